//! From edges to a plan.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use flow::{
    endpoint::Endpoint,
    record::{Direction, Protocol},
    time::Timestamp,
};

use super::{
    blocks,
    cluster::Cluster,
    ends::{Ends, PodIndex, TargetIndex},
    evidence::Gathered,
    manifest, minimal, name,
    notice::{Notice, Reason},
    options::{Enforcer, Options, OwnNode, Since},
    peer::{Peer, Peers},
    plan::{Draft, Plan, Rule},
};
use crate::ledger::Edge;

/// The policies that could be written for the chosen namespaces.
///
/// Each pod or service of these namespaces that is an end of an edge gets a policy. An edge between two of them becomes
/// an egress rule at the client and an ingress rule at the server.
#[must_use]
pub fn plan<'a>(edges: &'a [Edge], options: &'a Options) -> Plan<'a> {
    let cluster = Cluster::new(edges);
    let mut ends = Ends::new(&cluster, edges, options);
    let until = edges.iter().map(|edge| edge.last_seen).max();
    let until = until.unwrap_or_default();
    let mut builder = Builder {
        edges,
        options,
        cluster: &cluster,
        ends: &ends,
        openings: BTreeMap::new(),
        notices: BTreeSet::new(),
    };
    let left_out = left_out(edges, &ends, options, until);
    for (index, left_out) in (0_u32..).zip(left_out) {
        builder.add(index, left_out);
    }
    let Builder {
        mut openings,
        notices,
        ..
    } = builder;

    for directed in openings.values_mut() {
        merge_external(directed, options);
    }
    minimal::reduce(&mut openings, &cluster, &mut ends, edges);
    let (policies, places) = drafts(&cluster, &ends, &openings, edges);
    let mut rules = Vec::new();
    for ((target, direction), directed) in openings {
        for (key, opening) in directed {
            let Some(evidence) = opening.gathered.of(ends.governed_by(target)) else {
                continue;
            };
            rules.push(Rule {
                policy: places[&target],
                direction,
                peer: key.peer.block(),
                protocol: key.protocol,
                port: key.port,
                evidence,
                edges: opening.edges,
            });
        }
    }
    rules.sort_by(|one, other| {
        let key = |rule: &Rule| (rule.policy, rule.direction);
        key(one)
            .cmp(&key(other))
            .then_with(|| one.peer.cmp(&other.peer))
            .then_with(|| (one.protocol, one.port).cmp(&(other.protocol, other.port)))
    });
    Plan {
        edges,
        options,
        ends,
        policies,
        rules,
        notices: notices.into_iter().collect(),
        until,
    }
}

/// What the policies let through.
pub(super) type Openings = BTreeMap<(TargetIndex, Direction), Directed>;

/// The ports and peers of one direction of one policy.
pub(super) type Directed = BTreeMap<Key, Opening>;

/// One port of one peer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) peer: Other,
    pub(super) protocol: Protocol,
    pub(super) port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Other {
    /// Covered by the rule for DNS.
    Dns,
    Peer(Peer),
    /// May be merged with others.
    External(IpAddr),
}

