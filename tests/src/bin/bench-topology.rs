//! `cargo xtask bench topology`: what it takes to know a cluster of some size, on this machine.
//!
//! A small API server (see `lab::apiserver`) serves a made-up cluster; the same program, started a second time so that its
//! memory is its own, listens to it as the generator does. Everything is asked for over real HTTP, and each pod is as
//! long as a real one.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    env, fs,
    hint::black_box,
    io::{self, BufRead as _, BufReader, Write as _},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use flow::{
    endpoint::Endpoint,
    record::Protocol,
    source::{Access, Options, Pace, Scope, Source, Topology, View},
    time::Timestamp,
};
use lab::apiserver::ApiServer;
use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How long each kind of lookup is repeated.
const LOOKUPS: Duration = Duration::from_secs(2);

/// Measures what it takes to know a cluster.
#[derive(Parser)]
struct Cli {
    /// Sizes of clusters, in pods; there is a service to 20 pods and a node to 100.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 100_000])]
    pods: Vec<usize>,
    /// Changes of pods a second while watching.
    #[arg(long, default_value_t = 50)]
    changes: u32,
    /// Seconds of watching.
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Subcommand)]
enum Part {
    /// The part of the program that listens.
    #[command(hide = true)]
    Listen { kubeconfig: PathBuf, pods: usize },
}

/// What the listener found.
#[derive(Debug, Deserialize, Serialize)]
struct Known {
    seconds_to_ready: f64,
    resident_kib_before: u64,
    resident_kib: u64,
    peak_kib: u64,
    client_lookups_per_second: f64,
    service_lookups_per_second: f64,
    hash_map_lookups_per_second: f64,
}

/// One size of cluster.
#[derive(Debug, Serialize)]
struct Row {
    pods: usize,
    #[serde(flatten)]
    known: Known,
    bytes_per_pod: f64,
    list_bytes_per_pod: f64,
    watched_bytes_per_second: f64,
    cpu_seconds_per_second_of_watching: f64,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.part {
        Some(Part::Listen { kubeconfig, pods }) => listen(kubeconfig, *pods),
        None => compare(&cli),
    };
    lab::exit_code("bench topology", result)
}

fn compare(cli: &Cli) -> Result<()> {
    let mut rows = Vec::new();
    for pods in &cli.pods {
        eprintln!("{pods} pods …");
        rows.push(measure(cli, *pods)?);
    }
    let mut out = io::stdout().lock();
    if cli.json {
        serde_json::to_writer_pretty(&mut out, &rows)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "{:>8} {:>9} {:>8} {:>8} {:>8} {:>11} {:>11} {:>11} {:>10} {:>6}",
        "pods",
        "ready s",
        "RSS MiB",
        "peak MiB",
        "B/pod",
        "clients/s",
        "services/s",
        "hash map/s",
        "watch B/s",
        "CPU %"
    )?;
    for row in &rows {
        let known = &row.known;
        writeln!(
            out,
            "{:>8} {:>9.2} {:>8.1} {:>8.1} {:>8.0} {:>11.0} {:>11.0} {:>11.0} {:>10.0} {:>6.2}",
            row.pods,
            known.seconds_to_ready,
            known.resident_kib as f64 / 1_024.0,
            known.peak_kib as f64 / 1_024.0,
            row.bytes_per_pod,
            known.client_lookups_per_second,
            known.service_lookups_per_second,
            known.hash_map_lookups_per_second,
            row.watched_bytes_per_second,
            row.cpu_seconds_per_second_of_watching * 100.0,
        )?;
    }
    writeln!(
        out,
        "B/pod is what resident memory grew by; wanted: less than 1024. Lookups are one core's; wanted: more than 2 million."
    )?;
    Ok(())
}

fn measure(cli: &Cli, pods: usize) -> Result<Row> {
    let runtime = tokio::runtime::Runtime::new()?;
    let _entered = runtime.enter();
    let server = runtime.block_on(ApiServer::start())?;
    let list_bytes = fill(&server, pods);
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig, None)?;

    let mut child = Command::new(env::current_exe()?)
        .arg("listen")
        .arg(&kubeconfig)
        .arg(pods.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    let known: Known = serde_json::from_str(&line).with_context(|| format!("said `{line}`"))?;

    let (bytes, cpu) = (server.bytes_watched(), cpu_seconds(&child)?);
    let start = Instant::now();
    for change in 0..cli.changes * cli.seconds {
        let mut pod = pod(change as usize * 7_919 % pods);
        pod["status"]["conditions"] =
            json!([{"type": "Ready", "status": "True", "lastProbeTime": change}]);
        server.put("pods", pod);
        let next = Duration::from_secs(1) * (change + 1) / cli.changes;
        std::thread::sleep(next.saturating_sub(start.elapsed()));
    }
    let watched = start.elapsed().as_secs_f64();
    let row = Row {
        pods,
        bytes_per_pod: known.resident_kib.saturating_sub(known.resident_kib_before) as f64
            * 1_024.0
            / pods as f64,
        known,
        list_bytes_per_pod: list_bytes as f64 / pods as f64,
        watched_bytes_per_second: (server.bytes_watched() - bytes) as f64 / watched,
        cpu_seconds_per_second_of_watching: (cpu_seconds(&child)? - cpu) / watched,
    };
    // The end of its input is what it waits for.
    drop(child.stdin.take());
    child.wait()?;
    Ok(row)
}

