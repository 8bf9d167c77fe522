//! `--resolve local` and `--resolve both` come to the same edges.

use std::{collections::BTreeSet, fs, net::IpAddr, path::PathBuf, time::Duration};

use agent::{
    capture::{Event, Observation},
    identity::{ContainerRef, Owner},
    resolve::{Resolver, Sighting},
};
use anyhow::{Context, Result, ensure};
use flow::{
    record::{Outcome, Protocol},
    source::{Scope, Topology, View},
    time::Timestamp,
    wire::Resolve,
};
use lab::apiserver::ApiServer;
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{
    test,
    world::{World, now},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![test(
        "local::the_same_edges_either_way",
        the_same_edges_either_way,
    )]
}

const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];
const KINDS: [&str; 5] = ["namespaces", "nodes", "services", "endpointslices", "pods"];

/// The topologies of one cluster, each with what its user watches.
struct Cluster {
    generator: Topology,
    /// An agent with `--resolve both`.
    both: Topology,
    /// Agents with `--resolve local`, by node.
    local: Vec<Topology>,
}

/// What happened in the recorded cluster happens to a small API server, and after each part of it everybody is asked for
/// the names of everything that could be seen, now and at all earlier times.
async fn the_same_edges_either_way() -> Result<()> {
    let world = World::empty().await?;
    for kind in KINDS {
        for object in recorded_list(kind)? {
            world.server.put(kind, object);
        }
    }
    let mut local = Vec::new();
    for node in NODES {
        local.push(world.listen_to(Scope::OneNode(node.to_owned())).await?);
    }
    let cluster = Cluster {
        generator: world.listen_to(Scope::Everything).await?,
        both: world.listen_to(Scope::BothEnds).await?,
        local,
    };
    for topology in cluster
        .local
        .iter()
        .chain([&cluster.generator, &cluster.both])
    {
        world.ready(topology.view()).await?;
    }
    // Pods that have gone keep their uids: what they did is still told of.
    let mut pods = BTreeSet::new();
    let mut times = vec![settle(&world, &cluster, &mut pods).await?];
    for (kind, event) in recorded_events()? {
        play(&world.server, kind, &event)?;
        times.push(settle(&world, &cluster, &mut pods).await?);
    }
    ensure!(times.len() > 30, "{} parts", times.len());
    for at in times.into_iter().step_by(4) {
        let differences = cluster.differences(&pods, at);
        ensure!(differences.is_empty(), "later:\n{}", differences.join("\n"));
    }
    Ok(())
}

/// Waits until everybody has heard of what happened. Returns a time at which all agree.
async fn settle(world: &World, cluster: &Cluster, pods: &mut BTreeSet<Local>) -> Result<Timestamp> {
    // That nobody has heard of it yet would be a kind of agreement, too.
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut at = now();
    world
        .wait_for("the same names either way", || {
            pods.extend(locals(cluster.generator.view()));
            at = now();
            cluster.differences(pods, at).is_empty()
        })
        .await
        .with_context(|| cluster.differences(pods, at).join("\n"))?;
    Ok(at)
}

/// The end of a flow that an agent observes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Local {
    node: usize,
    address: IpAddr,
    /// None for a process of the host.
    pod_uid: Option<String>,
}

fn locals(view: &View) -> Vec<Local> {
    let index = view.index();
    let mut found = Vec::new();
    for (node, name) in NODES.iter().enumerate() {
        for pod in index
            .pods()
            .filter(|pod| pod.node.as_deref() == Some(*name))
        {
            found.extend(pod.addresses.iter().map(|address| Local {
                node,
                address: *address,
                pod_uid: Some(pod.uid.clone()),
            }));
        }
        let host = index.node(name);
        let addresses = host.iter().flat_map(|node| &node.addresses);
        found.extend(addresses.map(|address| Local {
            node,
            address: *address,
            pod_uid: None,
        }));
        // A pod that no object tells of yet.
        found.push(Local {
            node,
            address: [10, 244, node as u8 + 1, 250].into(),
            pod_uid: Some("unknown".to_owned()),
        });
    }
    found
}

/// Addresses and ports that can be called.
const CALLED: [(&str, u16); 12] = [
    ("10.96.0.1", 443),
    ("10.96.0.10", 53),
    ("10.96.0.10", 9153),
    ("192.168.50.11", 30080),
    ("192.168.50.12", 6443),
    ("fd00:50::13", 31000),
    ("10.244.1.1", 10250),
    ("10.244.3.13", 8080),
    ("10.244.1.11", 8080),
    ("10.244.2.11", 5432),
    ("203.0.113.7", 443),
    ("2001:db8::7", 443),
];

