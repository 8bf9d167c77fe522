//! Random clusters with all that the corpus leaves out: pods in their node's network, traffic from the own node, IPv6, dual
//! stack.

use std::{collections::BTreeMap, net::IpAddr};

use flow::record::Protocol;
use generator::evaluate::{Effect, Policies, PortRange, World, diff, prove};
use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicy};
use proptest::{prelude::*, sample::select, test_runner::TestRunner};
use serde_json::{Value, json};

use crate::{
    cluster::{Cluster, Query, node_addresses, pod_addresses},
    oracle,
};

const OUTSIDE: [&str; 4] = ["192.0.2.1", "10.9.0.1", "2001:db8:9::1", "fd00:9::1"];

const PORTS: [(Protocol, u16); 6] = [
    (Protocol::Tcp, 80),
    (Protocol::Tcp, 443),
    (Protocol::Tcp, 8080),
    (Protocol::Udp, 53),
    (Protocol::Udp, 80),
    (Protocol::Sctp, 99),
];

/// How often each kind of connection was asked about, and how often it was allowed.
#[derive(Debug, Default)]
struct Coverage {
    own_node: (usize, usize),
    other_node: (usize, usize),
    to_node: (usize, usize),
    ipv6: (usize, usize),
    all: (usize, usize),
}

#[test]
fn every_connection_of_random_clusters_is_judged_as_documented() {
    let coverage = std::cell::RefCell::new(Coverage::default());
    let mut runner = TestRunner::new(ProptestConfig::with_cases(300));
    runner
        .run(&cluster(), |cluster| {
            let queries = queries(&cluster);
            for (query, answer) in queries.iter().zip(cluster.answers(&queries)) {
                let expected = oracle::allows(&cluster, query);
                prop_assert_eq!(answer, expected, "{:?}", query);
                coverage.borrow_mut().count(&cluster, query, answer);
            }
            Ok(())
        })
        .unwrap();
    // What was never denied or never allowed was not tested; from the own node nothing can be denied.
    let Coverage {
        own_node,
        other_node,
        to_node,
        ipv6,
        all,
    } = coverage.into_inner();
    for (asked, allowed) in [other_node, to_node, ipv6, all] {
        assert!(0 < allowed && allowed < asked);
    }
    assert!(own_node.0 > 0);
}

#[test]
fn as_many_pairs_are_reachable_as_the_oracle_finds() {
    let counted = std::cell::RefCell::new((0, 0));
    let mut runner = TestRunner::new(ProptestConfig::with_cases(150));
    runner
        .run(&cluster(), |mut cluster| {
            make_distinct(&mut cluster);
            let endpoints = endpoints(&cluster, &cluster.policies);
            let mut before = 0;
            let mut after = 0;
            for (i, source) in endpoints.iter().enumerate() {
                for (j, destination) in endpoints.iter().enumerate() {
                    if i == j || !(source.is_pod || destination.is_pod) {
                        continue;
                    }
                    let queries = source.queries(destination);
                    before += u64::from(!queries.is_empty());
                    let allowed = queries.iter().any(|query| oracle::allows(&cluster, query));
                    after += u64::from(allowed);
                }
            }

            let policies = Policies::compile(&cluster.policies).unwrap();
            let proof = prove(&[], &policies, &whole_world(&cluster));
            prop_assert_eq!(proof.reachable_before, before);
            prop_assert_eq!(proof.reachable_after, after);
            let mut counted = counted.borrow_mut();
            counted.0 += before;
            counted.1 += after;
            Ok(())
        })
        .unwrap();
    let (before, after) = counted.into_inner();
    assert!(0 < after && after < before);
}

