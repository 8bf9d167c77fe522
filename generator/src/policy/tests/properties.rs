//! For random clusters and flows: what was seen is allowed at both ends, and nothing else is.

use std::{
    collections::BTreeSet, net::IpAddr, num::NonZeroUsize, ops::RangeInclusive, time::Duration,
};

use flow::{record::Direction, time::Timestamp};
use ipnet::IpNet;
use k8s_openapi::api::networking::v1::NetworkPolicySpec;
use proptest::prelude::*;

use super::*;
use crate::policy::build::is_from_own_node;
use crate::samples::{Synthesis, any_records};

pub(super) fn any_options() -> impl Strategy<Value = Options> {
    let blocks = (0..=32_u8, 0..=128_u8, 0..3_usize, any::<bool>()).prop_map(
        |(max_prefix4, max_prefix6, group, exact)| {
            if exact {
                return Blocks::default();
            }
            Blocks {
                max_prefix4,
                max_prefix6,
                group: NonZeroUsize::new(group),
            }
        },
    );
    let namespaces = prop_oneof![
        Just(Namespaces::All),
        Just(Namespaces::Only(["shop".to_owned()].into())),
        Just(Namespaces::AllBut(["shop".to_owned()].into())),
    ];
    let since = prop_oneof![
        3 => Just(None),
        1 => (0..8_u64).prop_map(|nanos| Some(Since::At(Timestamp::from_nanos(nanos)))),
        1 => (0..8_u64).prop_map(|nanos| Some(Since::Last(Duration::from_nanos(nanos)))),
    ];
    (
        (namespaces, any::<bool>(), blocks),
        prop::sample::select(vec![
            Granularity::Namespace,
            Granularity::Service,
            Granularity::Workload,
            Granularity::Pod,
        ]),
        prop::sample::select(vec![OwnNode::Ignore, OwnNode::Allow]),
        prop::sample::select(vec![PolicyTypes::Both, PolicyTypes::Observed]),
        prop::sample::select(vec![PortForm::Exact, PortForm::Ranges]),
        prop::sample::select(vec![Enforcer::Kubernetes, Enforcer::WeaveNpc]),
        prop_oneof![3 => Just(1), 1 => 0..30_u64],
        since,
    )
        .prop_map(
            |(
                (namespaces, allow_dns, blocks),
                granularity,
                own_node,
                policy_types,
                ports,
                enforcer,
                min_count,
                since,
            )| Options {
                namespaces,
                granularity,
                allow_dns,
                own_node,
                policy_types,
                ports,
                enforcer,
                blocks,
                min_count,
                since,
            },
        )
}

/// One port of one rule, and the policy that it is in.
struct Opening<'a> {
    namespace: &'a str,
    selector: Labels,
    is_ingress: bool,
    peer: &'a NetworkPolicyPeer,
    protocol: &'a str,
    ports: RangeInclusive<u16>,
}

fn number(port: Option<&IntOrString>) -> u16 {
    match port {
        Some(IntOrString::Int(number)) => u16::try_from(*number).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn openings(policies: &[NetworkPolicy]) -> Vec<Opening<'_>> {
    let mut openings = Vec::new();
    for policy in policies {
        let namespace = policy.metadata.namespace.as_deref().unwrap();
        let spec: &NetworkPolicySpec = policy.spec.as_ref().unwrap();
        let ingress = spec.ingress.iter().flatten();
        let ingress = ingress.map(|rule| (true, rule.from.as_ref(), rule.ports.as_ref()));
        let egress = spec.egress.iter().flatten();
        let egress = egress.map(|rule| (false, rule.to.as_ref(), rule.ports.as_ref()));
        for (is_ingress, peers, ports) in ingress.chain(egress) {
            for port in ports.unwrap() {
                openings.push(Opening {
                    namespace,
                    selector: match_labels(spec.pod_selector.as_ref()),
                    is_ingress,
                    peer: &peers.unwrap()[0],
                    protocol: port.protocol.as_deref().unwrap(),
                    ports: {
                        let first = number(port.port.as_ref());
                        let last = port.end_port.map(IntOrString::Int);
                        first..=last.map_or(first, |last| number(Some(&last)))
                    },
                });
            }
        }
    }
    openings
}

fn match_labels(selector: Option<&LabelSelector>) -> Labels {
    selector.unwrap().match_labels.clone().unwrap_or_default()
}

/// The labels that are known of an end's pods: a service's are at least those of its selector.
fn known_labels(endpoint: &Endpoint) -> Option<(&str, &Labels)> {
    match endpoint {
        Endpoint::Pod { pod, .. } if !pod.host_network => Some((&pod.namespace, &pod.labels)),
        Endpoint::Service(service) if !service.selector.is_empty() => {
            Some((&service.namespace, &service.selector))
        }
        _ => None,
    }
}

fn is_in(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|pair| labels.iter().any(|label| label == pair))
}