impl Other {
    fn block(self) -> Option<Peer> {
        match self {
            Self::Dns => None,
            Self::Peer(peer) => Some(peer),
            Self::External(address) => Some(Peer::address(address)),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Opening {
    pub(super) gathered: Gathered,
    /// Sorted.
    pub(super) edges: Vec<u32>,
}

struct Builder<'a> {
    edges: &'a [Edge],
    options: &'a Options,
    cluster: &'a Cluster<'a>,
    ends: &'a Ends,
    openings: Openings,
    notices: BTreeSet<Notice>,
}

impl Builder<'_> {
    fn add(&mut self, index: u32, left_out: Option<Reason>) {
        let edge = &self.edges[index as usize];
        let chosen = |endpoint: &Endpoint| {
            endpoint
                .namespace()
                .is_some_and(|namespace| self.options.namespaces.contains(namespace))
        };
        if !chosen(&edge.client) && !chosen(&edge.server) {
            return;
        }
        let ignores_node = self.options.own_node == OwnNode::Ignore;
        let own_node = (ignores_node && is_from_own_node(edge)).then_some(Reason::OwnNode);
        let is_by_a_stranger = edge.is_by_a_stranger() || self.is_hearsay(index, edge);
        let stranger = is_by_a_stranger.then_some(Reason::Stranger);
        if let Some(reason) = own_node.or(stranger).or(left_out) {
            if own_node.is_some() || !self.is_allowed_query(index, edge) {
                self.notices.insert(Notice::new(edge, reason));
            }
            return;
        }
        for direction in [Direction::Egress, Direction::Ingress] {
            if let Err(reason) = self.add_side(index, edge, direction) {
                self.notices.insert(Notice::new(edge, reason));
            }
        }
        if self.is_shared(index) {
            self.notices.insert(Notice::new(edge, Reason::Shared));
        }
        if edge.is_disputed {
            self.notices.insert(Notice::new(edge, Reason::Disputed));
        }
    }

    /// Whether a policy of one end would have to let a pod of the other through by its addresses, and only that pod's agent
    /// tells of it: the pod may not exist.
    fn is_hearsay(&self, index: u32, edge: &Edge) -> bool {
        let (client, server) = self.ends.of_edge(index);
        [
            (Direction::Egress, edge.seen_by_client, client, server),
            (Direction::Ingress, edge.seen_by_server, server, client),
        ]
        .into_iter()
        .any(|(direction, seen_inside, inside, outside)| {
            let mut targets = inside.targets.as_deref().unwrap_or_default().iter();
            seen_inside == 0
                && matches!(outside.peers, Ok(Peers::Unlabelled))
                && targets.any(|target| !self.is_covered(*target, direction, edge))
        })
    }

    /// Whether a policy of either end governs pods of other workloads as well.
    fn is_shared(&self, index: u32) -> bool {
        let (client, server) = self.ends.of_edge(index);
        [client, server].into_iter().any(|end| {
            let targets = end.targets.as_deref().unwrap_or_default();
            targets.iter().any(|target| self.ends.is_shared(*target))
        })
    }

    fn add_side(&mut self, index: u32, edge: &Edge, direction: Direction) -> Result<(), Reason> {
        let (client, server) = self.ends.of_edge(index);
        let (inside, outside) = match direction {
            Direction::Egress => (client, server),
            Direction::Ingress => (server, client),
        };
        let address = address_outside(edge, direction);
        let targets = inside.targets.as_ref().map_err(|reason| *reason)?;
        if targets.is_empty() {
            return Ok(());
        }
        let (covered, targets): (Vec<&TargetIndex>, Vec<&TargetIndex>) = targets
            .iter()
            .partition(|target| self.is_covered(**target, direction, edge));
        for target in covered {
            self.open(*target, direction, Other::Dns, index, inside.pod);
        }
        if targets.is_empty() {
            return Ok(());
        }
        let mut peers: Vec<Other> = match outside.peers.as_ref().map_err(|reason| *reason)? {
            Peers::These(peers) => peers.iter().cloned().map(Other::Peer).collect(),
            Peers::Address => vec![Other::Peer(Peer::address(address))],
            Peers::Unlabelled => {
                let addresses = addresses_outside(edge, direction).into_iter();
                addresses.map(Peer::address).map(Other::Peer).collect()
            }
            Peers::External => vec![Other::External(address.to_canonical())],
        };
        if self.options.enforcer == Enforcer::WeaveNpc && peers.iter().any(is_ipv6) {
            peers.retain(|peer| !is_ipv6(peer));
            if peers.is_empty() {
                return Err(Reason::Ipv6);
            }
            self.notices.insert(Notice::new(edge, Reason::Ipv6));
        }
        if matches!(outside.peers, Ok(Peers::Unlabelled)) {
            self.notices.insert(Notice::new(edge, Reason::ByAddress));
        } else if self.options.enforcer == Enforcer::Kubernetes && has_node(edge, direction, &peers)
        {
            self.notices.insert(Notice::new(edge, Reason::NodeAddress));
        }
        for target in targets {
            for peer in &peers {
                self.open(*target, direction, peer.clone(), index, inside.pod);
            }
        }
        Ok(())
    }

    fn open(
        &mut self,
        target: TargetIndex,
        direction: Direction,
        peer: Other,
        index: u32,
        inside: Option<PodIndex>,
    ) {
        let edge = &self.edges[index as usize];
        let directed = self.openings.entry((target, direction)).or_default();
        let key = Key {
            peer,
            protocol: edge.protocol,
            port: edge.port,
        };
        let opening = directed.entry(key).or_default();
        opening.gathered.add(edge, inside);
        opening.edges.push(index);
    }

    /// Whether the rules for DNS, which stand in any case, let the edge through at all ends that policies govern.
    fn is_allowed_query(&self, index: u32, edge: &Edge) -> bool {
        let (client, server) = self.ends.of_edge(index);
        [(Direction::Egress, client), (Direction::Ingress, server)]
            .into_iter()
            .all(|(direction, inside)| {
                inside.targets.as_ref().is_ok_and(|targets| {
                    let mut targets = targets.iter();
                    targets.all(|target| self.is_covered(*target, direction, edge))
                })
            })
    }

    /// Whether a rule for DNS of this policy covers the edge.
    fn is_covered(&self, target: TargetIndex, direction: Direction, edge: &Edge) -> bool {
        match direction {
            Direction::Egress => self.is_cluster_dns(edge),
            Direction::Ingress => self.is_query_to(target, edge),
        }
    }

    /// Whether the rule by which every policy lets its pods ask the cluster's DNS covers the edge.
    fn is_cluster_dns(&self, edge: &Edge) -> bool {
        let answers = match &edge.server {
            Endpoint::Pod { pod, .. } => !pod.host_network && manifest::are_of_dns(&pod.labels),
            Endpoint::Service(service) => {
                let mut pods = self.cluster.pods_of(service).peekable();
                let is_of_dns = manifest::are_of_dns(&service.selector)
                    || pods.peek().is_some() && pods.all(|pod| manifest::are_of_dns(&pod.labels));
                is_of_dns && self.cluster.host_addresses_of(service).is_empty()
            }
            Endpoint::Node(_) | Endpoint::External(_) => false,
        };
        self.options.allow_dns && is_query(edge) && answers
    }

    /// Whether the rule by which a policy lets all pods ask the cluster's DNS, if it governs that, covers the edge. What
    /// comes from a node's network or from outside it does not let in.
    fn is_query_to(&self, target: TargetIndex, edge: &Edge) -> bool {
        self.options.allow_dns
            && is_query(edge)
            && matches!(&edge.client, Endpoint::Pod { pod, .. } if !pod.host_network)
            && self.cluster.has_dns_in(self.ends.target(target))
    }
}

/// Whether a node, or what runs in the network of one, is among those that are let through by address. The API server is;
/// other services without a selector lead to anything.
fn has_node(edge: &Edge, direction: Direction, peers: &[Other]) -> bool {
    let endpoint = match direction {
        Direction::Egress => &edge.server,
        Direction::Ingress => &edge.client,
    };
    let may_be = match endpoint {
        Endpoint::Pod { .. } | Endpoint::Node(_) => true,
        Endpoint::Service(service) => {
            let name = (service.namespace.as_str(), service.name.as_str());
            !service.selector.is_empty() || name == ("default", "kubernetes")
        }
        Endpoint::External(_) => false,
    };
    may_be && (peers.iter()).any(|peer| matches!(peer, Other::Peer(Peer::Block(_))))
}

/// Why each edge is to have no rule, if it was seen too seldom or too long ago. Pods of one service or controller count as
/// one, so that both ends of an edge are judged alike, and replicas do not make a connection rare.
fn left_out(
    edges: &[Edge],
    ends: &Ends,
    options: &Options,
    until: Timestamp,
) -> Vec<Option<Reason>> {
    let since = match options.since {
        None => Timestamp::default(),
        Some(Since::At(time)) => time,
        Some(Since::Last(duration)) => until.saturating_sub(duration),
    };
    let key = |index: u32, edge: &Edge| {
        let (client, server) = ends.of_edge(index);
        (client.group, server.group, edge.protocol, edge.port)
    };
    let mut sums = HashMap::<_, (u64, Timestamp)>::new();
    for (index, edge) in (0_u32..).zip(edges) {
        let (count, last_seen) = sums.entry(key(index, edge)).or_default();
        *count = count.saturating_add(edge.count());
        *last_seen = edge.last_seen.max(*last_seen);
    }
    let reason = |(index, edge)| {
        let (count, last_seen) = sums[&key(index, edge)];
        if last_seen < since {
            Some(Reason::Old)
        } else {
            (count < options.min_count).then_some(Reason::Rare)
        }
    };
    (0_u32..).zip(edges).map(reason).collect()
}

/// Puts the external addresses of one direction of a policy into blocks.
fn merge_external(directed: &mut Directed, options: &Options) {
    let mut ports = BTreeMap::<IpAddr, BTreeSet<(Protocol, u16)>>::new();
    for key in directed.keys() {
        if let Other::External(address) = key.peer {
            let ports = ports.entry(address).or_default();
            ports.insert((key.protocol, key.port));
        }
    }
    if ports.is_empty() {
        return;
    }
    let merged = blocks::merge(ports, &options.blocks);
    for (key, opening) in std::mem::take(directed) {
        let peer = match key.peer {
            Other::External(address) => match merged.get(&address) {
                Some(block) => Other::Peer(Peer::Block(*block)),
                None => Other::External(address),
            },
            other => other,
        };
        let known = directed.entry(Key { peer, ..key }).or_default();
        known.gathered.join(opening.gathered);
        known.edges.extend(opening.edges);
        known.edges.sort_unstable();
    }
}

/// The policies sorted by namespace and name, and which of them is whose.
fn drafts(
    cluster: &Cluster<'_>,
    ends: &Ends,
    openings: &Openings,
    edges: &[Edge],
) -> (Vec<Draft>, HashMap<TargetIndex, usize>) {
    let mut newest = BTreeMap::<TargetIndex, Timestamp>::new();
    for ((target, _), directed) in openings {
        let newest = newest.entry(*target).or_default();
        for edge in directed.values().flat_map(|opening| &opening.edges) {
            *newest = edges[*edge as usize].first_seen.max(*newest);
        }
    }
    let mut targets: Vec<TargetIndex> = newest.keys().copied().collect();
    targets.sort_by(|one, other| ends.target(*one).id.cmp(&ends.target(*other).id));
    let names = name::names(targets.iter().map(|target| &ends.target(*target).id));
    let mut drafts: Vec<(TargetIndex, Draft)> = targets
        .into_iter()
        .zip(names)
        .map(|(index, name)| {
            let draft = Draft {
                name,
                answers_dns: cluster.has_dns_in(ends.target(index)),
                target: ends.target(index).clone(),
                pods: ends.governed_by(index),
                newest: newest[&index],
            };
            (index, draft)
        })
        .collect();
    drafts.sort_by(|(_, one), (_, other)| {
        (one.namespace(), &one.name).cmp(&(other.namespace(), &other.name))
    });
    let places = drafts.iter().enumerate();
    let places = places.map(|(place, (index, _))| (*index, place)).collect();
    (drafts.into_iter().map(|(_, draft)| draft).collect(), places)
}

/// The address that the traffic carried of the end outside: of the server for egress, of the client for ingress.
pub(super) const fn address_outside(edge: &Edge, direction: Direction) -> IpAddr {
    match direction {
        Direction::Egress => edge.server_address,
        Direction::Ingress => edge.client_address,
    }
}

/// The same where there may be several.
pub(super) fn addresses_outside(edge: &Edge, direction: Direction) -> BTreeSet<IpAddr> {
    let pairs = edge.addresses().into_iter();
    let outside = pairs.map(|(client, server)| match direction {
        Direction::Egress => server,
        Direction::Ingress => client,
    });
    outside.collect()
}

fn is_ipv6(peer: &Other) -> bool {
    match peer {
        Other::External(address) => address.is_ipv6(),
        Other::Peer(Peer::Block(block)) => block.addr().is_ipv6(),
        Other::Peer(Peer::Pods { .. }) | Other::Dns => false,
    }
}

/// Whether the client is the node of the server's pod, or a pod in that node's network. Kubernetes always lets a pod's
/// own node reach it, for the sake of kubelet's probes.
pub(super) fn is_from_own_node(edge: &Edge) -> bool {
    let Endpoint::Pod { pod: server, .. } = &edge.server else {
        return false;
    };
    let node = match &edge.client {
        Endpoint::Node(node) => Some(node.name.as_str()),
        Endpoint::Pod { pod, .. } if pod.host_network => pod.node.as_deref(),
        _ => None,
    };
    node.is_some() && node == server.node.as_deref() && !server.host_network
}

/// Whether it goes to the port on which DNS is served.
fn is_query(edge: &Edge) -> bool {
    edge.port == manifest::DNS_PORT && matches!(edge.protocol, Protocol::Tcp | Protocol::Udp)
}
