//! What could be written: every policy, with every rule and what speaks for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use flow::{
    endpoint::Endpoint,
    record::{Direction, Protocol},
    time::Timestamp,
};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::{
    Namespaces, Notice, Options, PolicyTypes, blocks,
    ends::{Ends, GroupId},
    evidence::{Evidence, Gathered, SeenBy},
    manifest::{self, Spec},
    peer::Peer,
    target::Target,
};
use crate::ledger::Edge;

/// The policies that allow the edges of the chosen namespaces, rule by rule.
#[derive(Debug)]
pub struct Plan<'a> {
    pub(super) edges: &'a [Edge],
    pub(super) options: &'a Options,
    pub(super) ends: Ends,
    /// Sorted by namespace and name.
    pub(super) policies: Vec<Draft>,
    /// Sorted by policy; those of one policy by direction, peer, protocol and port.
    pub(super) rules: Vec<Rule>,
    /// Edges of the chosen namespaces for which a rule was left out, or given in another way than by labels.
    pub notices: Vec<Notice>,
    /// When anything was seen last: the end of what is known.
    pub until: Timestamp,
}

/// A policy before it is written.
#[derive(Debug)]
pub struct Draft {
    /// Its name.
    pub name: String,
    pub(super) target: Target,
    /// Some of its pods are the cluster's DNS.
    pub(super) answers_dns: bool,
    /// The pods that it governs, as far as they are ends of edges.
    pub pods: usize,
    /// When something was seen last that had not been seen before.
    pub newest: Timestamp,
}

impl Draft {
    /// The namespace of its pods.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.target.id.namespace
    }
}

/// One port of one peer in one direction of one policy.
#[derive(Debug)]
pub struct Rule {
    /// The policy's place among the policies.
    pub policy: usize,
    /// Ingress or egress.
    pub direction: Direction,
    /// `None` where the rule for DNS, which every policy has, covers it.
    pub(super) peer: Option<Peer>,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// What speaks for it.
    pub evidence: Evidence,
    /// The edges that it is there for, by their places.
    pub(super) edges: Vec<u32>,
}

impl Rule {
    /// Whom the rule lets through, as text; `None` where the rule for DNS covers it.
    #[must_use]
    pub fn peer(&self) -> Option<String> {
        self.peer.as_ref().map(ToString::to_string)
    }
}

/// Connections of one rule that people tell apart: between one service, workload or pod inside and one end outside.
#[derive(Clone, Debug, PartialEq)]
pub struct Connection {
    /// The rule's place among the rules: connections of one rule are allowed together or not at all.
    pub rule: usize,
    /// Whether the end inside is the client or the server.
    pub direction: Direction,
    /// The namespace of the policy.
    pub namespace: String,
    /// The end that the policy governs.
    pub inside: String,
    /// The other end.
    pub outside: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// What was seen of it.
    pub evidence: Evidence,
}

/// A policy in one direction of which nothing was seen.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct OneSided {
    /// The policy's namespace.
    pub namespace: String,
    /// The policy's name.
    pub policy: String,
    /// The direction of which nothing was seen.
    pub direction: Direction,
    /// Whether the policy closes it all the same.
    pub closed: bool,
}

/// A policy of whose pods only the agents of others told: what else they do is not known.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Unwatched {
    /// The policy's namespace.
    pub namespace: String,
    /// The policy's name.
    pub policy: String,
}

