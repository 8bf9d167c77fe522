//! What a batch may say of time and place, and of what the generator knows by itself.
//!
//! An agent's clock may be wrong, and an agent may be in the hands of an attacker. What it says of the future was seen when it
//! arrived, at the latest. And where its token says on which node it is, it reports as that node, of that node's pods:
//! what it says of other nodes' pods is not taken in, but counted as lost, so that an agent that errs is noticed and is not
//! stopped by one flow for ever.
//!
//! Of a service that the generator knows it is itself that says what the service selects, and so it is with a node's
//! addresses: one that is not this node's becomes that of nobody known, which those at the other end must have seen as well
//! if it is to be in a rule.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

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
        if let Some(index) = self.index {
            correct_services(batch, index);
        }
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
        let strangers = self.strangers(&mut batch.ends, node);
        let mut lost = 0_u64;
        batch.flows.retain_mut(|flow| {
            flow.hostname = None;
            let observed = match flow.direction {
                Direction::Egress => &mut flow.src,
                Direction::Ingress => &mut flow.dst,
            };
            let is_here = is_here[*observed as usize];
            if let Some(stranger) = strangers.get(observed) {
                *observed = *stranger;
            }
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

    /// Of ends that are said to be in this node's network, at an address that is none of it as far as is known, the places of
    /// ends that are nothing but that address; these are added. Whoever is at the other end names them so as well.
    fn strangers(&self, ends: &mut Vec<KnownEnd>, node: &str) -> BTreeMap<u32, u32> {
        let Some(index) = self.index else {
            return BTreeMap::new();
        };
        let mut strangers = BTreeMap::new();
        for place in 0..ends.len() {
            let End { address, endpoint } = &*ends[place].end;
            let is_in_its_network = match endpoint {
                Endpoint::Node(_) => true,
                Endpoint::Pod { pod, .. } => pod.host_network,
                Endpoint::Service(_) | Endpoint::External(_) => false,
            };
            if is_in_its_network && index.is_of_node(node, *address) == Some(false) {
                let endpoint = Endpoint::External(*address);
                let address = *address;
                // A batch has some thousand ends at the most.
                strangers.insert(place as u32, ends.len() as u32);
                ends.push(KnownEnd::made(End { address, endpoint }));
            }
        }
        strangers
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

/// Puts the services that are known in the place of what a batch says of them.
fn correct_services(batch: &mut Packed<KnownEnd>, index: &Index) {
    for known in &mut batch.ends {
        let (Endpoint::Pod {
            service: Some(said),
            ..
        }
        | Endpoint::Service(said)) = &known.end.endpoint
        else {
            continue;
        };
        let Some(service) = index.service(&said.namespace, &said.name) else {
            continue;
        };
        if (&said.selector, &said.backends) == (&service.selector, &service.backends) {
            continue;
        }
        let service = Arc::clone(service);
        let endpoint = match &known.end.endpoint {
            Endpoint::Pod { pod, .. } => Endpoint::Pod {
                pod: Arc::clone(pod),
                service: Some(service),
            },
            _ => Endpoint::Service(service),
        };
        *known = KnownEnd::made(End {
            address: known.end.address,
            endpoint,
        });
    }
}

#[cfg(test)]
mod tests;
