//! Pods are found by their cgroups, however kubelet and the container runtime name those.

use std::fs;

use anyhow::{Context, Result, ensure};
use flow::record::Direction::{Egress, Ingress};
use lab::{
    Agent, AgentOptions, Cluster, Lab,
    cgroup::{self, Driver, Runtime},
    truth::Edge,
};

use crate::{Test, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut hierarchies = vec![false];
    if cgroup::v1_mount().is_some() {
        hierarchies.push(true);
    } else {
        eprintln!("identity::by_cgroup[v1,…] is skipped: no cgroup v1 hierarchy is mounted here");
    }
    let mut tests = Vec::new();
    for v1 in hierarchies {
        for driver in [Driver::Systemd, Driver::Cgroupfs] {
            for runtime in [Runtime::Containerd, Runtime::Crio, Runtime::Docker] {
                let version = if v1 { "v1" } else { "v2" };
                tests.push(Test::new(
                    format!("identity::by_cgroup[{version},{driver:?},{runtime:?}]"),
                    move || by_cgroup(v1, driver, runtime),
                ));
            }
        }
    }
    tests
}

/// The agent does not know the addresses of pods: they are in its node's range, so by them all pods are the node.
///
/// A node's process calls `relay`, which calls `server`. Both pods' programs outlive their calls, because in a v1
/// hierarchy only a process that is there can be looked up.
fn by_cgroup(v1: bool, driver: Driver, runtime: Runtime) -> Result<()> {
    let mut cluster = Cluster::apart();
    let node = cluster.node("node-1").cgroups(driver, runtime);
    if v1 {
        node.v1_cgroups();
    }
    cluster.pod("shop", "relay");
    cluster.pod("shop", "server");
    let lab = Lab::start(cluster)?;
    hide_addresses(&lab)?;
    let target = |pod: &str, port: u16| -> Result<String> {
        let address = lab.cluster().addresses(lab.spec(pod)?)[0];
        Ok(format!("tcp://{address}:{port}"))
    };

    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1"))?;
    let _server = lab.pod("shop/server")?.serve(["--tcp", "8080"])?;
    let call = target("shop/server", 8080)?;
    let _relay = lab
        .pod("shop/relay")?
        .serve(["--tcp", "8081", "--call", &call])?;
    lab.node("node-1").call_all([target("shop/relay", 8081)?])?;
    let capture = agent.stop()?;

    for record in &capture.records {
        let own = match record.direction {
            Egress => record.src.to_string(),
            Ingress => record.dst.to_string(),
        };
        let process = record.process.as_ref().context("no process")?;
        let wanted = match lab.spec(&own) {
            Ok(pod) => Some(pod.container()),
            Err(_no_pod) => None,
        };
        ensure!(process.container == wanted, "{own}: {record:?}");
    }
    let edges = [
        Edge::new(Egress, "node node-1", "node node-1 TCP 8081"),
        Edge::new(Ingress, "node node-1", "shop/relay TCP 8081"),
        Edge::new(Egress, "shop/relay", "node node-1 TCP 8080"),
        Edge::new(Ingress, "node node-1", "shop/server TCP 8080"),
    ];
    expect(&[capture], edges.map(|edge| (edge, 1)).into())
}

/// Removes the addresses of all pods from the file that the agent reads.
fn hide_addresses(lab: &Lab) -> Result<()> {
    let mut list: serde_yaml::Value = serde_yaml::from_str(&fs::read_to_string(lab.topology())?)?;
    let items = list["items"].as_sequence_mut().context("items")?;
    let mut pods = 0;
    for item in items.iter_mut().filter(|item| item["kind"] == "Pod") {
        let status = item["status"].as_mapping_mut().context("a pod's status")?;
        status.remove("podIP").context("podIP")?;
        status.remove("podIPs").context("podIPs")?;
        pods += 1;
    }
    ensure!(pods == lab.cluster().pods.len(), "{pods} pods in the file");
    Ok(fs::write(lab.topology(), serde_yaml::to_string(&list)?)?)
}
