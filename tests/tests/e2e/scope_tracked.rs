//! Beside a Scope probe that tells of what its node tracks, too: who answers behind a service's address is known, and no
//! connection counts twice because it is told of as a socket and as tracked.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use flow::record::{Direction, FlowRecord, Source};
use lab::{
    Agent, AgentOptions, Cluster, Generator, GeneratorOptions, Lab, Place, Process,
    truth::{self, Edge},
};
use nix::sys::signal::Signal;

use crate::{Test, expect, scope_log::probe_of};

/// Longer than a sighting waits for its lines, and its record for being printed.
const SETTLED: Duration = Duration::from_secs(5);

/// By how many milliseconds lines about tracked connections come after those about sockets.
const ORDERS: [(&str, i64); 3] = [
    ("both at once", 0),
    ("tracked later", 200),
    ("tracked sooner", -200),
];

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (title, later) in ORDERS {
        tests.push(Test::new(
            format!("scope_tracked::services_are_translated[{title}]"),
            move || services_are_translated(later),
        ));
        tests.push(Test::new(
            format!("scope_tracked::the_agent_is_away[{title}]"),
            move || the_agent_is_away(later),
        ));
    }
    tests.push(Test::new("scope_tracked::a_log_that_comes_late", || {
        a_log_that_comes_late()
    }));
    tests
}

/// The agent and the probe watch the same connections.
fn services_are_translated(later: i64) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let log = lab.folder().join("probe.log");
    let mut probe = probe(&lab, &log, later)?;
    let agents = agents(&lab, &log)?;
    let mut world = World::new(&lab)?;
    world.call(40)?;
    thread::sleep(SETTLED);
    let mut captures = Vec::new();
    for agent in agents {
        captures.push(agent.stop()?);
    }
    probe.stop(Signal::SIGTERM)?;
    for record in &captures[0].records {
        ensure!(
            record.sources == BTreeSet::from([Source::Ebpf, Source::Scope]),
            "both have seen it: {record:?}"
        );
        let is_called = record.direction == Direction::Egress;
        let called = world.called.contains(&record.tuple.dst_addr);
        ensure!(
            record.via.is_some() == (is_called && called),
            "the service is said where one was called: {record:?}"
        );
    }
    let records = captures.iter().flat_map(|capture| &capture.records);
    let wanted = world.wanted(&truth::edges(records), Called::Server)?;
    expect(&captures, wanted)
}

/// The lines come when the agent has reported long since: what was called stays, and counts once.
fn a_log_that_comes_late() -> Result<()> {
    let lab = Lab::start(cluster())?;
    let (hidden, log) = (lab.folder().join("hidden"), lab.folder().join("probe.log"));
    let mut probe = probe(&lab, &hidden, 0)?;
    let agents = agents(&lab, &log)?;
    let mut world = World::new(&lab)?;
    world.call(20)?;
    thread::sleep(SETTLED);
    probe.stop(Signal::SIGTERM)?;
    fs::rename(&hidden, &log)?;
    thread::sleep(SETTLED);
    let mut captures = Vec::new();
    for agent in agents {
        captures.push(agent.stop()?);
    }
    let records = captures.iter().flat_map(|capture| &capture.records);
    let wanted = world.wanted(&truth::edges(records), Called::Service)?;
    expect(&captures, wanted)
}

/// The agent is killed and comes back; what happens meanwhile is in the log alone. The ledger has every connection once, and
/// who has answered.
fn the_agent_is_away(later: i64) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let log = lab.folder().join("probe.log");
    let mut generator = Generator::start(&lab, &GeneratorOptions::default())?;
    let spool = lab.folder().join("spool").display().to_string();
    let options = AgentOptions::streaming("node-1", &generator)
        .arg("--spool", &spool)
        .arg("--scope-log", &log.display().to_string());
    let mut probe = probe(&lab, &log, later)?;
    let mut agent = Agent::start(&lab, &options)?;
    let other = Agent::start(&lab, &AgentOptions::streaming("node-2", &generator))?;
    let mut world = World::new(&lab)?;
    world.call(10)?;
    thread::sleep(SETTLED);
    agent.process().stop(Signal::SIGKILL)?;
    world.call(20)?;
    thread::sleep(Duration::from_secs(1));
    let mut agent = Agent::start(&lab, &options)?;
    world.call(10)?;
    thread::sleep(SETTLED);
    let log = agent.process().stderr().join("\n");
    ensure!(!log.contains("ERROR"), "{log}");
    agent.stop()?;
    other.stop()?;
    probe.stop(Signal::SIGTERM)?;
    generator.stop()?;
    let records: Vec<FlowRecord> = generator.export()?;
    let alone = BTreeSet::from([Source::Scope]);
    ensure!(
        records.iter().all(|record| record.sources != alone),
        "each edge was seen by an agent too: {records:?}"
    );
    let seen = truth::edges(&records);
    let wanted = world.wanted(&seen, Called::Server)?;
    ensure!(seen == wanted, "seen: {seen:#?}\nmade: {wanted:#?}");
    Ok(())
}

