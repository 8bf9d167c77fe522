//! What TCP and sockets can do besides a client that calls a server.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flow::record::{Direction, FlowRecord, Process as Owner};
use lab::{Agent, AgentOptions, Cluster, Hooks, Lab, Place, pace::patience, truth::Edge};

use crate::{HOOKS, Test, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for hooks in [Hooks::Btf, Hooks::Classic, Hooks::ClassicWithoutTypes] {
        let check = move || simultaneous_open(hooks);
        tests.push(Test::new(
            format!("edge_cases::simultaneous_open[{hooks}]"),
            check,
        ));
    }
    tests.push(Test::new("edge_cases::all_client_ports", all_client_ports));
    for hooks in HOOKS {
        for (name, check) in CASES {
            let name = format!("edge_cases::{name}[{hooks}]");
            tests.push(Test::new(name, move || check(hooks)));
        }
    }
    tests
}

type Check = fn(Hooks) -> Result<()>;

const CASES: [(&str, Check); 12] = [
    (
        "a_connect_that_completes_later",
        a_connect_that_completes_later,
    ),
    ("a_connect_that_fails_later", a_connect_that_fails_later),
    ("multipath_tcp", multipath_tcp),
    ("fast_open", fast_open),
    ("fast_open_served_at_once", fast_open_served_at_once),
    (
        "a_listener_in_the_same_process",
        a_listener_in_the_same_process,
    ),
    ("one_port_after_the_other", one_port_after_the_other),
    (
        "ports_that_the_kernel_chose_one_after_the_other",
        ports_that_the_kernel_chose_one_after_the_other,
    ),
    ("more_calls_that_cross", more_calls_that_cross),
    ("sockets_that_are_handed_on", sockets_that_are_handed_on),
    (
        "one_port_of_several_processes",
        one_port_of_several_processes,
    ),
    (
        "processes_that_are_gone_with_their_cgroup",
        processes_that_are_gone_with_their_cgroup,
    ),
];

const PORT: u16 = 7000;

struct Stage {
    lab: Lab,
    agent: Agent,
}

impl Stage {
    fn new(hooks: Hooks) -> Result<Self> {
        Self::build(AgentOptions::stdout("node-1").hooks(hooks))
    }

    /// With room for so many flows.
    fn with_room(hooks: Hooks, entries: usize) -> Result<Self> {
        let options = AgentOptions::stdout("node-1").hooks(hooks);
        Self::build(options.arg("--map-entries", &entries.to_string()))
    }

    fn build(options: AgentOptions) -> Result<Self> {
        let mut cluster = Cluster::apart();
        cluster.node("node-1");
        for pod in ["client", "server", "other"] {
            cluster.pod("shop", pod);
        }
        for pod in ["host-a", "host-b"] {
            cluster.pod("shop", pod).host_network();
        }
        let lab = Lab::start(cluster)?;
        let agent = Agent::start(&lab, &options)?;
        Ok(Self { lab, agent })
    }

    fn pod(&self, pod: &str) -> Result<Place> {
        self.lab.pod(&format!("shop/{pod}"))
    }

    fn at(&self, pod: &str) -> Result<SocketAddr> {
        let pod = self.lab.spec(&format!("shop/{pod}"))?;
        Ok(SocketAddr::new(self.lab.cluster().addresses(pod)[0], PORT))
    }

    /// Stops handshakes on their way until it is called again with `false`.
    fn hold_handshakes(&self, hold: bool) -> Result<()> {
        self.lab.node("node-1").nft(if hold {
            "table inet held { chain forward { type filter hook forward priority filter; \n\
             tcp flags & (syn|ack) == syn drop\n}\n}"
        } else {
            "delete table inet held"
        })
    }

    fn container(&self, pod: &str) -> Result<Option<String>> {
        Ok(Some(self.lab.spec(&format!("shop/{pod}"))?.container()))
    }
}

fn edge(direction: Direction, client: &str, server: &str) -> Edge {
    Edge::new(
        direction,
        &format!("shop/{client}"),
        &format!("shop/{server} TCP {PORT}"),
    )
}

fn both(client: &str, server: &str, count: u64) -> BTreeMap<Edge, u64> {
    [Direction::Egress, Direction::Ingress]
        .map(|direction| (edge(direction, client, server), count))
        .into()
}

