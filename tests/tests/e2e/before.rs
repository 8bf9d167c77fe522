//! What was open before the agent came: it is found, once, and nobody has to be restarted.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use flow::{
    record::{Direction, FlowRecord},
    time::Timestamp,
    wire::UDP_OPEN_BEFORE_UNKNOWN,
};
use lab::{Agent, AgentOptions, Cluster, Hooks, Lab, Place, Process, pace::patience, truth::Edge};

use crate::{Test, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for hooks in [Hooks::Btf, Hooks::Classic, Hooks::ClassicWithoutTypes] {
        let name = |test: &str| format!("before::{test}[{hooks}]");
        tests.extend([
            Test::new(name("edges_of_open_connections"), move || {
                edges_of_open_connections(hooks)
            }),
            Test::new(name("owners_of_older_listeners"), move || {
                owners_of_older_listeners(hooks)
            }),
            Test::alone(name("none_twice_in_a_storm"), move || {
                none_twice_in_a_storm(hooks)
            }),
            Test::alone(name("the_whole_machine"), move || the_whole_machine(hooks)),
            Test::alone(name("no_room_is_counted"), move || {
                no_room_is_counted(hooks)
            }),
        ]);
    }
    tests.push(Test::new(
        "before::older_listeners_that_close_make_room",
        older_listeners_that_close_make_room,
    ));
    for hooks in [Hooks::Btf, Hooks::Classic] {
        tests.push(Test::new(
            format!("before::answers_that_come_late[{hooks}]"),
            move || answers_that_come_late(hooks),
        ));
        tests.push(Test::new(
            format!("before::what_a_socket_tells_without_a_listener[{hooks}]"),
            move || what_a_socket_tells_without_a_listener(hooks),
        ));
    }
    tests
}

/// Connections that are held: who holds them, to what, how many, and how either side names the other.
struct Case {
    client: &'static str,
    target: fn(&Lab) -> Result<String>,
    count: u64,
    called: &'static str,
    caller: &'static str,
    server: &'static str,
}

const CASES: [Case; 8] = [
    Case {
        client: "shop/near",
        target: |lab| pod(lab, "shop/web", 0, 8080),
        count: 2,
        called: "shop/web TCP 8080",
        caller: "shop/near",
        server: "shop/web TCP 8080",
    },
    Case {
        client: "shop/far",
        target: |lab| pod(lab, "shop/web", 1, 8080),
        count: 3,
        called: "shop/web TCP 8080",
        caller: "shop/far",
        server: "shop/web TCP 8080",
    },
    // IPv4 on an IPv6 socket.
    Case {
        client: "shop/other",
        target: |lab| {
            let address = lab.cluster().addresses(lab.spec("shop/web")?)[0];
            Ok(format!("tcp://[::ffff:{address}]:8080"))
        },
        count: 4,
        called: "shop/web TCP 8080",
        caller: "shop/other",
        server: "shop/web TCP 8080",
    },
    // Through a service address: the client's socket has the address that was called.
    Case {
        client: "shop/near",
        target: |lab| {
            let address = lab.cluster().services[0].addresses()[0];
            Ok(format!("tcp://{}", SocketAddr::new(address, 80)))
        },
        count: 5,
        called: "service shop/api TCP 9090",
        caller: "shop/near",
        server: "shop/web TCP 9090",
    },
    // A pod in its node's network, as client and as server.
    Case {
        client: "shop/host",
        target: |lab| pod(lab, "shop/web", 0, 8080),
        count: 6,
        called: "shop/web TCP 8080",
        caller: "node node-1",
        server: "shop/web TCP 8080",
    },
    Case {
        client: "shop/near",
        target: |lab| {
            let address = lab.cluster().nodes[0].addresses()[0];
            Ok(format!("tcp://{}", SocketAddr::new(address, 7070)))
        },
        count: 7,
        called: "node node-1 TCP 7070",
        caller: "shop/near",
        server: "shop/host TCP 7070",
    },
    // A process of the node.
    Case {
        client: "node node-1",
        target: |lab| pod(lab, "shop/web", 0, 8080),
        count: 8,
        called: "shop/web TCP 8080",
        caller: "node node-1",
        server: "shop/web TCP 8080",
    },
    // The server never accepts: its connections are in no process.
    Case {
        client: "shop/other",
        target: |lab| pod(lab, "shop/web", 1, 7171),
        count: 9,
        called: "shop/web TCP 7171",
        caller: "shop/other",
        server: "shop/web TCP 7171",
    },
];