impl Cluster {
    /// Where it makes a difference whether the agent or the generator finds the names.
    fn differences(&self, locals: &BTreeSet<Local>, at: Timestamp) -> Vec<String> {
        let mut remotes: BTreeSet<(IpAddr, u16)> = CALLED
            .iter()
            .filter_map(|(address, port)| Some((address.parse().ok()?, *port)))
            .collect();
        remotes.extend(locals.iter().map(|local| (local.address, 8080)));
        remotes.extend(cluster_addresses(self.generator.view()));

        let generator = self.generator.view().index();
        let both = self.both.view().index();
        let mut differences = Vec::new();
        for local in locals {
            let node = NODES[local.node].to_owned();
            let own = self.local[local.node].view().index();
            let here = Resolver::new(node.clone(), Resolve::Both, true);
            let elsewhere = Resolver::new(node, Resolve::Local, true);
            for (remote, port) in &remotes {
                for event in [Event::Connect(Outcome::Established), Event::Accept] {
                    let sighting = sighting(local, *remote, *port, event, at);
                    let by_agent = here.name(&sighting, &both).record;
                    let mut by_both = elsewhere.name(&sighting, &own).record;
                    if let Ok(record) = &mut by_both {
                        generator.name_ends(record);
                    }
                    if by_agent != by_both {
                        differences.push(format!("{by_agent:?}\n{by_both:?}\n"));
                    }
                }
            }
        }
        differences
    }
}

fn cluster_addresses(view: &View) -> Vec<(IpAddr, u16)> {
    let index = view.index();
    let mut found = Vec::new();
    for third in 0..2 {
        for last in 0..=255 {
            let address = IpAddr::from([10, 96, third, last]);
            for port in [80, 8080] {
                let server = index.resolve(address, Protocol::Tcp, port, now());
                if server.virtual_address {
                    found.push((address, port));
                }
            }
        }
    }
    found
}

fn sighting(local: &Local, remote: IpAddr, port: u16, event: Event, at: Timestamp) -> Sighting {
    Sighting {
        observation: Observation {
            event,
            protocol: Protocol::Tcp,
            local: local.address,
            remote,
            port,
            cgroup: 7,
            netns: 0,
            client_port: 0,
            connection: None,
            pid: 1,
            comm: "app".to_owned(),
            count: 3,
            first_seen: at,
            last_seen: at,
        },
        owner: Some(match &local.pod_uid {
            Some(uid) => Owner::Container(ContainerRef {
                pod_uid: uid.clone(),
                container: None,
            }),
            None => Owner::Host,
        }),
        log: None,
        round: 0,
    }
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/kube-1.24")
        .join(name)
}

fn recorded_list(kind: &str) -> Result<Vec<Value>> {
    let text = fs::read_to_string(fixture(&format!("list-{kind}.json")))?;
    let mut list: Value = serde_json::from_str(&text)?;
    match list["items"].take() {
        Value::Array(items) => Ok(items),
        other => anyhow::bail!("items: {other}"),
    }
}

/// The events of all kinds, in the order in which they happened.
fn recorded_events() -> Result<Vec<(&'static str, Value)>> {
    let mut events = Vec::new();
    for kind in KINDS {
        for line in fs::read_to_string(fixture(&format!("watch-{kind}.jsonl")))?.lines() {
            let event: Value = serde_json::from_str(line)?;
            let version = &event["object"]["metadata"]["resourceVersion"];
            let version: u64 = version.as_str().unwrap_or_default().parse()?;
            if event["type"] != "BOOKMARK" {
                events.push((version, kind, event));
            }
        }
    }
    events.sort_by_key(|(version, ..)| *version);
    Ok(events
        .into_iter()
        .map(|(_, kind, event)| (kind, event))
        .collect())
}

fn play(server: &ApiServer, kind: &str, event: &Value) -> Result<()> {
    let object = &event["object"];
    if event["type"] == "DELETED" {
        let text = |key: &str| {
            object["metadata"][key]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        ensure!(
            server.delete(kind, &text("namespace"), &text("name")),
            "{event}"
        );
    } else {
        server.put(kind, object.clone());
    }
    Ok(())
}
