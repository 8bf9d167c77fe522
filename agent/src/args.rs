//! The command line.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use clap::{Parser, Subcommand, ValueEnum, builder::BoolishValueParser};
use flow::{
    logging::LogArgs,
    source::Source,
    transport::{ClientFiles, TokenFile},
    wire,
};

use crate::{
    capture::{Hooks, Mode},
    plugin::PluginSocket,
    scope::LogSource,
    uplink::{Credentials, GeneratorUrl, spool::MIN_SPOOL_BYTES},
};

const MAP_ENTRIES: u32 = 65_536;

const RING_BYTES: &str = "1048576";

/// Watches which pods of this node talk to which, and reports it.
///
/// Needs CAP_BPF and CAP_PERFMON, CAP_NET_ADMIN for UDP and SCTP and CAP_SYS_PTRACE for what is older than it (root has all of them),
/// and a Linux kernel from 5.10 on.
#[derive(Debug, Parser)]
#[command(
    name = "microshield-agent",
    version,
    args_conflicts_with_subcommands = true,
    // Who deploys it adds options to those of the manifests: the last one counts.
    args_override_self = true,
    subcommand_negates_reqs = true
)]
pub struct Args {
    /// What to do instead of watching.
    #[command(subcommand)]
    pub word: Option<Word>,

    /// Where flow records go.
    #[command(flatten)]
    pub output: Output,

    /// How they get there.
    #[command(flatten)]
    pub stream: Stream,

    /// The name of this node in the cluster [default: the host's name].
    #[arg(long, env = "MICROSHIELD_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<NodeName>,

    /// Where the cluster's objects come from.
    #[command(flatten)]
    pub topology: Topology,

    /// The Scope probe beside the agent.
    #[command(flatten)]
    pub scope: Scope,

    /// Which ends of a flow the agent names. With local it watches no more than its own node and the pods on it, and the
    /// generator (which then needs --topology) names the other end: less memory a node, less work for the API server.
    #[arg(long, env = "MICROSHIELD_RESOLVE", value_enum, default_value_t = Resolve::Both)]
    pub resolve: Resolve,

    /// The folder of the cgroup v2 hierarchy whose processes are this node's [default: where cgroup2 is mounted].
    #[arg(long, env = "MICROSHIELD_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,

    /// Whether connections are counted by flow, or each is reported when it is made and when it ends, with both ports, duration
    /// and bytes, which is for --stdout: a generator counts them by flow all the same. More of them than the ring buffer takes in
    /// 50 ms are counted by flow.
    #[arg(long, env = "MICROSHIELD_MODE", value_enum, default_value_t = Mode::Flows)]
    pub mode: Mode,

    /// Form of the kernel hooks [default: btf where the kernel has it].
    #[arg(long, env = "MICROSHIELD_HOOKS", value_enum)]
    pub hooks: Option<Hooks>,

    /// Distinct flows that the kernel holds between two drains; those that exceed it go through a ring buffer. There is room for
    /// four times as many peers of UDP sockets, and for a quarter as many listeners and SCTP calls.
    #[arg(long, env = "MICROSHIELD_MAP_ENTRIES", value_name = "N", default_value_t = MAP_ENTRIES, value_parser = clap::value_parser!(u32).range(1..=4_194_304))]
    pub map_entries: u32,

    /// Size of that ring buffer in bytes, and of the one for single connections; a power of two of at least 4096.
    #[arg(long, env = "MICROSHIELD_RING_BYTES", value_name = "BYTES", default_value = RING_BYTES, value_parser = ring_bytes)]
    pub ring_bytes: u32,

    /// Address on which /healthz, /readyz and /metrics are answered, to anybody who can reach it.
    #[arg(long, env = "MICROSHIELD_METRICS", value_name = "ADDRESS:PORT")]
    pub metrics: Option<SocketAddr>,

    /// What Weave Scope is given.
    #[command(flatten)]
    pub to_scope: ToScope,

    /// What it says of itself.
    #[command(flatten)]
    pub log: LogArgs,
}

/// What the agent does instead of watching.
#[derive(Debug, Subcommand)]
pub enum Word {
    /// Say what this node supports: kernel, cgroups, capabilities, hooks. Exit code 1 if nothing can be captured.
    ///
    /// The kernel programs are loaded and attached for a moment. An agent that runs on the node is not disturbed.
    Check(CheckArgs),
}

/// How to check.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// Print JSON.
    #[arg(long, env = "MICROSHIELD_CHECK_JSON", value_parser = BoolishValueParser::new())]
    pub json: bool,

    /// As for watching.
    #[arg(long, env = "MICROSHIELD_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,

    /// As for watching.
    #[arg(long, env = "MICROSHIELD_MAP_ENTRIES", value_name = "N", default_value_t = MAP_ENTRIES, value_parser = clap::value_parser!(u32).range(1..=4_194_304))]
    pub map_entries: u32,

    /// As for watching.
    #[arg(long, env = "MICROSHIELD_RING_BYTES", value_name = "BYTES", default_value = RING_BYTES, value_parser = ring_bytes)]
    pub ring_bytes: u32,
}