fn cluster() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.node("node-2");
    cluster.pod("shop", "web").label("app", "web");
    cluster.pod("shop", "near");
    cluster.pod("shop", "other");
    cluster.pod("shop", "host").host_network();
    cluster.pod("shop", "far").on("node-2");
    cluster
        .service("shop", "api")
        .select("app", "web")
        .port("api", 80, 9090);
    cluster
}

fn pod(lab: &Lab, path: &str, family: usize, port: u16) -> Result<String> {
    let address = lab.cluster().addresses(lab.spec(path)?)[family];
    Ok(format!("tcp://{}", SocketAddr::new(address, port)))
}

fn place(lab: &Lab, client: &str) -> Result<Place> {
    match client.strip_prefix("node ") {
        Some(node) => Ok(lab.node(node)),
        None => lab.pod(client),
    }
}

/// Serves and holds what [`CASES`] says; the programs, and the edges that agents of both nodes have to see.
fn open_all(lab: &Lab) -> Result<(Vec<Process>, BTreeMap<Edge, u64>)> {
    let mut programs = vec![
        lab.pod("shop/web")?
            .serve(["--keep", "8080,9090", "--deaf", "7171"])?,
        lab.pod("shop/host")?.serve(["--keep", "7070"])?,
    ];
    let mut wanted = BTreeMap::new();
    for case in &CASES {
        let (count, target) = (case.count.to_string(), (case.target)(lab)?);
        programs.push(place(lab, case.client)?.hold(["--count", &count, &target])?);
        for (direction, client, server) in [
            (Direction::Egress, case.client, case.called),
            (Direction::Ingress, case.caller, case.server),
        ] {
            *wanted
                .entry(Edge::new(direction, client, server))
                .or_default() += case.count;
        }
    }
    Ok((programs, wanted))
}

/// Every connection that is open is reported from each side as one, with its owner, and as seen when the agent looked.
fn edges_of_open_connections(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let (programs, wanted) = open_all(&lab)?;
    let started = Timestamp::from(std::time::SystemTime::now());
    let agents = ["node-1", "node-2"]
        .map(|node| Agent::start(&lab, &AgentOptions::stdout(node).hooks(hooks)));
    let mut captures = Vec::new();
    for agent in agents {
        captures.push(agent?.stop()?);
    }
    let pids: Vec<u32> = programs.iter().map(Process::pid).collect();
    for record in captures.iter().flat_map(|capture| &capture.records) {
        ensure!(
            record.first_seen >= started,
            "nobody was there to see it earlier: {record:?}"
        );
        let process = record.process.as_ref();
        let process = process.with_context(|| format!("no process: {record:?}"))?;
        ensure!(
            pids.contains(&process.pid) && process.comm == "lab-pod",
            "none of {pids:?}: {record:?}"
        );
        check_container(&lab, record)?;
    }
    expect(&captures, wanted)
}

/// The container is that of the pod at the record's own end.
fn check_container(lab: &Lab, record: &FlowRecord) -> Result<()> {
    let own = match record.direction {
        Direction::Egress => record.src.to_string(),
        Direction::Ingress => record.dst.to_string(),
    };
    let process = record.process.as_ref().context("no process")?;
    let wanted = match lab.spec(&own) {
        Ok(pod) => Some(pod.container()),
        Err(_no_pod) => None,
    };
    ensure!(process.container == wanted, "{own}: {record:?}");
    Ok(())
}

