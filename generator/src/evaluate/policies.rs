//! Policies, checked and prepared for judging.

mod compile;

use std::{
    borrow::Borrow,
    collections::{BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use flow::record::Direction;
use k8s_openapi::api::networking::v1::NetworkPolicy;

pub use self::compile::Compiler;
use super::{
    block::Block, error::InvalidPolicy, ports::Ports, selector::Selector, world::NAMESPACE_NAME,
};

/// A set of policies as the API server would have accepted them.
///
/// What rules have in common is kept once: equal peers of any number of rules are one [`PeerId`], so that it is decided
/// once which pods a peer means, and not again for every rule.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    /// Sorted by namespace and name.
    policies: Vec<Policy>,
    pod_peers: Vec<PodPeer>,
    blocks: Vec<Block>,
    /// The blocks of a single address, which are found by it, and all others.
    single_blocks: HashMap<IpAddr, usize>,
    wide_blocks: Vec<usize>,
}

/// A policy of a [`Policies`]. The order is by namespace and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyId(usize);

/// A rule of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId {
    /// The policy.
    pub policy: PolicyId,
    /// Whether it is one of the policy's rules for ingress or for egress.
    pub direction: Direction,
    /// Its place among these, from 0.
    pub index: usize,
}

/// A policy.
#[derive(Clone, Debug)]
pub struct Policy {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    pub(super) pods: Selector,
    ingress: Option<Rules>,
    egress: Option<Rules>,
}

/// The rules of a policy for one direction.
#[derive(Clone, Debug, Default)]
pub(super) struct Rules {
    /// The ports of each rule; `None` for all ports.
    ports: Vec<Option<Vec<Ports>>>,
    /// Sorted.
    by_peer: Vec<(PeerId, usize)>,
    /// The rules that do not say which peers they let through.
    for_all: Vec<usize>,
}

/// Whom a rule lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum PeerId {
    Pods(usize),
    Block(usize),
}

/// Pods as a rule selects them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PodPeer {
    pub(super) namespaces: NamespacePeer,
    pub(super) pods: Selector,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum NamespacePeer {
    /// The policy's own namespace.
    Own(String),
    Selected(Selector),
}

/// What policies ask for that flow records do not tell, but the cluster's objects do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BeyondFlows<'a> {
    /// The keys by which they select namespaces, but for the one that holds the namespace's name.
    pub namespace_labels: BTreeSet<&'a str>,
    /// The names of ports.
    pub port_names: BTreeSet<&'a str>,
}

impl Policies {
    /// Checks and prepares policies. Their order does not matter.
    ///
    /// # Errors
    /// At the first policy that the API server would refuse.
    pub fn compile(
        policies: impl IntoIterator<Item: Borrow<NetworkPolicy>>,
    ) -> Result<Self, InvalidPolicy> {
        let mut compiler = Compiler::default();
        for policy in policies {
            compiler.add(policy.borrow())?;
        }
        Ok(compiler.finish())
    }

    /// How many policies there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.policies.len()
    }

    /// Whether there is no policy.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// A policy of this set.
    ///
    /// # Panics
    /// If the id is not of this set.
    #[must_use]
    pub fn get(&self, id: PolicyId) -> &Policy {
        &self.policies[id.0]
    }

    /// The policy of this namespace and name.
    #[must_use]
    pub fn find(&self, namespace: &str, name: &str) -> Option<PolicyId> {
        self.policies
            .binary_search_by(|policy| {
                (policy.namespace.as_str(), policy.name.as_str()).cmp(&(namespace, name))
            })
            .ok()
            .map(PolicyId)
    }

    /// All policies, by namespace and name.
    pub fn ids(&self) -> impl Iterator<Item = PolicyId> + use<> {
        (0..self.policies.len()).map(PolicyId)
    }

    /// What they ask for that flow records do not tell.
    #[must_use]
    pub fn beyond_flows(&self) -> BeyondFlows<'_> {
        let keys = self
            .pod_peers
            .iter()
            .flat_map(|peer| match &peer.namespaces {
                NamespacePeer::Own(_) => Vec::new(),
                NamespacePeer::Selected(selector) => selector.keys().collect(),
            });
        let rules = self.policies.iter().flat_map(|policy| {
            let rules = [&policy.ingress, &policy.egress];
            rules.into_iter().flatten()
        });
        let names = rules.flat_map(Rules::all_ports).filter_map(Ports::name);
        BeyondFlows {
            namespace_labels: keys.filter(|key| *key != NAMESPACE_NAME).collect(),
            port_names: names.collect(),
        }
    }

    /// The policies of a namespace.
    pub(super) fn of_namespace(&self, namespace: &str) -> impl Iterator<Item = PolicyId> + use<> {
        let place = |is_before: fn(&str, &str) -> bool| {
            self.policies
                .partition_point(|policy| is_before(&policy.namespace, namespace))
        };
        (place(|one, other| one < other)..place(|one, other| one <= other)).map(PolicyId)
    }

    pub(super) fn pod_peers(&self) -> impl Iterator<Item = (PeerId, &PodPeer)> {
        (0..).map(PeerId::Pods).zip(&self.pod_peers)
    }

    pub(super) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The blocks that an address is in, sorted.
    pub(super) fn blocks_of(&self, address: IpAddr) -> Vec<PeerId> {
        let address = address.to_canonical();
        let wide = self
            .wide_blocks
            .iter()
            .copied()
            .filter(|block| self.blocks[*block].contains(address));
        let single = self.single_blocks.get(&address).copied();
        let mut blocks: Vec<PeerId> = wide.chain(single).map(PeerId::Block).collect();
        blocks.sort_unstable();
        blocks
    }
}

impl Policy {
    /// How many rules there are for a direction; `None` if the policy does not concern it.
    #[must_use]
    pub fn rules_for(&self, direction: Direction) -> Option<usize> {
        self.rules(direction).map(|rules| rules.ports.len())
    }

    pub(super) fn rules(&self, direction: Direction) -> Option<&Rules> {
        match direction {
            Direction::Ingress => self.ingress.as_ref(),
            Direction::Egress => self.egress.as_ref(),
        }
    }
}

/// `namespace/name`.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Rules {
    /// The rules that let through a peer which is all of `peers`, each at least once, in no particular order.
    pub(super) fn letting<'a>(&'a self, peers: &'a [PeerId]) -> impl Iterator<Item = usize> + 'a {
        let by_peer = peers.iter().flat_map(|peer| {
            let from = self.by_peer.partition_point(|(known, _)| known < peer);
            self.by_peer[from..]
                .iter()
                .take_while(move |(known, _)| known == peer)
                .map(|(_, rule)| *rule)
        });
        self.for_all.iter().copied().chain(by_peer)
    }

    /// The ports that a rule lets through; `None` for all.
    pub(super) fn ports(&self, rule: usize) -> Option<&[Ports]> {
        self.ports[rule].as_deref()
    }

    /// The ports that the rules let through, rule by rule.
    pub(super) fn all_ports(&self) -> impl Iterator<Item = &Ports> {
        self.ports.iter().flatten().flatten()
    }

    /// The peers that the rules name, each at least once.
    pub(super) fn peers(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.by_peer.iter().map(|(peer, _)| *peer)
    }

    /// Whether a rule lets all peers through.
    pub(super) fn are_for_all(&self) -> bool {
        !self.for_all.is_empty()
    }
}

#[cfg(test)]
mod tests;