impl Plan<'_> {
    /// The policies that could be written.
    #[must_use]
    pub fn policies(&self) -> &[Draft] {
        &self.policies
    }

    /// The rules that they could have.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// How long before the end of what is known something was last seen of a policy that had not been seen before. The
    /// longer, the likelier that nothing is missing.
    #[must_use]
    pub fn quiet(&self, draft: &Draft) -> Duration {
        let nanos = self
            .until
            .as_nanos()
            .saturating_sub(draft.newest.as_nanos());
        Duration::from_micros(nanos / 1_000)
    }

    /// All rules.
    #[must_use]
    pub fn all(&self) -> Vec<bool> {
        vec![true; self.rules.len()]
    }

    /// The connections that the rules are there for, sorted by policy, direction, ends and port.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        let mut connections = Vec::new();
        for (index, rule) in self.rules.iter().enumerate() {
            let namespace = self.policies[rule.policy].namespace();
            let mut seen = BTreeMap::<(GroupId, GroupId), Gathered>::new();
            for index in &rule.edges {
                let (client, server) = self.ends.of_edge(*index);
                let (inside, outside) = match rule.direction {
                    Direction::Egress => (client, server),
                    Direction::Ingress => (server, client),
                };
                let gathered = seen.entry((inside.group, outside.group)).or_default();
                gathered.add(&self.edges[*index as usize], inside.pod);
            }
            connections.extend(
                seen.into_iter()
                    .filter_map(|((inside, outside), gathered)| {
                        let inside = self.ends.group(inside);
                        Some(Connection {
                            rule: index,
                            direction: rule.direction,
                            namespace: namespace.to_owned(),
                            inside: inside.within(namespace),
                            outside: self.ends.group(outside).within(namespace),
                            protocol: rule.protocol,
                            port: rule.port,
                            evidence: gathered.of(inside.pods())?,
                        })
                    }),
            );
        }
        connections.sort_by(|one, other| {
            let order = |connection: &Connection| {
                let policy = self.rules[connection.rule].policy;
                (policy, connection.direction)
            };
            let ends =
                |connection: &Connection| (connection.inside.clone(), connection.outside.clone());
            order(one)
                .cmp(&order(other))
                .then_with(|| ends(one).cmp(&ends(other)))
                .then_with(|| (one.protocol, one.port).cmp(&(other.protocol, other.port)))
        });
        connections
    }

    /// The policies with the chosen rules, one after the other: a large cluster's are never all in memory at once.
    /// A policy of which no rule was chosen is left out.
    pub fn manifests<'s>(&'s self, chosen: &'s [bool]) -> impl Iterator<Item = NetworkPolicy> + 's {
        self.chosen(chosen)
            .map(|(draft, rules)| self.manifest(draft, &rules))
    }

    /// One file a policy: name and text. Where several namespaces may be written, names start with the namespace's; the
    /// folder stays flat because `kubectl apply -f FOLDER` does not descend.
    ///
    /// # Errors
    /// If a policy cannot be expressed in JSON; none made here cannot.
    pub fn files(&self, chosen: &[bool]) -> serde_json::Result<BTreeMap<String, String>> {
        self.manifests(chosen)
            .map(|policy| {
                let name = file_name(&policy, &self.options.namespaces);
                Ok((name, manifest::render(&policy)?))
            })
            .collect()
    }

    /// The text of one policy with its chosen rules, if it has any.
    ///
    /// # Errors
    /// As [`files`](Self::files).
    pub fn text(&self, policy: usize, chosen: &[bool]) -> serde_json::Result<Option<String>> {
        let rules: Vec<&Rule> = self.rules_of(policy, chosen).collect();
        if rules.is_empty() {
            return Ok(None);
        }
        manifest::render(&self.manifest(&self.policies[policy], &rules)).map(Some)
    }

    /// The policies for which nothing was chosen in one direction.
    #[must_use]
    pub fn one_sided(&self, chosen: &[bool]) -> Vec<OneSided> {
        let mut one_sided = Vec::new();
        for (draft, rules) in self.chosen(chosen) {
            for direction in [Direction::Ingress, Direction::Egress] {
                if rules.iter().all(|rule| rule.direction != direction) {
                    one_sided.push(OneSided {
                        namespace: draft.namespace().to_owned(),
                        policy: draft.name.clone(),
                        direction,
                        closed: self.options.policy_types == PolicyTypes::Both,
                    });
                }
            }
        }
        one_sided
    }

    /// The policies, of those with chosen rules, whose rules were all seen at the other end only, as if no agent ran where
    /// their pods are.
    #[must_use]
    pub fn unwatched(&self, chosen: &[bool]) -> Vec<Unwatched> {
        let is_seen_inside = |rule: &&Rule| match rule.direction {
            Direction::Egress => rule.evidence.seen_by != SeenBy::Server,
            Direction::Ingress => rule.evidence.seen_by != SeenBy::Client,
        };
        let watched = self.rules.iter().filter(is_seen_inside);
        let watched: BTreeSet<usize> = watched.map(|rule| rule.policy).collect();
        (self.policies.iter().enumerate())
            .filter(|(index, _)| !watched.contains(index))
            .filter(|(index, _)| self.rules_of(*index, chosen).next().is_some())
            .map(|(_, draft)| Unwatched {
                namespace: draft.namespace().to_owned(),
                policy: draft.name.clone(),
            })
            .collect()
    }

    /// How many external addresses the policies with the chosen rules let through that were not seen, because addresses
    /// were merged. What two policies, or both directions of one, let through counts twice.
    #[must_use]
    pub fn added_addresses(&self, chosen: &[bool]) -> u128 {
        let mut seen = BTreeMap::<(usize, Direction, IpNet), BTreeSet<IpAddr>>::new();
        for (rule, _) in self.rules.iter().zip(chosen).filter(|(_, chosen)| **chosen) {
            let Some(Peer::Block(block)) = &rule.peer else {
                continue;
            };
            // Single addresses may be those of nodes and pods, and nothing was merged there.
            if block.prefix_len() == block.max_prefix_len() {
                continue;
            }
            let seen = seen
                .entry((rule.policy, rule.direction, *block))
                .or_default();
            for edge in rule.edges.iter().map(|edge| &self.edges[*edge as usize]) {
                let (outside, address) = match rule.direction {
                    Direction::Egress => (&edge.server, edge.server_address),
                    Direction::Ingress => (&edge.client, edge.client_address),
                };
                if matches!(outside, Endpoint::External(_)) {
                    seen.insert(address.to_canonical());
                }
            }
        }
        seen.into_iter().fold(0, |sum, ((.., block), seen)| {
            // Two blocks may have all IPv6 addresses each.
            sum.saturating_add(blocks::size(block).saturating_sub(seen.len() as u128))
        })
    }

    fn chosen<'s>(
        &'s self,
        chosen: &'s [bool],
    ) -> impl Iterator<Item = (&'s Draft, Vec<&'s Rule>)> + 's {
        self.policies
            .iter()
            .enumerate()
            .map(|(index, draft)| (draft, self.rules_of(index, chosen).collect::<Vec<_>>()))
            .filter(|(_, rules)| !rules.is_empty())
    }

    /// The chosen rules of a policy, which is given by its place.
    pub fn rules_of<'s>(
        &'s self,
        policy: usize,
        chosen: &'s [bool],
    ) -> impl Iterator<Item = &'s Rule> + 's {
        let start = self.rules.partition_point(|rule| rule.policy < policy);
        self.rules[start..]
            .iter()
            .zip(&chosen[start..])
            .take_while(move |(rule, _)| rule.policy == policy)
            .filter(|(_, chosen)| **chosen)
            .map(|(rule, _)| rule)
    }

    fn manifest(&self, draft: &Draft, rules: &[&Rule]) -> NetworkPolicy {
        manifest::policy(&Spec {
            target: &draft.target,
            name: &draft.name,
            rules,
            options: self.options,
            answers_dns: draft.answers_dns,
        })
    }
}

fn file_name(policy: &NetworkPolicy, namespaces: &Namespaces) -> String {
    manifest::file_name(policy, !namespaces.is_single())
}
