//! Leaves out what is allowed twice.
//!
//! Policies add up. A pod may be selected by several of them, and a peer by several rules: two services have the same
//! selector, or one selects some of the pods of the other. What remains here is minimal: each opening lets through something
//! that was seen and that no other one lets through.
//!
//! A policy may lose its last rule to others; then those isolate all of its pods that were seen, in the directions in which
//! they were seen.
//!
//! Three things do not count. The rule for DNS stands whether it is needed or not. A block of addresses is not taken to let
//! through the pods that have some of them: network plugins differ in whether it does. And where a service was called and
//! nobody saw which pod answered, the service's own rule stands although others allow it for all pods that were seen.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use flow::{
    endpoint::{Endpoint, Labels, Pod},
    record::{Direction, Protocol},
};
use ipnet::IpNet;

use super::{
    build::{Key, Openings, Other, address_outside, addresses_outside},
    cluster::Cluster,
    ends::{Ends, TargetIndex},
    labels::selects,
    peer::{Peer, Peers},
};
use crate::{label_index::LabelIndex, ledger::Edge};

/// Place among the openings, in an order that does not depend on that of the edges.
type Number = usize;

/// Takes out openings until each that is left is needed. Their edges go to those that let these through.
pub(super) fn reduce(
    openings: &mut Openings,
    cluster: &Cluster<'_>,
    ends: &mut Ends,
    edges: &[Edge],
) {
    let places = places(openings, ends);
    let contests = contests(
        &Covers::new(&places, openings, cluster, ends, edges),
        openings,
    );
    let dropped = superfluous(&contests);
    if dropped.is_empty() {
        return;
    }
    for contest in contests.undecided {
        let (out, kept): (Vec<Number>, Vec<Number>) = contest
            .by
            .iter()
            .partition(|number| dropped.contains(number));
        if !out.is_empty() {
            let kept = kept.iter().map(|number| &places[*number]);
            find_home(&contest, kept, openings, ends, edges);
        }
    }
    for place in dropped.iter().map(|number| &places[*number]) {
        if let Some(directed) = openings.get_mut(&(place.target, place.direction)) {
            directed.remove(&place.key);
        }
    }
    openings.retain(|_, directed| !directed.is_empty());
}

/// Which opening it is.
struct Place {
    target: TargetIndex,
    direction: Direction,
    key: Key,
}

fn places(openings: &Openings, ends: &Ends) -> Vec<Place> {
    let mut places: Vec<Place> = openings
        .iter()
        .flat_map(|((target, direction), directed)| {
            directed.keys().map(|key| Place {
                target: *target,
                direction: *direction,
                key: key.clone(),
            })
        })
        .filter(|place| place.key.peer != Other::Dns)
        .collect();
    places.sort_by(|one, other| {
        let order = |place: &Place| (&ends.target(place.target).id, place.direction);
        let keys = one.key.cmp(&other.key);
        order(one).cmp(&order(other)).then(keys)
    });
    places
}

/// One side of an edge, for pods of one class inside and one outside: several openings let it through.
struct Contest {
    edge: u32,
    direction: Direction,
    /// Sorted.
    by: Vec<Number>,
}

struct Contests {
    /// Whether nothing else lets through what the opening does.
    needed: Vec<bool>,
    undecided: Vec<Contest>,
}

fn contests(covers: &Covers<'_>, openings: &Openings) -> Contests {
    let mut contests = Contests {
        needed: vec![false; covers.by_port.len()],
        undecided: Vec::new(),
    };
    let sides: BTreeSet<(u32, Direction)> = openings
        .iter()
        .flat_map(|((_, direction), directed)| {
            let edges = directed.values().flat_map(|opening| &opening.edges);
            edges.map(|edge| (*edge, *direction))
        })
        .collect();
    for (edge, direction) in sides {
        for by in covers.of(edge, direction) {
            match by.as_slice() {
                [] => {}
                [only] => contests.needed[*only] = true,
                _ => contests.undecided.push(Contest {
                    edge,
                    direction,
                    by,
                }),
            }
        }
    }
    contests
}

