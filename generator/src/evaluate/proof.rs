//! What a set of policies does to the connections that were seen, and what it leaves open besides.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use flow::record::{Direction, Protocol};
use serde::Serialize;

use super::{
    Judge, Policies, World,
    groups::{GroupId, Groups},
    judge::connections,
    policies::RuleId,
    reach::{Opening, Reach},
    verdict::Verdict,
};
use crate::ledger::Edge;

/// How many examples are kept of what a rule opens.
const MAX_EXAMPLES: usize = 3;

/// What a set of policies does to the connections that were seen, and what it leaves open besides.
///
/// The latter is counted in pairs of endpoints, of which at least one is a pod that policies apply to. Pods of one namespace
/// with the same labels, ports and blocks of addresses count as one endpoint, as do external addresses in the same blocks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proof {
    /// How many edges the policies allow.
    pub allowed: usize,
    /// The edges that they deny.
    pub denied: Vec<Denied>,
    /// How many pairs can reach each other where there are no policies.
    pub reachable_before: u64,
    /// How many with the policies.
    pub reachable_after: u64,
    /// How many of these no policy restricts at either end, or no policy can because one is the other's own node.
    pub unrestricted: u64,
    /// How many openings of ports between the rest were not seen in use.
    pub never_seen: u64,
    /// The same by the rule that opens them, the server's where both ends need one.
    pub never_seen_by_rule: Vec<NeverSeen>,
}

/// An edge that the policies deny.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Denied {
    /// Its place among the edges.
    pub edge: usize,
    /// The client's name.
    pub client: String,
    /// The server's name.
    pub server: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// How many connections were seen.
    pub count: u64,
    /// Where it is denied.
    pub denials: Vec<Denial>,
}

/// An end at which an edge is denied.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Denial {
    /// Egress at the client, or ingress at the server.
    pub direction: Direction,
    /// `namespace/name` of the policies that isolate it there and have no rule for the edge.
    pub policies: Vec<String>,
}

/// What a rule opens that was not seen in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NeverSeen {
    /// The rule.
    pub rule: RuleName,
    /// How many openings of ports between two endpoints.
    pub count: u64,
    /// The first of them.
    pub examples: Vec<Unused>,
}

/// Ports between two endpoints that are open and were not seen in use, or not all of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unused {
    /// The end that can open a connection.
    pub source: String,
    /// The end that it reaches.
    pub destination: String,
    /// The ports.
    #[serde(flatten)]
    pub ports: PortRange,
}

/// Ports of one protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PortRange {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The first port.
    pub port: u16,
    /// The last port.
    pub end_port: u16,
}

/// A rule by the names of its policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct RuleName {
    /// `namespace/name`.
    pub policy: String,
    /// Whether it is one of the policy's rules for ingress or for egress.
    pub direction: Direction,
    /// Its place among these, from 0.
    pub index: usize,
}

/// Judges all edges by the policies, and all pairs of the world's endpoints. The world must know the edges' ends, as one that
/// is made of these edges does.
#[must_use]
pub fn prove(edges: &[Edge], policies: &Policies, world: &World) -> Proof {
    let judge = Judge::new(world, policies);
    let groups = Groups::new(world, &[&judge]);
    let mut proof = Proof {
        allowed: 0,
        denied: Vec::new(),
        reachable_before: groups.pairs(),
        reachable_after: 0,
        unrestricted: 0,
        never_seen: 0,
        never_seen_by_rule: Vec::new(),
    };
    let mut seen: Vec<Seen> = vec![Seen::new(); groups.len()];
    for (i, edge) in edges.iter().enumerate() {
        for connection in connections(world, edge) {
            if let (Some(from), Some(to)) = (
                groups.of(connection.source),
                groups.of(connection.destination),
            ) {
                let ports = seen[to].entry(from).or_default();
                ports.push((edge.protocol, edge.port));
            }
        }
        let verdict = judge.verdict_on_edge(edge);
        if verdict.is_allowed() {
            proof.allowed += 1;
        } else {
            proof.denied.push(Denied::new(i, edge, &verdict, policies));
        }
    }
    for ports in seen.iter_mut().flat_map(HashMap::values_mut) {
        ports.sort_unstable();
        ports.dedup();
    }
    proof.add_reach(&groups, &Reach::new(&groups, policies, 0), &seen, policies);
    proof
}