/// Two pods call each other from the very ports that they call: either is a client, neither has accepted.
fn simultaneous_open(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    stage.hold_handshakes(true)?;
    let mut programs = Vec::new();
    for (pod, peer) in [("client", "server"), ("server", "client")] {
        let (own, peer) = (stage.at(pod)?, stage.at(peer)?);
        let steps = [
            format!("tcp a {own}"),
            format!("begin a {peer}"),
            "ready".to_owned(),
            "recv a".to_owned(),
        ];
        programs.push(stage.pod(pod)?.start("play", steps)?);
    }
    stage.hold_handshakes(false)?;
    // A handshake is tried again after a second.
    thread::sleep(Duration::from_millis(2_500));
    let wanted = [("client", "server"), ("server", "client")]
        .map(|(client, server)| (edge(Direction::Egress, client, server), 1));
    expect(&[stage.agent.stop()?], wanted.into())
}

/// Two pairs of calls that cross, and room to remember one call: the other is counted as lost. Answers are held up, so that no
/// handshake ends meanwhile.
fn more_calls_that_cross(hooks: Hooks) -> Result<()> {
    let mut stage = Stage::with_room(hooks, 64)?;
    stage.hold_handshakes(true)?;
    let mut programs = Vec::new();
    for (pod, peer) in [("client", "server"), ("server", "client")] {
        let mut steps = Vec::new();
        for offset in [0, 1] {
            let [own, peer] = [pod, peer].map(|pod| {
                let mut address = stage.at(pod)?;
                address.set_port(PORT + offset);
                anyhow::Ok(address)
            });
            steps.push(format!("tcp a{offset} {}", own?));
            steps.push(format!("begin a{offset} {}", peer?));
        }
        steps.extend(["ready", "stay"].map(str::to_owned));
        programs.push(stage.pod(pod)?.start("play", steps)?);
    }
    stage.lab.node("node-1").nft(
        "table inet answers { chain forward { type filter hook forward priority filter; \n\
         tcp flags & (syn|ack) == (syn|ack) drop\n}\n}",
    )?;
    stage.hold_handshakes(false)?;
    // A call is tried again after a second, and then after two.
    let start = Instant::now();
    let is_said = |line: &String| line.contains("crossed_calls_full");
    while !stage.agent.process().stderr().iter().any(is_said) {
        ensure!(
            start.elapsed() < patience(Duration::from_secs(10)),
            "no call is counted as lost"
        );
        thread::sleep(Duration::from_millis(100));
    }
    let capture = stage.agent.stop()?;
    let lost = capture.losses.get("crossed_calls_full");
    ensure!(lost.is_some_and(|&lost| lost > 0), "{:?}", capture.losses);
    Ok(())
}

/// A client that uses every port that it may without privileges: one entry a drain at each end, whatever the port.
fn all_client_ports() -> Result<()> {
    const PORTS: std::ops::RangeInclusive<u16> = 1_024..=u16::MAX;
    let stage = Stage::new(Hooks::Btf)?;
    let port = PORT.to_string();
    let _server = stage.pod("server")?.serve(["--reset", &port])?;
    let start = Instant::now();
    let (first, last, server) = (PORTS.start(), PORTS.end(), stage.at("server")?);
    stage
        .pod("client")?
        .play(&[format!("ports {first} {last} {server}")])?;
    let capture = stage.agent.stop()?;
    let drains = start.elapsed().as_secs() + 2;
    ensure!(
        capture.records.len() as u64 <= 2 * drains,
        "{} records of {drains} drains",
        capture.records.len()
    );
    expect(&[capture], both("client", "server", PORTS.count() as u64))
}

/// The caller does not wait, and several drains go by: its name is still known.
fn a_connect_that_completes_later(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let _server = stage.pod("server")?.serve(["--tcp", &PORT.to_string()])?;
    stage.hold_handshakes(true)?;
    let steps = [
        "tcp a 0.0.0.0:0".to_owned(),
        format!("begin a {}", stage.at("server")?),
        "ready".to_owned(),
        // Blocks until it is connected.
        "send a".to_owned(),
        "recv a".to_owned(),
    ];
    let mut client = stage.pod("client")?.start("play", steps)?;
    thread::sleep(Duration::from_millis(2_200));
    stage.hold_handshakes(false)?;
    let status = client.wait(patience(Duration::from_secs(15)))?;
    ensure!(status.success(), "{}", client.stderr().join("\n"));
    let (container, pid) = (stage.container("client")?, client.pid());
    let capture = stage.agent.stop()?;
    let of = |record: &&FlowRecord| record.direction == Direction::Egress;
    let owner = capture
        .records
        .iter()
        .find(of)
        .and_then(|record| record.process.clone());
    let wanted = Owner {
        pid,
        comm: "lab-pod".to_owned(),
        container,
        fd: None,
    };
    ensure!(owner == Some(wanted), "{owner:?} is not {pid}");
    expect(&[capture], both("client", "server", 1))
}