/// Connections that come later to listeners that are older have those listeners' processes for owners.
fn owners_of_older_listeners(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let address = lab.cluster().addresses(lab.spec("shop/web")?)[0];
    // Without the kernel's types a namespace has no name, and so a listener on every address none of its own.
    let bind = match hooks {
        Hooks::ClassicWithoutTypes => address.to_string(),
        Hooks::Btf | Hooks::Classic => "::".to_owned(),
    };
    let server = lab
        .pod("shop/web")?
        .serve(["--bind", &bind, "--tcp", "8080"])?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    lab.pod("shop/near")?
        .call_all([format!("tcp://{address}:8080")])?;
    let capture = agent.stop()?;
    let accepted = capture
        .records
        .iter()
        .find(|record| record.direction == Direction::Ingress)
        .context("no accept was seen")?;
    let process = accepted.process.as_ref().context("no process")?;
    ensure!(
        process.pid == server.pid(),
        "{} is not {process:?}",
        server.pid()
    );
    ensure!(process.comm == "lab-pod", "{process:?}");
    check_container(&lab, accepted)?;
    let edge = |direction| (Edge::new(direction, "shop/near", "shop/web TCP 8080"), 1);
    expect(
        &[capture],
        [Direction::Egress, Direction::Ingress].map(edge).into(),
    )
}

/// Agents that are started in a storm, one after the other.
const ROUNDS: u16 = 6;

/// Pods that connect at the same time.
const HOLDERS: usize = 4;

/// Connections that each of them makes while one agent starts.
const PER_ROUND: u64 = 3_000;

/// Microseconds between two connections of a pod: all of them take longer than an agent takes to start.
const PAUSE: u64 = 200;

/// While an agent starts, pods connect all the time, and keep what they have: each connection is seen by the hooks
/// or found, and none is both. What the round before made is there all the time.
fn none_twice_in_a_storm(hooks: Hooks) -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("load", "server");
    for holder in 0..HOLDERS {
        cluster.pod("load", &format!("holder-{holder}"));
    }
    let lab = Lab::start(cluster)?;
    let made = 2 * HOLDERS as u64 * PER_ROUND;
    let mut amid = 0;
    let mut last_round: Option<Storm> = None;
    for port in 7000..7000 + ROUNDS {
        let mut storm = Storm::prepare(&lab, port)?;
        let mut agent = Agent::spawn(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
        storm.start(&lab)?;
        agent
            .process()
            .wait_stderr(|line| line.contains("capturing"))?;
        for holder in &storm.holders {
            holder.wait_stdout(|line| line == "held")?;
        }
        let mut wanted = storm.edges();
        wanted.extend(last_round.iter().flat_map(Storm::edges));
        let found = open_before(&mut agent)?;
        let old = last_round.as_ref().map_or(0, |_| made);
        if found > old && found < old + made {
            amid += 1;
        }
        expect(&[agent.stop()?], wanted).with_context(|| format!("port {port}"))?;
        last_round = Some(storm);
    }
    ensure!(
        amid >= ROUNDS / 2,
        "only {amid} of {ROUNDS} agents came amid a storm"
    );
    Ok(())
}

/// Pods that connect to a server, and keep connections.
struct Storm {
    port: u16,
    holders: Vec<Process>,
    _server: Process,
}

impl Storm {
    fn prepare(lab: &Lab, port: u16) -> Result<Self> {
        let server = lab
            .pod("load/server")?
            .serve(["--keep", &port.to_string()])?;
        Ok(Self {
            port,
            holders: Vec::new(),
            _server: server,
        })
    }

