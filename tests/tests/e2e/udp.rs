//! UDP: who speaks first to whom, and on which port.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use flow::record::Direction::{Egress, Ingress};
use lab::{Agent, AgentOptions, Capture, Cluster, Lab, cgroup, truth::Edge};

use crate::{
    Test, expect,
    stage::{MAPPED, Stage, V4, V6, any, both, edge, owner, steps},
};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests: Vec<Test> = CASES
        .into_iter()
        .map(|(name, check)| Test::new(format!("udp::{name}"), check))
        .collect();
    if cgroup::v1_mount().is_some() {
        tests.push(Test::new(
            "udp::not_without_cgroup_v2",
            not_without_cgroup_v2,
        ));
    } else {
        eprintln!("udp::not_without_cgroup_v2 is skipped: no cgroup v1 hierarchy is mounted here");
    }
    tests
}

type Check = fn() -> Result<()>;

const CASES: [(&str, Check); 20] = [
    ("resolvers", resolvers),
    ("resolvers_without_types", resolvers_without_types),
    ("a_service_address", a_service_address),
    (
        "a_service_address_from_its_own_node",
        a_service_address_from_its_own_node,
    ),
    ("a_sink_that_never_answers", a_sink_that_never_answers),
    ("one_socket_and_many_servers", one_socket_and_many_servers),
    ("both_speak_first", both_speak_first),
    (
        "a_server_with_a_socket_for_each_client",
        a_server_with_a_socket_for_each_client,
    ),
    (
        "a_server_with_a_socket_for_each_client_on_its_port",
        a_server_with_a_socket_for_each_client_on_its_port,
    ),
    ("who_is_shown_everything", who_is_shown_everything),
    ("to_many_and_to_oneself", to_many_and_to_oneself),
    ("a_connect_alone_is_nothing", a_connect_alone_is_nothing),
    ("whose_sockets", whose_sockets),
    ("whose_sockets_without_types", whose_sockets_without_types),
    ("no_memory_is_counted", no_memory_is_counted),
    ("a_full_map_is_counted", a_full_map_is_counted),
    ("the_silent_make_room", the_silent_make_room),
    ("a_late_answer_in_a_crowd", a_late_answer_in_a_crowd),
    (
        "what_found_no_room_is_not_turned_round",
        what_found_no_room_is_not_turned_round,
    ),
    ("one_name_one_peer", one_name_one_peer),
];

/// An agent with room for 128 peers, which is four times as much.
const CROWDED: [&str; 2] = ["--map-entries", "32"];

/// A server that answers from a wildcard socket; musl asks it from an unconnected socket, glibc from a connected one, over
/// IPv4, IPv6, and IPv4 on an IPv6 socket. Several questions of one socket are one conversation.
fn resolvers() -> Result<()> {
    ask_resolvers(Stage::new()?)
}

fn resolvers_without_types() -> Result<()> {
    ask_resolvers(Stage::without_types()?)
}

fn ask_resolvers(mut stage: Stage) -> Result<()> {
    stage.serves("one", 53)?;
    for family in [V4, V6, MAPPED] {
        let server = stage.at("one", family, 53)?;
        stage.plays(
            "client",
            &steps!["udp musl {}", any(family); "sendto musl {server}"; "answer musl";
                    "sendto musl {server}"; "recv musl";
                    "udp glibc {}", any(family); "connect glibc {server}"; "send glibc"; "recv glibc"],
        )?;
    }
    expect(&[stage.ends()?], both([("client", "one UDP 53", 6)]))
}

/// The client knows the service, the server its own port.
fn a_service_address() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.serves("one", 5353)?;
    for address in stage.lab.cluster().services[0].addresses() {
        let target = format!("udp://{}", SocketAddr::new(address, 53));
        stage.lab.pod("dns/client")?.call_all([target])?;
    }
    let service = Edge::new(Egress, "dns/client", "service dns/resolver UDP 5353");
    let wanted = [(service, 2), (edge(Ingress, "client", "one UDP 5353"), 2)];
    expect(&[stage.ends()?], wanted.into())
}

