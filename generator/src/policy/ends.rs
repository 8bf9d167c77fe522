//! The ends of edges: who they are, which policies govern them, by what rules know them.
//!
//! A pod is the end of many edges, and all of this is found out once for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use flow::endpoint::{Endpoint, Labels};

use super::{
    cluster::{Cluster, workload},
    notice::Reason,
    options::{Granularity, Options},
    peer::Peers,
    target::{self, Target, TargetId},
};
use crate::ledger::Edge;

/// Place of a pod among those that are ends.
pub(super) type PodIndex = u32;

/// Place among the targets.
pub(super) type TargetIndex = usize;

/// Place among the groups.
pub(super) type GroupId = usize;

/// An end, without the address that its traffic carried.
#[derive(Debug)]
pub(super) struct End {
    pub(super) group: GroupId,
    /// The pod, if it is known which one it is.
    pub(super) pod: Option<PodIndex>,
    /// The policies that govern it, if its namespace was chosen.
    pub(super) targets: Result<Vec<TargetIndex>, Reason>,
    pub(super) peers: Result<Peers, Reason>,
}

/// The ends that people take for one: the pods of a service or of a controller, a node, an address.
#[derive(Debug)]
pub(super) struct Group {
    name: GroupName,
    pods: BTreeSet<PodIndex>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum GroupName {
    Named { namespace: String, name: String },
    Node(String),
    Address(IpAddr),
}

impl Group {
    /// How many pods of it are ends.
    pub(super) fn pods(&self) -> usize {
        self.pods.len()
    }

    /// The name, with the namespace unless that is the one given.
    pub(super) fn within(&self, known: &str) -> String {
        match &self.name {
            GroupName::Named { namespace, name } if namespace == known => name.clone(),
            GroupName::Named { namespace, name } => format!("{namespace}/{name}"),
            GroupName::Node(name) => format!("node {name}"),
            GroupName::Address(address) => address.to_string(),
        }
    }
}

/// The ends of all edges.
#[derive(Debug)]
pub(super) struct Ends {
    /// Of each edge the places of client and server.
    of_edges: Vec<(usize, usize)>,
    ends: Vec<End>,
    groups: Vec<Group>,
    /// The policies that could be, in the order in which they were found.
    targets: Vec<Target>,
    /// Of each of them the pods that it governs.
    governed: Vec<BTreeSet<PodIndex>>,
    /// Whether it is meant for one workload's pods and selects those of others too.
    shared: Vec<bool>,
}

impl Ends {
    pub(super) fn new(cluster: &Cluster<'_>, edges: &[Edge], options: &Options) -> Self {
        let mut finder = Finder {
            cluster,
            options,
            known: HashMap::new(),
            pods: HashMap::new(),
            groups: BTreeMap::new(),
            targets: BTreeMap::new(),
            shared: BTreeMap::new(),
            found: Self {
                of_edges: Vec::with_capacity(edges.len()),
                ends: Vec::new(),
                groups: Vec::new(),
                targets: Vec::new(),
                governed: Vec::new(),
                shared: Vec::new(),
            },
        };
        for edge in edges {
            let ends = (finder.place(&edge.client), finder.place(&edge.server));
            finder.found.of_edges.push(ends);
        }
        finder.found
    }

    /// Client and server of an edge.
    pub(super) fn of_edge(&self, edge: u32) -> (&End, &End) {
        let (client, server) = self.of_edges[edge as usize];
        (&self.ends[client], &self.ends[server])
    }

    /// Where client and server of an edge stand among the ends.
    pub(super) fn places_of_edge(&self, edge: u32) -> (usize, usize) {
        self.of_edges[edge as usize]
    }

    pub(super) fn group(&self, id: GroupId) -> &Group {
        &self.groups[id]
    }

    pub(super) fn target(&self, index: TargetIndex) -> &Target {
        &self.targets[index]
    }

    /// Whether a policy that is meant for the pods of one workload selects those of others too.
    pub(super) fn is_shared(&self, index: TargetIndex) -> bool {
        self.shared[index]
    }

    /// Counts a pod among those that a policy governs.
    pub(super) fn govern(&mut self, index: TargetIndex, pod: PodIndex) {
        self.governed[index].insert(pod);
    }

