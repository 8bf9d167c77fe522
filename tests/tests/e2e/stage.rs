//! A client, three servers and an agent, and what is played with sockets step by step.

use std::{collections::BTreeMap, net::SocketAddr};

use anyhow::{Context, Result};
use flow::record::{
    Direction::{self, Egress, Ingress},
    FlowRecord, Process as Owner,
};
use lab::{Agent, AgentOptions, Capture, Cluster, Hooks, Lab, Process, truth::Edge};

/// The two families, by the index of an address; and IPv4 spoken on an IPv6 socket.
pub(crate) const V4: usize = 0;
pub(crate) const V6: usize = 1;
pub(crate) const MAPPED: usize = 2;

/// The lab, its agent and what is played in it.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    pub(crate) agent: Agent,
    actors: Vec<Process>,
}

/// `client` and three servers in `dns`; `dns/one` is behind a service that translates UDP 53 to 5353, and behind one that
/// translates SCTP 3868 to 5868.
pub(crate) fn cluster() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("dns", "client");
    cluster.pod("dns", "one").label("app", "dns");
    cluster.pod("dns", "two");
    cluster.pod("dns", "three");
    cluster
        .service("dns", "resolver")
        .select("app", "dns")
        .port("dns", 53, 5353)
        .udp();
    cluster
        .service("dns", "diameter")
        .select("app", "dns")
        .port("diameter", 3868, 5868)
        .sctp();
    cluster
}

impl Stage {
    /// The agent with these options.
    pub(crate) fn build(options: impl FnOnce(AgentOptions) -> AgentOptions) -> Result<Self> {
        let lab = Lab::start(cluster())?;
        let agent = Agent::start(&lab, &options(AgentOptions::stdout("node-1")))?;
        Ok(Self {
            lab,
            agent,
            actors: Vec::new(),
        })
    }

    pub(crate) fn new() -> Result<Self> {
        Self::build(|options| options)
    }

    pub(crate) fn without_types() -> Result<Self> {
        Self::build(|options| options.hooks(Hooks::ClassicWithoutTypes))
    }

    pub(crate) fn at(&self, pod: &str, family: usize, port: u16) -> Result<SocketAddr> {
        address(&self.lab, pod, family, port)
    }

    /// Lets a pod take steps while the others go on; returns when it says `ready`. That is whose its sockets are.
    pub(crate) fn starts(&mut self, pod: &str, steps: &[String]) -> Result<Owner> {
        let pod = format!("dns/{pod}");
        let actor = self.lab.pod(&pod)?.start("play", steps)?;
        let owner = Owner {
            pid: actor.pid(),
            comm: "lab-pod".to_owned(),
            container: Some(self.lab.spec(&pod)?.container()),
            fd: None,
        };
        self.actors.push(actor);
        Ok(owner)
    }

    /// Lets a pod take steps, and waits for the last.
    pub(crate) fn plays(&self, pod: &str, steps: &[String]) -> Result<()> {
        self.lab.pod(&format!("dns/{pod}"))?.play(steps)
    }

    pub(crate) fn serves(&mut self, pod: &str, port: u16) -> Result<()> {
        let place = self.lab.pod(&format!("dns/{pod}"))?;
        self.actors.push(place.serve(["--udp", &port.to_string()])?);
        Ok(())
    }

    pub(crate) fn ends(self) -> Result<Capture> {
        self.agent.stop()
    }
}

/// An address of a pod in `dns`.
pub(crate) fn address(lab: &Lab, pod: &str, family: usize, port: u16) -> Result<SocketAddr> {
    let [v4, v6] = lab.cluster().addresses(lab.spec(&format!("dns/{pod}"))?);
    let address = match (family, v4) {
        (V4, _) => v4,
        (MAPPED, std::net::IpAddr::V4(v4)) => v4.to_ipv6_mapped().into(),
        _ => v6,
    };
    Ok(SocketAddr::new(address, port))
}

/// Whose the socket is at that end of what was captured.
pub(crate) fn owner(capture: &Capture, direction: Direction) -> Result<Owner> {
    let is_of = |record: &&FlowRecord| record.direction == direction;
    let record = capture.records.iter().find(is_of);
    let owner = record.and_then(|record| record.process.clone());
    owner.with_context(|| format!("no process: {record:?}"))
}

/// The same edge seen at both ends.
pub(crate) fn both<const N: usize>(edges: [(&str, &str, u64); N]) -> BTreeMap<Edge, u64> {
    let mut wanted = BTreeMap::new();
    for (client, server, count) in edges {
        for direction in [Egress, Ingress] {
            wanted.insert(edge(direction, client, server), count);
        }
    }
    wanted
}

pub(crate) fn edge(direction: Direction, client: &str, server: &str) -> Edge {
    Edge::new(
        direction,
        &format!("dns/{client}"),
        &format!("dns/{server}"),
    )
}

pub(crate) fn any(family: usize) -> &'static str {
    ["0.0.0.0:0", "[::]:0", "[::]:0"][family]
}

macro_rules! steps {
    ($($step:literal $(, $value:expr)*);* $(;)?) => {
        [$(format!($step $(, $value)*)),*]
    };
}

pub(crate) use steps;