/// A service on two nodes, of which the first has the probe, and one whose only server calls itself.
fn cluster() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.node("node-2");
    cluster.pod("shop", "near");
    cluster
        .pod("shop", "web-1")
        .label("app", "web")
        .label("is", "alone");
    cluster
        .pod("shop", "web-2")
        .on("node-2")
        .label("app", "web");
    cluster
        .service("shop", "web")
        .select("app", "web")
        .port("http", 80, 8080)
        .node_port(NODE_PORT);
    cluster
        .service("shop", "own")
        .select("is", "alone")
        .port("http", 80, 8080);
    cluster
}

/// The service's port at every node.
const NODE_PORT: u16 = 30_080;

/// A probe on the first node that tells of tracked connections.
fn probe(lab: &Lab, out: &Path, later: i64) -> Result<Process> {
    let how = ["--form=cri".to_owned(), format!("--tracked={later}")];
    probe_of(lab, out, &["shop/near", "shop/web-1"], &how)
}

/// One on each node, of which the first reads the log.
fn agents(lab: &Lab, log: &Path) -> Result<[Agent; 2]> {
    let first = AgentOptions::stdout("node-1").arg("--scope-log", &log.display().to_string());
    let second = AgentOptions::stdout("node-2");
    Ok([Agent::start(lab, &first)?, Agent::start(lab, &second)?])
}

/// What a client's side is expected to say of who answered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Called {
    Server,
    Service,
}

/// Whom is called, and how often it was.
struct World {
    /// The services' addresses.
    called: Vec<std::net::IpAddr>,
    /// Who calls what.
    calls: [(Place, String); 4],
    made: u64,
    _servers: [Process; 2],
}

impl World {
    fn new(lab: &Lab) -> Result<Self> {
        let cluster = lab.cluster();
        let serve = |pod| lab.pod(pod)?.serve(["--tcp", "8080"]);
        let target = |address, port| format!("tcp://{}", SocketAddr::new(address, port));
        let services = &cluster.services;
        let called: Vec<_> = (services.iter())
            .map(|service| service.addresses()[0])
            .collect();
        let [second, _] = cluster.addresses(lab.spec("shop/web-2")?);
        let [node, _] = cluster.nodes[0].addresses();
        Ok(Self {
            calls: [
                (lab.pod("shop/near")?, target(called[0], 80)),
                // To a server itself.
                (lab.pod("shop/near")?, target(second, 8080)),
                // Masked, as it comes back to itself.
                (lab.pod("shop/web-1")?, target(called[1], 80)),
                // Masked, and to the second node passed on.
                (lab.outside(), target(node, NODE_PORT)),
            ],
            called,
            made: 0,
            _servers: [serve("shop/web-1")?, serve("shop/web-2")?],
        })
    }

    /// Each calls so often, within some drains.
    fn call(&mut self, count: u64) -> Result<()> {
        let mut callers = Vec::new();
        for (place, target) in &self.calls {
            let count = count.to_string();
            callers.push(place.start("call", ["--count", &count, "--interval", "120", target])?);
        }
        for mut caller in callers {
            let answered = lab::Calls::of(&mut caller)?.answered;
            ensure!(answered == count, "{answered} calls were answered");
        }
        self.made += count;
        Ok(())
    }

    /// Which server answers is drawn by the kernel. The servers' nodes say which did, and have to come to what was made; each
    /// client's node has to say the same.
    fn wanted(&self, seen: &BTreeMap<Edge, u64>, called: Called) -> Result<BTreeMap<Edge, u64>> {
        let made = self.made;
        let mut wanted = BTreeMap::new();
        let mut want = |direction, client: &str, server: &str, count| {
            let server = format!("{server} TCP 8080");
            if count > 0 {
                *wanted
                    .entry(Edge::new(direction, client, &server))
                    .or_default() += count;
            }
        };
        let accepted = |client: &str| {
            ["shop/web-1", "shop/web-2"].map(|server| {
                let edge = Edge::new(Direction::Ingress, client, &format!("{server} TCP 8080"));
                seen.get(&edge).copied().unwrap_or(0)
            })
        };
        for client in ["shop/near", "node node-1"] {
            let [first, second] = accepted(client);
            ensure!(
                first + second == 2 * made,
                "{client} was accepted {first} and {second} times, not {}: {seen:#?}",
                2 * made
            );
            want(Direction::Ingress, client, "shop/web-1", first);
            want(Direction::Ingress, client, "shop/web-2", second);
        }
        let [first, second] = accepted("shop/near");
        let (near, own) = ("shop/near", "shop/web-1");
        match called {
            Called::Server => {
                want(Direction::Egress, near, "shop/web-1", first);
                want(Direction::Egress, near, "shop/web-2", second);
                want(Direction::Egress, own, "shop/web-1", made);
            }
            Called::Service => {
                want(Direction::Egress, near, "shop/web-2", made);
                want(Direction::Egress, near, "service shop/web", made);
                want(Direction::Egress, own, "service shop/own", made);
            }
        }
        Ok(wanted)
    }
}