    /// How many pods a policy governs.
    pub(super) fn governed_by(&self, index: TargetIndex) -> usize {
        self.governed[index].len()
    }
}

struct Finder<'a> {
    cluster: &'a Cluster<'a>,
    options: &'a Options,
    known: HashMap<Key, usize>,
    /// By the address of the details in memory. All edges of a pod share them.
    pods: HashMap<usize, PodIndex>,
    groups: BTreeMap<GroupName, GroupId>,
    targets: BTreeMap<TargetId, TargetIndex>,
    /// Whether labels are shared in a namespace. Many workloads may have the same, and each answer takes a look at all pods.
    shared: BTreeMap<(String, Labels), bool>,
    found: Ends,
}

/// Tells ends apart by where their details are in memory: equal ones at two places are only looked at twice.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Pod(usize, usize),
    Service(usize),
    Node(usize),
    External(IpAddr),
}

impl Key {
    fn of(endpoint: &Endpoint) -> Self {
        match endpoint {
            Endpoint::Pod { pod, service } => {
                Self::Pod(place(pod), service.as_ref().map(place).unwrap_or_default())
            }
            Endpoint::Service(service) => Self::Service(place(service)),
            Endpoint::Node(node) => Self::Node(place(node)),
            Endpoint::External(address) => Self::External(*address),
        }
    }
}

fn place<T>(shared: &Arc<T>) -> usize {
    Arc::as_ptr(shared) as usize
}

impl Finder<'_> {
    fn place(&mut self, endpoint: &Endpoint) -> usize {
        let key = Key::of(endpoint);
        if let Some(known) = self.known.get(&key) {
            return *known;
        }
        let end = self.end(endpoint);
        self.found.ends.push(end);
        let place = self.found.ends.len() - 1;
        self.known.insert(key, place);
        place
    }

    fn end(&mut self, endpoint: &Endpoint) -> End {
        let granularity = self.options.granularity;
        let pod = match endpoint {
            Endpoint::Pod { pod, .. } => Some(self.pod(place(pod))),
            _ => None,
        };
        let group = self.group(endpoint);
        self.found.groups[group].pods.extend(pod);
        let targets = if endpoint
            .namespace()
            .is_some_and(|namespace| self.options.namespaces.contains(namespace))
        {
            target::targets(self.cluster, endpoint, granularity)
        } else {
            Ok(Vec::new())
        };
        let targets = targets.map(|targets| {
            let mut places: Vec<TargetIndex> = targets
                .into_iter()
                .map(|target| self.target(target))
                .collect();
            places.sort_unstable();
            places.dedup();
            for place in &places {
                self.found.governed[*place].extend(pod);
            }
            places
        });
        End {
            group,
            pod,
            targets,
            peers: Peers::of(self.cluster, endpoint, granularity),
        }
    }

    fn pod(&mut self, place: usize) -> PodIndex {
        let next = u32::try_from(self.pods.len()).unwrap_or(PodIndex::MAX);
        *self.pods.entry(place).or_insert(next)
    }

    fn target(&mut self, target: Target) -> TargetIndex {
        let (cluster, found, shared) = (self.cluster, &mut self.found, &mut self.shared);
        *self.targets.entry(target.id.clone()).or_insert_with(|| {
            let is_shared = target.is_of_a_workload()
                && *shared
                    .entry((target.id.namespace.clone(), target.selector.clone()))
                    .or_insert_with_key(|(namespace, labels)| cluster.is_shared(namespace, labels));
            found.targets.push(target);
            found.governed.push(BTreeSet::new());
            found.shared.push(is_shared);
            found.targets.len() - 1
        })
    }

    fn group(&mut self, endpoint: &Endpoint) -> GroupId {
        let named = |namespace: &str, name: &str| GroupName::Named {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        let name = match endpoint {
            Endpoint::Pod { pod, service } => {
                let by_service = matches!(
                    self.options.granularity,
                    Granularity::Namespace | Granularity::Service
                ) && !pod.host_network;
                let of_service = by_service
                    .then(|| self.cluster.service_of(pod, service.as_ref()))
                    .flatten();
                match of_service {
                    Some((service, _)) => named(&pod.namespace, &service),
                    None if self.options.granularity == Granularity::Pod => {
                        named(&pod.namespace, &pod.name)
                    }
                    None => named(&pod.namespace, &workload(pod).2),
                }
            }
            Endpoint::Service(service) => named(&service.namespace, &service.name),
            Endpoint::Node(node) => GroupName::Node(node.name.clone()),
            Endpoint::External(address) => GroupName::Address(*address),
        };
        let found = &mut self.found;
        *self.groups.entry(name.clone()).or_insert_with(|| {
            found.groups.push(Group {
                name,
                pods: BTreeSet::new(),
            });
            found.groups.len() - 1
        })
    }
}
