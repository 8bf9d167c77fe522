//! Judges connections.

use std::collections::HashMap;

use flow::{
    endpoint::Labels,
    record::{Direction, Protocol},
};

use super::{
    policies::{NamespacePeer, PeerId, PodPeer, Policies, PolicyId, RuleId, Rules},
    ports::NamedPort,
    selector::Selector,
    verdict::{Connection, Ruling, Verdict},
    world::{End, PodId, World},
};
use crate::{label_index::LabelIndex, ledger::Edge};

/// Judges the connections of a world by a set of policies.
///
/// Selectors see nothing of a pod but its labels and its namespace. So it is decided once for each *class* of pods that
/// agree in both which policies select them and which peers they are; what is left to do for a connection are lookups.
#[derive(Debug)]
pub struct Judge<'a> {
    world: &'a World,
    policies: &'a Policies,
    classes: Vec<Class<'a>>,
    /// By the pod's number.
    class_of: Vec<ClassId>,
}

/// Pods of one namespace with the same labels.
#[derive(Debug)]
pub(super) struct Class<'a> {
    namespace: &'a str,
    labels: &'a Labels,
    /// The policies that select the pods and concern the direction, sorted.
    ingress: Vec<PolicyId>,
    egress: Vec<PolicyId>,
    /// The peers that the pods are, whatever their addresses, sorted.
    pub(super) peers: Vec<PeerId>,
}

pub(super) type ClassId = usize;

impl<'a> Judge<'a> {
    /// Decides which policies select which pods of the world, and which peers these are.
    #[must_use]
    pub fn new(world: &'a World, policies: &'a Policies) -> Self {
        let mut classes = Vec::<Class<'a>>::new();
        let mut numbers = HashMap::<(&str, &Labels), ClassId>::new();
        let class_of = world
            .pods()
            .map(|(_, pod)| {
                *numbers
                    .entry((&pod.namespace, &pod.labels))
                    .or_insert_with(|| {
                        classes.push(Class {
                            namespace: &pod.namespace,
                            labels: &pod.labels,
                            ingress: Vec::new(),
                            egress: Vec::new(),
                            peers: Vec::new(),
                        });
                        classes.len() - 1
                    })
            })
            .collect();
        let mut judge = Self {
            world,
            policies,
            classes,
            class_of,
        };
        judge.select();
        judge
    }

    /// What the policies say of a connection.
    #[must_use]
    pub fn verdict(&self, connection: &Connection) -> Verdict {
        Verdict {
            egress: self.ruling(connection, Direction::Egress),
            ingress: self.ruling(connection, Direction::Ingress),
        }
    }

    /// What the policies say of an edge. Of a service any backend may answer, and a pod may have been seen with any of its
    /// addresses, so an edge is denied if it is denied for one of them.
    #[must_use]
    pub fn verdict_on_edge(&self, edge: &Edge) -> Verdict {
        let mut verdict = Verdict {
            egress: Ruling::NotGoverned,
            ingress: Ruling::NotGoverned,
        };
        for connection in connections(self.world, edge) {
            verdict = self.verdict(&connection);
            if !verdict.is_allowed() {
                break;
            }
        }
        verdict
    }

    /// All rules of the policies for this direction that let the connection through at its end, sorted. There are none
    /// where no rule is needed.
    #[must_use]
    pub fn rules(&self, connection: &Connection, direction: Direction) -> Vec<RuleId> {
        let Ok(isolating) = self.isolating(connection, direction) else {
            return Vec::new();
        };
        let peers = self.peers_of(other_end(connection, direction));
        let named = self.named_ports(connection.destination);
        let mut rules: Vec<RuleId> = isolating
            .iter()
            .flat_map(|policy| {
                self.letting(*policy, direction, &peers, connection, named)
                    .map(|index| RuleId {
                        policy: *policy,
                        direction,
                        index,
                    })
            })
            .collect();
        rules.sort_unstable();
        rules.dedup();
        rules
    }

    /// The pods that a policy selects and concerns for some direction.
    pub fn selected(&self, policy: PolicyId) -> impl Iterator<Item = PodId> {
        self.world.pods().map(|(id, _)| id).filter(move |id| {
            let class = self.class(*id);
            class.ingress.binary_search(&policy).is_ok()
                || class.egress.binary_search(&policy).is_ok()
        })
    }

