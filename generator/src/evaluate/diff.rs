//! What changes in what is reachable when one set of policies takes the place of another.

use std::{collections::BTreeMap, net::IpAddr};

use flow::record::Protocol;
use serde::Serialize;

use super::{
    Judge, Policies, World,
    groups::{GroupId, Groups},
    policies::RuleId,
    proof::{Denial, PortRange, RuleName, denials},
    reach::{Opening, PROTOCOLS, Pair, Reach},
    verdict::Connection,
};

/// The most changes that are described; the rest are counted.
const MAX_CHANGES: usize = 100_000;

/// What changes in what the endpoints of a world can reach. Endpoints are counted as in [`Proof`](super::Proof).
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diff {
    /// How many pairs of endpoints were compared.
    pub pairs: u64,
    /// How many changes open ports between two endpoints.
    pub opened: u64,
    /// How many close some.
    pub closed: u64,
    /// The changes, by destination and source; at most 100,000.
    pub changes: Vec<Change>,
}

/// Ports between two endpoints that were opened or closed for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Which of both.
    pub effect: Effect,
    /// The end that opens connections.
    pub source: String,
    /// The end that accepts them.
    pub destination: String,
    /// The ports, sorted; those of one protocol do not overlap.
    pub ports: Vec<PortRange>,
    /// The rule that opens the ports, or opened them before; `None` where no policy restricts either end.
    pub rule: Option<RuleName>,
    /// Where they were denied before, or are denied now.
    pub denials: Vec<Denial>,
}

/// Whether ports were opened or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Closed before, open now.
    Opened,
    /// Open before, closed now.
    Closed,
}

/// Compares what two sets of policies let the endpoints of a world do.
#[must_use]
pub fn diff(world: &World, before: &Policies, after: &Policies) -> Diff {
    let judges = [Judge::new(world, before), Judge::new(world, after)];
    let groups = Groups::new(world, &[&judges[0], &judges[1]]);
    let sides = [
        Side {
            judge: &judges[0],
            reach: Reach::new(&groups, before, 0),
        },
        Side {
            judge: &judges[1],
            reach: Reach::new(&groups, after, 1),
        },
    ];
    let mut diff = Diff {
        pairs: groups.pairs(),
        ..Diff::default()
    };
    for destination in 0..groups.len() {
        for source in 0..groups.len() {
            let (from, to) = (groups.get(source), groups.get(destination));
            if !(from.is_pods() || to.is_pods()) || (source == destination && from.members == 1) {
                continue;
            }
            let [was, is] = [&sides[0], &sides[1]].map(|side| side.reach.pair(source, destination));
            if was == is {
                continue;
            }
            let [was, is] = [open(was), open(is)];
            let pair = (source, destination);
            diff.add(
                Effect::Opened,
                &groups,
                pair,
                [&sides[1], &sides[0]],
                &minus(&is, &was),
            );
            diff.add(
                Effect::Closed,
                &groups,
                pair,
                [&sides[0], &sides[1]],
                &minus(&was, &is),
            );
        }
    }
    diff
}

struct Side<'a> {
    judge: &'a Judge<'a>,
    reach: Reach<'a>,
}