/// The ports on which a group was seen to be called, by the calling group.
type Seen = HashMap<GroupId, Vec<(Protocol, u16)>>;

impl Proof {
    /// `seen` is by destination; its ports are sorted and distinct.
    fn add_reach(
        &mut self,
        groups: &Groups<'_>,
        reach: &Reach<'_>,
        seen: &[Seen],
        policies: &Policies,
    ) {
        let mut by_rule = BTreeMap::<RuleId, NeverSeen>::new();
        let counts = reach.visit(|source, destination, openings| {
            let seen = seen[destination].get(&source);
            let seen = seen.map_or(&[][..], Vec::as_slice);
            for opening in openings {
                let Some(rule) = opening.rule() else {
                    continue;
                };
                if is_all_seen(opening, seen) {
                    continue;
                }
                self.never_seen += 1;
                let of_rule = by_rule.entry(rule).or_insert_with(|| NeverSeen {
                    rule: RuleName::new(rule, policies),
                    count: 0,
                    examples: Vec::new(),
                });
                of_rule.count += 1;
                if of_rule.examples.len() < MAX_EXAMPLES {
                    of_rule.examples.push(Unused {
                        source: groups.get(source).to_string(),
                        destination: groups.get(destination).to_string(),
                        ports: PortRange {
                            protocol: opening.protocol,
                            port: opening.first,
                            end_port: opening.last,
                        },
                    });
                }
            }
        });
        self.unrestricted = counts.unguarded + counts.own_node;
        self.reachable_after = self.unrestricted + counts.guarded;
        self.never_seen_by_rule = by_rule.into_values().collect();
    }
}

/// Whether each of the open ports is among those seen, which are sorted and distinct.
fn is_all_seen(opening: &Opening, seen: &[(Protocol, u16)]) -> bool {
    let place = |port| (opening.protocol, port);
    let from = seen.partition_point(|seen| *seen < place(opening.first));
    let to = seen.partition_point(|seen| *seen <= place(opening.last));
    to - from == usize::from(opening.last - opening.first) + 1
}

impl Denied {
    fn new(i: usize, edge: &Edge, verdict: &Verdict, policies: &Policies) -> Self {
        Self {
            edge: i,
            client: edge.client.to_string(),
            server: edge.server.to_string(),
            protocol: edge.protocol,
            port: edge.port,
            count: edge.count(),
            denials: denials(verdict, policies),
        }
    }
}

/// The ends at which a connection is denied, by the names of the policies.
#[must_use]
pub fn denials(verdict: &Verdict, policies: &Policies) -> Vec<Denial> {
    verdict
        .denials()
        .map(|(direction, isolating)| Denial {
            direction,
            policies: isolating
                .iter()
                .map(|policy| policies.get(*policy).to_string())
                .collect(),
        })
        .collect()
}

impl RuleName {
    /// The name of a rule of these policies.
    #[must_use]
    pub fn new(rule: RuleId, policies: &Policies) -> Self {
        Self {
            policy: policies.get(rule.policy).to_string(),
            direction: rule.direction,
            index: rule.index,
        }
    }
}

/// As in `ingress[2] of sock-shop/policy-carts`: the rule's field in the policy's `spec`.
impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            policy,
            direction,
            index,
        } = self;
        write!(f, "{direction}[{index}] of {policy}")
    }
}

/// As in `shop/web -> shop/db 3306/TCP`.
impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {}", self.source, self.destination, self.ports)
    }
}

/// `80/TCP`, `8000-8010/TCP` or `any port/TCP`.
impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            protocol,
            port,
            end_port,
        } = self;
        match (*port, *end_port) {
            (1, u16::MAX) => write!(f, "any port/{protocol}"),
            (first, last) if first == last => write!(f, "{first}/{protocol}"),
            (first, last) => write!(f, "{first}-{last}/{protocol}"),
        }
    }
}