/// The caller gives up: a failure, of a caller that is known.
fn a_connect_that_fails_later(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    stage.hold_handshakes(true)?;
    let steps = [
        "tcp a 0.0.0.0:0".to_owned(),
        format!("begin a {}", stage.at("server")?),
        "pause 1500".to_owned(),
        "close a".to_owned(),
    ];
    stage.pod("client")?.play(steps)?;
    let container = stage.container("client")?;
    let capture = stage.agent.stop()?;
    let owner = capture
        .records
        .first()
        .and_then(|record| record.process.clone());
    ensure!(
        owner
            .as_ref()
            .is_some_and(|owner| owner.pid != 0 && owner.container == container),
        "{owner:?}"
    );
    let failed = Edge::failed("shop/client", &format!("shop/server TCP {PORT}"));
    expect(&[capture], [(failed, 1)].into())
}

/// A multipath connection is one connection: its first subflow's.
fn multipath_tcp(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let (client, server) = calls_once(&stage, "mptcp", "connect")?;
    expect(&[stage.agent.stop()?], both(client, server, 1))
}

/// Data in the first packet; the server's socket is accepted before the handshake ends.
fn fast_open(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let (client, server) = calls_once(&stage, "tcp", "fastopen")?;
    expect(&[stage.agent.stop()?], both(client, server, 1))
}

/// A server that has answered and closed before the client's acknowledgement is there: its socket is never established.
fn fast_open_served_at_once(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    stage.lab.node("node-1").nft(&format!(
        "table inet held {{ chain forward {{ type filter hook forward priority filter; \n\
         tcp dport {PORT} tcp flags & (syn|ack) == ack drop\n}}\n}}"
    ))?;
    let server = [
        FAST_OPEN.to_owned(),
        format!("tcp l 0.0.0.0:{PORT}"),
        "listen l".to_owned(),
        "ready".to_owned(),
        "accept l a".to_owned(),
        "recv a".to_owned(),
        "send a".to_owned(),
        "close a".to_owned(),
        "stay".to_owned(),
    ];
    let _server = stage.pod("server")?.start("play", server)?;
    stage.pod("client")?.play([
        FAST_OPEN.to_owned(),
        "tcp a 0.0.0.0:0".to_owned(),
        format!("fastopen a {}", stage.at("server")?),
        "recv a".to_owned(),
    ])?;
    // What was sent may arrive before the socket is closed.
    thread::sleep(Duration::from_millis(200));
    expect(&[stage.agent.stop()?], both("client", "server", 1))
}

/// Clients and listeners do it without a cookie, and without being asked (`ip-sysctl.rst`).
const FAST_OPEN: &str = "sysctl net/ipv4/tcp_fastopen 1543";

fn calls_once(stage: &Stage, socket: &str, connect: &str) -> Result<(&'static str, &'static str)> {
    let server = stage.pod("server")?.start(
        "play",
        [
            FAST_OPEN.to_owned(),
            format!("{socket} l 0.0.0.0:{PORT}"),
            "listen l".to_owned(),
            "ready".to_owned(),
            "accept l a".to_owned(),
            "recv a".to_owned(),
            "send a".to_owned(),
            "stay".to_owned(),
        ],
    )?;
    let address = stage.at("server")?;
    let mut steps = vec![
        FAST_OPEN.to_owned(),
        format!("{socket} a 0.0.0.0:0"),
        format!("{connect} a {address}"),
    ];
    if connect == "connect" {
        steps.push("send a".to_owned());
    }
    steps.push("recv a".to_owned());
    stage.pod("client")?.play(steps)?;
    drop(server);
    Ok(("client", "server"))
}

/// A process that calls itself, by its pod's address: nothing that a policy could judge.
fn a_listener_in_the_same_process(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let own = stage.at("client")?;
    stage.pod("client")?.play([
        format!("tcp l {own}"),
        "listen l".to_owned(),
        "tcp a 0.0.0.0:0".to_owned(),
        format!("connect a {own}"),
        "accept l b".to_owned(),
        "send a".to_owned(),
        "recv b".to_owned(),
    ])?;
    expect(&[stage.agent.stop()?], BTreeMap::new())
}

/// Two pods in the node's network listen on one port, one after the other: each has what it accepted.
fn one_port_after_the_other(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let address = stage.at("host-a")?;
    let mut wanted = BTreeMap::new();
    for (pod, count) in [("host-a", 2), ("host-b", 3)] {
        let server = stage.pod(pod)?.serve(["--tcp", &PORT.to_string()])?;
        let target = format!("tcp://{address}");
        stage
            .pod("client")?
            .call_all(["--count", &count.to_string(), &target])?;
        drop(server);
        wanted.insert(edge(Direction::Ingress, "client", pod), count);
    }
    let capture = stage.agent.stop()?;
    ensure!(capture.lost_nothing(), "{:?}", capture.losses);
    let mut seen = lab::truth::edges(&capture.records);
    // By the address alone nobody can tell which pod of the node's network a client called.
    seen.retain(|edge, _| edge.direction == Direction::Ingress);
    ensure!(seen == wanted, "{seen:#?}");
    Ok(())
}