/// The name of a node: a DNS subdomain (RFC 1123).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeName(String);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for NodeName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let within = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let valid = (1..=253).contains(&text.len())
            && text.split('.').all(|label| {
                let bytes = label.as_bytes();
                bytes.first().is_some_and(|&first| within(first))
                    && bytes.last().is_some_and(|&last| within(last))
                    && bytes.iter().all(|&byte| within(byte) || byte == b'-')
            });
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err("expected at most 253 lower-case letters, digits, `-` and `.`")
        }
    }
}

/// Where flow records go.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Output {
    /// Print flow records as JSON lines.
    #[arg(long, env = "MICROSHIELD_STDOUT", value_parser = BoolishValueParser::new())]
    pub stdout: bool,

    /// Stream them to the generator, e.g. ws://generator:8765/agents. Of several addresses the next is tried when one does
    /// not answer.
    #[arg(
        long,
        env = "MICROSHIELD_GENERATOR",
        value_name = "URL",
        value_delimiter = ','
    )]
    pub generator: Vec<GeneratorUrl>,
}

/// The Scope probe on this node.
#[derive(Debug, clap::Args)]
pub struct Scope {
    /// The log of the modified Weave Scope probe on this node, to be merged with what the agent sees: a path, a pattern such as
    /// /var/log/pods/weave_weave-scope-agent-*/*/*.log, or - for standard input. May be given more than once. It is followed
    /// through rotation, as containerd, CRI-O or Docker write it, or plain.
    #[arg(
        id = "scope_log",
        long = "scope-log",
        env = "MICROSHIELD_SCOPE_LOG",
        value_name = "PATH|GLOB",
        value_delimiter = ','
    )]
    pub log: Vec<LogSource>,

    /// File that says how far the log was read, so that a restart neither repeats nor skips [default: scope-position in the
    /// folder of --spool].
    #[arg(
        id = "scope_position",
        long = "scope-position",
        env = "MICROSHIELD_SCOPE_POSITION",
        value_name = "FILE",
        requires = "scope_log"
    )]
    pub position: Option<PathBuf>,
}

/// The stream to the generator.
#[derive(Debug, clap::Args)]
pub struct Stream {
    /// Folder in which flows are kept until the generator has stored them, over restarts of the agent too [default: in
    /// memory, and those that are not delivered in the end are lost].
    #[arg(long, env = "MICROSHIELD_SPOOL", value_name = "DIR")]
    pub spool: Option<PathBuf>,

    /// The most that the spool may take. When it is full the oldest flows are added up, and if that is not enough they go.
    #[arg(long, env = "MICROSHIELD_SPOOL_BYTES", value_name = "BYTES", default_value_t = 256 << 20, value_parser = clap::value_parser!(u64).range(MIN_SPOOL_BYTES..))]
    pub spool_bytes: u64,

    /// Bearer token to show, the first line of this file; read again for each connection.
    #[arg(long, env = "MICROSHIELD_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<TokenFile>,

    /// Certificate authorities that the generator's certificate must come from [default: the system's].
    #[arg(long, env = "MICROSHIELD_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// Certificate to show to a generator that asks for one; read again for each connection.
    #[arg(
        long,
        env = "MICROSHIELD_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,

    /// Its key.
    #[arg(
        long,
        env = "MICROSHIELD_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,

    /// How messages to the generator are encoded; json is for looking at.
    #[arg(long, env = "MICROSHIELD_WIRE", value_enum, default_value_t = Wire::Msgpack)]
    pub wire: Wire,
}

impl Stream {
    /// What the generator is shown, and must show.
    #[must_use]
    pub fn credentials(&self) -> Credentials {
        Credentials {
            token: self.token_file.clone(),
            tls: ClientFiles {
                ca: self.ca.clone(),
                identity: self.tls_cert.clone().zip(self.tls_key.clone()),
            },
        }
    }
}

/// How messages are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wire {
    /// MessagePack.
    Msgpack,
    /// JSON.
    Json,
}

impl From<Wire> for wire::Encoding {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::Msgpack => Self::MessagePack,
            Wire::Json => Self::Json,
        }
    }
}

/// Where the cluster's objects come from.
#[derive(Debug, clap::Args)]
pub struct Topology {
    /// Where the cluster's objects come from: kube, the Kubernetes API [default: in a pod]; file=PATH, a list as `kubectl
    /// get namespaces,pods,services,endpointslices,nodes -A -o yaml` prints it (YAML or JSON), read again when it changes;
    /// or scope=URL, the report of Weave Scope's app (http://APP:4040/api/report), or scope=PATH, a file with one.
    #[arg(
        long = "topology",
        env = "MICROSHIELD_TOPOLOGY",
        value_name = "SRC",
        required_unless_present = "in_cluster"
    )]
    source: Option<Source>,

    /// How to reach the Kubernetes API [default: $KUBECONFIG, ~/.kube/config, else the pod's own account].
    #[arg(long, env = "MICROSHIELD_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// The context of the kubeconfig to use, instead of its current one.
    #[arg(long, env = "MICROSHIELD_CONTEXT", value_name = "NAME")]
    pub context: Option<String>,

    /// Certificate authorities that the certificate of Scope's app must come from [default: the system's].
    #[arg(long, env = "MICROSHIELD_SCOPE_CA", value_name = "FILE")]
    scope_ca: Option<PathBuf>,

    /// Set in every pod.
    #[arg(long, env = "KUBERNETES_SERVICE_HOST", hide = true)]
    in_cluster: Option<String>,
}

