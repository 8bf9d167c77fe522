//! The agent with the rights that the manifests give it, started by runc: nothing is missing. With one of them less, it says
//! which, and what is lost.

use std::time::Duration;

use anyhow::{Result, ensure};
use flow::{record::Direction, wire::UDP_OPEN_BEFORE_UNKNOWN};
use lab::{Agent, AgentOptions, Cluster, Lab, Rights, truth::Edge};

use crate::{Test, before, capture, expect, failures, identity, udp};

pub(crate) fn tests() -> Vec<Test> {
    let everything = [
        before::tests(),
        capture::tests(),
        failures::tests(),
        identity::tests(),
        udp::tests(),
    ];
    // Those that need the machine for themselves, and the long one, are about counting and not about rights.
    let chosen = everything
        .into_iter()
        .flatten()
        .filter(|test| !test.alone && !test.name.starts_with("capture::counts_are_exact"));
    let mut tests: Vec<Test> = chosen
        .map(|test| {
            // Who asks for the tests of capturing by name gets those, and not these as well.
            let name = format!("rights::{}", test.name.replace("::", "/"));
            Test::new(name, move || Rights::of_agent()?.for_agents(test.run))
        })
        .collect();
    for capability in ["CAP_BPF", "CAP_PERFMON"] {
        tests.push(Test::new(
            format!("rights::without[{capability}]"),
            move || nothing_without(capability),
        ));
    }
    tests.extend([
        Test::new("rights::without[CAP_NET_ADMIN]", no_udp_without),
        Test::new("rights::without[CAP_SYS_PTRACE]", said_without_ptrace),
        Test::new("rights::without_the_node_s_pids", said_without_pids),
        Test::new("rights::sys_admin_instead", sys_admin_instead),
        Test::new("rights::a_filter_that_knows_no_cap_bpf", refused_by_filter),
    ]);
    tests
}

fn client_and_server() -> Result<Lab> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client");
    cluster.pod("shop", "server");
    Lab::start(cluster)
}

/// One call over TCP and one over UDP.
fn call(lab: &Lab) -> Result<()> {
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let _server = lab
        .pod("shop/server")?
        .serve(["--tcp", "7000", "--udp", "7001"])?;
    let targets = [
        format!("tcp://{address}:7000"),
        format!("udp://{address}:7001"),
    ];
    lab.pod("shop/client")?.call_all(targets)?;
    Ok(())
}

fn edges(servers: &[&str]) -> impl Iterator<Item = (Edge, u64)> {
    let both = [Direction::Egress, Direction::Ingress];
    let edge = |server: &&str, direction| (Edge::new(direction, "shop/client", server), 1);
    let edges = servers
        .iter()
        .flat_map(|server| both.map(|direction| edge(server, direction)));
    edges.collect::<Vec<_>>().into_iter()
}

const TCP: &str = "shop/server TCP 7000";
const UDP: &str = "shop/server UDP 7001";

fn nothing_without(capability: &'static str) -> Result<()> {
    let lab = client_and_server()?;
    let rights = Rights::of_agent()?.without(capability);
    let mut agent = rights.for_agents(|| Agent::spawn(&lab, &AgentOptions::stdout("node-1")))?;
    let status = agent.process().wait(Duration::from_secs(10))?;
    let log = agent.process().stderr().join("\n");
    let named = format!("not permitted to capture: this process lacks {capability} (");
    ensure!(
        status.code() == Some(1) && log.contains(&named),
        "{status}\n{log}"
    );
    Ok(())
}

fn no_udp_without() -> Result<()> {
    let lab = client_and_server()?;
    let rights = Rights::of_agent()?.without("CAP_NET_ADMIN");
    let mut agent = rights.for_agents(|| Agent::start(&lab, &AgentOptions::stdout("node-1")))?;
    call(&lab)?;
    let log = agent.process().stderr().join("\n");
    let named = "this process lacks CAP_NET_ADMIN: UDP and SCTP are not captured";
    ensure!(log.contains(named), "{log}");
    let mut capture = agent.stop()?;
    let lost = capture.losses.remove("udp_not_captured");
    ensure!(lost == Some(1), "{lost:?}");
    expect(&[capture], edges(&[TCP]).collect())
}

fn said_without_ptrace() -> Result<()> {
    let lab = client_and_server()?;
    let rights = Rights::of_agent()?.without("CAP_SYS_PTRACE");
    let mut agent = rights.for_agents(|| Agent::start(&lab, &AgentOptions::stdout("node-1")))?;
    call(&lab)?;
    let log = agent.process().stderr().join("\n");
    let named = "this process lacks CAP_SYS_PTRACE: there, the owners of sockets";
    ensure!(log.contains(named), "{log}");
    expect(&[agent.stop()?], edges(&[TCP, UDP]).collect())
}

/// Without `hostPID` nobody else's sockets are found. The agent says so and counts it, and goes on with what comes.
fn said_without_pids() -> Result<()> {
    let lab = client_and_server()?;
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let _older = lab.pod("shop/server")?.serve(["--keep", "7002"])?;
    let _open = lab
        .pod("shop/client")?
        .hold([format!("tcp://{address}:7002")])?;
    let mut rights = Rights::of_agent()?;
    rights.host_pid = false;
    let mut agent = rights.for_agents(|| Agent::start(&lab, &AgentOptions::stdout("node-1")))?;
    call(&lab)?;
    let log = agent.process().stderr().join("\n");
    let named =
        "this process sees no others (is hostPID missing?): what was open before is not known";
    ensure!(log.contains(named), "{log}");
    let mut capture = agent.stop()?;
    for reason in ["open_before_unread", UDP_OPEN_BEFORE_UNKNOWN] {
        let lost = capture.losses.remove(reason);
        ensure!(lost == Some(1), "{reason}: {lost:?}");
    }
    expect(&[capture], edges(&[TCP, UDP]).collect())
}

/// What `deploy/README.md` says of runtimes that do not know `CAP_BPF`.
fn sys_admin_instead() -> Result<()> {
    let lab = client_and_server()?;
    let rights = Rights::of_agent()?
        .without("CAP_BPF")
        .without("CAP_PERFMON")
        .with("CAP_SYS_ADMIN");
    let agent = rights.for_agents(|| Agent::start(&lab, &AgentOptions::stdout("node-1")))?;
    call(&lab)?;
    expect(&[agent.stop()?], edges(&[TCP, UDP]).collect())
}

fn refused_by_filter() -> Result<()> {
    let lab = client_and_server()?;
    let rights = Rights::of_agent()?.filtered_without("CAP_BPF");
    let mut agent = rights.for_agents(|| Agent::spawn(&lab, &AgentOptions::stdout("node-1")))?;
    let status = agent.process().wait(Duration::from_secs(10))?;
    let log = agent.process().stderr().join("\n");
    let named = "a seccomp profile that keeps bpf(2)";
    ensure!(
        status.code() == Some(1) && log.contains(named),
        "{status}\n{log}"
    );
    Ok(())
}
