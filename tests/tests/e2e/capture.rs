//! Connections that come about: every one is counted, once at each end.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use aya::maps::Array;
use flow::record::{Direction, FlowRecord};
use lab::{Agent, AgentOptions, Calls, Cluster, Hooks, Lab, Process, pace::share, truth::Edge};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    sys::signal::Signal,
    unistd::Pid,
};

use crate::{Test, exactly, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for hooks in [Hooks::Btf, Hooks::Classic, Hooks::ClassicWithoutTypes] {
        let name = |test: &str| format!("capture::{test}[{hooks}]");
        tests.extend([
            Test::new(name("counts_are_exact"), move || counts_are_exact(hooks)),
            Test::new(name("an_accept_that_blocks_already"), move || {
                an_accept_that_blocks_already(hooks)
            }),
            Test::new(name("thousands_that_block_in_accept"), move || {
                thousands_that_block_in_accept(hooks)
            }),
            Test::new(name("listeners_of_one_port"), move || {
                listeners_of_one_port(hooks)
            }),
            Test::alone(name("overflow_is_exact"), move || overflow_is_exact(hooks)),
            Test::alone(name("what_is_lost_is_counted"), move || {
                exactly(|| what_is_lost_is_counted(hooks))
            }),
            Test::alone(name("owners_that_find_no_room_are_counted"), move || {
                exactly(|| owners_that_find_no_room_are_counted(hooks))
            }),
        ]);
        if hooks != Hooks::Btf {
            tests.push(Test::alone(
                name("what_is_left_out_is_counted"),
                move || exactly(|| what_is_left_out_is_counted(hooks)),
            ));
        }
    }
    tests
}

/// Processes that call at the same time.
const CALLERS: usize = 8;

/// Ports that each of them calls.
const PORTS: std::ops::Range<u16> = 7000..7050;

/// How often each of them calls each port.
fn rounds() -> u64 {
    share(250)
}

/// The ways to write a server's addresses; callers take turns.
const FORMS: [fn([IpAddr; 2], u16) -> String; 3] = [
    |[v4, _], port| format!("tcp://{v4}:{port}"),
    |[_, v6], port| format!("tcp://[{v6}]:{port}"),
    |[v4, _], port| format!("tcp://[::ffff:{v4}]:{port}"),
];

/// 100,000 connections (fewer on a slow machine) over IPv4, IPv6 and IPv4 on IPv6 sockets, while the map is drained.
fn counts_are_exact(hooks: Hooks) -> Result<()> {
    let (lab, _server) = lab_with_server()?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let rounds = rounds();
    call_from_all(&lab, rounds)?;
    let capture = agent.stop()?;
    let wanted = wanted(&lab, rounds)?;
    // One drain has one record of each flow.
    ensure!(
        capture.records.len() > wanted.len(),
        "{} records of {} edges: the map was drained but once",
        capture.records.len(),
        wanted.len()
    );

    let with_v4 = (0..CALLERS)
        .filter(|caller| caller % FORMS.len() != 1)
        .count() as u64;
    let per_caller = PORTS.len() as u64 * rounds;
    for (direction, address) in [
        (
            Direction::Egress,
            (|record| record.tuple.dst_addr) as fn(&FlowRecord) -> IpAddr,
        ),
        (Direction::Ingress, |record| record.tuple.src_addr),
    ] {
        let records = capture.records.iter();
        let v4: u64 = records
            .filter(|record| record.direction == direction && address(record).is_ipv4())
            .map(|record| record.count)
            .sum();
        let made = with_v4 * per_caller;
        ensure!(
            v4 <= made && made - v4 <= capture.skipped(),
            "{v4} IPv4 connections were seen from the {direction:?} side, not {made}"
        );
    }
    expect(&[capture], wanted)
}

/// How often each port is called where it is not about the number of calls.
fn few_rounds() -> u64 {
    share(10)
}