    /// The world whose connections are judged.
    #[must_use]
    pub const fn world(&self) -> &'a World {
        self.world
    }

    /// The policies by which they are judged.
    #[must_use]
    pub const fn policies(&self) -> &'a Policies {
        self.policies
    }

    fn ruling(&self, connection: &Connection, direction: Direction) -> Ruling {
        let isolating = match self.isolating(connection, direction) {
            Ok(isolating) => isolating,
            Err(ruling) => return ruling,
        };
        let peers = self.peers_of(other_end(connection, direction));
        let named = self.named_ports(connection.destination);
        for policy in isolating {
            let first = self
                .letting(*policy, direction, &peers, connection, named)
                .min();
            if let Some(index) = first {
                return Ruling::Allowed(RuleId {
                    policy: *policy,
                    direction,
                    index,
                });
            }
        }
        Ruling::Denied(isolating.to_vec())
    }

    /// The policies that isolate the end which this direction concerns, at least one; else why no rule is needed.
    fn isolating(
        &self,
        connection: &Connection,
        direction: Direction,
    ) -> Result<&[PolicyId], Ruling> {
        let end = match direction {
            Direction::Egress => connection.source,
            Direction::Ingress => connection.destination,
        };
        let End::Pod(pod, _) = end else {
            return Err(Ruling::NotGoverned);
        };
        match self.class(pod).isolating(direction) {
            [] => Err(Ruling::NotIsolated),
            _ if direction == Direction::Ingress && self.is_own_node(connection.source, pod) => {
                Err(Ruling::OwnNode)
            }
            isolating => Ok(isolating),
        }
    }

    /// The policy's rules that let the connection through, in no particular order.
    fn letting<'b>(
        &'b self,
        policy: PolicyId,
        direction: Direction,
        peers: &'b [PeerId],
        connection: &'b Connection,
        named: &'b [NamedPort],
    ) -> impl Iterator<Item = usize> + 'b {
        let rules = self.policies.get(policy).rules(direction);
        rules.into_iter().flat_map(move |rules| {
            rules.letting(peers).filter(move |rule| {
                lets_through(rules, *rule, named, connection.protocol, connection.port)
            })
        })
    }

    fn is_own_node(&self, source: End, pod: PodId) -> bool {
        let End::Node(source, _) = source else {
            return false;
        };
        self.world.pod(pod).node.as_deref() == Some(&self.world.node(source).name)
    }

    fn named_ports(&self, destination: End) -> &'a [NamedPort] {
        match destination {
            End::Pod(pod, _) => &self.world.pod(pod).ports,
            End::Node(..) | End::External(_) => &[],
        }
    }

    /// The peers that an end is.
    fn peers_of(&self, end: End) -> Vec<PeerId> {
        match end {
            End::Pod(pod, address) => {
                let mut peers =
                    address.map_or_else(Vec::new, |address| self.policies.blocks_of(address));
                peers.extend_from_slice(&self.class(pod).peers);
                peers
            }
            End::Node(_, address) | End::External(address) => self.policies.blocks_of(address),
        }
    }

    pub(super) fn class(&self, pod: PodId) -> &Class<'a> {
        &self.classes[self.class_of[pod.0]]
    }

    fn select(&mut self) {
        let mut index = LabelIndex::default();
        for (i, class) in self.classes.iter().enumerate() {
            index.add(i, class.labels);
        }
        let mut of_namespace = HashMap::<&str, Vec<ClassId>>::new();
        for (i, class) in self.classes.iter().enumerate() {
            of_namespace.entry(class.namespace).or_default().push(i);
        }
        let everything: Vec<ClassId> = (0..self.classes.len()).collect();

        // The fewest classes known to include all that the selector selects in the namespace.
        let candidates = |namespace: Option<&str>, selector: &Selector| -> Vec<ClassId> {
            let in_namespace = match namespace {
                Some(namespace) => of_namespace.get(namespace).map_or(&[][..], Vec::as_slice),
                None => &everything,
            };
            match index.rarest(selector.pairs()) {
                Some(labelled) if labelled.len() < in_namespace.len() => labelled.to_vec(),
                _ => in_namespace.to_vec(),
            }
        };

        for policy_id in self.policies.ids() {
            let policy = self.policies.get(policy_id);
            for i in candidates(Some(&policy.namespace), &policy.pods) {
                let class = &mut self.classes[i];
                if class.namespace != policy.namespace || !policy.pods.selects(class.labels) {
                    continue;
                }
                if policy.rules(Direction::Ingress).is_some() {
                    class.ingress.push(policy_id);
                }
                if policy.rules(Direction::Egress).is_some() {
                    class.egress.push(policy_id);
                }
            }
        }

        let namespaces: HashMap<&str, &Labels> = self.world.namespaces().collect();
        for (
            peer_id,
            PodPeer {
                namespaces: of,
                pods,
            },
        ) in self.policies.pod_peers()
        {
            let own = match of {
                NamespacePeer::Own(namespace) => Some(namespace.as_str()),
                NamespacePeer::Selected(_) => None,
            };
            for i in candidates(own, pods) {
                let class = &mut self.classes[i];
                let in_namespace = match of {
                    NamespacePeer::Own(namespace) => class.namespace == namespace,
                    NamespacePeer::Selected(selector) => namespaces
                        .get(class.namespace)
                        .is_some_and(|labels| selector.selects(labels)),
                };
                if in_namespace && pods.selects(class.labels) {
                    class.peers.push(peer_id);
                }
            }
        }
    }
}

impl Class<'_> {
    pub(super) fn isolating(&self, direction: Direction) -> &[PolicyId] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// The connections that an edge stands for: several if its server is a service with several backends, or if an end is a
/// pod with several addresses.
pub fn connections(world: &World, edge: &Edge) -> impl Iterator<Item = Connection> + use<> {
    let mut connections = Vec::new();
    for (client, server) in edge.addresses() {
        let destinations = world.ends(&edge.server, server);
        for source in world.ends(&edge.client, client) {
            connections.extend(destinations.iter().map(|destination| Connection {
                source,
                destination: *destination,
                protocol: edge.protocol,
                port: edge.port,
            }));
        }
    }
    connections.into_iter()
}

fn lets_through(
    rules: &Rules,
    rule: usize,
    named: &[NamedPort],
    protocol: Protocol,
    port: u16,
) -> bool {
    rules.ports(rule).is_none_or(|ports| {
        ports.iter().any(|ports| {
            ports.protocol == protocol
                && ports
                    .range(named)
                    .is_some_and(|(first, last)| (first..=last).contains(&port))
        })
    })
}

fn other_end(connection: &Connection, direction: Direction) -> End {
    match direction {
        Direction::Egress => connection.destination,
        Direction::Ingress => connection.source,
    }
}
