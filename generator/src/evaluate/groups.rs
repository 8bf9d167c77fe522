//! Ends that no policy can tell apart, taken together.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use flow::{endpoint::Labels, record::Direction};

use super::{
    judge::Judge,
    policies::{PeerId, PolicyId},
    ports::NamedPort,
    world::{End, NodeId, World},
};

/// The known ends of a world in groups, so that pairs of groups stand for pairs of ends.
///
/// In a group are pods of one namespace that have the same labels and ports and whose addresses are in the same blocks; a
/// node; or addresses outside of the cluster that are in the same blocks.
#[derive(Debug)]
pub(super) struct Groups<'a> {
    groups: Vec<Group<'a>>,
    by_end: HashMap<EndKey, GroupId>,
}

pub(super) type GroupId = usize;

#[derive(Debug)]
pub(super) struct Group<'a> {
    pub(super) kind: Kind<'a>,
    /// What its first member is called.
    name: String,
    pub(super) members: usize,
    /// The first member, once with each family of its addresses.
    pub(super) ends: Vec<End>,
    /// For each judge what it sees of the group.
    pub(super) seen_by: Vec<Seen<'a>>,
}

#[derive(Debug)]
pub(super) enum Kind<'a> {
    /// Pods with these ports, and the nodes on which they run.
    Pods(&'a [NamedPort], BTreeSet<Option<NodeId>>),
    Node(NodeId),
    Externals,
}

/// What the policies of one judge make of a group.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Seen<'a> {
    ingress: &'a [PolicyId],
    egress: &'a [PolicyId],
    /// The peers that the group is over IPv4 and over IPv6; `None` where it has no address.
    pub(super) peers: [Option<Vec<PeerId>>; 2],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum EndKey {
    Pod(usize),
    Node(usize),
    External(IpAddr),
}

/// What the members of a group agree in.
#[derive(PartialEq, Eq, Hash)]
enum GroupKey<'a> {
    Pods(&'a str, &'a Labels, &'a [NamedPort], Vec<Seen<'a>>),
    Node(NodeId),
    Externals(Vec<Seen<'a>>),
}

impl<'a> Groups<'a> {
    /// The groups of the ends of a world that the judges see; all of them must be of this world.
    pub(super) fn new(world: &'a World, judges: &[&'a Judge<'a>]) -> Self {
        let mut groups = Self {
            groups: Vec::new(),
            by_end: HashMap::new(),
        };
        let mut known = HashMap::<GroupKey<'a>, GroupId>::new();
        for (id, pod) in world.pods() {
            let seen_by = || seen(judges, End::Pod(id, None), &pod.addresses);
            let key = GroupKey::Pods(&pod.namespace, &pod.labels, &pod.ports, seen_by());
            let group = *known.entry(key).or_insert_with(|| {
                groups.push(
                    Kind::Pods(&pod.ports, BTreeSet::new()),
                    format!("{}/{}", pod.namespace, pod.known_as),
                    ends(&pod.addresses, |address| End::Pod(id, address)),
                    seen_by(),
                )
            });
            groups.join(EndKey::Pod(id.0), group);
            if let Kind::Pods(_, nodes) = &mut groups.groups[group].kind {
                let node = pod.node.as_deref();
                nodes.insert(node.and_then(|node| world.find_node(node)));
            }
        }
        for (id, node) in world.nodes() {
            // Without an address nothing comes from there.
            let Some(first) = node.addresses.first() else {
                continue;
            };
            let group = *known.entry(GroupKey::Node(id)).or_insert_with(|| {
                let seen_by = seen(judges, End::Node(id, *first), &node.addresses);
                let ends = ends(&node.addresses, |address| {
                    End::Node(id, address.unwrap_or(*first))
                });
                groups.push(Kind::Node(id), format!("node {}", node.name), ends, seen_by)
            });
            groups.join(EndKey::Node(id.0), group);
        }
        for address in world.externals() {
            let seen_by = || seen(judges, End::External(address), &[address]);
            let group = *known
                .entry(GroupKey::Externals(seen_by()))
                .or_insert_with(|| {
                    let ends = vec![End::External(address)];
                    groups.push(Kind::Externals, address.to_string(), ends, seen_by())
                });
            groups.join(EndKey::External(address), group);
        }
        groups
    }

    /// The group of an end of this world; `None` for an address that the world does not know.
    pub(super) fn of(&self, end: End) -> Option<GroupId> {
        let key = match end {
            End::Pod(id, _) => EndKey::Pod(id.0),
            End::Node(id, _) => EndKey::Node(id.0),
            End::External(address) => EndKey::External(address),
        };
        self.by_end.get(&key).copied()
    }

    pub(super) fn of_node(&self, node: NodeId) -> Option<GroupId> {
        self.by_end.get(&EndKey::Node(node.0)).copied()
    }