/// A node's own process calls the service: the translation is in its own namespace, so questions leave to the pod, and
/// answers come from the service. Connected or not, no answer is taken for a question.
fn a_service_address_from_its_own_node() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.serves("one", 5353)?;
    for (family, address) in stage.lab.cluster().services[0]
        .addresses()
        .into_iter()
        .enumerate()
    {
        let service = SocketAddr::new(address, 53);
        stage.lab.node("node-1").play(
            &steps!["udp musl {}", any(family); "sendto musl {service}"; "recv musl";
                    "udp glibc {}", any(family); "connect glibc {service}"; "send glibc"; "recv glibc"],
        )?;
    }
    let wanted = [Egress, Ingress]
        .map(|direction| (Edge::new(direction, "node node-1", "dns/one UDP 5353"), 4));
    expect(&[stage.ends()?], wanted.into())
}

/// As statsd: connected and unconnected senders, and a reader that does not ask who they are.
fn a_sink_that_never_answers() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.starts(
        "one",
        &steps!["udp sink [::]:8125"; "ready"; "recv sink"; "recv sink"; "recv sink"; "recv sink"; "stay"],
    )?;
    for family in [V4, V6] {
        let sink = stage.at("one", family, 8125)?;
        stage.plays(
            "client",
            &steps!["udp a {}", any(family); "sendto a {sink}"; "udp b {}", any(family); "connect b {sink}"; "send b"],
        )?;
    }
    expect(&[stage.ends()?], both([("client", "one UDP 8125", 4)]))
}

fn one_socket_and_many_servers() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut steps = steps!["udp a 0.0.0.0:0"].to_vec();
    for (pod, port) in [("one", 53), ("two", 123), ("three", 500), ("three", 4500)] {
        stage.serves(pod, port)?;
        let server = stage.at(pod, V4, port)?;
        steps.extend(steps!["sendto a {server}"; "answer a"; "recv a"]);
    }
    stage.plays("client", &steps)?;
    let wanted = both([
        ("client", "one UDP 53", 1),
        ("client", "two UDP 123", 1),
        ("client", "three UDP 500", 1),
        ("client", "three UDP 4500", 1),
    ]);
    expect(&[stage.ends()?], wanted)
}

/// NTP between equals: either has spoken before it hears of the other, both from port 123. Each is the other's client.
fn both_speak_first() -> Result<()> {
    let mut stage = Stage::new()?;
    let (one, two) = (stage.at("one", V4, 123)?, stage.at("two", V4, 123)?);
    // The first datagram finds nobody there.
    stage.starts(
        "one",
        &steps!["udp a 0.0.0.0:123"; "sendto a {two}"; "ready"; "answer a"; "stay"],
    )?;
    stage.plays(
        "two",
        &steps!["udp a 0.0.0.0:123"; "sendto a {one}"; "recv a"],
    )?;
    let wanted = [
        (edge(Egress, "one", "two UDP 123"), 1),
        (edge(Egress, "two", "one UDP 123"), 1),
    ];
    expect(&[stage.ends()?], wanted.into())
}

/// As TFTP: the first datagram goes to the port that is known, the answer comes from another, and so both ends are what they
/// were, with a port more.
fn a_server_with_a_socket_for_each_client() -> Result<()> {
    let mut stage = Stage::new()?;
    let (server, client) = (stage.at("one", V4, 69)?, stage.at("client", V4, 4000)?);
    stage.starts(
        "one",
        &steps!["udp known 0.0.0.0:69"; "ready"; "recv known"; "udp own 0.0.0.0:6969"; "connect own {client}"; "send own"; "recv own"; "stay"],
    )?;
    stage.plays(
        "client",
        &steps!["udp a 0.0.0.0:4000"; "sendto a {server}"; "answer a"],
    )?;
    let wanted = both([("client", "one UDP 69", 1), ("one", "client UDP 4000", 1)]);
    expect(&[stage.ends()?], wanted)
}