    fn start(&mut self, lab: &Lab) -> Result<()> {
        let (count, pause) = ((PER_ROUND / 2).to_string(), PAUSE.to_string());
        let targets = [
            pod(lab, "load/server", 0, self.port)?,
            pod(lab, "load/server", 1, self.port)?,
        ];
        for holder in 0..HOLDERS {
            let place = lab.pod(&format!("load/holder-{holder}"))?;
            let options = ["--count", &count, "--pause", &pause];
            let targets = targets.iter().map(String::as_str);
            self.holders
                .push(place.start("hold", options.into_iter().chain(targets))?);
        }
        Ok(())
    }

    fn edges(&self) -> BTreeMap<Edge, u64> {
        let server = format!("load/server TCP {}", self.port);
        (0..HOLDERS)
            .flat_map(|holder| {
                let client = format!("load/holder-{holder}");
                [Direction::Egress, Direction::Ingress]
                    .map(|direction| (Edge::new(direction, &client, &server), PER_ROUND))
            })
            .collect()
    }
}

/// How many connections an agent says it has found when it came.
fn open_before(agent: &mut Agent) -> Result<u64> {
    let log = agent.process().stderr();
    let line = log
        .iter()
        .find(|line| line.contains("open before listeners="));
    line.and_then(|line| line.split_once(" connections="))
        .and_then(|(_, rest)| rest.split(' ').next()?.parse().ok())
        .with_context(|| log.join("\n"))
}

/// Without a cgroup root every process of the machine is the node's: the lab's are among them.
fn the_whole_machine(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let (_programs, wanted) = open_all(&lab)?;
    let options = AgentOptions::stdout("node-1").hooks(hooks).whole_machine();
    let capture = Agent::start(&lab, &options)?.stop()?;
    ensure!(capture.lost_nothing(), "lost: {:?}", capture.losses);
    // Only types lead to UDP sockets that are older.
    let unknown = capture.losses.get(UDP_OPEN_BEFORE_UNKNOWN);
    ensure!(hooks != Hooks::ClassicWithoutTypes || unknown == Some(&1));
    let seen = lab::truth::edges(&capture.records);
    for (edge, count) in wanted {
        // By address, what the other node's pods and processes do is somebody's who is not on this node.
        let own = match edge.direction {
            Direction::Egress => &edge.client,
            Direction::Ingress => &edge.server,
        };
        if own.starts_with("shop/") && !own.starts_with("shop/far") {
            ensure!(
                seen.get(&edge) == Some(&count),
                "{count} of {edge:?} are open, seen: {seen:#?}"
            );
        }
    }
    Ok(())
}

/// More edges are open than there is room for: what is not reported is lost, and counted.
fn no_room_is_counted(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let ports: Vec<String> = (7000..7200).map(|port: u16| port.to_string()).collect();
    let _server = lab.pod("shop/web")?.serve(["--keep", &ports.join(",")])?;
    let address = lab.cluster().addresses(lab.spec("shop/web")?)[0];
    let targets = ports.iter().map(|port| format!("tcp://{address}:{port}"));
    let _holder = lab.pod("shop/near")?.hold(targets)?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--map-entries", "16")
        .arg("--ring-bytes", "4096");
    let mut capture = Agent::start(&lab, &options)?.stop()?;
    capture.losses.remove(UDP_OPEN_BEFORE_UNKNOWN);
    let reported: u64 = capture.records.iter().map(|record| record.count).sum();
    let made = 2 * ports.len() as u64;
    let lost = capture
        .losses
        .get("flows_and_ring_full")
        .copied()
        .unwrap_or(0);
    if hooks == Hooks::ClassicWithoutTypes {
        // Read by the agent, which has room for connections, but in the kernel for four listeners only.
        let listeners = capture.losses.get("listeners_full").copied().unwrap_or(0);
        ensure!(
            reported == made && listeners >= ports.len() as u64 - 4 && capture.losses.len() == 1,
            "{reported} of {made}, {capture:?}"
        );
        return Ok(());
    }
    // Connections of others on this machine can be among the lost.
    ensure!(
        reported < made && made - reported <= lost,
        "{made} open, {reported} reported, {lost} lost"
    );
    Ok(())
}