#[test]
fn a_diff_has_what_the_oracle_finds_and_nothing_else() {
    let counted = std::cell::RefCell::new((0, 0));
    let mut runner = TestRunner::new(ProptestConfig::with_cases(150));
    runner
        .run(&(cluster(), policies()), |(mut before, policies)| {
            make_distinct(&mut before);
            let after = Cluster {
                policies,
                ..before.clone()
            };
            let all = [&before.policies[..], &after.policies].concat();
            let endpoints = endpoints(&before, &all);
            let diff = diff(
                &whole_world(&before),
                &Policies::compile(&before.policies).unwrap(),
                &Policies::compile(&after.policies).unwrap(),
            );
            let mut changes = BTreeMap::<_, Vec<&PortRange>>::new();
            for change in &diff.changes {
                let ends = (change.source.as_str(), change.destination.as_str());
                let ports = changes.entry((ends, change.effect)).or_default();
                ports.extend(&change.ports);
                prop_assert!(!change.denials.is_empty(), "{:?}", change);
            }
            for source in &endpoints {
                for destination in &endpoints {
                    let ends = (source.name.as_str(), destination.name.as_str());
                    if source.name == destination.name || !(source.is_pod || destination.is_pod) {
                        prop_assert!(!changes.contains_key(&(ends, Effect::Opened)));
                        prop_assert!(!changes.contains_key(&(ends, Effect::Closed)));
                        continue;
                    }
                    let queries = source.queries(destination);
                    for (protocol, port) in PORTS {
                        let is_open = |cluster: &Cluster| {
                            let mut queries = queries
                                .iter()
                                .filter(|query| (query.protocol, query.port) == (protocol, port));
                            queries.any(|query| oracle::allows(cluster, query))
                        };
                        let has = |effect| {
                            let mut ports = changes.get(&(ends, effect)).into_iter().flatten();
                            ports.any(|range| {
                                range.protocol == protocol
                                    && (range.port..=range.end_port).contains(&port)
                            })
                        };
                        let (was, is) = (is_open(&before), is_open(&after));
                        prop_assert_eq!(has(Effect::Opened), is && !was, "{:?} {}", ends, port);
                        prop_assert_eq!(has(Effect::Closed), was && !is, "{:?} {}", ends, port);
                    }
                }
            }
            let mut counted = counted.borrow_mut();
            counted.0 += diff.opened;
            counted.1 += diff.closed;
            Ok(())
        })
        .unwrap();
    let (opened, closed) = counted.into_inner();
    assert!(opened > 0 && closed > 0);
}

/// Pods with the same labels are one endpoint: now each is its own.
fn make_distinct(cluster: &mut Cluster) {
    for pod in &mut cluster.pods {
        let name = pod.metadata.name.clone().unwrap();
        let labels = pod.metadata.labels.get_or_insert_default();
        labels.insert("name".to_owned(), name);
    }
}

/// With the addresses outside.
fn whole_world(cluster: &Cluster) -> World {
    let mut world = cluster.world();
    for address in OUTSIDE {
        world.add_external(address.parse().unwrap());
    }
    world
}

/// What counts as one endpoint.
struct Endpoint {
    name: String,
    is_pod: bool,
    addresses: Vec<IpAddr>,
}

impl Endpoint {
    fn queries(&self, destination: &Self) -> Vec<Query> {
        let mut queries = Vec::new();
        for source in &self.addresses {
            for destination in &destination.addresses {
                queries.extend(queries_between(*source, *destination));
            }
        }
        queries
    }
}

