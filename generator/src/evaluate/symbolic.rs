//! A world made up from policies alone, for comparing them where no cluster is known.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use flow::{
    endpoint::Labels,
    record::{Direction, Protocol},
};
use ipnet::IpNet;

use super::{
    policies::{NamespacePeer, Policies},
    ports::{NamedPort, Numbers},
    world::{NAMESPACE_NAME, Pod, World},
};

/// Addresses that are kept for documentation stand for those which no block is about.
const OUTSIDE: [&str; 2] = ["192.0.2.1", "2001:db8::1"];

/// A world in which different policies should differ.
///
/// It has the namespaces that the policies name and one for each other selector of namespaces; in each namespace a pod without
/// labels, and for each selector that the policies apply there pods with just the labels that it needs and with other values of
/// these; the first and the last address of each block, and those before and after it. Every pod has all ports that the
/// policies name.
///
/// So a change is found wherever it concerns pods that one selector tells apart, and any address. Not found is what concerns
/// only pods with the labels of several selectors at once: that takes a real cluster.
#[derive(Debug)]
pub struct Symbolic {
    /// The world.
    pub world: World,
    /// The numbers that named ports have in it, from the highest port downwards.
    pub ports: Vec<NamedPort>,
}

impl Symbolic {
    /// The world of some sets of policies.
    #[must_use]
    pub fn new(sets: &[&Policies]) -> Self {
        let ports = named_ports(sets);
        let namespaces = namespaces(sets);
        let mut pods = BTreeSet::<(&str, Labels)>::new();
        for (name, labels) in &namespaces {
            pods.insert((name, Labels::new()));
            for set in sets {
                let governed = set.of_namespace(name).map(|policy| &set.get(policy).pods);
                let peers = set
                    .pod_peers()
                    .filter(|(_, peer)| match &peer.namespaces {
                        NamespacePeer::Own(own) => own == name,
                        NamespacePeer::Selected(selector) => selector.selects(labels),
                    })
                    .map(|(_, peer)| &peer.pods);
                for selector in governed.chain(peers) {
                    pods.extend(
                        selector
                            .samples()
                            .into_iter()
                            .map(|labels| (name.as_str(), labels)),
                    );
                }
            }
        }

        let mut world = World::default();
        for (name, labels) in &namespaces {
            world.add_namespace(name, labels.clone());
        }
        for (namespace, labels) in pods {
            let known_as = text(&labels).unwrap_or_else(|| "(other pods)".to_owned());
            // Two of each, because pods with the same labels may talk to each other.
            for i in 1..=2 {
                world.add_pod(Pod {
                    namespace: namespace.to_owned(),
                    name: format!("{known_as} {i}"),
                    known_as: known_as.clone(),
                    labels: labels.clone(),
                    ports: ports.clone(),
                    ..Pod::default()
                });
            }
        }
        for address in addresses(sets) {
            world.add_external(address);
        }
        Self { world, ports }
    }
}

/// The namespaces with their labels, by name. Those that no policy names are called by their labels.
fn namespaces(sets: &[&Policies]) -> BTreeMap<String, Labels> {
    let mut namespaces = BTreeMap::<String, Labels>::new();
    let mut add = |mut labels: Labels| {
        let name = match labels.remove(NAMESPACE_NAME) {
            Some(name) => name,
            None => text(&labels).unwrap_or_else(|| "(other namespaces)".to_owned()),
        };
        let known = namespaces.entry(name.clone()).or_default();
        known.extend(labels);
        known.insert(NAMESPACE_NAME.to_owned(), name);
    };
    add(Labels::new());
    for set in sets {
        for policy in set.ids() {
            let name = set.get(policy).namespace.clone();
            add([(NAMESPACE_NAME.to_owned(), name)].into());
        }
        for (_, peer) in set.pod_peers() {
            if let NamespacePeer::Selected(selector) = &peer.namespaces {
                selector.samples().into_iter().for_each(&mut add);
            }
        }
    }
    namespaces
}

fn named_ports(sets: &[&Policies]) -> Vec<NamedPort> {
    let mut names = BTreeSet::<(&str, Protocol)>::new();
    for set in sets {
        for policy in set.ids() {
            for direction in [Direction::Ingress, Direction::Egress] {
                let rules = set.get(policy).rules(direction);
                for ports in rules.into_iter().flat_map(|rules| rules.all_ports()) {
                    if let Numbers::Named(name) = &ports.numbers {
                        names.insert((name, ports.protocol));
                    }
                }
            }
        }
    }
    (1..=u16::MAX)
        .rev()
        .zip(names)
        .map(|(port, (name, protocol))| NamedPort {
            name: name.to_owned(),
            protocol,
            port,
        })
        .collect()
}

/// What is in a block changes only at the ends of its networks.
fn addresses(sets: &[&Policies]) -> BTreeSet<IpAddr> {
    let outside = OUTSIDE.iter().filter_map(|address| address.parse().ok());
    let networks = sets
        .iter()
        .flat_map(|set| set.blocks())
        .flat_map(|block| block.networks());
    outside.chain(networks.flat_map(ends)).collect()
}

fn ends(network: IpNet) -> [IpAddr; 4] {
    let (first, last) = (network.network(), network.broadcast());
    match (first, last) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            let before = one.to_bits().saturating_sub(1);
            let after = other.to_bits().saturating_add(1);
            [
                first,
                last,
                IpAddr::V4(before.into()),
                IpAddr::V4(after.into()),
            ]
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => {
            let before = one.to_bits().saturating_sub(1);
            let after = other.to_bits().saturating_add(1);
            [
                first,
                last,
                IpAddr::V6(before.into()),
                IpAddr::V6(after.into()),
            ]
        }
        _ => [first, last, first, last],
    }
}

fn text(labels: &Labels) -> Option<String> {
    let pairs: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    (!pairs.is_empty()).then(|| format!("({})", pairs.join(",")))
}
