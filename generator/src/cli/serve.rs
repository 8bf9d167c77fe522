//! `microshield serve`: agents in, the ledger and a folder of policies out.

use std::{io, net::SocketAddr, path::PathBuf, pin::pin, time::Duration};

use anyhow::{Context as _, anyhow};
use flow::{
    logging::LogArgs,
    source::{Access, Options, Pace, Scope, Source},
    transport::{ServerFiles, TokenFile},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;

use super::{Failure, PolicyArgs, policy_args::duration, source::Kube};
use crate::{
    auth::{Account, Review, Rules},
    serve::{self, Bounds, Config, Limits, Publication, TopologyConfig},
};

/// Take flows from agents, keep the ledger, and keep a folder of policies up to date
// Who deploys it adds options to those of the manifests: the last one counts.
#[derive(Debug, clap::Args)]
#[command(
    args_override_self = true,
    mut_arg("namespaces", |arg| arg.overrides_with("all_namespaces"))
)]
pub(super) struct Args {
    /// Address and port on which agents connect
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "MICROSHIELD_LISTEN",
        default_value = "0.0.0.0:8765"
    )]
    listen: SocketAddr,

    /// Address on which /healthz, /readyz and /metrics are answered, to anybody who can reach it and without TLS
    #[arg(long, value_name = "ADDRESS:PORT", env = "MICROSHIELD_METRICS")]
    metrics: Option<SocketAddr>,

    /// Folder in which the ledger is kept; without it, a restart forgets everything
    #[arg(long, value_name = "DIR", env = "MICROSHIELD_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// Folder for the policies, kept up to date; what other hands put there stays
    ///
    /// Needs --data-dir: from a ledger that forgets, each restart would take away the rules for what is not seen again.
    #[arg(
        short,
        long,
        value_name = "FOLDER",
        env = "MICROSHIELD_OUTPUT",
        requires = "data_dir"
    )]
    output: Option<PathBuf>,

    /// Leave the policies as they are as long as the ledger says that observations were lost, by any agent or reason
    #[arg(long, env = "MICROSHIELD_STRICT", requires = "output")]
    strict: bool,

    #[command(flatten)]
    log: LogArgs,

    /// Where the cluster's objects come from, for agents with --resolve local: kube, the Kubernetes API [default: in
    /// a pod, without --token-audience]; file=PATH, a list as kubectl prints it, read again when it changes; or scope=URL, the
    /// report of Weave Scope's app (http://APP:4040/api/report), or scope=PATH, a file with one
    #[arg(long, value_name = "SRC", env = "MICROSHIELD_TOPOLOGY")]
    topology: Option<Source>,

    #[command(flatten)]
    kube: Kube,

    /// Certificate authorities that the certificate of Scope's app must come from [default: the system's]
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_SCOPE_CA")]
    scope_ca: Option<PathBuf>,

    /// Set in every pod
    #[arg(long, env = "KUBERNETES_SERVICE_HOST", hide = true)]
    in_cluster: Option<String>,

    /// Forget what was not seen for so long, such as 30d or 12h; without it, nothing is forgotten
    ///
    /// A rule goes with the last observation that asks for it. While no agent reports, nothing becomes older.
    #[arg(long, value_name = "TIME", env = "MICROSHIELD_RETAIN", value_parser = span)]
    retain: Option<Duration>,

    /// Memory that the ledger may take, about; what is new beyond it is counted as lost
    #[arg(long, value_name = "BYTES", env = "MICROSHIELD_LEDGER_BYTES", default_value_t = serve::MAX_LEDGER_BYTES)]
    ledger_bytes: usize,

    #[command(flatten)]
    auth: AuthArgs,

    #[command(flatten)]
    policy: PolicyArgs,
}

/// Who may report, and who may read
#[derive(Debug, clap::Args)]
struct AuthArgs {
    /// Agents show one of the tokens of this file, one a line; read again whenever it is needed
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_TOKEN_FILE")]
    token_file: Option<TokenFile>,

    /// Agents show their pod's service-account token, issued for this audience; the API server checks it, and an agent can
    /// report for its pod's node only
    #[arg(
        long,
        value_name = "AUDIENCE",
        env = "MICROSHIELD_TOKEN_AUDIENCE",
        requires = "agent_account"
    )]
    token_audience: Option<String>,

    /// The service account of the agents
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "MICROSHIELD_AGENT_ACCOUNT",
        requires = "token_audience"
    )]
    agent_account: Option<Account>,

    /// The service account of readers, who show a token of it for the same audience
    #[arg(
        long,
        value_name = "NAMESPACE/NAME",
        env = "MICROSHIELD_READER_ACCOUNT",
        requires = "token_audience"
    )]
    reader_account: Option<Account>,

    /// Readers show one of the tokens of this file
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_READ_TOKEN_FILE")]
    read_token_file: Option<TokenFile>,

    /// Certificate for TLS, with those between it and its authority; read again when it changes
    #[arg(
        long,
        value_name = "FILE",
        env = "MICROSHIELD_TLS_CERT",
        requires = "tls_key"
    )]
    tls_cert: Option<PathBuf>,

    /// Its key
    #[arg(
        long,
        value_name = "FILE",
        env = "MICROSHIELD_TLS_KEY",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,

    /// Agents and readers show a certificate of one of the authorities in this file
    #[arg(
        long,
        value_name = "FILE",
        env = "MICROSHIELD_CLIENT_CA",
        requires = "tls_cert"
    )]
    client_ca: Option<PathBuf>,

    /// Let anybody report who can reach the port
    #[arg(long, env = "MICROSHIELD_INSECURE")]
    insecure: bool,
}

