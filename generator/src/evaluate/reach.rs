//! Which groups can reach which.
//!
//! There are as many pairs as groups squared, so nothing is done for each pair that can be done for more. What a rule lets
//! arrive at a group depends on the policies that isolate it alone, and many groups have these in common; what may leave for
//! a group depends on the policies of the source alone. Pairs of which neither end is isolated are only counted.

use std::collections::HashMap;

use flow::record::{Direction, Protocol};

use super::{
    groups::{Group, GroupId, Groups, Kind, Seen},
    policies::{PeerId, Policies, PolicyId, RuleId},
    ports::NamedPort,
};

pub(super) const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// What the policies of one judge let the groups of a world do.
#[derive(Debug)]
pub(super) struct Reach<'a> {
    groups: &'a Groups<'a>,
    policies: &'a Policies,
    /// The judge's place in the groups' list.
    judge: usize,
    /// The groups that are a peer, by the numbers of peers that are pods, and of those that are blocks.
    pods: Vec<Vec<GroupId>>,
    blocks: Vec<Vec<GroupId>>,
    /// The groups that policies isolate for egress.
    isolated: Vec<GroupId>,
    /// How many groups there are that no policy isolates for egress, by the families of their addresses; first all of
    /// them, then those of pods.
    unrestricted: [[u64; 4]; 2],
}

/// How many pairs can reach each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Pairs that no policy restricts at either end.
    pub(super) unguarded: u64,
    /// Pods and the node on which all of them run, which policies cannot keep out.
    pub(super) own_node: u64,
    /// The others.
    pub(super) guarded: u64,
}

/// Ports that are open between two groups, and the rules that open them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Opening {
    pub(super) protocol: Protocol,
    pub(super) first: u16,
    pub(super) last: u16,
    /// `None` where nothing isolates the source.
    pub(super) egress: Option<RuleId>,
    /// `None` where nothing isolates the destination.
    pub(super) ingress: Option<RuleId>,
}

/// What is open between two groups.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pair {
    /// Everything: no policy restricts either end.
    Unguarded,
    /// Everything: the source is the node on which all pods of the destination run, and nothing isolates it.
    OwnNode,
    /// This.
    Guarded(Vec<Opening>),
}

/// What the rules at one end let through to or from the other one, over IPv4 and over IPv6.
type ByFamily = [Vec<Opening>; 2];

impl<'a> Reach<'a> {
    pub(super) fn new(groups: &'a Groups<'a>, policies: &'a Policies, judge: usize) -> Self {
        let mut reach = Self {
            groups,
            policies,
            judge,
            pods: Vec::new(),
            blocks: Vec::new(),
            isolated: Vec::new(),
            unrestricted: [[0; 4]; 2],
        };
        for (id, group) in groups.iter().enumerate() {
            let seen = &group.seen_by[judge];
            for peer in seen.peers.iter().flatten().flatten() {
                let (list, number) = match peer {
                    PeerId::Pods(number) => (&mut reach.pods, *number),
                    PeerId::Block(number) => (&mut reach.blocks, *number),
                };
                if list.len() <= number {
                    list.resize_with(number + 1, Vec::new);
                }
                // A group with addresses of both families comes twice.
                if list[number].last() != Some(&id) {
                    list[number].push(id);
                }
            }
            if seen.isolating(Direction::Egress).is_empty() {
                reach.unrestricted[0][group.families()] += 1;
                reach.unrestricted[1][group.families()] += u64::from(group.is_pods());
            } else {
                reach.isolated.push(id);
            }
        }
        reach
    }

