//! Puts the parts together, and takes them apart again in reverse order.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use flow::{
    source::{Access, Options, Pace, ReportAt, Scope, Source, Topology, View},
    wire::Resolve,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};

use crate::{
    args::{self, Args},
    capabilities,
    capture::{self, Capture},
    collector::{Collector, Naming, Totals},
    hold::{self, Hold},
    identity::{Identity, Mounts, knows_the_node_s_ids},
    metrics::{Desk, Meter},
    plugin::{self, Plugin, recent::Recent},
    pulse::Pulse,
    resolve::Resolver,
    scope::{self, LogSource, ScopeLog},
    single::{LockError, SingleInstance},
    stdout,
    uplink::{self, GeneratorUrl, Leftover, Uplink, spool::Spool},
};

/// Drains that may wait for the uplink or standard output. They are taken up at once unless that reader hangs; then the
/// collector waits and the kernel's map goes on counting, so that nothing is lost until it is full.
const REPORTS: usize = 4;

/// Lists are asked for at a time drawn from this span: a DaemonSet's agents start together, and a thousand lists of all pods
/// at once would be a heavy load. What is captured meanwhile waits.
const JITTER: Duration = Duration::from_secs(5);

/// How long the end may take after a signal: the last drain and what the uplink takes to say goodbye, and as long again for a
/// busy node. Only what hangs takes longer.
const PARTING: Duration = Duration::from_secs(10);

/// A new pod is in Scope's report when its probe has reported, every three seconds, and we see it when we ask next.
const SCOPE_PATIENCE: Duration = Duration::from_secs(15);

/// The file in the spool's folder that says how far the log of the Scope probe was read.
const POSITION: &str = "scope-position";

/// What ended the run without success, and the exit code for it.
#[derive(Debug)]
pub struct Failure {
    /// 2 for wrong usage or input, 1 for everything else.
    pub code: u8,
    /// Why.
    pub error: anyhow::Error,
}