impl AuthArgs {
    fn rules(self, access: Access) -> Rules {
        let review = |audience| {
            Some(Review {
                access,
                audience,
                agents: self.agent_account?,
                readers: self.reader_account,
            })
        };
        let tls = |cert| {
            Some(ServerFiles {
                cert,
                key: self.tls_key?,
                client_ca: self.client_ca,
            })
        };
        Rules {
            tokens: self.token_file,
            review: self.token_audience.and_then(review),
            read_tokens: self.read_token_file,
            tls: self.tls_cert.and_then(tls),
            insecure: self.insecure,
        }
    }
}

impl Args {
    fn topology(&self) -> Option<TopologyConfig> {
        // Who checks tokens has a way to the API, but need not have the right to read the cluster's objects.
        let checks_tokens = self.auth.token_audience.is_some();
        let default = self.in_cluster.as_ref().filter(|_| !checks_tokens);
        let default = default.map(|_| Source::Kube);
        Some(TopologyConfig {
            source: self
                .topology
                .clone()
                .or(default)?
                .scope_ca(self.scope_ca.as_deref()),
            options: Options {
                access: self.kube.access(),
                scope: Scope::Everything,
                // There is one generator.
                jitter: Duration::ZERO,
                pace: Pace::default(),
            },
            required: self.topology.is_some(),
        })
    }
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    let topology = args.topology();
    let access = args.kube.access();
    let rules = args.auth.rules(access);
    let publication = match (args.output, args.policy.options()) {
        (Some(folder), options) => Some(Publication {
            folder,
            options: options?,
            strict: args.strict,
        }),
        (None, Err(_)) => None,
        (None, Ok(_)) => {
            return Err(Failure::input(anyhow!(
                "whose policies to write is said, but not where: --output FOLDER is missing"
            )));
        }
    };
    let config = Config {
        listen: args.listen,
        metrics: args.metrics,
        rules,
        limits: Limits {
            bounds: Bounds {
                bytes: args.ledger_bytes,
                ..Bounds::default()
            },
            retain: args.retain,
        },
        data_dir: args.data_dir,
        topology,
        publication,
    };
    args.log.init(false);
    raise_file_limit();
    let runtime = tokio::runtime::Runtime::new()
        .context("cannot start the runtime")
        .map_err(Failure::other)?;
    let served = runtime.block_on(async {
        // Installed before anything is announced: whoever waits for `listening` may stop us right after it.
        let shutdown = shutdown_signal()
            .context("cannot listen for signals")
            .map_err(Failure::other)?;
        let mut shutdown = pin!(shutdown);
        let generator = tokio::select! {
            // What cannot even be started was asked for wrongly.
            started = serve::Generator::start(config) => started.map_err(Failure::input)?,
            // A large ledger takes its time to be loaded and shown, and nobody is served yet.
            () = &mut shutdown => return Ok(()),
        };
        generator.run(shutdown).await.map_err(Failure::other)
    });
    // The policy folder may still be written, and is whole at any time.
    runtime.shutdown_background();
    served
}

/// A span of time that is not empty.
fn span(text: &str) -> Result<Duration, &'static str> {
    duration(text)
        .filter(|span| !span.is_zero())
        .ok_or("expected a whole number of s, m, h, d or w, such as 30d")
}

/// Ready when the process is asked to end, by SIGTERM or Ctrl-C.
fn shutdown_signal() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Takes all the file descriptors that are allowed: each agent needs one, and the usual 1,024 are kept so low for the sake
/// of programs that use `select(2)`.
fn raise_file_limit() {
    let raise = || {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok::<_, nix::Error>(())
    };
    if let Err(error) = raise() {
        warn!(%error, "cannot raise the limit of open files, which limits the number of agents");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_of_time() {
        for (text, seconds) in [
            ("30d", 2_592_000),
            ("2w", 1_209_600),
            ("12h", 43_200),
            ("1s", 1),
        ] {
            assert_eq!(span(text), Ok(Duration::from_secs(seconds)));
        }
        for bad in [
            "",
            "d",
            "30",
            "0d",
            "-1d",
            "+1d",
            "1.5h",
            "99999999999999999999d",
            "213503982334602d",
        ] {
            assert!(span(bad).is_err(), "{bad}");
        }
    }
}
