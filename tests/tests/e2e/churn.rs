//! Pods that come and go: nothing of them stays in the agent.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Agent, AgentOptions, Cluster, Lab, Process};

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![Test::alone("churn::five_thousand_pods", five_thousand_pods)]
}

/// So many pods have come and gone before it is measured what the agent takes: its caches have their sizes then.
const FIRST: usize = 1_000;

const PODS: usize = 5_000;

/// What of a pod is kept for ten minutes is its name: some hundred bytes, of two cgroups each.
const KEPT: u64 = PODS as u64 * 1_024;

/// What the kernel keeps for two minutes of silence is one entry for each pod's datagram, of at most so many bytes.
const PEERS: u64 = PODS as u64 * 160;

/// What the agent has.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    resident: u64,
    descriptors: usize,
    /// Bytes of kernel memory by the number of a map.
    maps: Vec<(String, u64)>,
}

/// Each has a cgroup, a network namespace, a connection and a datagram to itself; all of it goes before the next comes.
fn five_thousand_pods() -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    let lab = Lab::start(cluster)?;
    let mut agent = Agent::start(&lab, &AgentOptions::stdout("node-1"))?;
    come_and_go(&lab, FIRST)?;
    let before = taken(agent.process())?;
    let begin = Instant::now();
    come_and_go(&lab, PODS)?;
    let after = taken(agent.process())?;
    eprintln!("{PODS} pods in {:?}: {before:?} {after:?}", begin.elapsed());
    ensure!(
        after.descriptors == before.descriptors,
        "{before:?} {after:?}"
    );
    // All maps but that of UDP's peers have their room from the start.
    ensure!(
        after.maps.len() == before.maps.len(),
        "{before:?} {after:?}"
    );
    let grown: Vec<_> = before
        .maps
        .iter()
        .zip(&after.maps)
        .filter(|(before, after)| before != after)
        .collect();
    ensure!(grown.len() <= 1, "{grown:?}");
    for ((number, before), (same, after)) in grown {
        let growth = after.saturating_sub(*before);
        ensure!(
            number == same && growth <= PEERS,
            "{number}: {growth} bytes"
        );
    }
    ensure!(
        after.resident < before.resident + KEPT,
        "{} more bytes",
        after.resident - before.resident
    );
    let capture = agent.stop()?;
    ensure!(capture.losses.is_empty(), "{:?}", capture.losses);
    Ok(())
}

/// Two at a time.
fn come_and_go(lab: &Lab, pods: usize) -> Result<()> {
    let root = lab.cgroup_root("node-1").join("kubepods/burstable");
    let mut programs = Vec::new();
    for half in ["a", "b"] {
        let args = [
            root.display().to_string(),
            half.to_owned(),
            (pods / 2).to_string(),
        ];
        programs.push(lab.node("node-1").start("churn", args)?);
    }
    for program in &mut programs {
        let status = program.wait(Duration::from_secs(120))?;
        ensure!(status.success(), "{}", program.stderr().join("\n"));
    }
    // A drain, and one more.
    std::thread::sleep(Duration::from_millis(2_200));
    Ok(())
}

fn taken(agent: &Process) -> Result<Taken> {
    let folder = format!("/proc/{}/fdinfo", agent.pid());
    let mut maps = Vec::new();
    let mut descriptors = 0;
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        descriptors += 1;
        let Ok(info) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name));
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:")) {
            maps.push((id.trim().to_owned(), bytes.trim().parse()?));
        }
    }
    maps.sort();
    Ok(Taken {
        resident: agent.resident_bytes()?,
        descriptors,
        maps,
    })
}