impl Opening<'_> {
    fn is_for(&self, edge: &Edge) -> bool {
        let (own, other, address) = if self.is_ingress {
            (&edge.server, &edge.client, edge.client_address)
        } else {
            (&edge.client, &edge.server, edge.server_address)
        };
        let governs = known_labels(own).is_some_and(|(namespace, labels)| {
            namespace == self.namespace && is_in(&self.selector, labels)
        });
        governs
            && self.protocol == edge.protocol.name()
            && self.ports.contains(&edge.port)
            && self.lets_through(other, address)
    }

    fn lets_through(&self, other: &Endpoint, address: IpAddr) -> bool {
        match (&self.peer.ip_block, other) {
            (Some(block), Endpoint::Service(service)) => {
                let block: IpNet = block.cidr.parse().unwrap();
                service
                    .backends
                    .iter()
                    .any(|backend| block.contains(backend))
            }
            (Some(block), _) => block.cidr.parse::<IpNet>().unwrap().contains(&address),
            (None, other) => known_labels(other).is_some_and(|(namespace, labels)| {
                let namespaces = match_labels(self.peer.namespace_selector.as_ref());
                let pods = match_labels(self.peer.pod_selector.as_ref());
                namespaces["kubernetes.io/metadata.name"] == namespace
                    && !pods.is_empty()
                    && is_in(&pods, labels)
            }),
        }
    }
}

/// Whether a policy can govern this end: the pods of the sample cluster have the label `app`, or none that is stable.
fn is_governed(endpoint: &Endpoint, options: &Options) -> bool {
    known_labels(endpoint).is_some_and(|(namespace, labels)| {
        options.namespaces.contains(namespace)
            && (labels.contains_key("app") || options.granularity == Granularity::Namespace)
    })
}

/// Whether the options leave the edge alone: it was seen often and lately enough by itself, and all is IPv4 if it must be.
fn is_wanted(edge: &Edge, edges: &[Edge], options: &Options) -> bool {
    let newest = edges.iter().map(|edge| edge.last_seen).max().unwrap();
    let since = match options.since {
        None => Timestamp::default(),
        Some(Since::At(time)) => time,
        Some(Since::Last(duration)) => newest.saturating_sub(duration),
    };
    let is_ignored = options.own_node == OwnNode::Ignore && is_from_own_node(edge);
    let has_ipv6 = edge.client_address.is_ipv6() || edge.server_address.is_ipv6();
    !is_ignored
        && !edge.is_by_a_stranger()
        && edge.count() >= options.min_count
        && edge.last_seen >= since
        && !(has_ipv6 && options.enforcer == Enforcer::WeaveNpc)
}

fn size(block: IpNet) -> u128 {
    let free = block.max_prefix_len() - block.prefix_len();
    1_u128.checked_shl(u32::from(free)).unwrap_or(u128::MAX)
}