/// As servers of DTLS do it: a client is asked back by a socket that is connected to it, on the port that it has called. What such
/// a socket says to others that have not called is a call of its own.
fn a_server_with_a_socket_for_each_client_on_its_port() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.serves("two", 53)?;
    for family in [V4, V6] {
        let [server, client] =
            [("one", 4433), ("client", 4000)].map(|(pod, port)| stage.at(pod, family, port));
        let (server, client, other) = (server?, client?, stage.at("two", family, 53)?);
        let any = if family == V4 { "0.0.0.0" } else { "[::]" };
        stage.starts(
            "one",
            &steps!["udp-shared known {any}:4433"; "ready"; "recv known";
                    "udp-shared own {any}:4433"; "connect own {client}"; "send own"; "recv own"; "send own";
                    "udp-shared further {any}:4433"; "connect further {other}"; "send further"; "recv further"; "stay"],
        )?;
        stage.plays(
            "client",
            &steps!["udp a {any}:4000"; "sendto a {server}"; "answer a"; "recv a"; "pause 300"; "close a"],
        )?;
    }
    let wanted = both([("client", "one UDP 4433", 2), ("one", "two UDP 53", 2)]);
    expect(&[stage.ends()?], wanted)
}

/// A raw socket is shown what other sockets send and receive, and takes part in nothing.
fn who_is_shown_everything() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.serves("one", 53)?;
    let (server, own) = (stage.at("one", V4, 53)?, stage.at("client", V4, 0)?);
    stage.plays(
        "client",
        &steps!["udp-raw r {own}"; "udp a 0.0.0.0:0"; "sendto a {server}"; "recv a"; "recv r"],
    )?;
    expect(&[stage.ends()?], both([("client", "one UDP 53", 1)]))
}

/// Multicast and broadcast of every kind, loopback, and a pod's own address: no edges.
fn to_many_and_to_oneself() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.starts(
        "one",
        &steps!["udp a 0.0.0.0:5000"; "join a 239.1.2.3"; "udp b [::]:5001"; "join b ff02::1:2"; "ready"; "recv a"; "recv a"; "recv a"; "recv b"; "stay"],
    )?;
    let own = stage.at("client", V4, 6000)?;
    let mut everybody = own.ip().to_string();
    everybody.truncate(everybody.rfind('.').context("an IPv4 address")?);
    stage.plays(
        "client",
        &steps!["udp a 0.0.0.0:6000"; "broadcast a"; "sendto a 239.1.2.3:5000"; "sendto a 255.255.255.255:5000";
                "sendto a {everybody}.255:5000"; "sendto a 127.0.0.1:6000"; "recv a"; "sendto a {own}"; "recv a";
                "udp b [::]:0"; "sendto b [ff02::1:2]:5001"; "pause 300"],
    )?;
    expect(&[stage.ends()?], BTreeMap::new())
}

/// What resolvers do to sort the addresses of a name (RFC 6724), Go with port 53.
fn a_connect_alone_is_nothing() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.serves("one", 53)?;
    let mut steps = Vec::new();
    for family in [V4, V6, MAPPED] {
        let server = stage.at("one", family, 53)?;
        steps.extend(steps!["udp a {}", any(family); "connect a {server}"; "close a"]);
    }
    stage.plays("client", &steps)?;
    expect(&[stage.ends()?], BTreeMap::new())
}

/// The sender's process and container at one end, the one that bound the socket at the other.
fn whose_sockets() -> Result<()> {
    owners_of_sockets(Stage::new()?)
}

/// The process that bound the socket is known also where the sender's cannot be read.
fn whose_sockets_without_types() -> Result<()> {
    owners_of_sockets(Stage::without_types()?)
}

