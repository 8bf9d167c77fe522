//! `microshield serve`: agents in, the ledger and a folder of policies out.

use std::{
    io::{self, IsTerminal as _},
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use flow::source::{Access, Options, Pace, Scope, Source};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing::warn;
use tracing_subscriber::EnvFilter;

use super::{Failure, PolicyArgs};
use crate::serve::{self, Config, Publication, TopologyConfig};

/// Take flows from agents, keep the ledger, and keep a folder of policies up to date
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Address and port on which agents connect
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "MICROSHIELD_LISTEN",
        default_value = "0.0.0.0:8765"
    )]
    listen: SocketAddr,

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

    /// Write no policies as long as the ledger says that observations were lost, by any agent or reason
    #[arg(long, env = "MICROSHIELD_STRICT", requires = "output")]
    strict: bool,

    /// What to log: error, warn, info, debug or trace, also by module
    ///
    /// The HTTP client's own words are left out by default: what comes of its failures is said where they are dealt with.
    #[arg(
        long,
        value_name = "FILTER",
        env = "MICROSHIELD_LOG",
        default_value = "info,kube_client=off"
    )]
    log: String,

    /// Where the cluster's objects come from, for agents with --resolve local: kube, the Kubernetes API [default: in a pod],
    /// or file=PATH, a list as kubectl prints it, read again when it changes
    #[arg(long, value_name = "SRC", env = "MICROSHIELD_TOPOLOGY")]
    topology: Option<Source>,

    /// How to reach the Kubernetes API [default: $KUBECONFIG, ~/.kube/config, else the pod's own account]
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,

    /// The context of the kubeconfig to use, instead of its current one
    #[arg(long, value_name = "NAME", env = "MICROSHIELD_CONTEXT")]
    context: Option<String>,

    /// Set in every pod
    #[arg(long, env = "KUBERNETES_SERVICE_HOST", hide = true)]
    in_cluster: Option<String>,

    #[command(flatten)]
    policy: PolicyArgs,
}

impl Args {
    fn topology(&self) -> Option<TopologyConfig> {
        let default = self.in_cluster.as_ref().map(|_| Source::Kube);
        Some(TopologyConfig {
            source: self.topology.clone().or(default)?,
            options: Options {
                access: Access {
                    kubeconfig: self.kubeconfig.clone(),
                    context: self.context.clone(),
                },
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
        data_dir: args.data_dir,
        topology,
        publication,
    };
    log_to_stderr(&args.log)?;
    raise_file_limit();
    let runtime = tokio::runtime::Runtime::new()
        .context("cannot start the runtime")
        .map_err(Failure::other)?;
    runtime.block_on(async {
        // Installed before anything is announced: whoever waits for `listening` may stop us right after it.
        let shutdown = shutdown_signal()
            .context("cannot listen for signals")
            .map_err(Failure::other)?;
        // What cannot even be started was asked for wrongly.
        let generator = serve::Generator::start(config)
            .await
            .map_err(Failure::input)?;
        generator.run(shutdown).await.map_err(Failure::other)
    })
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

fn log_to_stderr(filter: &str) -> Result<(), Failure> {
    let filter = EnvFilter::builder()
        .parse(filter)
        .with_context(|| format!("--log {filter}"))
        .map_err(Failure::input)?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}