/// The listener.
fn listen(kubeconfig: &Path, pods: usize) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let resident_kib_before = status_kib("VmRSS:")?;
        let start = Instant::now();
        let options = Options {
            access: Access {
                kubeconfig: Some(kubeconfig.to_owned()),
                context: None,
            },
            scope: Scope::Everything,
            jitter: Duration::ZERO,
            pace: Pace::default(),
        };
        let topology = Topology::start(&Source::Kube, options).await?;
        let mut view = topology.view().clone();
        view.ready().await;
        let seconds_to_ready = start.elapsed().as_secs_f64();
        // The memory of what is known, not of what reading took for a moment.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (resident_kib, peak_kib) = (status_kib("VmRSS:")?, status_kib("VmHWM:")?);
        let found = view.index().counts();
        if found.pods != pods {
            bail!("{} pods are known instead of {pods}", found.pods);
        }
        let known = Known {
            seconds_to_ready,
            resident_kib_before,
            resident_kib,
            peak_kib,
            client_lookups_per_second: client_lookups(&view, pods),
            service_lookups_per_second: service_lookups(&view, pods),
            hash_map_lookups_per_second: hash_map_lookups(&view, pods),
        };
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &known)?;
        writeln!(out)?;
        out.flush()?;
        let until_told = || io::stdin().read_line(&mut String::new());
        tokio::task::spawn_blocking(until_told).await??;
        Ok(())
    })
}

fn client_lookups(view: &View, pods: usize) -> f64 {
    let addresses: Vec<IpAddr> = shuffled(pods).into_iter().map(pod_address).collect();
    let (index, now) = (view.index(), Timestamp::from(SystemTime::now()));
    rate(&addresses, |address| {
        black_box(index.resolve_client(*address, now));
    })
}

fn service_lookups(view: &View, pods: usize) -> f64 {
    let services = (pods / 20).max(1);
    let addresses: Vec<IpAddr> = shuffled(services)
        .into_iter()
        .map(service_address)
        .collect();
    let (index, now) = (view.index(), Timestamp::from(SystemTime::now()));
    rate(&addresses, |address| {
        black_box(index.resolve(*address, Protocol::Tcp, 80, now));
    })
}

/// What a hash map does that has the same answers ready.
fn hash_map_lookups(view: &View, pods: usize) -> f64 {
    let addresses: Vec<IpAddr> = shuffled(pods).into_iter().map(pod_address).collect();
    let (index, now) = (view.index(), Timestamp::from(SystemTime::now()));
    let answers = (0..pods).map(pod_address);
    let answers = answers.map(|address| (address, index.resolve_client(address, now)));
    let map: HashMap<IpAddr, Endpoint> = answers.collect();
    rate(&addresses, |address| {
        black_box(map.get(address).cloned());
    })
}

fn rate(addresses: &[IpAddr], mut look_up: impl FnMut(&IpAddr)) -> f64 {
    let start = Instant::now();
    let mut done = 0_u64;
    while start.elapsed() < LOOKUPS {
        for address in addresses {
            look_up(address);
        }
        done += addresses.len() as u64;
    }
    done as f64 / start.elapsed().as_secs_f64()
}

/// The numbers below `count` in an order that no cache foresees; the same each time.
fn shuffled(count: usize) -> Vec<usize> {
    let mut numbers: Vec<usize> = (0..count).collect();
    numbers.shuffle(&mut StdRng::seed_from_u64(7));
    numbers
}

fn status_kib(key: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with(key));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    Ok(number.with_context(|| format!("no {key}"))?.parse()?)
}

fn cpu_seconds(child: &Child) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
    let (_, fields) = stat.rsplit_once(')').context("stat")?;
    let mut fields = fields.split_whitespace().skip(11).map(str::parse::<f64>);
    let user = fields.next().context("utime")??;
    let system = fields.next().context("stime")??;
    // USER_HZ, which is 100 on every architecture that matters.
    Ok((user + system) / 100.0)
}