/// A process may not keep anything with its sockets: what they say and hear is counted, and that it is not known who bound them.
fn no_memory_is_counted() -> Result<()> {
    let mut stage = Stage::new()?;
    stage.starts(
        "one",
        &steps!["sysctl net/core/optmem_max 0"; "udp a 0.0.0.0:53"; "ready"; "answer a"; "stay"],
    )?;
    let server = stage.at("one", V4, 53)?;
    stage.plays(
        "client",
        &steps!["udp a 0.0.0.0:0"; "sendto a {server}"; "recv a"],
    )?;
    let mut capture = stage.ends()?;
    // When it was bound, and when it was asked.
    let refused = capture.losses.remove("socket_storage_refused");
    ensure!(refused == Some(2), "{refused:?}: {:?}", capture.losses);
    let record = capture.records.iter().find(|it| it.direction == Ingress);
    let pid = record
        .and_then(|record| record.process.as_ref())
        .map(|process| process.pid);
    ensure!(pid.is_none_or(|pid| pid == 0), "{record:?}");
    expect(&[capture], both([("client", "one UDP 53", 1)]))
}

fn owners_of_sockets(mut stage: Stage) -> Result<()> {
    let listens = stage.starts(
        "one",
        &steps!["udp a 0.0.0.0:53"; "ready"; "recv a"; "stay"],
    )?;
    let server = stage.at("one", V4, 53)?;
    let calls = stage.starts(
        "client",
        &steps!["udp a 0.0.0.0:0"; "sendto a {server}"; "ready"; "stay"],
    )?;
    let capture = stage.ends()?;
    for (direction, wanted) in [(Egress, calls), (Ingress, listens)] {
        let owner = owner(&capture, direction)?;
        ensure!(owner == wanted, "{direction}: {owner:?}, not {wanted:?}");
    }
    expect(&[capture], both([("client", "one UDP 53", 1)]))
}

/// Conversations that there was no room for are counted, neither more nor fewer.
fn a_full_map_is_counted() -> Result<()> {
    const MADE: u64 = 400;
    let mut stage = Stage::build(|options| options.arg(CROWDED[0], CROWDED[1]))?;
    stage.starts("one", &steps!["udp sink 0.0.0.0:8125"; "ready"; "stay"])?;
    let sink = stage.at("one", V4, 8125)?;
    // Connected sockets, and then one that names the address with each datagram.
    stage.plays(
        "client",
        &steps!["burst {} {sink}", MADE - 1; "udp late 0.0.0.0:0"; "sendto late {sink}"; "pause 100"],
    )?;
    let capture = stage.ends()?;
    let reported: u64 = capture.records.iter().map(|record| record.count).sum();
    let lost = |reason: &str| capture.losses.get(reason).copied().unwrap_or(0);
    ensure!(
        reported > 0 && reported + lost("udp_peers_full") == 2 * MADE,
        "{reported} reported, losses {:?}",
        capture.losses
    );
    ensure!(lost("udp_names_full") == 1, "{:?}", capture.losses);
    Ok(())
}

/// In a map that is nearly full, peers whose question was answered are forgotten after seconds: what comes then from the same
/// ports is a conversation of its own, and finds room.
fn the_silent_make_room() -> Result<()> {
    let mut stage = Stage::build(|options| options.arg(CROWDED[0], CROWDED[1]))?;
    stage.serves("one", 7)?;
    let server = stage.at("one", V4, 7)?;
    stage.plays(
        "client",
        &steps!["asks 54 {server}"; "pause 11000"; "asks 54 {server}"],
    )?;
    let capture = without_listeners(stage.ends()?);
    expect(&[capture], both([("client", "one UDP 7", 108)]))
}

/// Whoever waits for an answer is known for longer than seconds, also in a map that is nearly full: the answer makes the server
/// no client.
fn a_late_answer_in_a_crowd() -> Result<()> {
    let mut stage = Stage::build(|options| options.arg(CROWDED[0], CROWDED[1]))?;
    let client = stage.at("client", V4, 4000)?;
    let slow = stage.at("one", V4, 53)?;
    let sink = stage.at("two", V4, 8125)?;
    stage.starts(
        "one",
        &steps!["udp a 0.0.0.0:53"; "ready"; "recv a"; "pause 8500"; "sendto a {client}"; "stay"],
    )?;
    stage.starts("two", &steps!["udp sink 0.0.0.0:8125"; "ready"; "stay"])?;
    stage.plays(
        "client",
        &steps!["udp a 0.0.0.0:4000"; "sendto a {slow}"; "burst 55 {sink}"; "recv a"; "pause 100"],
    )?;
    let wanted = both([("client", "one UDP 53", 1), ("client", "two UDP 8125", 55)]);
    expect(&[without_listeners(stage.ends()?)], wanted)
}

