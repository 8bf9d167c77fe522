//! `--mode connections`: each connection for itself.

use std::{collections::BTreeMap, fs, net::SocketAddr, thread, time::Duration};

use anyhow::{Result, ensure};
use flow::record::{ConnectionEvent, Direction};
use lab::{Agent, AgentOptions, Capture, Cluster, Hooks, Lab, pace::patience, truth::Edge};
use nix::sys::signal::Signal;

use crate::{HOOKS, Test, exactly, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for hooks in HOOKS {
        tests.push(Test::new(
            format!("connections::each_for_itself[{hooks}]"),
            move || exactly(|| each_for_itself(hooks)),
        ));
        tests.push(Test::new(
            format!("connections::each_call_that_is_refused[{hooks}]"),
            move || exactly(|| each_call_that_is_refused(hooks)),
        ));
        tests.push(Test::alone(
            format!("connections::more_than_the_ring_holds[{hooks}]"),
            move || exactly(|| more_than_the_ring_holds(hooks)),
        ));
        tests.push(Test::alone(
            format!("connections::more_open_than_there_is_room_for[{hooks}]"),
            move || exactly(|| more_open_than_there_is_room_for(hooks)),
        ));
    }
    tests.push(Test::new(
        "connections::names_that_never_come",
        names_that_never_come,
    ));
    tests
}

const CALLS: u64 = 20;

fn stage() -> Result<Lab> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client");
    cluster.pod("shop", "server");
    Lab::start(cluster)
}

fn call(lab: &Lab, count: u64) -> Result<()> {
    let _server = lab.pod("shop/server")?.serve(["--tcp", "7000"])?;
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let target = format!("tcp://{}", SocketAddr::new(address, 7000));
    lab.pod("shop/client")?
        .call_all(["--count", &count.to_string(), &target])?;
    Ok(())
}

fn edges(count: u64) -> BTreeMap<Edge, u64> {
    [Direction::Egress, Direction::Ingress]
        .map(|direction| {
            (
                Edge::new(direction, "shop/client", "shop/server TCP 7000"),
                count,
            )
        })
        .into()
}

/// Both ends report the beginning and the end of each connection under the same client's port, with a byte each way.
fn each_for_itself(hooks: Hooks) -> Result<()> {
    let lab = stage()?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--mode", "connections");
    let agent = Agent::start(&lab, &options)?;
    call(&lab, CALLS)?;
    let capture = agent.stop()?;
    expect(std::slice::from_ref(&capture), edges(CALLS))?;
    // Whose run that was is not known, so some story would lack a word.
    ensure!(capture.skipped() == 0, "{:?}", capture.losses);
    let mut stories: BTreeMap<(u16, &str), Vec<ConnectionEvent>> = BTreeMap::new();
    for record in &capture.records {
        let Some(connection) = record.connection else {
            anyhow::bail!("not told apart: {record:?}");
        };
        let story = stories
            .entry((record.tuple.src_port, record.direction.name()))
            .or_default();
        story.push(connection.event);
        let closed = connection.event == ConnectionEvent::Close;
        let bytes = (connection.bytes_sent, connection.bytes_received);
        ensure!(
            record.count == u64::from(!closed)
                && (bytes == (0, 0)) != closed
                && (!closed || (bytes.0 == 1 && (1..=2).contains(&bytes.1))),
            "{record:?}"
        );
        ensure!(
            Duration::from_nanos(connection.duration_ns) < patience(Duration::from_secs(5))
                && (connection.duration_ns > 0 || connection.event == ConnectionEvent::Accept),
            "{record:?}"
        );
    }
    ensure!(
        stories.len() as u64 == 2 * CALLS,
        "{} stories",
        stories.len()
    );
    for ((port, direction), story) in stories {
        let begins = match direction {
            "egress" => ConnectionEvent::Connect,
            _ => ConnectionEvent::Accept,
        };
        ensure!(
            port != 0 && story == [begins, ConnectionEvent::Close],
            "{port} {direction}: {story:?}"
        );
    }
    Ok(())
}

