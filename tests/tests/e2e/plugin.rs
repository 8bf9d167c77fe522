//! What the agent gives Weave Scope: asked as a probe was seen to ask, and merged as a probe merges.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Agent, AgentOptions, Cluster, Lab, scope_app};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("plugin::scope_draws_what_the_agent_sees", drawn),
        Test::new("plugin::a_killed_agent_s_socket_is_replaced", replaced),
        Test::new("plugin::names_that_scope_does_not_take", bad_names),
    ]
}

/// As a probe was seen to ask.
const QUESTION: &str = "GET /report?api_version=1&probe_id=2b6c443405ab307c HTTP/1.1\r\nHost: plugin\r\n\
     User-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n";

/// How long the probe waits.
const PROBE_PATIENCE: Duration = Duration::from_millis(500);

/// How long it may take until a flow is in the answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// `web` and `near` are on the same node, `far` is on another.
fn cluster() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.node("node-2");
    cluster.pod("shop", "web").label("app", "web");
    cluster.pod("shop", "near");
    cluster.pod("shop", "far").on("node-2");
    cluster
        .service("shop", "api")
        .select("app", "web")
        .port("api", 80, 9090);
    cluster
}

fn socket(lab: &Lab, node: &str) -> PathBuf {
    lab.folder()
        .join(format!("plugins-{node}/microshield.sock"))
}

fn agent(lab: &Lab, node: &str) -> Result<Agent> {
    let socket = socket(lab, node).display().to_string();
    let options = AgentOptions::stdout(node).arg("--scope-plugin", &socket);
    let mut agent = Agent::start(lab, &options)?;
    let is_serving = |line: &str| line.contains("serving Scope as a plugin");
    agent.process().wait_stderr(is_serving)?;
    Ok(agent)
}

/// The body of the answer, which comes in time unless the machine has other things to do.
fn ask(socket: &Path) -> Result<Value> {
    for _ in 0..5 {
        let begun = Instant::now();
        let report = ask_once(socket)?;
        if begun.elapsed() < PROBE_PATIENCE {
            return Ok(report);
        }
    }
    bail!("the probe would not wait for it")
}

fn ask_once(socket: &Path) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.write_all(QUESTION.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("an answer with a body")?;
    ensure!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    Ok(serde_json::from_str(body)?)
}

/// A node is merged key by key, and of two values the later stays.
fn merge(into: &mut Value, from: &Value) {
    let (Some(all), Some(new)) = (into.as_object_mut(), from.as_object()) else {
        return;
    };
    for (key, value) in new {
        match all.get_mut(key) {
            Some(known) if known.get("timestamp").is_some() => {
                if known["timestamp"].as_str() < value["timestamp"].as_str() {
                    *known = value.clone();
                }
            }
            Some(Value::Array(known)) => {
                for value in value.as_array().into_iter().flatten() {
                    if !known.contains(value) {
                        known.push(value.clone());
                    }
                }
            }
            Some(known) if known.is_object() => merge(known, value),
            Some(known) if !known.is_null() => {}
            _ => drop(all.insert(key.clone(), value.clone())),
        }
    }
}

fn latest<'a>(report: &'a Value, topology: &str, id: &str, key: &str) -> Option<&'a str> {
    report[topology]["nodes"][id]["latest"][key]["value"].as_str()
}

/// The end that the app draws for an endpoint: the pod of its process, or else the pod with its address; and what has no host,
/// as the Internet.
fn drawn_as(report: &Value, id: &str) -> Option<String> {
    let host = latest(report, "Endpoint", id, "host_node_id");
    let Some(host) = host else {
        return Some("the Internet".to_owned());
    };
    let parent = |topology: &str, id: &str, of: &str| -> Option<String> {
        let parents = &report[topology]["nodes"][id]["parents"][of];
        parents[0].as_str().map(str::to_owned)
    };
    let process = latest(report, "Endpoint", id, "pid")
        .map(|pid| format!("{};{pid}", host.trim_end_matches(";<host>")));
    let pod = process
        .and_then(|process| parent("Process", &process, "container"))
        .and_then(|container| parent("Container", &container, "pod"));
    let address = id.split(';').nth(1)?;
    let pods = report["Pod"]["nodes"].as_object()?;
    let pod = pod.or_else(|| {
        let mut ids = pods.keys();
        let has_address =
            |id: &&String| latest(report, "Pod", id, "kubernetes_ip") == Some(address);
        ids.find(has_address).cloned()
    });
    match pod {
        Some(pod) => latest(report, "Pod", &pod, "kubernetes_name").map(str::to_owned),
        None => Some(host.to_owned()),
    }
}

/// Client, server with port, protocols and outcomes of every edge.
fn edges(report: &Value) -> Result<BTreeSet<(String, String, String, String)>> {
    let endpoints = report["Endpoint"]["nodes"]
        .as_object()
        .context("endpoints")?;
    let mut edges = BTreeSet::new();
    for (id, node) in endpoints {
        for server in node["adjacency"].as_array().into_iter().flatten() {
            let server = server.as_str().context("an id")?;
            let said = |key| {
                latest(report, "Endpoint", server, key)
                    .unwrap_or_default()
                    .to_owned()
            };
            // A translated connection's own.
            if latest(report, "Endpoint", server, "copy_of").is_some() {
                continue;
            }
            let name = drawn_as(report, server).context("a server")?;
            let port = server.rsplit(';').next().context("a port")?;
            edges.insert((
                drawn_as(report, id).context("a client")?,
                format!("{name} {port}"),
                said("microshield_protocol"),
                said("microshield_outcome"),
            ));
        }
    }
    Ok(edges)
}