fn endpoints(cluster: &Cluster, policies: &[NetworkPolicy]) -> Vec<Endpoint> {
    let pods = cluster
        .pods
        .iter()
        .filter(|pod| pod.spec.as_ref().unwrap().host_network != Some(true))
        .map(|pod| Endpoint {
            name: format!(
                "{}/{}",
                pod.metadata.namespace.as_ref().unwrap(),
                pod.metadata.name.as_ref().unwrap()
            ),
            is_pod: true,
            addresses: pod_addresses(pod),
        });
    let nodes = cluster.nodes.iter().map(|node| Endpoint {
        name: format!("node {}", node.metadata.name.as_ref().unwrap()),
        is_pod: false,
        addresses: node_addresses(node),
    });
    let mut endpoints: Vec<Endpoint> = pods.chain(nodes).collect();

    // Addresses outside are one endpoint if they are in the same blocks.
    let rules = |policy: &NetworkPolicy| {
        let spec = policy.spec.clone().unwrap();
        let ingress = spec
            .ingress
            .into_iter()
            .flatten()
            .flat_map(|rule| rule.from);
        let egress = spec.egress.into_iter().flatten().flat_map(|rule| rule.to);
        ingress.chain(egress).flatten().collect::<Vec<_>>()
    };
    let blocks: Vec<IPBlock> = policies
        .iter()
        .flat_map(rules)
        .filter_map(|peer| peer.ip_block)
        .collect();
    let mut outside = BTreeMap::<Vec<bool>, Vec<IpAddr>>::new();
    for address in OUTSIDE {
        let address: IpAddr = address.parse().unwrap();
        let mut place: Vec<bool> = blocks
            .iter()
            .map(|block| oracle::in_block(block, address))
            .collect();
        place.push(address.is_ipv4());
        outside.entry(place).or_default().push(address);
    }
    endpoints.extend(outside.into_values().map(|addresses| {
        let first = addresses.iter().min().unwrap();
        Endpoint {
            name: match addresses.len() {
                1 => first.to_string(),
                count => format!("{first} and {} more addresses", count - 1),
            },
            is_pod: false,
            addresses,
        }
    }));
    endpoints
}

impl Coverage {
    fn count(&mut self, cluster: &Cluster, query: &Query, allowed: bool) {
        let node_at = |address: IpAddr| {
            cluster
                .nodes
                .iter()
                .find(|node| node_addresses(node).contains(&address))
                .map(|node| &node.metadata.name)
        };
        let destination_runs_on = cluster
            .pods
            .iter()
            .find(|pod| pod_addresses(pod).contains(&query.destination))
            .map(|pod| &pod.spec.as_ref().unwrap().node_name);
        let count = |kind: &mut (usize, usize)| {
            kind.0 += 1;
            kind.1 += usize::from(allowed);
        };
        count(&mut self.all);
        if query.source.is_ipv6() {
            count(&mut self.ipv6);
        }
        match (node_at(query.source), node_at(query.destination)) {
            (Some(source), None) if destination_runs_on == Some(source) => {
                count(&mut self.own_node);
            }
            (Some(_), None) => count(&mut self.other_node),
            (None, Some(_)) => count(&mut self.to_node),
            _ => {}
        }
    }
}

fn queries(cluster: &Cluster) -> Vec<Query> {
    let mut addresses: Vec<IpAddr> = OUTSIDE
        .iter()
        .map(|address| address.parse().unwrap())
        .chain(cluster.nodes.iter().flat_map(node_addresses))
        .chain(cluster.pods.iter().flat_map(pod_addresses))
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    let mut queries = Vec::new();
    for source in &addresses {
        for destination in &addresses {
            queries.extend(queries_between(*source, *destination));
        }
    }
    queries
}

fn queries_between(source: IpAddr, destination: IpAddr) -> Vec<Query> {
    if source.is_ipv4() != destination.is_ipv4() {
        return Vec::new();
    }
    PORTS
        .map(|(protocol, port)| Query {
            source,
            destination,
            protocol,
            port,
        })
        .to_vec()
}