/// Puts a cluster of this size into the server. Returns how many bytes the list of its pods has.
fn fill(server: &ApiServer, pods: usize) -> usize {
    for number in 0..pods.div_ceil(500) {
        let name = format!("team-{number}");
        server.put(
            "namespaces",
            json!({"metadata": {"name": name, "uid": format!("ns-{number}")}}),
        );
    }
    for number in 0..pods.div_ceil(100) {
        let range = format!("10.{}.{}.0/24", number / 256, number % 256);
        server.put(
            "nodes",
            json!({
                "metadata": {"name": node_name(number), "uid": format!("node-{number}")},
                "spec": {"podCIDR": range, "podCIDRs": [range]},
                "status": {"addresses": [
                    {"type": "InternalIP", "address": format!("172.16.{}.{}", number / 256, number % 256)},
                    {"type": "Hostname", "address": node_name(number)},
                ]},
            }),
        );
    }
    for number in 0..(pods / 20).max(1) {
        let name = app_name(number);
        let namespace = format!("team-{}", number / 25);
        let address = service_address(number).to_string();
        server.put(
            "services",
            json!({
                "metadata": {
                    "namespace": namespace, "name": name, "uid": format!("1e0b6f1a-0000-4000-8000-{number:012}"),
                    "labels": {"app.kubernetes.io/name": name}, "creationTimestamp": "2026-11-21T20:12:36Z",
                },
                "spec": {
                    "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address],
                    "selector": {"app.kubernetes.io/name": name},
                    "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
                },
            }),
        );
        let endpoints: Vec<Value> = (number * 20..(number * 20 + 20).min(pods))
            .map(|pod| json!({"addresses": [pod_address(pod).to_string()], "conditions": {"ready": true}}))
            .collect();
        server.put(
            "endpointslices",
            json!({
                "metadata": {
                    "namespace": namespace, "name": format!("{name}-x7k2p"),
                    "labels": {
                        "kubernetes.io/service-name": name,
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    },
                },
                "addressType": "IPv4", "endpoints": endpoints,
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            }),
        );
    }
    let mut bytes = 0;
    for number in 0..pods {
        let pod = pod(number);
        bytes += pod.to_string().len();
        server.put("pods", pod);
    }
    bytes
}

/// A pod of a Deployment with one service, as long as a real one: with the fields that nobody here uses.
fn pod(number: usize) -> Value {
    let app = app_name(number / 20);
    let address = pod_address(number).to_string();
    let hash = format!("{:09x}", number / 20 * 2_654_435_761 % (1 << 36));
    let variables: Vec<Value> = (0..12)
        .map(|i| json!({"name": format!("SETTING_{i}"), "value": format!("value of the setting {i} of {app}")}))
        .collect();
    let managed: Vec<Value> = ["kube-controller-manager", "kubelet"]
        .map(|manager| {
            json!({
                "manager": manager, "operation": "Update", "apiVersion": "v1", "time": "2026-11-21T20:12:36Z", "fieldsType": "FieldsV1",
                "fieldsV1": {"f:metadata": {"f:generateName": {}, "f:labels": {".": {}, "f:app.kubernetes.io/name": {}, "f:pod-template-hash": {}},
                    "f:ownerReferences": {".": {}, "k:{\"uid\":\"0397589c-4f58-47ba-b92f-a3789dbd7dde\"}": {}}},
                    "f:spec": {"f:containers": {"k:{\"name\":\"main\"}": {".": {}, "f:env": {}, "f:image": {}, "f:ports": {}, "f:resources": {}}},
                    "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:terminationGracePeriodSeconds": {}}},
            })
        })
        .to_vec();
    json!({
        "metadata": {
            "namespace": format!("team-{}", number / 500), "name": format!("{app}-{hash}-{number:05x}"),
            "generateName": format!("{app}-{hash}-"),
            "uid": format!("2c11e8b4-2f71-4784-a554-{number:012}"), "creationTimestamp": "2026-11-21T20:12:36Z",
            "labels": {
                "app.kubernetes.io/name": app, "app.kubernetes.io/instance": app, "app.kubernetes.io/version": "1.2.3",
                "helm.sh/chart": "service-1.2.3", "pod-template-hash": hash,
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-{hash}"), "controller": true,
                "uid": "0397589c-4f58-47ba-b92f-a3789dbd7dde", "blockOwnerDeletion": true,
            }],
            "managedFields": managed,
        },
        "spec": {
            "nodeName": node_name(number / 100), "serviceAccountName": "default", "restartPolicy": "Always",
            "containers": [{
                "name": "main", "image": format!("registry.example.com/team/{app}:1.2.3"), "env": variables,
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true}],
            }],
            "volumes": [{"name": "token", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}]}}],
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
        },
        "status": {
            "phase": "Running", "hostIP": "172.16.0.1", "podIP": address, "podIPs": [{"ip": address}],
            "startTime": "2026-11-21T20:12:36Z", "qosClass": "Burstable",
            "containerStatuses": [{
                "name": "main", "ready": true, "restartCount": 0, "started": true, "state": {"running": {"startedAt": "2026-11-21T20:12:38Z"}},
                "image": format!("registry.example.com/team/{app}:1.2.3"),
                "imageID": "registry.example.com/team/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
                "containerID": "containerd://0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
            }],
        },
    })
}

fn app_name(number: usize) -> String {
    format!("service-{number}")
}

fn node_name(number: usize) -> String {
    format!(
        "ip-172-16-{}-{}.compute.internal",
        number / 256,
        number % 256
    )
}

fn pod_address(number: usize) -> IpAddr {
    let node = number / 100;
    [
        10,
        (node / 256) as u8,
        (node % 256) as u8,
        (number % 100 + 2) as u8,
    ]
    .into()
}

fn service_address(number: usize) -> IpAddr {
    [172, 20, (number / 256) as u8, (number % 256) as u8].into()
}