fn drawn() -> Result<()> {
    let lab = Lab::start(cluster())?;
    let agents = [agent(&lab, "node-1")?, agent(&lab, "node-2")?];
    let _servers = [
        lab.pod("shop/web")?.serve(["--tcp", "8080,9090"])?,
        lab.pod("shop/web")?.serve(["--udp", "5353"])?,
    ];
    let [v4, v6] = lab.cluster().addresses(lab.spec("shop/web")?);
    let at = |scheme: &str, address: IpAddr, port| {
        format!("{scheme}://{}", SocketAddr::new(address, port))
    };
    lab.pod("shop/near")?.call_all([at("tcp", v4, 8080)])?;
    lab.pod("shop/far")?
        .call_all(["--count", "3", &at("udp", v4, 5353)])?;
    // Nobody knows this address but the process that has it.
    lab.pod("shop/far")?.call_all([at("tcp", v6, 9090)])?;
    let service = lab.cluster().services[0].addresses()[0];
    lab.pod("shop/far")?.call_all([at("tcp", service, 80)])?;
    // Nobody is there.
    lab.pod("shop/near")?.call([at("tcp", v4, 81)])?;

    let edge = |client: &str, server: &str, protocol: &str, outcome: &str| {
        [client, server, protocol, outcome]
            .map(str::to_owned)
            .into()
    };
    let name = |key: &str| -> Result<String> { Ok(lab.spec(&format!("shop/{key}"))?.name()) };
    let (web, near, far) = (name("web")?, name("near")?, name("far")?);
    let wanted: BTreeSet<(String, String, String, String)> = [
        edge(&near, &format!("{web} 8080"), "TCP", "established"),
        edge(&near, &format!("{web} 81"), "TCP", "failed"),
        edge(&far, &format!("{web} 5353"), "UDP", "established"),
        edge(&far, &format!("{web} 9090"), "TCP", "established"),
    ]
    .into();
    let begun = Instant::now();
    let merged = loop {
        let mut merged = scope_app::report_of(&lab)?;
        for node in ["node-1", "node-2"] {
            merge(&mut merged, &ask(&socket(&lab, node))?);
        }
        let drawn = edges(&merged)?;
        if drawn == wanted {
            break merged;
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "drawn: {drawn:#?}\nmade: {wanted:#?}"
        );
        thread::sleep(Duration::from_millis(200));
    };

    // Scope's own nodes have got more to say, and no other was made of them.
    let pods = merged["Pod"]["nodes"].as_object().context("pods")?;
    ensure!(pods.len() == 3, "{pods:#?}");
    let count =
        |pod: &str, key| latest(&merged, "Pod", &format!("{pod};<pod>"), key).map(str::to_owned);
    let near_uid = lab.spec("shop/near")?.uid();
    let of_near =
        ["microshield_connections", "microshield_failed"].map(|key| count(&near_uid, key));
    ensure!(
        of_near == [Some("1".to_owned()), Some("1".to_owned())],
        "{of_near:?}"
    );
    let table: BTreeMap<&String, &Value> = merged["Host"]["nodes"]["node-2;<host>"]["latest"]
        .as_object()
        .context("the host")?
        .iter()
        .filter(|(key, _)| key.starts_with("microshield_flows_000___"))
        .collect();
    ensure!(table.len() == 7, "{table:#?}");
    for agent in agents {
        let capture = agent.stop()?;
        ensure!(capture.losses.is_empty(), "{:?}", capture.losses);
        ensure!(
            !capture.records.is_empty(),
            "the records go where they went before"
        );
    }
    for node in ["node-1", "node-2"] {
        ensure!(!socket(&lab, node).exists(), "{node}'s socket stays behind");
    }
    Ok(())
}

fn replaced() -> Result<()> {
    let lab = Lab::start(cluster())?;
    let socket = socket(&lab, "node-1");
    let mut killed = agent(&lab, "node-1")?;
    ask(&socket)?;
    killed.process().stop(Signal::SIGKILL)?;
    ensure!(
        socket.exists(),
        "somebody has removed the socket of a killed agent"
    );
    ensure!(ask(&socket).is_err(), "somebody answers for it");
    let next = agent(&lab, "node-1")?;
    ask(&socket)?;
    next.stop()?;
    ensure!(!socket.exists());
    Ok(())
}

fn bad_names() -> Result<()> {
    let lab = Lab::start(cluster())?;
    for (path, reason) in [
        (
            lab.folder().join("micro_shield.sock"),
            "Scope takes no plugin of this name",
        ),
        (lab.topology(), "there is something that is no socket"),
    ] {
        let path = match reason.contains("no socket") {
            true => {
                let name = lab.folder().join("topology.sock");
                std::fs::copy(path, &name)?;
                name
            }
            false => path,
        };
        let options =
            AgentOptions::stdout("node-1").arg("--scope-plugin", &path.display().to_string());
        let mut agent = Agent::spawn(&lab, &options)?;
        let status = agent.process().wait(Duration::from_secs(10))?;
        let log = agent.process().stderr().join("\n");
        ensure!(status.code() == Some(2), "{status}\n{log}");
        ensure!(log.contains(reason), "{log}");
    }
    Ok(())
}