    /// How many pairs there are whose connections policies can restrict, and which share a family of addresses.
    pub(super) fn pairs(&self) -> u64 {
        let mut count = [[0_u64; 4]; 2];
        for group in &self.groups {
            count[0][group.families()] += 1;
            count[1][group.families()] += u64::from(group.is_pods());
        }
        let sources = |group: &Group<'_>| -> u64 {
            let count = &count[usize::from(!group.is_pods())];
            let with_itself: u64 = (0..4)
                .filter(|families| families & group.families() != 0)
                .map(|families| count[families])
                .sum();
            with_itself - u64::from(group.is_pods() && group.members == 1)
        };
        self.groups.iter().map(sources).sum()
    }

    pub(super) fn get(&self, id: GroupId) -> &Group<'a> {
        &self.groups[id]
    }

    pub(super) fn len(&self) -> usize {
        self.groups.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Group<'a>> {
        self.groups.iter()
    }

    fn push(
        &mut self,
        kind: Kind<'a>,
        name: String,
        ends: Vec<End>,
        seen_by: Vec<Seen<'a>>,
    ) -> GroupId {
        self.groups.push(Group {
            kind,
            name,
            members: 0,
            ends,
            seen_by,
        });
        self.groups.len() - 1
    }

    fn join(&mut self, end: EndKey, group: GroupId) {
        self.groups[group].members += 1;
        self.by_end.insert(end, group);
    }
}

impl<'a> Group<'a> {
    pub(super) const fn is_pods(&self) -> bool {
        matches!(self.kind, Kind::Pods(..))
    }

    pub(super) const fn named_ports(&self) -> &'a [NamedPort] {
        match &self.kind {
            Kind::Pods(ports, _) => ports,
            Kind::Node(_) | Kind::Externals => &[],
        }
    }

    /// Whether all pods of the group run on the node that `source` is, which can therefore reach each of them.
    pub(super) fn is_all_on(&self, source: &Self) -> bool {
        match (&self.kind, &source.kind) {
            (Kind::Pods(_, nodes), Kind::Node(node)) => nodes.iter().eq([&Some(*node)]),
            _ => false,
        }
    }

    /// Bit 0 for IPv4, bit 1 for IPv6.
    pub(super) fn families(&self) -> usize {
        let Some(seen) = self.seen_by.first() else {
            return 0b11;
        };
        let [ipv4, ipv6] = &seen.peers;
        usize::from(ipv4.is_some()) | usize::from(ipv6.is_some()) << 1
    }
}

impl Seen<'_> {
    pub(super) const fn isolating(&self, direction: Direction) -> &[PolicyId] {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }
}

/// What its first member is called, and how many more there are.
impl fmt::Display for Group<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.kind, self.members) {
            (Kind::Externals, 2..) => {
                write!(f, "{} and {} more addresses", self.name, self.members - 1)
            }
            _ => f.write_str(&self.name),
        }
    }
}

/// An end with the first address of each family, or without address if there is none.
fn ends(addresses: &[IpAddr], end: impl Fn(Option<IpAddr>) -> End) -> Vec<End> {
    if addresses.is_empty() {
        return vec![end(None)];
    }
    [IpAddr::is_ipv4, IpAddr::is_ipv6]
        .into_iter()
        .filter_map(|is_of_family| addresses.iter().find(|address| is_of_family(address)))
        .map(|address| end(Some(*address)))
        .collect()
}

fn seen<'a>(judges: &[&'a Judge<'a>], end: End, addresses: &[IpAddr]) -> Vec<Seen<'a>> {
    judges
        .iter()
        .map(|judge| {
            let (ingress, egress, own): (_, _, &[PeerId]) = match end {
                End::Pod(pod, _) => {
                    let class = judge.class(pod);
                    (
                        class.isolating(Direction::Ingress),
                        class.isolating(Direction::Egress),
                        &class.peers,
                    )
                }
                End::Node(..) | End::External(_) => (&[][..], &[][..], &[]),
            };
            let peers = [true, false].map(|ipv4| {
                let mut of_family = addresses
                    .iter()
                    .filter(|address| address.is_ipv4() == ipv4)
                    .peekable();
                // A pod without a known address may have one of either family.
                (addresses.is_empty() || of_family.peek().is_some()).then(|| {
                    // Any of its addresses may be used.
                    let mut peers: Vec<PeerId> = of_family
                        .flat_map(|address| judge.policies().blocks_of(*address))
                        .chain(own.iter().copied())
                        .collect();
                    peers.sort_unstable();
                    peers.dedup();
                    peers
                })
            });
            Seen {
                ingress,
                egress,
                peers,
            }
        })
        .collect()
}