impl Failure {
    fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: 2,
            error: error.into(),
        }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            code: 1,
            error: error.into(),
        }
    }
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
/// If it cannot start, or capturing fails.
pub async fn run(args: Args) -> Result<(), Failure> {
    if !capture::is_built() {
        return Err(Failure::usage(anyhow!(
            "this agent was built without its kernel programs: run `cargo xtask build-ebpf`, then build it again"
        )));
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;

    let node = match args.node_name.clone() {
        Some(name) => name,
        None => host_name()?.parse().map_err(|error| {
            Failure::usage(anyhow!(
                "the host's name is no node's name ({error}): give --node-name"
            ))
        })?,
    };
    let node = node.to_string();
    let resolve = Resolve::from(args.resolve);
    if resolve == Resolve::Local && args.output.stdout {
        return Err(Failure::usage(anyhow!(
            "--resolve local leaves names to the generator: it needs --generator"
        )));
    }
    check_credentials(&args.stream, &args.output)?;
    let spool = match args.output.stdout {
        true => None,
        false => open_spool(&args.stream, resolve)?,
    };
    let meter = Meter::default();
    let scope_log = open_scope_log(&args, &meter)?;
    let topology = topology(&args.topology, &node, resolve).await?;
    let mounts = Mounts::read();
    let hybrid = mounts.as_ref().is_ok_and(|mounts| mounts.hybrid);
    let alone = args.cgroup_root.is_none();
    let cgroup_root: PathBuf = match args.cgroup_root {
        Some(root) => root,
        None => mounts.map_err(Failure::usage)?.root,
    };
    let _lock = SingleInstance::lock(&cgroup_root).map_err(|error| match error {
        LockError::Taken(_) => Failure::from(error),
        LockError::Io { .. } => Failure::usage(error),
    })?;

    capabilities::check()?;
    let capture = Capture::start(&capture::Options {
        hooks: args.hooks,
        mode: args.mode,
        map_entries: args.map_entries,
        ring_bytes: args.ring_bytes,
        cgroup: cgroup_root.clone(),
    })
    .map_err(name_who_refuses)?;
    tracing::info!(node, hooks = %capture.hooks(), udp = capture.sees_packets(), cgroup_root = %cgroup_root.display(), "capturing");

    let capabilities = capabilities_of(&capture, args.mode);
    let view = topology.view();
    let pulse = Pulse::default();
    let desk = match args.metrics {
        Some(address) => {
            let desk = Desk::open(address, meter.clone(), view.clone(), pulse.clone()).await;
            let desk = desk.with_context(|| format!("cannot listen on {address}"));
            Some(tokio::spawn(desk.map_err(Failure::usage)?.run()))
        }
        None => None,
    };
    let node_check = tokio::spawn(check_node(view.clone(), node.clone()));
    let naming = Naming::new(
        Identity::new(cgroup_root, hybrid, knows_the_node_s_ids()),
        Resolver::new(node.clone(), resolve, alone),
        view.clone(),
        // The position of the log goes on with what was handed over, so that has to be in order.
        Hold::new(patience(&args.topology, resolve), resolve).in_order(scope_log.is_some()),
    );
    let plugin = open_plugin(&args.to_scope, &node)?;
    let (sender, reports) = mpsc::channel(REPORTS);
    let (reports, plugin) = match plugin {
        None => (reports, None),
        Some((plugin, recent)) => {
            let (onward, tapped) = mpsc::channel(REPORTS);
            tokio::spawn(plugin::tap(reports, onward, recent));
            (tapped, Some(tokio::spawn(plugin.run())))
        }
    };
    let collector = Collector::start(capture, naming, scope_log, sender, pulse)?;
    let output = match args.output.stdout {
        // On a thread of its own: whoever reads standard output may take any time.
        true => tokio::task::spawn_blocking(move || {
            stdout::print(reports, &node, &meter).map(|()| Leftover::default())
        }),
        false => {
            let config = uplink::Config {
                urls: args.output.generator,
                node,
                resolve,
                capabilities,
                view: Some(view.clone()),
                encoding: args.stream.wire.into(),
                credentials: args.stream.credentials(),
            };
            let uplink = Uplink::new(config, spool, reports, meter);
            on_its_own(uplink.run())?
        }
    };

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = ended(&collector) => {}
    }
    node_check.abort();
    if let Some(plugin) = plugin {
        plugin.abort();
        // Then its socket is gone.
        plugin.await.ok();
    }
    let mut totals = None;
    let parting = async {
        let stopped = tokio::task::spawn_blocking(move || collector.stop());
        totals = Some(stopped.await.context("the collector")?);
        // Whatever became of capturing, what was captured is delivered first.
        let undelivered = output.await.context("the output")?;
        undelivered.context("standard output")
    };
    let undelivered = tokio::select! {
        parted = timeout(PARTING, parting) => parted.unwrap_or_else(|_elapsed| {
            Err(anyhow!("nobody reads standard output, or the spool's disk does not answer: what was captured last is lost"))
        }),
        again = signalled_again() => Err(match again {
            Ok(()) => anyhow!("ended by a second signal: what was captured last is lost"),
            Err(error) => error.into(),
        }),
    };
    if let Some(desk) = desk {
        desk.abort();
    }
    // What ended capturing comes before what became of the rest.
    let totals = totals.transpose()?;
    let undelivered = undelivered?;
    if let Some(totals) = totals {
        log_totals(&totals, undelivered);
    }
    Ok(())
}

/// Waits for a signal that is more than the echo of the first: some supervisors send two at once.
async fn signalled_again() -> io::Result<()> {
    sleep(Duration::from_secs(1)).await;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Runs the uplink on a thread of its own: the spool's disk may take any time, and whoever asks for health or tells of pods
/// does not wait for it.
fn on_its_own(
    uplink: impl Future<Output = Leftover> + Send + 'static,
) -> io::Result<JoinHandle<io::Result<Leftover>>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(tokio::task::spawn_blocking(move || {
        let left = runtime.block_on(uplink);
        // A name that is being looked up keeps its thread for as long as no server answers.
        runtime.shutdown_background();
        Ok(left)
    }))
}

/// What is captured and how, for the generator.
fn capabilities_of(capture: &Capture, mode: capture::Mode) -> Vec<String> {
    let mut capabilities = vec!["tcp".to_owned(), capture.hooks().to_string()];
    if capture.sees_packets() {
        capabilities.push("udp".to_owned());
    }
    if mode == capture::Mode::Connections {
        capabilities.push("connections".to_owned());
    }
    capabilities
}

fn open_plugin(args: &args::ToScope, node: &str) -> Result<Option<(Plugin, Arc<Recent>)>, Failure> {
    let Some(socket) = &args.scope_plugin else {
        return Ok(None);
    };
    let host = args.scope_host.clone().unwrap_or_else(|| node.to_owned());
    let recent = Arc::new(Recent::default());
    let plugin = Plugin::open(socket, host, Arc::clone(&recent)).map_err(Failure::usage)?;
    Ok(Some((plugin, recent)))
}