/// Openings without all of which everything is let through that was before. Those go first that let the fewest through, so
/// that of two policies the one for more pods keeps its rules.
fn superfluous(contests: &Contests) -> BTreeSet<Number> {
    let mut concerns = BTreeMap::<Number, Vec<usize>>::new();
    for (index, contest) in contests.undecided.iter().enumerate() {
        for number in contest
            .by
            .iter()
            .filter(|number| !contests.needed[**number])
        {
            concerns.entry(*number).or_default().push(index);
        }
    }
    let mut candidates: Vec<(Number, Vec<usize>)> = concerns.into_iter().collect();
    candidates.sort_by_key(|(number, concerns)| (concerns.len(), std::cmp::Reverse(*number)));
    let undecided = contests.undecided.iter();
    let mut left: Vec<usize> = undecided.map(|contest| contest.by.len()).collect();
    let mut dropped = BTreeSet::new();
    for (number, concerns) in candidates {
        if concerns.iter().all(|contest| left[*contest] > 1) {
            for contest in concerns {
                left[contest] -= 1;
            }
            dropped.insert(number);
        }
    }
    dropped
}

/// The first of the openings that let an edge through gets it, unless one has it already.
fn find_home<'p>(
    contest: &Contest,
    kept: impl Iterator<Item = &'p Place> + Clone,
    openings: &mut Openings,
    ends: &mut Ends,
    edges: &[Edge],
) {
    let mut homes = kept.clone().filter_map(|place| {
        let directed = openings.get(&(place.target, place.direction))?;
        directed.get(&place.key)
    });
    if homes.any(|opening| opening.edges.binary_search(&contest.edge).is_ok()) {
        return;
    }
    let Some(place) = kept.into_iter().next() else {
        return;
    };
    let (client, server) = ends.of_edge(contest.edge);
    let inside = match contest.direction {
        Direction::Egress => client.pod,
        Direction::Ingress => server.pod,
    };
    let directed = openings.get_mut(&(place.target, place.direction));
    if let Some(opening) = directed.and_then(|directed| directed.get_mut(&place.key)) {
        opening.gathered.add(&edges[contest.edge as usize], inside);
        let at = opening.edges.partition_point(|edge| *edge < contest.edge);
        opening.edges.insert(at, contest.edge);
        if let Some(pod) = inside {
            ends.govern(place.target, pod);
        }
    }
}

/// Place among the distinct peers.
type PeerNumber = usize;

/// Place among the classes.
type ClassNumber = usize;

/// Pods of one namespace with the same labels, which nothing here can tell apart.
struct Class<'a> {
    namespace: &'a str,
    labels: &'a Labels,
    selected_by: Vec<TargetIndex>,
    peers: Vec<PeerNumber>,
}

/// Tells which openings let a connection through.
struct Covers<'a> {
    ends: &'a Ends,
    edges: &'a [Edge],
    classes: Vec<Class<'a>>,
    /// Of each end that is one or several pods what these are.
    classes_of: HashMap<usize, Vec<ClassNumber>>,
    single: HashMap<IpAddr, PeerNumber>,
    wide: Vec<(IpNet, PeerNumber)>,
    by_port: HashMap<(TargetIndex, Direction, PeerNumber, Protocol, u16), Number>,
}

impl<'a> Covers<'a> {
    fn new(
        places: &[Place],
        openings: &Openings,
        cluster: &'a Cluster<'a>,
        ends: &'a Ends,
        edges: &'a [Edge],
    ) -> Self {
        let mut covers = Self {
            ends,
            edges,
            classes: Vec::new(),
            classes_of: HashMap::new(),
            single: HashMap::new(),
            wide: Vec::new(),
            by_port: HashMap::new(),
        };
        covers.classify(cluster);
        let mut index = LabelIndex::default();
        for (number, class) in covers.classes.iter().enumerate() {
            index.add(number, class.labels);
        }
        let mut targets: Vec<TargetIndex> = openings.keys().map(|(target, _)| *target).collect();
        targets.dedup();
        for target in targets {
            let selected = ends.target(target);
            let selected = covers.select(&index, &selected.id.namespace, &selected.selector);
            for class in selected {
                covers.classes[class].selected_by.push(target);
            }
        }
        covers.add_peers(places, &index);
        covers
    }

    /// Finds the classes of all ends.
    fn classify(&mut self, cluster: &'a Cluster<'a>) {
        let mut numbers = HashMap::<(&str, &Labels), ClassNumber>::new();
        for (index, edge) in (0_u32..).zip(self.edges) {
            let (client, server) = self.ends.places_of_edge(index);
            for (place, endpoint) in [(client, &edge.client), (server, &edge.server)] {
                if self.classes_of.contains_key(&place) {
                    continue;
                }
                let pods: Vec<(&'a str, &'a Labels)> = match endpoint {
                    Endpoint::Pod { pod, .. } if !pod.host_network => vec![class_of(pod)],
                    Endpoint::Service(service) if !service.selector.is_empty() => {
                        let known = cluster.pods_of(service).map(class_of);
                        // Which pod answered is not known: it may be one that was never seen, of which nothing is known but
                        // what the service selects it by.
                        let any = (service.namespace.as_str(), &service.selector);
                        known.chain([any]).collect()
                    }
                    _ => Vec::new(),
                };
                let classes = pods.into_iter().map(|(namespace, labels)| {
                    *numbers.entry((namespace, labels)).or_insert_with(|| {
                        self.classes.push(Class {
                            namespace,
                            labels,
                            selected_by: Vec::new(),
                            peers: Vec::new(),
                        });
                        self.classes.len() - 1
                    })
                });
                let classes: BTreeSet<ClassNumber> = classes.collect();
                self.classes_of.insert(place, classes.into_iter().collect());
            }
        }
    }