    /// Counts the pairs that can reach each other, and hands those that policies restrict, source first, to `visit` with
    /// what is open between them, which is something. The order depends on nothing but the groups.
    pub(super) fn visit(&self, mut visit: impl FnMut(GroupId, GroupId, &[Opening])) -> Counts {
        let mut counts = Counts::default();
        let mut destinations: Vec<GroupId> = (0..self.groups.len()).collect();
        destinations.sort_by_key(|id| self.arrival(*id));
        let mut openings = Vec::new();
        for same in destinations.chunk_by(|one, other| self.arrival(*one) == self.arrival(*other)) {
            let (isolating, named) = self.arrival(same[0]);
            let arriving: Vec<(GroupId, ByFamily)> = self
                .sources(isolating)
                .into_iter()
                .map(|source| {
                    let peers = &self.seen(source).peers;
                    (
                        source,
                        self.by_family(isolating, Direction::Ingress, peers, named),
                    )
                })
                .collect();
            for destination in same {
                let to = self.groups.get(*destination);
                if isolating.is_empty() {
                    counts.unguarded += self.unrestricted_sources(*destination);
                } else {
                    counts.own_node += self.own_nodes(to);
                }
                let mut leaving = Leaving::default();
                for (source, arriving) in &arriving {
                    let from = self.groups.get(*source);
                    let is_itself = source == destination && to.members == 1;
                    if is_itself || (!isolating.is_empty() && to.is_all_on(from)) {
                        continue;
                    }
                    let egress = self.seen(*source).isolating(Direction::Egress);
                    let leaving = leaving.get(egress, || {
                        let peers = &self.seen(*destination).peers;
                        self.by_family(egress, Direction::Egress, peers, to.named_ports())
                    });
                    openings.clear();
                    self.combine((*source, leaving), (*destination, arriving), &mut openings);
                    if !openings.is_empty() {
                        counts.guarded += 1;
                        visit(*source, *destination, &openings);
                    }
                }
            }
        }
        counts
    }

    /// What is open between two groups.
    pub(super) fn pair(&self, source: GroupId, destination: GroupId) -> Pair {
        let (from, to) = (self.groups.get(source), self.groups.get(destination));
        let (ingress, named) = self.arrival(destination);
        let egress = self.seen(source).isolating(Direction::Egress);
        let own_node = !ingress.is_empty() && to.is_all_on(from);
        if (ingress.is_empty() || own_node) && egress.is_empty() {
            return match (own_node, from.families() & to.families()) {
                (_, 0) => Pair::Guarded(Vec::new()),
                (true, _) => Pair::OwnNode,
                (false, _) => Pair::Unguarded,
            };
        }
        let leaving = self.by_family(
            egress,
            Direction::Egress,
            &self.seen(destination).peers,
            named,
        );
        let arriving = self.by_family(ingress, Direction::Ingress, &self.seen(source).peers, named);
        let mut openings = Vec::new();
        self.combine((source, &leaving), (destination, &arriving), &mut openings);
        Pair::Guarded(openings)
    }

    /// Adds what may leave the source and arrive at the destination, at least one of which is isolated.
    fn combine(
        &self,
        (source, leaving): (GroupId, &ByFamily),
        (destination, arriving): (GroupId, &ByFamily),
        openings: &mut Vec<Opening>,
    ) {
        let (from, to) = (self.seen(source), self.seen(destination));
        let is_free = |seen: &Seen<'_>, direction| seen.isolating(direction).is_empty();
        for family in 0..2 {
            if from.peers[family].is_none() || to.peers[family].is_none() {
                continue;
            }
            let (leaving, arriving) = (&leaving[family], &arriving[family]);
            if is_free(from, Direction::Egress) {
                openings.extend_from_slice(arriving);
            } else if is_free(to, Direction::Ingress) {
                openings.extend_from_slice(leaving);
            } else {
                for leaving in leaving {
                    openings.extend(arriving.iter().filter_map(|arriving| leaving.and(arriving)));
                }
            }
        }
        if openings.len() > 1 {
            openings.sort_unstable();
            // What several rules open is said of the first.
            openings.dedup_by_key(|opening| (opening.protocol, opening.first, opening.last));
        }
    }

    fn seen(&self, group: GroupId) -> &'a Seen<'a> {
        &self.groups.get(group).seen_by[self.judge]
    }

    /// What decides what can arrive at a group.
    fn arrival(&self, group: GroupId) -> (&'a [PolicyId], &'a [NamedPort]) {
        (
            self.seen(group).isolating(Direction::Ingress),
            self.groups.get(group).named_ports(),
        )
    }

