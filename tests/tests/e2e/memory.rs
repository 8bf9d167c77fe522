//! The agent's memory against the limit that the manifest gives it, with as many edges as it keeps.

use std::{
    net::{Ipv4Addr, TcpListener},
    time::Duration,
};

use anyhow::{Result, ensure};
use lab::{Agent, AgentOptions, Calls, Cluster, Lab, Memory, Rights};

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::alone("memory::many_edges_in_the_outbox", in_the_outbox),
        Test::alone("memory::many_edges_in_the_spool", in_the_spool),
    ]
}

/// Server addresses, and ports of each: an edge for each of both.
const ADDRESSES: u32 = 50;
const PORTS: u16 = 500;

fn in_the_outbox() -> Result<()> {
    many_edges(&[]).map(drop)
}

/// As the manifest has it. What waits in files is not memory: what is left is what the manifest sets aside.
fn in_the_spool() -> Result<()> {
    let memory = many_edges(&["--spool", "/var/lib/microshield/spool"])?;
    let request = Rights::of_agent()?.memory_request;
    ensure!(memory.now < request, "{memory:?}");
    Ok(())
}

/// The generator is away, and every connection is an edge of its own. The agent is a container as the manifest has it, whose
/// kernel maps and files count as its memory. Half of the limit is left for a large cluster's objects.
fn many_edges(flags: &[&str]) -> Result<Memory> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client");
    cluster.pod("shop", "server");
    let lab = Lab::start(cluster)?;
    let ports: Vec<String> = (9_000..9_000 + PORTS)
        .map(|port| port.to_string())
        .collect();
    let server = lab.pod("shop/server")?;
    let _serving = server.serve(["--tcp", &ports.join(",")])?;
    // Its network takes all of these addresses for itself.
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    server.ip("route replace local 10.200.0.0/16 dev lo")?;
    lab.node("node-1")
        .ip(&format!("route replace 10.200.0.0/16 via {address}"))?;

    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let mut options = AgentOptions::to("node-1", &format!("ws://{closed}/agents"));
    for flag in flags.chunks(2) {
        options = options.arg(flag[0], flag[1]);
    }
    let rights = Rights::of_agent()?;
    let limit = rights.memory;
    let agent = rights.for_agents(|| Agent::start(&lab, &options))?;
    let mut callers = Vec::new();
    for half in 0..2 {
        let targets = (half..ADDRESSES)
            .step_by(2)
            .map(|number| format!("tcp://10.200.0.{number}:9000"));
        let flags = ["--abort", "--ports", &ports.len().to_string()].map(str::to_owned);
        let words = flags.into_iter().chain(targets);
        callers.push(lab.pod("shop/client")?.start("call", words)?);
    }
    for caller in &mut callers {
        let calls = Calls::of(caller)?;
        ensure!(
            calls.answered == u64::from(ADDRESSES / 2) * u64::from(PORTS),
            "{calls:?}"
        );
    }
    // A drain, and one more.
    std::thread::sleep(Duration::from_millis(2_200));
    let memory = Memory::of_the_container(&lab)?;
    eprintln!("{flags:?}: {memory:?}");
    ensure!(memory.limit == limit && memory.kills == 0, "{memory:?}");
    ensure!(memory.most < limit / 2, "{memory:?}");
    let mut losses = agent.stop()?.losses;
    // An upper bound, which says nothing of memory.
    losses.remove("runs_skipped");
    ensure!(losses.is_empty(), "{losses:?}");
    Ok(memory)
}
