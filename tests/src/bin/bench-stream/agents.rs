//! Simulated agents: what they send is encoded before the clock runs.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use flow::wire::{self, AgentMessage, Encoding};
use futures_util::future::try_join_all;
use lab::StreamClient;
use tokio::runtime::Runtime;

use crate::{
    Delivered,
    workload::{Cluster, MOMENT},
};

/// Batches that an agent has under way, as the real one.
const IN_FLIGHT: u64 = 8;

/// How many connect at a time: a slow machine takes longer over all of them than each may take.
const CONNECTING: usize = 100;

/// Batches of an hour.
const HOUR: u64 = 3_600;

/// All agents.
pub(crate) struct Crew {
    runtime: Runtime,
    agents: Vec<Agent>,
}

struct Agent {
    client: StreamClient,
    batches: Vec<Template>,
    sequence: u64,
}

/// An encoded batch, and where in it a time stands.
struct Template {
    message: Vec<u8>,
    times: Vec<usize>,
    flows: u64,
}

impl Crew {
    pub(crate) fn connect(address: SocketAddr, cluster: &Cluster) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        // Before any of them connects: whoever is connected has to say who it is, and then to answer, within seconds.
        let prepared = (0..cluster.nodes())
            .map(|node| Ok((node, Template::all(cluster, node)?)))
            .collect::<Result<Vec<_>>>()?;
        let mut prepared = prepared.into_iter();
        let mut agents = Vec::new();
        while prepared.len() > 0 {
            let joining = prepared
                .by_ref()
                .take(CONNECTING)
                .map(|(node, batches)| Agent::join(address, node, batches));
            agents.extend(runtime.block_on(try_join_all(joining))?);
        }
        Ok(Self { runtime, agents })
    }

    /// Each agent sends each of its batches.
    pub(crate) fn send_all_once(&mut self) -> Result<Delivered> {
        self.send(|agent, sent| sent < agent.batches.len() as u64)
    }

    /// Each agent sends for a while.
    pub(crate) fn send_for(&mut self, time: Duration) -> Result<Delivered> {
        let end = Instant::now() + time;
        self.send(|_, _| Instant::now() < end)
    }

    /// One agent sends what it sees in an hour.
    pub(crate) fn send_hour(&mut self) -> Result<Delivered> {
        self.agents.truncate(1);
        self.send(|_, sent| sent < HOUR)
    }

    fn send(&mut self, goes_on: impl Fn(&Agent, u64) -> bool) -> Result<Delivered> {
        let sending = self.agents.iter_mut().map(|agent| agent.send(&goes_on));
        let delivered = self.runtime.block_on(try_join_all(sending))?;
        Ok(delivered
            .iter()
            .fold(Delivered::default(), |sum, one| Delivered {
                flows: sum.flows + one.flows,
                batches: sum.batches + one.batches,
            }))
    }
}

impl Agent {
    async fn join(address: SocketAddr, node: usize, batches: Vec<Template>) -> Result<Self> {
        let (instance, node) = (format!("bench-{node}"), format!("node-{node}"));
        let (client, stored) = StreamClient::join(address, &instance, &node).await?;
        ensure!(stored == 0, "{instance} has been here before");
        Ok(Self {
            client,
            batches,
            sequence: 0,
        })
    }

    async fn send(&mut self, goes_on: impl Fn(&Self, u64) -> bool) -> Result<Delivered> {
        let mut delivered = Delivered::default();
        if self.batches.is_empty() {
            return Ok(delivered);
        }
        let first = self.sequence;
        let mut acknowledged = first;
        loop {
            let sent = self.sequence - first;
            let more = goes_on(self, sent);
            if more && self.sequence < acknowledged + IN_FLIGHT {
                self.sequence += 1;
                let template = &self.batches[(self.sequence - 1) as usize % self.batches.len()];
                let message = template.message(self.sequence)?;
                delivered.flows += template.flows;
                delivered.batches += 1;
                self.client.send(message).await?;
                continue;
            }
            if acknowledged == self.sequence {
                return Ok(delivered);
            }
            acknowledged = self.client.acknowledged().await?;
        }
    }
}

impl Template {
    /// All that a node's agent reports.
    fn all(cluster: &Cluster, node: usize) -> Result<Vec<Self>> {
        let batches = cluster.batches(node).into_iter();
        batches
            .map(|batch| Self::new(&AgentMessage::Batch(batch)))
            .collect()
    }

    fn new(batch: &AgentMessage) -> Result<Self> {
        let message = wire::encode(batch, Encoding::MessagePack)?;
        let moment = (MOMENT as f64).to_be_bytes();
        let windows = message.windows(moment.len()).enumerate();
        let times: Vec<usize> = windows
            .filter(|(_, bytes)| *bytes == moment)
            .map(|(place, _)| place)
            .collect();
        ensure!(!times.is_empty(), "no time in a batch");
        let AgentMessage::Batch(batch) = batch else {
            bail!("no batch");
        };
        Ok(Self {
            message,
            times,
            flows: batch.flows.len() as u64,
        })
    }

    /// With its number, and of a later time the larger that is.
    fn message(&self, sequence: u64) -> Result<Vec<u8>> {
        let mut later = self.message.clone();
        let moment = ((MOMENT + sequence) as f64).to_be_bytes();
        for &place in &self.times {
            later[place..place + moment.len()].copy_from_slice(&moment);
        }
        Ok(wire::with_sequence(&later, sequence)?)
    }
}