/// More distinct flows than the kernel's map holds: what exceeds it comes through the ring buffer, and the counts
/// stay exact. There is room for all listeners, of which there may be a quarter as many.
fn overflow_is_exact(hooks: Hooks) -> Result<()> {
    let (lab, _server) = lab_with_server()?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--map-entries", "256")
        .arg("--ring-bytes", &(16 << 20).to_string());
    let agent = Agent::start(&lab, &options)?;
    call_from_all(&lab, few_rounds())?;
    expect(&[agent.stop()?], wanted(&lab, few_rounds())?)
}

/// The map and the ring are both too small: not everything is reported, and what is missing is counted as lost.
fn what_is_lost_is_counted(hooks: Hooks) -> Result<()> {
    let (lab, _server) = lab_with_server()?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--map-entries", "16")
        .arg("--ring-bytes", "4096");
    let agent = Agent::start(&lab, &options)?;
    call_from_all(&lab, few_rounds())?;
    let capture = agent.stop()?;
    let made: u64 = wanted(&lab, few_rounds())?.values().sum();
    let reported: u64 = capture.records.iter().map(|record| record.count).sum();
    let lost = capture.losses.get("flows_and_ring_full").copied();
    let lost = lost.with_context(|| format!("losses: {:?}", capture.losses))?;
    let skipped = capture.skipped();
    ensure!(
        reported > 0 && lost > 0 && reported + lost <= made && reported + lost + skipped >= made,
        "{made} made, {reported} reported, {lost} lost, {skipped} runs left out"
    );
    Ok(())
}

/// More listeners than the map of them takes, and more calls than map and ring take together: the agent says how many
/// owners it does not know, to the last one.
fn owners_that_find_no_room_are_counted(hooks: Hooks) -> Result<()> {
    /// Listeners that there is room for: a quarter as many as flows.
    const LISTENERS: usize = 4;
    const CALLS: u64 = 200;
    // This machine's own listeners may have taken their room before, so a first agent sees as many as there is room for.
    let ports = PORTS.map(|port| port.to_string()).collect::<Vec<_>>();
    let few = owners_lost(hooks, &ports[..LISTENERS], 0)?;
    let all = owners_lost(hooks, &ports, CALLS)?;
    // The ring buffer holds events of 96 bytes with heads of 8, and is never quite full.
    let room = match hooks {
        Hooks::ClassicWithoutTypes => MAP_ENTRIES,
        _ => MAP_ENTRIES + (RING_BYTES - 1) / (96 + 8),
    };
    let lost = |reason: &str| {
        let of = |losses: &BTreeMap<String, u64>| losses.get(reason).copied().unwrap_or(0);
        of(&all).checked_sub(of(&few))
    };
    ensure!(
        lost("listeners_full") == Some((ports.len() - LISTENERS) as u64)
            && lost("connect_owners_full") == Some(CALLS - room),
        "with few: {few:?}, with all: {all:?}"
    );
    Ok(())
}

const MAP_ENTRIES: u64 = 16;
const RING_BYTES: u64 = 4096;

/// What an agent with little room loses while a server starts to listen and a caller's calls hang: theirs are the owners that are
/// all to be remembered at once. It drains nothing meanwhile.
fn owners_lost(hooks: Hooks, ports: &[String], calls: u64) -> Result<BTreeMap<String, u64>> {
    let lab = Lab::start(callers_and_a_server())?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--map-entries", &MAP_ENTRIES.to_string())
        .arg("--ring-bytes", &RING_BYTES.to_string());
    let mut agent = Agent::start(&lab, &options)?;
    // What this machine had open before takes room until the first drain.
    thread::sleep(Duration::from_millis(1_500));
    let _server = lab.pod("load/server")?.serve(["--tcp", &ports.join(",")])?;
    lab.node("node-1").nft(
        "table inet held { chain forward { type filter hook forward priority filter; \n\
             tcp flags & (syn|ack) == syn drop\n}\n}",
    )?;
    let address = lab.cluster().addresses(lab.spec("load/server")?)[0];
    // At least one step is asked for.
    let mut steps = vec!["pause 1".to_owned()];
    for port in 200..200 + calls {
        steps.push(format!("tcp a{port} 0.0.0.0:0"));
        steps.push(format!("begin a{port} {address}:{port}"));
    }
    agent.process().signal(Signal::SIGSTOP)?;
    lab.pod("load/caller-0")?.play(&steps)?;
    agent.process().signal(Signal::SIGCONT)?;
    Ok(agent.stop()?.losses)
}