    fn add_peers(&mut self, places: &[Place], index: &LabelIndex) {
        let mut numbers = HashMap::<&Peer, PeerNumber>::new();
        for (number, place) in places.iter().enumerate() {
            let Other::Peer(peer) = &place.key.peer else {
                continue;
            };
            let next = numbers.len();
            let peer_number = *numbers.entry(peer).or_insert(next);
            if peer_number == next {
                self.add_peer(peer, peer_number, index);
            }
            let Key { protocol, port, .. } = place.key;
            let key = (place.target, place.direction, peer_number, protocol, port);
            self.by_port.insert(key, number);
        }
    }

    fn add_peer(&mut self, peer: &Peer, number: PeerNumber, index: &LabelIndex) {
        match peer {
            Peer::Pods { namespace, labels } => {
                for class in self.select(index, namespace, labels) {
                    self.classes[class].peers.push(number);
                }
            }
            Peer::Block(block) if block.prefix_len() == block.max_prefix_len() => {
                self.single.insert(block.addr(), number);
            }
            Peer::Block(block) => self.wide.push((*block, number)),
        }
    }

    fn select(&self, index: &LabelIndex, namespace: &str, selector: &Labels) -> Vec<ClassNumber> {
        let pairs = selector.iter().map(|(key, value)| (&**key, &**value));
        let is_selected = |number: &ClassNumber| {
            let class = &self.classes[*number];
            class.namespace == namespace && selects(selector, class.labels)
        };
        match index.rarest(pairs) {
            Some(candidates) => candidates.iter().copied().filter(is_selected).collect(),
            None => (0..self.classes.len()).filter(is_selected).collect(),
        }
    }

    /// For each class inside and each end outside the openings that let one side of an edge through, sorted.
    fn of(&self, edge: u32, direction: Direction) -> Vec<Vec<Number>> {
        let (client, server) = self.ends.places_of_edge(edge);
        let of_edge = &self.edges[edge as usize];
        let (inside, outside) = match direction {
            Direction::Egress => (client, server),
            Direction::Ingress => (server, client),
        };
        let (first, second) = self.ends.of_edge(edge);
        let other = match direction {
            Direction::Egress => second,
            Direction::Ingress => first,
        };
        let outside: Vec<Vec<PeerNumber>> = match &other.peers {
            Err(_) => Vec::new(),
            Ok(Peers::Address | Peers::External) => {
                vec![self.blocks_of(address_outside(of_edge, direction))]
            }
            Ok(Peers::Unlabelled) => {
                let addresses = addresses_outside(of_edge, direction).into_iter();
                addresses.map(|address| self.blocks_of(address)).collect()
            }
            Ok(Peers::These(peers)) => peers
                .iter()
                .flat_map(|peer| match peer {
                    Peer::Block(block) => vec![self.blocks_of(block.addr())],
                    Peer::Pods { .. } => {
                        let classes = self.classes_of[&outside].iter();
                        classes
                            .map(|class| self.classes[*class].peers.clone())
                            .collect()
                    }
                })
                .collect(),
        };
        let mut all = Vec::new();
        for class in &self.classes_of[&inside] {
            for peers in &outside {
                let targets = self.classes[*class].selected_by.iter();
                let openings = targets.flat_map(|target| {
                    peers.iter().filter_map(|peer| {
                        let key = (*target, direction, *peer, of_edge.protocol, of_edge.port);
                        self.by_port.get(&key).copied()
                    })
                });
                let mut by: Vec<Number> = openings.collect();
                by.sort_unstable();
                all.push(by);
            }
        }
        all
    }

    fn blocks_of(&self, address: IpAddr) -> Vec<PeerNumber> {
        let address = address.to_canonical();
        let wide = self
            .wide
            .iter()
            .filter(|(block, _)| block.contains(&address));
        let single = self.single.get(&address).copied();
        wide.map(|(_, number)| *number).chain(single).collect()
    }
}

fn class_of(pod: &Pod) -> (&str, &Labels) {
    (&pod.namespace, &pod.labels)
}