proptest! {
    #[test]
    fn every_edge_is_let_through_at_both_ends(records in any_records(), mut options in any_options()) {
        options.allow_dns = false;
        let edges = ledger(records).edges();
        let Synthesis { policies, notices, .. } = synthesise(&edges, &options);
        let openings = openings(&policies);
        for edge in &edges {
            let is_of_one_side = edge.seen_by_client == 0 || edge.seen_by_server == 0;
            let is_hearsay = is_of_one_side && notices.contains(&Notice::new(edge, Reason::Stranger));
            if is_hearsay || !is_wanted(edge, &edges, &options) {
                continue;
            }
            for (is_ingress, end) in [(true, &edge.server), (false, &edge.client)] {
                let is_open = openings
                    .iter()
                    .any(|opening| opening.is_ingress == is_ingress && opening.is_for(edge));
                prop_assert!(
                    is_open || !is_governed(end, &options),
                    "ingress {is_ingress}: {edge:?}\n{policies:?}"
                );
            }
        }
    }

    #[test]
    fn nothing_is_let_through_that_was_not_seen(records in any_records(), mut options in any_options()) {
        options.allow_dns = false;
        let edges = ledger(records).edges();
        let policies = synthesise(&edges, &options).policies;
        for opening in openings(&policies) {
            prop_assert!(
                edges.iter().any(|edge| opening.is_for(edge)),
                "{} {:?} {:?}", opening.namespace, opening.selector, opening.peer
            );
            for port in opening.ports.clone() {
                let seen = edges.iter().any(|edge| edge.port == port && opening.is_for(edge));
                prop_assert!(seen, "{port} of {:?}", opening.ports);
            }
        }
    }

    /// Blocks hold no more addresses that were not seen than is said.
    #[test]
    fn merging_is_no_wider_than_said(records in any_records(), options in any_options()) {
        let edges = ledger(records).edges();
        let plan = plan(&edges, &options);
        let policies: Vec<NetworkPolicy> = plan.manifests(&plan.all()).collect();
        let mut blocks = BTreeSet::new();
        for opening in openings(&policies) {
            if let Some(block) = &opening.peer.ip_block {
                blocks.insert((opening.namespace, opening.selector, opening.is_ingress, block.cidr.parse::<IpNet>().unwrap()));
            }
        }
        let addresses: BTreeSet<IpAddr> = edges
            .iter()
            .flat_map(|edge| [(&edge.client, edge.client_address), (&edge.server, edge.server_address)])
            .filter(|(end, _)| matches!(end, Endpoint::External(_)))
            .map(|(_, address)| address)
            .collect();
        let single = |block: &IpNet| block.prefix_len() == block.max_prefix_len();
        let added = blocks.iter().map(|(.., block)| *block).filter(|block| !single(block)).map(|block| {
            size(block) - addresses.iter().filter(|address| block.contains(*address)).count() as u128
        });
        prop_assert!(added.fold(0, u128::saturating_add) <= plan.added_addresses(&plan.all()));
        if options.blocks == Blocks::default() {
            prop_assert_eq!(plan.added_addresses(&plan.all()), 0);
            prop_assert!(blocks.iter().all(|(.., block)| single(block)));
        }
    }

    #[test]
    fn a_policy_has_the_types_that_were_asked_for(records in any_records(), options in any_options()) {
        let edges = ledger(records).edges();
        let plan = plan(&edges, &options);
        let all = plan.all();
        let one_sided = plan.one_sided(&all);
        for (index, policy) in plan.manifests(&all).enumerate() {
            let spec = policy.spec.unwrap();
            prop_assert!(options.namespaces.contains(&policy.metadata.namespace.unwrap()));
            for (direction, name, is_written) in [
                (Direction::Ingress, "Ingress", spec.ingress.is_some()),
                (Direction::Egress, "Egress", spec.egress.is_some()),
            ] {
                let types = spec.policy_types.as_ref().unwrap();
                let is_closed = types.iter().any(|known| known == name);
                let is_seen = plan.rules_of(index, &all).any(|rule| rule.direction == direction);
                prop_assert_eq!(is_closed, is_seen || options.policy_types == PolicyTypes::Both);
                prop_assert_eq!(is_closed, is_written);
                let is_said = one_sided.iter().any(|said| {
                    Some(&said.policy) == policy.metadata.name.as_ref()
                        && said.namespace == plan.policies()[index].namespace()
                        && said.direction == direction
                });
                prop_assert_eq!(is_said, !is_seen);
            }
        }
    }

    #[test]
    fn weave_npc_gets_single_ports_and_ipv4(records in any_records(), mut options in any_options()) {
        options.enforcer = Enforcer::WeaveNpc;
        let policies = synthesise(&ledger(records).edges(), &options).policies;
        for opening in openings(&policies) {
            prop_assert_eq!(opening.ports.start(), opening.ports.end());
            if let Some(block) = &opening.peer.ip_block {
                prop_assert!(!block.cidr.contains(':'), "{}", block.cidr);
            }
        }
    }

    #[test]
    fn what_is_too_rare_or_too_old_is_left_out_at_both_ends(records in any_records(), mut options in any_options()) {
        options.namespaces = Namespaces::All;
        let edges = ledger(records).edges();
        let all: u64 = edges.iter().map(Edge::count).sum();
        let newest = edges.iter().map(|edge| edge.last_seen).max().unwrap_or_default();
        let later = Timestamp::from_nanos(newest.as_nanos() + 1);
        for (min_count, since) in [(all + 1, None), (1, Some(Since::At(later)))] {
            let options = Options { min_count, since, ..options.clone() };
            prop_assert_eq!(synthesise(&edges, &options).policies, vec![]);
        }
    }

    /// A rule that is not chosen is not written, and a chosen one is.
    #[test]
    fn only_chosen_rules_are_written(records in any_records(), options in any_options(), seed: u64) {
        let edges = ledger(records).edges();
        let plan = plan(&edges, &options);
        let chosen: Vec<bool> = (0..plan.rules().len()).map(|rule| seed >> (rule % 64) & 1 == 1).collect();
        let policies: Vec<NetworkPolicy> = plan.manifests(&chosen).collect();
        let written = openings(&policies);
        let mut expected = BTreeSet::new();
        for (index, draft) in plan.policies().iter().enumerate() {
            let rules: Vec<&Rule> = plan.rules_of(index, &chosen).collect();
            expected.extend((!rules.is_empty()).then(|| (draft.namespace().to_owned(), draft.name.clone())));
            for rule in rules.into_iter().filter(|rule| rule.peer().is_some()) {
                let is_there = written.iter().any(|opening| {
                    opening.namespace == draft.namespace()
                        && opening.is_ingress == (rule.direction == Direction::Ingress)
                        && opening.protocol == rule.protocol.name()
                        && opening.ports.contains(&rule.port)
                });
                prop_assert!(is_there, "{rule:?}");
            }
        }
        let names = policies.iter().map(|policy| {
            (policy.metadata.namespace.clone().unwrap(), policy.metadata.name.clone().unwrap())
        });
        prop_assert_eq!(names.collect::<BTreeSet<_>>(), expected);
        for connection in plan.connections() {
            let rule = &plan.rules()[connection.rule];
            prop_assert_eq!((rule.direction, rule.protocol, rule.port), (connection.direction, connection.protocol, connection.port));
            prop_assert!(connection.evidence.pods <= rule.evidence.pods);
            prop_assert!(rule.evidence.pods <= rule.evidence.of_pods);
        }
        let sum: u64 = plan.connections().iter().map(|connection| connection.evidence.count).sum();
        prop_assert_eq!(sum, plan.rules().iter().map(|rule| rule.evidence.count).sum::<u64>());
    }

    #[test]
    fn policies_do_not_depend_on_the_order_of_edges(
        (edges, shuffled) in any_records().prop_flat_map(|records| {
            let edges = ledger(records).edges();
            (Just(edges.clone()), Just(edges).prop_shuffle())
        }),
        options in any_options(),
    ) {
        let (one, other) = (synthesise(&edges, &options), synthesise(&shuffled, &options));
        prop_assert_eq!(one, other);
    }

    #[test]
    fn names_are_unique_and_every_policy_is_what_its_text_says(records in any_records(), options in any_options()) {
        let synthesis = synthesise(&ledger(records).edges(), &options);
        let files = synthesis.files;
        prop_assert_eq!(files.len(), synthesis.policies.len());
        for policy in &synthesis.policies {
            prop_assert_eq!(api_server::complaints(policy), [""; 0]);
        }
        let mut read: Vec<NetworkPolicy> = files
            .values()
            .map(|text| serde_yaml::from_str(text).unwrap())
            .collect();
        read.sort_by_key(|policy| (policy.metadata.namespace.clone(), policy.metadata.name.clone()));
        let written: Vec<NetworkPolicy> = synthesis.policies;
        prop_assert_eq!(read, written);
    }
}