/// A call that is refused has its port too, whether the process or the kernel has chosen it.
fn each_call_that_is_refused(hooks: Hooks) -> Result<()> {
    const OWN: u16 = 6000;
    let lab = stage()?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--mode", "connections");
    let agent = Agent::start(&lab, &options)?;
    let server = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    lab.pod("shop/client")?.play([
        format!("tcp own 0.0.0.0:{OWN}"),
        format!("refused own {server}:7000"),
        "tcp any 0.0.0.0:0".to_owned(),
        format!("refused any {server}:7000"),
    ])?;
    let capture = agent.stop()?;
    let failed = Edge::failed("shop/client", "shop/server TCP 7000");
    expect(std::slice::from_ref(&capture), [(failed, 2)].into())?;
    ensure!(capture.skipped() == 0, "{:?}", capture.losses);
    let ports = capture.records.iter().map(|record| record.tuple.src_port);
    let others: Vec<_> = ports.clone().filter(|port| *port != OWN).collect();
    ensure!(
        ports.count() == 2 && matches!(others[..], [port] if port != 0),
        "{:?}",
        capture.records
    );
    Ok(())
}

/// What exceeds the ring is counted by flow, and the counts stay exact.
fn more_than_the_ring_holds(hooks: Hooks) -> Result<()> {
    const MANY: u64 = 500;
    let lab = stage()?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--mode", "connections")
        .arg("--ring-bytes", "4096");
    let agent = Agent::start(&lab, &options)?;
    call(&lab, MANY)?;
    let capture = agent.stop()?;
    let seen = lab::truth::edges(&capture.records);
    ensure!(seen == edges(MANY), "{seen:#?}");
    adds_up(&capture, false, "connections_added_up", 2 * MANY)?;
    adds_up(&capture, true, "closes_lost", 2 * MANY)
}

/// The ends of connections whose beginning found no room are missing, and counted; the beginnings are all there.
fn more_open_than_there_is_room_for(hooks: Hooks) -> Result<()> {
    const HELD: u64 = 60;
    let lab = stage()?;
    let options = AgentOptions::stdout("node-1")
        .hooks(hooks)
        .arg("--mode", "connections")
        .arg("--map-entries", "16");
    let agent = Agent::start(&lab, &options)?;
    let _server = lab.pod("shop/server")?.serve(["--tcp", "7000"])?;
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let target = format!("tcp://{}", SocketAddr::new(address, 7000));
    let mut holder = lab
        .pod("shop/client")?
        .hold(["--count", &HELD.to_string(), &target])?;
    holder.stop(Signal::SIGTERM)?;
    // The server's ends close a moment after.
    thread::sleep(Duration::from_millis(300));
    let capture = agent.stop()?;
    let seen = lab::truth::edges(&capture.records);
    ensure!(seen == edges(HELD), "{seen:#?}");
    adds_up(&capture, true, "open_connections_full", 2 * HELD)
}

/// An API server that nobody hears from the start to the end: nothing is guessed, and all is counted as lost, connections and closes.
fn names_that_never_come() -> Result<()> {
    let lab = stage()?;
    let nobody = lab.folder().join("kubeconfig");
    fs::write(
        &nobody,
        "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], \
          clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}], users: [{name: u, user: {}}]}",
    )?;
    let options = AgentOptions::stdout("node-1")
        .kube(&nobody)
        .arg("--mode", "connections");
    let agent = Agent::start(&lab, &options)?;
    call(&lab, CALLS)?;
    let capture = agent.stop()?;
    // Those of others on this machine are among them.
    let lost = |reason: &str| capture.losses.get(reason).copied().unwrap_or(0);
    ensure!(
        capture.records.is_empty()
            && lost("topology_unknown") + capture.skipped() >= 2 * CALLS
            && lost("closes_lost") + capture.skipped() >= 2 * CALLS,
        "{capture:?}"
    );
    Ok(())
}

/// Something was reported, something lost, and both together are what was made.
fn adds_up(capture: &Capture, closed: bool, reason: &str, made: u64) -> Result<()> {
    let connections = capture
        .records
        .iter()
        .filter_map(|record| record.connection);
    let reported = connections
        .filter(|connection| (connection.event == ConnectionEvent::Close) == closed)
        .count() as u64;
    let lost = capture.losses.get(reason).copied().unwrap_or(0);
    ensure!(
        reported > 0 && lost > 0 && reported + lost == made,
        "{reported} reported, {lost} lost for {reason}, {made} made: {:?}",
        capture.losses
    );
    Ok(())
}