/// Handshakes end on a processor that reads maps all the time, where the kernel leaves classic programs out: the agent says how
/// many ends of connections it has not seen.
fn what_is_left_out_is_counted(hooks: Hooks) -> Result<()> {
    const PORT: u16 = 7000;
    let calls = share(10_000).max(2_000);
    let lab = Lab::start(callers_and_a_server())?;
    let server = lab.pod("load/server")?;
    let _listening = server.serve(["--tcp", &PORT.to_string()])?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    // What is missing otherwise are owners: a call begins on its caller's processor, and that reads nothing.
    server.steer_packets_to(READING)?;
    let caller = lab.pod("load/caller-0")?.on_processor(1 - READING);
    let target = FORMS[0](lab.cluster().addresses(lab.spec("load/server")?), PORT);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read_maps_until(&done));
        let called = caller.call_all(["--abort", "--count", &calls.to_string(), &target]);
        done.store(true, Ordering::Relaxed);
        let read = reader
            .join()
            .map_err(|_panic| anyhow!("the reader panicked"))?;
        called.and(read)
    })?;
    let capture = agent.stop()?;
    let reported: u64 = capture.records.iter().map(|record| record.count).sum();
    let skipped = capture.skipped();
    // Some sandboxes' kernels run no tracing program, and count none as left out, in a softirq that interrupts the first process.
    let unknown = (2 * calls).checked_sub(reported + skipped);
    ensure!(
        skipped > 0
            && unknown.is_some_and(|unknown| unknown <= skipped / 10)
            && capture.lost_nothing(),
        "{calls} calls, {reported} ends reported, {skipped} runs left out: {:?}",
        capture.losses
    );
    Ok(())
}

/// The processor that reads maps.
const READING: usize = 1;

/// Reads a map again and again. While its value is copied, the kernel runs no classic program on this processor
/// (`bpf_map_copy_value` in `kernel/bpf/syscall.c`), so it is a large one.
fn read_maps_until(done: &AtomicBool) -> Result<()> {
    let mut here = CpuSet::new();
    here.set(READING)?;
    sched_setaffinity(Pid::from_raw(0), &here)?;
    let map = Array::<_, [u8; 1 << 14]>::create(1, 0)?;
    while !done.load(Ordering::Relaxed) {
        map.get(&0, 0)?;
    }
    Ok(())
}

fn lab_with_server() -> Result<(Lab, Process)> {
    let lab = Lab::start(callers_and_a_server())?;
    let ports = PORTS.map(|port| port.to_string()).collect::<Vec<_>>();
    let server = lab.pod("load/server")?.serve(["--tcp", &ports.join(",")])?;
    Ok((lab, server))
}

/// A server that sat in `accept` before there was an agent: its next connection is seen, and it is named.
fn an_accept_that_blocks_already(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(callers_and_a_server())?;
    let server = lab.pod("load/server")?.serve(["--tcp", "7000"])?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let address = lab.cluster().addresses(lab.spec("load/server")?)[0];
    lab.pod("load/caller-0")?
        .call_all([format!("tcp://{address}:7000")])?;
    let capture = agent.stop()?;
    let accepted = capture
        .records
        .iter()
        .find(|record| record.direction == Direction::Ingress)
        .context("no accept was seen")?;
    let container = lab.spec("load/server")?.container();
    let known = accepted.process.as_ref();
    let known = known.and_then(|process| process.container.as_ref());
    // Only the kernel's types tell whose a listener is that is older than the agent.
    let wanted = (hooks != Hooks::ClassicWithoutTypes).then_some(&container);
    ensure!(
        known == wanted,
        "{:?} is not container {wanted:?} (pid {})",
        accepted.process,
        server.pid()
    );
    let ends = ("load/caller-0", "load/server TCP 7000");
    let edge = |direction| (Edge::new(direction, ends.0, ends.1), 1);
    expect(
        &[capture],
        [Direction::Egress, Direction::Ingress].map(edge).into(),
    )
}