/// Those that `/proc` has told of are forgotten as the others are: there is room for these or for those that come after, and
/// not for both.
fn older_listeners_that_close_make_room() -> Result<()> {
    const ROOM: u16 = 1_024;
    const MANY: u16 = ROOM / 8 * 5;
    let lab = Lab::start(cluster())?;
    let listen = |first: u16| {
        let ports: Vec<_> = (first..first + MANY).map(|port| port.to_string()).collect();
        lab.pod("shop/web")?.serve(["--deaf", &ports.join(",")])
    };
    let older = listen(10_000)?;
    let options = AgentOptions::stdout("node-1")
        .hooks(Hooks::ClassicWithoutTypes)
        .arg("--map-entries", &(4 * ROOM).to_string());
    let agent = Agent::start(&lab, &options)?;
    drop(older);
    let _younger = listen(20_000)?;
    expect(&[agent.stop()?], BTreeMap::new())
}

/// An accepted socket tells that it is one, also when its listener is gone, or has a queue of length 0 by which it could
/// not tell.
fn what_a_socket_tells_without_a_listener(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let _gone = lab.pod("shop/web")?.serve(["--once", "8080"])?;
    let _short = lab
        .pod("shop/other")?
        .serve(["--keep", "8081", "--backlog", "0"])?;
    let _to_gone = lab
        .pod("shop/near")?
        .hold([pod(&lab, "shop/web", 0, 8080)?])?;
    let _to_short = lab
        .pod("shop/near")?
        .hold([pod(&lab, "shop/other", 1, 8081)?])?;
    let capture = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?.stop()?;
    let edges = ["shop/web TCP 8080", "shop/other TCP 8081"].map(|server| {
        [Direction::Egress, Direction::Ingress]
            .map(|direction| (Edge::new(direction, "shop/near", server), 1))
    });
    expect(&[capture], edges.into_iter().flatten().collect())
}

/// Datagrams were sent before the agent came, and are answered after: who answers is the server, though nobody has seen who
/// spoke first. The clients are one that connects and one that does not.
fn answers_that_come_late(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let come = lab.folder().join("the-agent-has-come");
    let wait = format!("await {}", come.display());
    let server = lab.pod("shop/web")?.start(
        "play",
        [
            "udp s [::]:5353",
            "ready",
            wait.as_str(),
            "answer s",
            "answer s",
            "stay",
        ],
    )?;
    let addresses = lab.cluster().addresses(lab.spec("shop/web")?);
    let [v4, v6] = addresses.map(|address| SocketAddr::new(address, 5353));
    let connects = format!("connect c {v4}");
    let sends = format!("sendto c {v6}");
    let mut clients = Vec::new();
    for (pod, steps) in [
        (
            "shop/near",
            [
                "udp c 0.0.0.0:0",
                connects.as_str(),
                "send c",
                "ready",
                "recv c",
            ],
        ),
        (
            "shop/other",
            ["udp c [::]:0", sends.as_str(), "ready", "recv c", "close c"],
        ),
    ] {
        clients.push(lab.pod(pod)?.start("play", steps)?);
    }
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    std::fs::write(&come, "")?;
    let mut pids = vec![server.pid()];
    for client in &mut clients {
        pids.push(client.pid());
        let status = client.wait(patience(Duration::from_secs(20)))?;
        ensure!(status.success(), "{}", client.stderr().join("\n"));
    }
    let capture = agent.stop()?;
    for record in &capture.records {
        let pid = record.process.as_ref().map(|process| process.pid);
        ensure!(
            pid.is_some_and(|pid| pids.contains(&pid)),
            "none of {pids:?}: {record:?}"
        );
        check_container(&lab, record)?;
    }
    let edges = ["shop/near", "shop/other"].map(|client| {
        [Direction::Egress, Direction::Ingress]
            .map(|direction| (Edge::new(direction, client, "shop/web UDP 5353"), 1))
    });
    expect(&[capture], edges.into_iter().flatten().collect())
}