/// A question that there was no room for, whose answer finds some: it is lost at both ends, and none of them is what it is not.
fn what_found_no_room_is_not_turned_round() -> Result<()> {
    let mut stage = Stage::build(|options| options.arg(CROWDED[0], CROWDED[1]))?;
    let client = stage.at("client", V4, 4000)?;
    let slow = stage.at("one", V4, 53)?;
    stage.starts(
        "one",
        &steps!["udp a 0.0.0.0:53"; "ready"; "recv a"; "pause 8500"; "sendto a {client}"; "stay"],
    )?;
    stage.serves("two", 7)?;
    let server = stage.at("two", V4, 7)?;
    stage.plays(
        "client",
        &steps!["asks 70 {server}"; "udp a 0.0.0.0:4000"; "sendto a {slow}"; "recv a"; "asks 8 {server}"],
    )?;
    let capture = stage.ends()?;
    let lost = |reason: &str| capture.losses.get(reason).copied().unwrap_or(0);
    // The question at both ends, and the answer at both.
    ensure!(
        lost("udp_peers_full") >= 4 && lost("udp_names_full") >= 1,
        "{:?}",
        capture.losses
    );
    let seen = lab::truth::edges(&capture.records);
    let right = both([("client", "two UDP 7", 0)]);
    ensure!(seen.keys().eq(right.keys()), "{seen:?}");
    Ok(())
}

/// Where nothing is translated, what a process names and where its datagram goes is one peer: each of these questions from a
/// socket that is not connected takes one place at either end, so there is room for all.
fn one_name_one_peer() -> Result<()> {
    let mut stage = Stage::build(|options| options.arg(CROWDED[0], CROWDED[1]))?;
    stage.serves("one", 53)?;
    let server = stage.at("one", V4, 53)?;
    let mut steps = Vec::new();
    // The system might choose a port twice, and the server would know its peer.
    for port in 5_000..5_060 {
        steps.extend(steps!["udp a 0.0.0.0:{port}"; "sendto a {server}"; "recv a"]);
    }
    stage.plays("client", &steps)?;
    let capture = without_listeners(stage.ends()?);
    expect(&[capture], both([("client", "one UDP 53", 60)]))
}

/// The map of listeners is as small, and the agent sees those of everybody on this machine.
fn without_listeners(mut capture: Capture) -> Capture {
    capture.losses.remove("listeners_full");
    capture
}

/// The agent says so, and goes on with TCP.
fn not_without_cgroup_v2() -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("dns", "client");
    cluster.pod("dns", "one");
    let lab = Lab::start(cluster)?;
    let root = cgroup::v1_mount().context("no cgroup v1 hierarchy")?;
    let options = AgentOptions::stdout("node-1").cgroup_root(&root);
    let mut agent = Agent::start(&lab, &options)?;
    let said = agent
        .process()
        .stderr()
        .iter()
        .any(|line| line.contains("UDP is not captured"));
    ensure!(said, "the agent did not say that UDP is not captured");
    let _server = lab.pod("dns/one")?.serve(["--tcp", "53", "--udp", "53"])?;
    let address = lab.cluster().addresses(lab.spec("dns/one")?)[V4];
    let target = |transport: &str| format!("{transport}://{}", SocketAddr::new(address, 53));
    lab.pod("dns/client")?
        .call_all([target("tcp"), target("udp")])?;
    let capture = agent.stop()?;
    let seen = lab::truth::edges(&capture.records);
    let client = |edge: &&Edge| edge.client == "dns/client" && edge.direction == Egress;
    let seen: Vec<_> = seen.keys().filter(client).collect();
    ensure!(
        seen.len() == 1 && seen[0].server == "dns/one TCP 53",
        "{seen:?}"
    );
    ensure!(
        capture.losses.keys().eq(["udp_not_captured"]),
        "{:?}",
        capture.losses
    );
    Ok(())
}