/// Files that are not there now are a mistake on the command line; later on, they are waited for.
fn check_credentials(stream: &args::Stream, output: &args::Output) -> Result<(), Failure> {
    let credentials = stream.credentials();
    if let Some(token) = &credentials.token {
        token.read().map_err(Failure::usage)?;
    }
    let encrypted = output.generator.iter().any(GeneratorUrl::is_encrypted);
    if encrypted {
        credentials.tls.config().map_err(Failure::usage)?;
    }
    if credentials.token.is_some() && !output.generator.iter().all(GeneratorUrl::is_encrypted) {
        tracing::warn!("the token is sent over connections that are not encrypted: use wss://");
    }
    Ok(())
}

/// The capabilities are there by now: what is not permitted all the same is forbidden by somebody else.
fn name_who_refuses(error: capture::Error) -> anyhow::Error {
    let error = anyhow::Error::from(error);
    let refused = error.chain().any(|cause| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
    });
    match refused {
        true => error.context(
            "the capabilities are there, and something else forbids it: a seccomp profile that keeps bpf(2) or \
             perf_event_open(2) for CAP_SYS_ADMIN (CRI-O's default does), SELinux, or lockdown",
        ),
        false => error,
    }
}

fn open_spool(args: &args::Stream, resolve: Resolve) -> Result<Option<Spool>, Failure> {
    let Some(folder) = &args.spool else {
        return Ok(None);
    };
    let spool = Spool::open(folder, args.spool_bytes, resolve).map_err(Failure::usage)?;
    tracing::info!(
        folder = %folder.display(),
        batches = spool.batches(),
        bytes = spool.bytes(),
        "spool"
    );
    Ok(Some(spool))
}

fn open_scope_log(args: &Args, meter: &Meter) -> Result<Option<ScopeLog>, Failure> {
    let sources = args.scope.log.clone();
    if sources.is_empty() {
        return Ok(None);
    }
    let in_spool = || Some(args.stream.spool.as_ref()?.join(POSITION));
    let position = args.scope.position.clone().or_else(in_spool);
    let are_files = sources.iter().any(|source| *source != LogSource::Stdin);
    if position.is_none() && are_files && !args.output.stdout {
        return Err(Failure::usage(anyhow!(
            "--scope-log needs --spool or --scope-position: an agent that starts again would report the log a second time"
        )));
    }
    let config = scope::Config { sources, position };
    let log = ScopeLog::open(&config, meter.scope.clone()).map_err(Failure::usage)?;
    Ok(Some(log))
}

async fn topology(
    args: &args::Topology,
    node: &str,
    resolve: Resolve,
) -> Result<Topology, Failure> {
    let options = Options {
        access: Access {
            kubeconfig: args.kubeconfig.clone(),
            context: args.context.clone(),
        },
        scope: match resolve {
            Resolve::Both => Scope::BothEnds,
            Resolve::Local => Scope::OneNode(node.to_owned()),
        },
        jitter: JITTER,
        pace: Pace::default(),
    };
    Topology::start(&args.source(), options)
        .await
        .map_err(Failure::usage)
}

/// A file is as it is: waiting makes nothing better, unless the generator is who learns of pods.
fn patience(args: &args::Topology, resolve: Resolve) -> Duration {
    match (args.source(), resolve) {
        (Source::File(_) | Source::Scope(ReportAt::File(_)), Resolve::Both) => Duration::ZERO,
        (Source::Scope(ReportAt::App(_)), _) => SCOPE_PATIENCE,
        (Source::Kube, _) | (_, Resolve::Local) => hold::PATIENCE,
    }
}

/// Says so if the cluster, once it is known, has no node of this name.
async fn check_node(mut view: View, node: String) {
    view.ready().await;
    let knows_it = view.index().node(&node).is_some();
    if !knows_it {
        tracing::warn!(
            node,
            "the topology has no node of this name: give --node-name"
        );
    }
}

fn log_totals(totals: &Totals, left: Leftover) {
    // As JSON, so that an empty set reads `{}`.
    let losses = serde_json::to_string(&totals.losses).unwrap_or_default();
    tracing::info!(
        connections = totals.connections,
        loopback = totals.loopback,
        other_node = totals.other_node,
        no_port = totals.no_port,
        undelivered = left.lost,
        spooled_batches = left.spooled,
        %losses,
        "capture ended"
    );
    if left.lost > 0 {
        tracing::error!(
            connections = left.lost,
            "the generator did not take everything: these connections are lost"
        );
    }
}

/// Returns when the collector has ended by itself.
async fn ended(collector: &Collector) {
    while !collector.is_finished() {
        sleep(Duration::from_millis(200)).await;
    }
}

/// The host's name, as kubelet registers its node by default.
fn host_name() -> anyhow::Result<String> {
    let name = nix::unistd::gethostname().context("cannot read the host's name")?;
    Ok(name.to_string_lossy().trim().to_lowercase())
}