fn cluster() -> impl Strategy<Value = Cluster> {
    let namespaces = [labels(), labels(), labels()];
    (namespaces, prop::collection::vec(pod(), 3..7), policies()).prop_map(
        |(namespaces, pods, policies)| {
            let namespaces = namespaces.into_iter().zip(["a", "b", "c"]);
            Cluster {
                namespaces: namespaces
                    .map(|(mut labels, name)| {
                        labels["kubernetes.io/metadata.name"] = name.into();
                        read(json!({"metadata": {"name": name, "labels": labels}}))
                    })
                    .collect(),
                nodes: (1..3)
                    .map(|i| {
                        let addresses = [
                            json!({"type": "InternalIP", "address": format!("10.1.0.{i}")}),
                            json!({"type": "InternalIP", "address": format!("fd00:1::{i}")}),
                        ];
                        read(json!({
                            "metadata": {"name": format!("node-{i}")},
                            "status": {"addresses": addresses},
                        }))
                    })
                    .collect(),
                pods: (1..).zip(pods).map(|(i, pod)| pod.build(i)).collect(),
                policies,
            }
        },
    )
}

fn policies() -> impl Strategy<Value = Vec<NetworkPolicy>> {
    prop::collection::vec(policy(), 1..5).prop_map(|policies| {
        (1..)
            .zip(policies)
            .map(|(i, (namespace, spec))| {
                let metadata = json!({"name": format!("policy-{i}"), "namespace": namespace});
                read(json!({"metadata": metadata, "spec": spec}))
            })
            .collect()
    })
}

fn read<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).unwrap()
}

#[derive(Clone, Debug)]
struct PodSketch {
    namespace: &'static str,
    labels: Value,
    node: usize,
    host_network: bool,
    ipv4: bool,
    ipv6: bool,
    ports: Vec<Value>,
}

impl PodSketch {
    fn build(self, i: usize) -> k8s_openapi::api::core::v1::Pod {
        let addresses = if self.host_network {
            [
                format!("10.1.0.{}", self.node),
                format!("fd00:1::{}", self.node),
            ]
        } else {
            // Two ranges of pods, one of which blocks can leave out.
            [
                format!("10.2.{}.{i}", i % 2),
                format!("fd00:2:{}::{i}", i % 2),
            ]
        };
        let addresses: Vec<Value> = addresses
            .into_iter()
            .zip([self.ipv4, self.ipv6])
            .filter(|(_, has)| *has || self.host_network)
            .map(|(ip, _)| json!({"ip": ip}))
            .collect();
        read(json!({
            "metadata": {"name": format!("pod-{i}"), "namespace": self.namespace, "labels": self.labels},
            "spec": {
                "containers": [{"name": "c", "ports": self.ports}],
                "nodeName": format!("node-{}", self.node),
                "hostNetwork": self.host_network,
            },
            "status": {"podIPs": addresses},
        }))
    }
}

fn pod() -> impl Strategy<Value = PodSketch> {
    let ports = prop::collection::vec(
        select(vec![
            json!({"name": "web", "containerPort": 80}),
            json!({"name": "web", "containerPort": 8080, "protocol": "TCP"}),
            json!({"name": "dns", "containerPort": 53, "protocol": "UDP"}),
            json!({"name": "web", "containerPort": 80, "protocol": "UDP"}),
        ]),
        0..2,
    );
    (
        select(vec!["a", "b", "c"]),
        labels(),
        1..3_usize,
        prop::bool::weighted(0.2),
        select(vec![
            (true, true),
            (true, true),
            (true, false),
            (false, true),
        ]),
        ports,
    )
        .prop_map(
            |(namespace, labels, node, host_network, (ipv4, ipv6), ports)| PodSketch {
                namespace,
                labels,
                node,
                host_network,
                ipv4,
                ipv6,
                ports,
            },
        )
}

fn labels() -> impl Strategy<Value = Value> {
    (value(), value()).prop_map(|(app, tier)| {
        let mut labels = json!({});
        for (key, value) in [("app", app), ("tier", tier)] {
            if let Some(value) = value {
                labels[key] = value.into();
            }
        }
        labels
    })
}

fn value() -> impl Strategy<Value = Option<&'static str>> {
    select(vec![None, Some("x"), Some("y")])
}