impl Diff {
    /// `sides`: that which allows the ports, and that which denies them.
    fn add(
        &mut self,
        effect: Effect,
        groups: &Groups<'_>,
        (source, destination): (GroupId, GroupId),
        sides: [&Side<'_>; 2],
        ports: &[Open],
    ) {
        let mut reasons = BTreeMap::<(Option<RuleId>, Vec<Denial>), Vec<PortRange>>::new();
        for port in ports {
            let denials = denied(groups, source, destination, port, sides[1].judge);
            let ranges = reasons.entry((port.rule, denials)).or_default();
            ranges.push(PortRange {
                protocol: port.protocol,
                port: port.first,
                end_port: port.last,
            });
        }
        for ((rule, denials), mut ports) in reasons {
            match effect {
                Effect::Opened => self.opened += 1,
                Effect::Closed => self.closed += 1,
            }
            if self.changes.len() >= MAX_CHANGES {
                continue;
            }
            ports.sort_unstable();
            self.changes.push(Change {
                effect,
                source: groups.get(source).to_string(),
                destination: groups.get(destination).to_string(),
                ports,
                rule: rule.map(|rule| RuleName::new(rule, sides[0].judge.policies())),
                denials,
            });
        }
    }
}

/// Where a judge denies the first of these ports. Of members that can be told apart by their addresses alone the first two
/// that can speak to each other stand for all.
fn denied(
    groups: &Groups<'_>,
    source: GroupId,
    destination: GroupId,
    port: &Open,
    judge: &Judge<'_>,
) -> Vec<Denial> {
    let family = |address: Option<IpAddr>| address.map(|address| address.is_ipv4());
    for from in &groups.get(source).ends {
        for to in &groups.get(destination).ends {
            if let (Some(one), Some(other)) = (family(from.address()), family(to.address()))
                && one != other
            {
                continue;
            }
            let verdict = judge.verdict(&Connection {
                source: *from,
                destination: *to,
                protocol: port.protocol,
                port: port.first,
            });
            if !verdict.is_allowed() {
                return denials(&verdict, judge.policies());
            }
        }
    }
    Vec::new()
}

/// Open ports of one protocol, and the rule that opens them.
#[derive(Clone, Copy, Debug)]
struct Open {
    protocol: Protocol,
    first: u16,
    last: u16,
    rule: Option<RuleId>,
}

fn open(pair: Pair) -> Vec<Open> {
    match pair {
        Pair::Unguarded | Pair::OwnNode => PROTOCOLS
            .map(|protocol| Open {
                protocol,
                first: 1,
                last: u16::MAX,
                rule: None,
            })
            .to_vec(),
        Pair::Guarded(openings) => openings
            .iter()
            .map(|opening: &Opening| Open {
                protocol: opening.protocol,
                first: opening.first,
                last: opening.last,
                rule: opening.rule(),
            })
            .collect(),
    }
}

/// What is in `these` and not in `those`, each port once.
fn minus(these: &[Open], those: &[Open]) -> Vec<Open> {
    let mut rest = Vec::<Open>::new();
    for this in these {
        let mut pieces = vec![*this];
        let taken = those.iter().chain(&rest).copied().collect::<Vec<_>>();
        for that in taken.iter().filter(|that| that.protocol == this.protocol) {
            pieces = pieces
                .into_iter()
                .flat_map(|piece| {
                    let below = (piece.first < that.first).then(|| Open {
                        last: piece.last.min(that.first - 1),
                        ..piece
                    });
                    let above = (piece.last > that.last).then(|| Open {
                        first: piece.first.max(that.last + 1),
                        ..piece
                    });
                    below.into_iter().chain(above)
                })
                .collect();
        }
        rest.extend(pieces);
    }
    rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn opens() -> impl Strategy<Value = Vec<Open>> {
        let open = (0..2_usize, 1..20_u16, 0..8_u16).prop_map(|(protocol, first, length)| Open {
            protocol: PROTOCOLS[protocol],
            first,
            last: first + length,
            rule: None,
        });
        prop::collection::vec(open, 0..6)
    }

    proptest! {
        #[test]
        fn a_difference_has_each_port_once(these in opens(), those in opens()) {
            let times = |opens: &[Open], protocol, port: u16| {
                opens
                    .iter()
                    .filter(|open| open.protocol == protocol && (open.first..=open.last).contains(&port))
                    .count()
            };
            let rest = minus(&these, &those);
            for protocol in PROTOCOLS {
                for port in 1..30 {
                    let expected = times(&these, protocol, port) > 0 && times(&those, protocol, port) == 0;
                    prop_assert_eq!(times(&rest, protocol, port), usize::from(expected));
                }
            }
        }
    }
}