/// Whoever waits in `accept`, and however many do, connections are accepted by the kernel.
fn thousands_that_block_in_accept(hooks: Hooks) -> Result<()> {
    const CALLS: u64 = 300;
    let acceptors = share(10_000).to_string();
    let lab = Lab::start(callers_and_a_server())?;
    let server = lab.pod("load/server")?;
    let _server = server.serve(["--tcp", "7000", "--acceptors", &acceptors])?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let address = lab.cluster().addresses(lab.spec("load/server")?)[0];
    let target = format!("tcp://{address}:7000");
    lab.pod("load/caller-0")?
        .call_all(["--count", &CALLS.to_string(), &target])?;
    let ends = ("load/caller-0", "load/server TCP 7000");
    let edge = |direction| (Edge::new(direction, ends.0, ends.1), CALLS);
    expect(
        &[agent.stop()?],
        [Direction::Egress, Direction::Ingress].map(edge).into(),
    )
}

/// Two pods on a node listen on the same port of every address: each accepts its own connections.
fn listeners_of_one_port(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(callers_and_a_server())?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let servers = ["load/server", "load/caller-1", "load/caller-2"];
    let mut programs = Vec::new();
    for server in servers {
        programs.push(lab.pod(server)?.serve(["--tcp", "7000"])?);
    }
    let mut wanted = BTreeMap::new();
    for (server, count) in servers.into_iter().zip(1..) {
        let address = lab.cluster().addresses(lab.spec(server)?)[0];
        let count_text = format!("{count}");
        let target = format!("tcp://{address}:7000");
        lab.pod("load/caller-0")?
            .call_all(["--count", &count_text, &target])?;
        for direction in [Direction::Egress, Direction::Ingress] {
            let edge = Edge::new(direction, "load/caller-0", &format!("{server} TCP 7000"));
            wanted.insert(edge, count);
        }
    }
    let capture = agent.stop()?;
    for record in &capture.records {
        let own = match record.direction {
            Direction::Egress => "load/caller-0".to_owned(),
            Direction::Ingress => record.dst.to_string(),
        };
        let container = lab.spec(&own)?.container();
        let process = record.process.as_ref();
        let named = process.and_then(|process| process.container.as_ref());
        let may_be_unknown = hooks == Hooks::ClassicWithoutTypes;
        ensure!(
            named == Some(&container) || (named.is_none() && may_be_unknown),
            "{own} has container {container}: {record:?}"
        );
    }
    expect(&[capture], wanted)
}

fn callers_and_a_server() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("load", "server");
    for caller in 0..CALLERS {
        cluster.pod("load", &format!("caller-{caller}"));
    }
    cluster
}

/// Every caller calls every port `rounds` times, all callers at once.
fn call_from_all(lab: &Lab, rounds: u64) -> Result<()> {
    let addresses = lab.cluster().addresses(lab.spec("load/server")?);
    let mut programs = Vec::new();
    for caller in 0..CALLERS {
        let form = FORMS[caller % FORMS.len()];
        let args = ["--abort", "--count", &rounds.to_string()].map(str::to_owned);
        let targets = PORTS.map(|port| form(addresses, port));
        let place = lab.pod(&format!("load/caller-{caller}"))?;
        programs.push(place.start("call", args.into_iter().chain(targets))?);
    }
    for mut program in programs {
        let calls = Calls::of(&mut program)?;
        let answered = PORTS.len() as u64 * rounds;
        ensure!(
            calls
                == Calls {
                    answered,
                    ..Calls::default()
                },
            "not every call was answered: {calls:?}"
        );
    }
    Ok(())
}

fn wanted(lab: &Lab, rounds: u64) -> Result<BTreeMap<Edge, u64>> {
    let server = lab.spec("load/server")?.path();
    let edges = (0..CALLERS).flat_map(|caller| {
        PORTS.flat_map({
            let server = server.clone();
            move |port| {
                let (client, server) = (
                    format!("load/caller-{caller}"),
                    format!("{server} TCP {port}"),
                );
                [Direction::Egress, Direction::Ingress]
                    .map(|direction| (Edge::new(direction, &client, &server), rounds))
            }
        })
    });
    Ok(edges.collect())
}