fn selector() -> impl Strategy<Value = Value> {
    let expression = (
        select(vec!["app", "tier"]),
        select(vec!["In", "NotIn", "Exists", "DoesNotExist"]),
        select(vec![vec!["x"], vec!["y"], vec!["x", "y"]]),
    )
        .prop_map(|(key, operator, values)| match operator {
            "In" | "NotIn" => json!({"key": key, "operator": operator, "values": values}),
            _ => json!({"key": key, "operator": operator}),
        });
    prop_oneof![
        2 => Just(json!({})),
        3 => labels().prop_map(|labels| json!({"matchLabels": labels})),
        3 => (labels(), prop::collection::vec(expression, 1..3))
            .prop_map(|(labels, expressions)| {
                json!({"matchLabels": labels, "matchExpressions": expressions})
            }),
    ]
}

fn peer() -> impl Strategy<Value = Value> {
    let by_name = select(vec!["a", "b", "c"])
        .prop_map(|name| json!({"matchLabels": {"kubernetes.io/metadata.name": name}}));
    let namespaces = prop_oneof![selector(), by_name];
    let block = select(vec![
        json!({"cidr": "0.0.0.0/0"}),
        json!({"cidr": "::/0"}),
        json!({"cidr": "10.0.0.0/8", "except": ["10.2.0.0/24"]}),
        json!({"cidr": "10.1.0.1/32"}),
        json!({"cidr": "10.2.1.7/24"}),
        json!({"cidr": "fd00::/16", "except": ["fd00:2:1::/48", "fd00:1::2/128"]}),
        json!({"cidr": "fd00:1::1/128"}),
    ]);
    prop_oneof![
        selector().prop_map(|pods| json!({"podSelector": pods})),
        namespaces
            .clone()
            .prop_map(|of| json!({"namespaceSelector": of})),
        (namespaces, selector())
            .prop_map(|(of, pods)| json!({"namespaceSelector": of, "podSelector": pods})),
        block.prop_map(|block| json!({"ipBlock": block})),
    ]
}

fn port() -> impl Strategy<Value = Value> {
    select(vec![
        json!({}),
        json!({"port": 80}),
        json!({"port": 80, "endPort": 443}),
        json!({"port": "web"}),
        json!({"protocol": "UDP", "port": "web"}),
        json!({"protocol": "UDP", "port": "dns"}),
        json!({"protocol": "UDP"}),
        json!({"protocol": "SCTP", "port": 99}),
    ])
}

fn rule(peers: &'static str) -> impl Strategy<Value = Value> {
    let list = |item: BoxedStrategy<Value>| {
        prop_oneof![
            1 => Just(None),
            3 => prop::collection::vec(item, 0..3).prop_map(Some),
        ]
    };
    (list(peer().boxed()), list(port().boxed())).prop_map(move |(of, ports)| {
        let mut rule = json!({});
        if let Some(of) = of {
            rule[peers] = of.into();
        }
        if let Some(ports) = ports {
            rule["ports"] = ports.into();
        }
        rule
    })
}

fn policy() -> impl Strategy<Value = (&'static str, Value)> {
    let types = select(vec![
        None,
        Some(vec![]),
        Some(vec!["Ingress"]),
        Some(vec!["Egress"]),
        Some(vec!["Ingress", "Egress"]),
    ]);
    let rules = |peers| {
        prop_oneof![
            1 => Just(None),
            4 => prop::collection::vec(rule(peers), 0..3).prop_map(Some),
        ]
    };
    (
        select(vec!["a", "b", "c"]),
        prop::option::of(selector()),
        types,
        rules("from"),
        rules("to"),
    )
        .prop_map(|(namespace, pods, types, ingress, egress)| {
            let mut spec = json!({});
            if let Some(pods) = pods {
                spec["podSelector"] = pods;
            }
            if let Some(types) = types {
                spec["policyTypes"] = types.into();
            }
            if let Some(ingress) = ingress {
                spec["ingress"] = ingress.into();
            }
            if let Some(egress) = egress {
                spec["egress"] = egress.into();
            }
            (namespace, spec)
        })
}