impl Topology {
    /// The source that was asked for, or else the default.
    #[must_use]
    pub fn source(&self) -> Source {
        let source = self.source.clone().unwrap_or(Source::Kube);
        source.scope_ca(self.scope_ca.as_deref())
    }
}

/// What Weave Scope is given.
#[derive(Debug, clap::Args)]
pub struct ToScope {
    /// Serve Scope's plugin protocol on this Unix socket, e.g. /var/run/scope/plugins/microshield/microshield.sock: Scope then
    /// draws the connections of the last half minute that only the agent sees.
    #[arg(long, env = "MICROSHIELD_SCOPE_PLUGIN", value_name = "SOCKET")]
    pub scope_plugin: Option<PluginSocket>,

    /// The name that Scope has for this host: its probe's host name [default: the node's name].
    #[arg(
        long,
        env = "MICROSHIELD_SCOPE_HOST",
        value_name = "NAME",
        requires = "scope_plugin",
        value_parser = scope_host
    )]
    pub scope_host: Option<String>,
}

/// Which ends of a flow the agent names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Resolve {
    /// Both.
    Both,
    /// The end on this node.
    Local,
}

impl From<Resolve> for wire::Resolve {
    fn from(resolve: Resolve) -> Self {
        match resolve {
            Resolve::Both => Self::Both,
            Resolve::Local => Self::Local,
        }
    }
}

/// Scope's ids are separated by `;`.
fn scope_host(text: &str) -> Result<String, &'static str> {
    let is_name = |text: &str| {
        !text.is_empty() && text.len() <= 255 && text.bytes().all(|byte| byte.is_ascii_graphic())
    };
    match is_name(text) && !text.contains(';') {
        true => Ok(text.to_owned()),
        false => Err("expected a host's name"),
    }
}

fn ring_bytes(text: &str) -> Result<u32, String> {
    let bytes: u32 = text.parse().map_err(|error| format!("{error}"))?;
    if !bytes.is_power_of_two() || bytes < 4096 {
        return Err("must be a power of two of at least 4096".to_owned());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Args::command().debug_assert();
    }

    #[test]
    fn node_names() {
        for good in ["node-1", "ip-10-0-0-1.eu-west-1.compute.internal", "1"] {
            assert!(good.parse::<NodeName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "Node",
            "-a",
            "a-",
            "a..b",
            "a_b",
            "a/b",
            &"a".repeat(254),
        ] {
            assert!(bad.parse::<NodeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn scopes_host_is_a_part_of_ids() {
        assert_eq!(scope_host("Vm-1.example").as_deref(), Ok("Vm-1.example"));
        for bad in ["", "a;b", "a b", &"a".repeat(256)] {
            assert!(scope_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn logs_are_paths_and_patterns() {
        let base = ["--stdout", "--topology", "file=x"];
        let logs = |log: &str| {
            let args = parse(&[&base[..], &["--scope-log", log]].concat())?;
            Ok::<_, clap::Error>(args.scope.log)
        };
        let files = |pattern: &str| LogSource::Files(pattern.to_owned());
        assert_eq!(
            logs("/a/*.log,-").unwrap(),
            [files("/a/*.log"), LogSource::Stdin]
        );
        assert!(logs("/a/[").is_err());
        assert!(parse(&[&base[..], &["--scope-position", "x"]].concat()).is_err());
    }

    fn parse(arguments: &[&str]) -> Result<Args, clap::Error> {
        Args::try_parse_from(["agent"].iter().chain(arguments))
    }

    #[test]
    fn checking_needs_nothing_of_what_watching_needs() {
        let args = parse(&["check", "--json"]).unwrap();
        let Some(Word::Check(check)) = args.word else {
            panic!("{args:?}");
        };
        assert!(check.json && check.map_entries == MAP_ENTRIES);
        assert!(parse(&["--stdout", "check"]).is_err());
    }

    #[test]
    fn in_a_pod_the_api_is_the_default() {
        let outside = parse(&["--stdout"]);
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
            assert!(outside.unwrap_err().to_string().contains("--topology"));
        }
        let inside = parse(&["--stdout", "--in-cluster", "10.96.0.1"]).unwrap();
        assert_eq!(inside.topology.source(), Source::Kube);
        let told = parse(&["--stdout", "--in-cluster", "x", "--topology", "file=x"]).unwrap();
        assert_eq!(told.topology.source(), Source::File("x".into()));
    }
}
