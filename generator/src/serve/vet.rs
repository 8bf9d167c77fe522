//! What a batch may say of time and place.
//!
//! An agent's clock may be wrong, and an agent may be in the hands of an attacker. What it says of the future was seen when it
//! arrived, at the latest. And where its token says on which node it is, it reports as that node, of that node's pods:
//! what it says of other nodes' pods is not taken in, but counted as lost, so that an agent that errs is noticed and is not
//! stopped by one flow for ever.

use std::time::Duration;

use flow::{
    endpoint::Endpoint,
    record::Direction,
    time::Timestamp,
    topology::Index,
    wire::{End, Packed},
};

use crate::ledger::KnownEnd;

/// How far clocks of a cluster may differ. It is said of agents whose clock differs more, and nothing is taken to be later
/// than this after its arrival.
pub(super) const MAX_AHEAD: Duration = Duration::from_secs(60);

/// The reason under which connections are counted whose observed end is of another node than the agent.
const OTHER_NODE: &str = "other_node";

/// What a batch is held against.
pub(super) struct Vetting<'a> {
    /// When it arrived.
    pub(super) now: Timestamp,
    /// The node of its agent, if that is proven.
    pub(super) node: Option<&'a str>,
    /// What the generator knows of the cluster by itself.
    pub(super) index: Option<&'a Index>,
}

impl Vetting<'_> {
    pub(super) fn vet(&self, batch: &mut Packed<KnownEnd>) {
        self.limit_times(batch);
        if let Some(node) = self.node {
            self.confine(batch, node);
        }
    }

    fn limit_times(&self, batch: &mut Packed<KnownEnd>) {
        let latest = self.now.saturating_add(MAX_AHEAD);
        let limit = |time: &mut Timestamp| *time = latest.min(*time);
        limit(&mut batch.window.from);
        limit(&mut batch.window.to);
        for flow in &mut batch.flows {
            limit(&mut flow.last_seen);
            let others = flow.first_seen.iter_mut().chain(&mut flow.timestamp);
            others.for_each(limit);
        }
    }

    /// Scope names hosts in its own way, so names of observers are not compared with the node's, but become it.
    fn confine(&self, batch: &mut Packed<KnownEnd>, node: &str) {
        if batch.hostname != node {
            node.clone_into(&mut batch.hostname);
        }
        // An end is that of many flows.
        let is_here: Vec<bool> = batch
            .ends
            .iter()
            .map(|known| self.may_be_on(node, &known.end))
            .collect();
        let mut lost = 0_u64;
        batch.flows.retain_mut(|flow| {
            flow.hostname = None;
            let observed = match flow.direction {
                Direction::Egress => flow.src,
                Direction::Ingress => flow.dst,
            };
            let is_here = is_here[observed as usize];
            if !is_here {
                lost = lost.saturating_add(flow.count);
            }
            is_here
        });
        if lost > 0 {
            let count = batch.losses.entry(OTHER_NODE.to_owned()).or_default();
            *count = count.saturating_add(lost);
        }
    }

    /// Whether an agent of this node may have observed this end. Not all topologies know on which node a pod is, and of a pod
    /// that nobody knows there is only the address.
    fn may_be_on(&self, node: &str, end: &End) -> bool {
        match &end.endpoint {
            Endpoint::Pod { pod, .. } => {
                let known = self.index.and_then(|index| index.pod_by_uid(&pod.uid));
                let is_on = |other: &str| other == node;
                let said = pod.node.as_deref().is_none_or(is_on);
                said && known.is_none_or(|pod| pod.node.as_deref().is_none_or(is_on))
            }
            Endpoint::Node(it) => it.name == node,
            Endpoint::Service(_) => false,
            Endpoint::External(_) => true,
        }
    }
}

#[cfg(test)]
mod tests;