    /// The groups whose connections to groups that are isolated by these policies have to be looked at, sorted: those that any
    /// rule lets through, or, where no policy isolates, those that cannot just be counted.
    fn sources(&self, isolating: &[PolicyId]) -> Vec<GroupId> {
        if isolating.is_empty() {
            return self.isolated.clone();
        }
        let rules = || {
            isolating
                .iter()
                .filter_map(|policy| self.policies.get(*policy).rules(Direction::Ingress))
        };
        if rules().any(|rules| rules.are_for_all()) {
            return (0..self.groups.len()).collect();
        }
        let of_peer = |peer| {
            match peer {
                PeerId::Pods(number) => self.pods.get(number),
                PeerId::Block(number) => self.blocks.get(number),
            }
            .map_or(&[][..], Vec::as_slice)
        };
        let mut sources: Vec<GroupId> = rules()
            .flat_map(|rules| rules.peers())
            .flat_map(of_peer)
            .copied()
            .collect();
        sources.sort_unstable();
        sources.dedup();
        sources
    }

    /// How many groups can reach one that no policy isolates for ingress, because none isolates them for egress. Between two
    /// ends that are no pods policies have no say.
    fn unrestricted_sources(&self, destination: GroupId) -> u64 {
        let group = self.groups.get(destination);
        let unrestricted = &self.unrestricted[usize::from(!group.is_pods())];
        let with_itself: u64 = (0..4)
            .filter(|families| families & group.families() != 0)
            .map(|families| unrestricted[families])
            .sum();
        let is_free = self
            .seen(destination)
            .isolating(Direction::Egress)
            .is_empty();
        with_itself - u64::from(group.is_pods() && group.members == 1 && is_free)
    }

    /// How many nodes there are on which all pods of an isolated group run.
    fn own_nodes(&self, group: &Group<'_>) -> u64 {
        let Kind::Pods(_, nodes) = &group.kind else {
            return 0;
        };
        let nodes = nodes.iter().flatten();
        nodes
            .filter_map(|node| self.groups.of_node(*node))
            .map(|node| self.groups.get(node))
            .filter(|node| group.is_all_on(node) && node.families() & group.families() != 0)
            .count() as u64
    }

    /// What the rules of some policies let through to or from a group that is these peers.
    fn by_family(
        &self,
        isolating: &[PolicyId],
        direction: Direction,
        peers: &[Option<Vec<PeerId>>; 2],
        named: &[NamedPort],
    ) -> ByFamily {
        [0, 1].map(|family| match &peers[family] {
            Some(peers) => self.openings(isolating, direction, peers, named),
            None => Vec::new(),
        })
    }

    fn openings(
        &self,
        isolating: &[PolicyId],
        direction: Direction,
        peers: &[PeerId],
        named: &[NamedPort],
    ) -> Vec<Opening> {
        let mut openings = Vec::new();
        for policy in isolating {
            let Some(rules) = self.policies.get(*policy).rules(direction) else {
                continue;
            };
            for index in rules.letting(peers) {
                let rule = RuleId {
                    policy: *policy,
                    direction,
                    index,
                };
                match rules.ports(index) {
                    None => openings.extend(
                        PROTOCOLS.map(|protocol| Opening::by(rule, protocol, (1, u16::MAX))),
                    ),
                    Some(ports) => openings.extend(ports.iter().filter_map(|ports| {
                        let range = ports.range(named)?;
                        Some(Opening::by(rule, ports.protocol, range))
                    })),
                }
            }
        }
        openings
    }
}

/// What may leave for one destination, by the policies of the source.
#[derive(Debug, Default)]
struct Leaving<'a> {
    known: HashMap<&'a [PolicyId], ByFamily>,
}

impl<'a> Leaving<'a> {
    fn get(&mut self, isolating: &'a [PolicyId], compute: impl FnOnce() -> ByFamily) -> &ByFamily {
        self.known.entry(isolating).or_insert_with(compute)
    }
}

impl Opening {
    fn by(rule: RuleId, protocol: Protocol, (first, last): (u16, u16)) -> Self {
        Self {
            protocol,
            first,
            last,
            egress: (rule.direction == Direction::Egress).then_some(rule),
            ingress: (rule.direction == Direction::Ingress).then_some(rule),
        }
    }

    /// What is open where both are.
    fn and(&self, other: &Self) -> Option<Self> {
        let both = Self {
            protocol: self.protocol,
            first: self.first.max(other.first),
            last: self.last.min(other.last),
            egress: self.egress.or(other.egress),
            ingress: self.ingress.or(other.ingress),
        };
        (self.protocol == other.protocol && both.first <= both.last).then_some(both)
    }

    /// The rule that opens it: the destination's where there is one.
    pub(super) fn rule(&self) -> Option<RuleId> {
        self.ingress.or(self.egress)
    }
}