/// The kernel takes such a port back before it says that the listener is closed: its place is free all the same.
fn ports_that_the_kernel_chose_one_after_the_other(hooks: Hooks) -> Result<()> {
    const ENTRIES: usize = 1_024;
    let stage = Stage::with_room(hooks, ENTRIES)?;
    let listeners = ENTRIES / 2;
    stage.pod("server")?.play([
        format!("listens {listeners} 127.0.0.1:0"),
        format!("listens {listeners} [::]:0"),
    ])?;
    expect(&[stage.agent.stop()?], BTreeMap::new())
}

/// A listener whose connections another process accepts, and a socket that another process connects, each in a pod of its own:
/// as by SCM_RIGHTS, by systemd, or by a fork. A packet leaves and arrives where the socket was made; the process is who
/// called `listen`, and who called `connect`.
fn sockets_that_are_handed_on(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let other = stage.pod("other")?.cgroup().to_owned();
    fs::create_dir_all(&other)?;
    let other = other.display();
    let server = stage.pod("server")?.start(
        "play",
        [
            format!("tcp l 0.0.0.0:{PORT}"),
            "listen l".to_owned(),
            "ready".to_owned(),
            "pause 500".to_owned(),
            format!("worker l {other} accept l a,recv a"),
        ],
    )?;
    let address = stage.at("server")?;
    let client = stage.pod("client")?.start(
        "play",
        [
            "tcp a 0.0.0.0:0".to_owned(),
            format!("worker a {other} connect a {address},send a"),
            "ready".to_owned(),
            "stay".to_owned(),
        ],
    )?;
    let (listening, making) = (server.pid(), client.pid());
    let containers = [stage.container("client")?, stage.container("server")?];
    let capture = stage.agent.stop()?;
    let owner = |direction| {
        let of = |record: &&FlowRecord| record.direction == direction;
        let record = capture.records.iter().find(of);
        record
            .and_then(|record| record.process.clone())
            .context("no process")
    };
    let (connected, accepted) = (owner(Direction::Egress)?, owner(Direction::Ingress)?);
    ensure!(
        connected.container == containers[0] && connected.pid != making && connected.pid != 0,
        "{connected:?} is not who connected the socket of {making}"
    );
    ensure!(
        accepted.container == containers[1] && accepted.pid == listening,
        "{accepted:?} is not {listening}"
    );
    expect(&[capture], both("client", "server", 1))
}

/// SO_REUSEPORT: whichever of two processes gets a connection, it is counted once.
fn one_port_of_several_processes(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let server = || {
        let mut steps = vec![
            format!("tcp l 0.0.0.0:{PORT}"),
            "listen l".to_owned(),
            "ready".to_owned(),
        ];
        steps.push("stay".to_owned());
        stage.pod("server")?.start("play", steps)
    };
    let (first, second) = (server()?, server()?);
    let address = stage.at("server")?;
    let mut steps = Vec::new();
    for call in 0..50 {
        steps.extend([
            format!("tcp a{call} 0.0.0.0:0"),
            format!("connect a{call} {address}"),
        ]);
    }
    stage.pod("client")?.play(&steps)?;
    let pids = [first.pid(), second.pid()];
    let accepted = {
        let capture = stage.agent.stop()?;
        expect(std::slice::from_ref(&capture), both("client", "server", 50))?;
        let mut records = capture.records.into_iter();
        let accepted = records.find(|record| record.direction == Direction::Ingress);
        accepted.and_then(|record| record.process)
    };
    ensure!(
        accepted
            .as_ref()
            .is_some_and(|owner| pids.contains(&owner.pid)),
        "{accepted:?} is none of {pids:?}"
    );
    Ok(())
}

/// A process that has ended, and whose cgroup is removed, before anybody could look: known by its address.
fn processes_that_are_gone_with_their_cgroup(hooks: Hooks) -> Result<()> {
    let stage = Stage::new(hooks)?;
    let _server = stage.pod("server")?.serve(["--tcp", &PORT.to_string()])?;
    let client = stage.pod("client")?;
    client.call_all([format!("tcp://{}", stage.at("server")?)])?;
    fs::remove_dir(client.cgroup()).context("the client's cgroup")?;
    expect(&[stage.agent.stop()?], both("client", "server", 1))
}
