//! What a real kube-apiserver said, and what the index makes of it.

use std::{fs, path::PathBuf, time::Duration};

use flow::{
    endpoint::Endpoint,
    record::Protocol,
    time::Timestamp,
    topology::{
        Change, EndpointSlice, Index, Namespace, Node, Object, Objects, Pod, RETENTION, Service,
        file,
    },
};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::de::DeserializeOwned;
use serde_json::Value;

const KINDS: [&str; 5] = ["namespaces", "nodes", "services", "endpointslices", "pods"];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/fixtures/kube-1.24")
        .join(name)
}

/// The lists of all kinds: `list` or `after`.
fn lists(which: &str) -> Objects {
    let mut all = Objects::default();
    for kind in KINDS {
        let loaded = file::load(&fixture(&format!("{which}-{kind}.json"))).unwrap();
        assert!(loaded.skipped.is_empty());
        assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
        all.namespaces.extend(loaded.objects.namespaces);
        all.nodes.extend(loaded.objects.nodes);
        all.services.extend(loaded.objects.services);
        all.endpoint_slices.extend(loaded.objects.endpoint_slices);
        all.pods.extend(loaded.objects.pods);
    }
    all
}

/// The events of all watches, in the order of their resource versions.
fn events() -> Vec<(String, Change)> {
    let mut events = Vec::new();
    for kind in KINDS {
        let text = fs::read_to_string(fixture(&format!("watch-{kind}.jsonl"))).unwrap();
        for line in text.lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            let action = event["type"].as_str().unwrap().to_owned();
            if action == "BOOKMARK" {
                continue;
            }
            let value = event["object"].clone();
            let version = value["metadata"]["resourceVersion"].as_str().unwrap();
            let version: u64 = version.parse().unwrap();
            let name = value["metadata"]["name"].as_str().unwrap().to_owned();
            let object = object(kind, value);
            let change = match action.as_str() {
                "ADDED" | "MODIFIED" => Change::Upsert(object),
                "DELETED" => Change::Delete {
                    key: object.key(),
                    ended: None,
                },
                other => panic!("{other}"),
            };
            events.push((version, format!("{action} {name}"), change));
        }
    }
    events.sort_by_key(|(version, ..)| *version);
    events
        .into_iter()
        .map(|(_, name, change)| (name, change))
        .collect()
}

fn object(kind: &str, value: Value) -> Object {
    fn read<A: DeserializeOwned, O: TryFrom<A>>(value: Value) -> O
    where
        O::Error: std::fmt::Debug,
    {
        serde_json::from_value::<A>(value)
            .unwrap()
            .try_into()
            .unwrap()
    }
    match kind {
        "namespaces" => Object::Namespace(read::<core::Namespace, Namespace>(value)),
        "nodes" => Object::Node(read::<core::Node, Node>(value)),
        "services" => Object::Service(read::<core::Service, Service>(value)),
        "pods" => Object::Pod(read::<core::Pod, Pod>(value)),
        _ => Object::EndpointSlice(read::<discovery::EndpointSlice, EndpointSlice>(value)),
    }
}

/// A time of that evening, in seconds after 20:14:00.
fn at(seconds: f64) -> Timestamp {
    const BASE: u64 = 1_795_292_040;
    Timestamp::from_nanos(BASE * 1_000_000_000 + (seconds * 1e9) as u64)
}

/// When the events of each part of the story arrive, in seconds after 20:14:00. The streams do not say; the parts are
/// told apart by their first event, and the events of one part come a millisecond apart.
const ARRIVALS: [(&str, f64); 4] = [
    ("MODIFIED front-67796785cb-bjxrg", 2.500),
    ("MODIFIED report-29921534-pr497", 4.200),
    ("MODIFIED api-node", 6.300),
    ("MODIFIED report-29921533-zr9c6", 6.400),
];

/// The index after the first lists (at 20:14:01) and all events, and the time of each event.
fn replayed() -> (Index, Vec<(String, Timestamp)>) {
    let mut index = Index::default();
    index.replace(lists("list"), at(1.0));
    let mut now = at(2.0);
    let mut times = Vec::new();
    for (name, change) in events() {
        now = match ARRIVALS.iter().find(|(first, _)| *first == name) {
            Some((_, seconds)) if at(*seconds) > now => at(*seconds),
            _ => now.saturating_add(Duration::from_millis(1)),
        };
        index.apply(change, now);
        times.push((name, now));
    }
    (index, times)
}

fn time_of(times: &[(String, Timestamp)], event: &str, nth: usize) -> Timestamp {
    let mut found = times.iter().filter(|(name, _)| name == event);
    found.nth(nth).unwrap().1
}

fn call(index: &Index, address: &str, protocol: Protocol, port: u16, at: Timestamp) -> String {
    let server = index.resolve(address.parse().unwrap(), protocol, port, at);
    let service = match &server.endpoint {
        Endpoint::Pod {
            service: Some(service),
            ..
        } => format!(" of {}", service.name),
        _ => String::new(),
    };
    let how = if server.virtual_address {
        "virtual"
    } else {
        "direct"
    };
    format!("{}{service}:{} {how}", server.endpoint, server.port)
}

fn tcp(index: &Index, address: &str, port: u16, at: Timestamp) -> String {
    call(index, address, Protocol::Tcp, port, at)
}

fn client(index: &Index, address: &str, at: Timestamp) -> String {
    index
        .resolve_client(address.parse().unwrap(), at)
        .to_string()
}

#[test]
fn the_watches_lead_from_one_list_to_the_next() {
    let (mut watched, _) = replayed();
    let mut listed = Index::default();
    listed.replace(lists("after"), at(100.0));

    let state = |index: &Index| {
        let mut pods: Vec<_> = index.pods().cloned().collect();
        pods.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut services: Vec<_> = index.services().cloned().collect();
        services.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut namespaces: Vec<_> = index
            .namespaces()
            .map(|(name, labels)| (name.to_owned(), labels.clone()))
            .collect();
        namespaces.sort();
        (pods, services, namespaces, index.counts())
    };
    assert_eq!(state(&watched), state(&listed));

    // A relist changes nothing then, and nothing but the past is left to forget.
    watched.replace(lists("after"), at(101.0));
    assert_eq!(state(&watched), state(&listed));
    watched.expire(at(102.0).saturating_add(RETENTION));
    assert_eq!(state(&watched), state(&listed));
    let now = at(102.0).saturating_add(RETENTION);
    let front = "b992fb7c-dd38-4da1-ba09-544d678b49c9";
    assert_eq!(watched.pod_by_uid(front), None);
    assert_eq!(
        tcp(&watched, "10.96.53.27", 8080, now),
        "10.96.53.27:8080 direct"
    );
}

#[test]
fn an_address_that_moves_is_told_apart() {
    let (index, times) = replayed();
    let deleted = time_of(&times, "DELETED front-67796785cb-bjxrg", 0);
    let taken = time_of(&times, "MODIFIED intruder", 1);
    let before = deleted.saturating_sub(Duration::from_nanos(1));
    for address in ["10.244.3.13", "fd00:10:244:3::d"] {
        assert_eq!(
            client(&index, address, at(1.0)),
            "shop/front-67796785cb-bjxrg"
        );
        assert_eq!(
            client(&index, address, before),
            "shop/front-67796785cb-bjxrg"
        );
        // It started in the second in which the other one ended, so it had the address from that end on.
        assert_eq!(client(&index, address, deleted), "batch/intruder");
        assert_eq!(client(&index, address, taken), "batch/intruder");
    }
    assert!(taken < deleted.saturating_add(Duration::from_millis(10)));
    let front = "b992fb7c-dd38-4da1-ba09-544d678b49c9";
    assert_eq!(
        index.pod_by_uid(front).unwrap().name,
        "front-67796785cb-bjxrg"
    );
}

#[test]
fn a_finished_pod_gives_its_address_up() {
    let (index, times) = replayed();
    // In the first list already, where its status tells when it ended.
    let migrate = "c6fec47b";
    let pod = index.pods().find(|pod| pod.uid.starts_with(migrate));
    assert_eq!(pod.unwrap().addresses.len(), 2);
    assert_eq!(
        client(&index, "10.244.1.12", at(6.0)),
        "shop/api-56c994bcff-4tg24"
    );
    // The script gave the address to the next Job's pod before the first one had ended. The younger one has it.
    let taken = time_of(&times, "MODIFIED report-29921534-pr497", 1);
    let just_before = taken.saturating_sub(Duration::from_millis(1));
    assert_eq!(
        client(&index, "10.244.1.11", just_before),
        "batch/report-29921533-zr9c6"
    );
    for time in [taken, at(30.0)] {
        assert_eq!(
            client(&index, "10.244.1.11", time),
            "batch/report-29921534-pr497"
        );
    }
}

#[test]
fn workloads_come_from_owner_references() {
    let (index, _) = replayed();
    let workload = |name: &str| {
        let pod = index.pods().find(|pod| pod.name == name).unwrap();
        pod.workload
            .as_ref()
            .map_or("none".to_owned(), |w| format!("{}/{}", w.kind, w.name))
    };
    assert_eq!(workload("front-67796785cb-lk686"), "Deployment/front");
    assert_eq!(workload("db-0"), "StatefulSet/db");
    assert_eq!(workload("node-exporter-hfrvf"), "DaemonSet/node-exporter");
    assert_eq!(workload("report-29921534-pr497"), "CronJob/report");
    assert_eq!(workload("migrate-7w4t2"), "Job/migrate");
    assert_eq!(workload("intruder"), "none");
    assert_eq!(workload("api-56c994bcff-6k86t"), "none", "relabelled");
}

#[test]
fn a_relabelled_pod_leaves_its_services() {
    let mut index = Index::default();
    index.replace(lists("list"), at(1.0));
    let uid = "1e2b971c-02ed-467a-b96b-f671c74dca55";
    let before = index.pod_by_uid(uid).unwrap();
    assert_eq!(*before.services, ["api", "api-node"]);
    let (index, _) = replayed();
    let after = index.pod_by_uid(uid).unwrap();
    assert!(after.services.is_empty());
    assert_eq!(
        tcp(&index, "10.244.1.13", 9090, at(30.0)),
        "shop/api-56c994bcff-6k86t:9090 direct"
    );
}

#[test]
fn services_lead_to_their_pods_ports() {
    let (index, times) = replayed();
    let moved = time_of(&times, "MODIFIED api-node", 0);
    let before = moved.saturating_sub(Duration::from_millis(1));
    let deleted = time_of(&times, "DELETED front-all", 0);
    let long_after = at(90.0);
    for (address, port, time, expected) in [
        // Named target ports, two ports with one target, dual stack.
        (
            "10.96.91.211",
            80,
            before,
            "service shop/front:8080 virtual",
        ),
        (
            "10.96.91.211",
            8081,
            before,
            "service shop/front:8080 virtual",
        ),
        ("10.96.224.106", 80, before, "service shop/api:9090 virtual"),
        (
            "fd00:96::d6c5",
            9091,
            before,
            "service shop/api:9091 virtual",
        ),
        (
            "::ffff:10.96.224.106",
            80,
            before,
            "service shop/api:9090 virtual",
        ),
        // A port that the service does not have.
        ("10.96.224.106", 81, before, "service shop/api:81 virtual"),
        // The target port as it was at the time.
        (
            "10.96.150.120",
            80,
            before,
            "service shop/api-node:9090 virtual",
        ),
        (
            "10.96.150.120",
            80,
            moved,
            "service shop/api-node:9091 virtual",
        ),
        (
            "192.168.50.12",
            30080,
            before,
            "service shop/api-node:9090 virtual",
        ),
        (
            "fd00:50::12",
            30080,
            moved,
            "service shop/api-node:9091 virtual",
        ),
        // A node's port from the node's own interface in the pod network.
        (
            "10.244.2.1",
            30080,
            moved,
            "service shop/api-node:9091 virtual",
        ),
        // Load balancer: its address and its node ports; other ports of its address are not the cluster's.
        ("203.0.113.7", 80, before, "service shop/front:8080 virtual"),
        ("203.0.113.7", 443, before, "203.0.113.7:443 direct"),
        (
            "192.168.50.13",
            32310,
            before,
            "service shop/front:8080 virtual",
        ),
        // Without selector, the endpoint slices tell.
        (
            "10.96.87.82",
            1521,
            before,
            "service data/legacy:1521 virtual",
        ),
        (
            "10.96.0.1",
            443,
            before,
            "service default/kubernetes:6443 virtual",
        ),
        // A deleted service is known as long as a flow may still mean it.
        (
            "10.96.53.27",
            8080,
            before,
            "service shop/front-all:8080 virtual",
        ),
        (
            "10.96.53.27",
            8080,
            deleted,
            "service shop/front-all:8080 virtual",
        ),
        ("10.96.53.27", 8080, long_after, "10.96.53.27:8080 direct"),
        // Pods: the service whose target the port is, else the first by name.
        (
            "10.244.2.13",
            9090,
            before,
            "shop/api-56c994bcff-tjxvf of api:9090 direct",
        ),
        (
            "10.244.1.14",
            8080,
            before,
            "shop/front-67796785cb-lk686 of front:8080 direct",
        ),
        (
            "10.244.1.14",
            22,
            before,
            "shop/front-67796785cb-lk686 of front:22 direct",
        ),
        ("10.244.3.11", 5432, before, "data/db-1 of db:5432 direct"),
        // Host network: the node, whichever pod it is.
        ("192.168.50.11", 9100, before, "node node-1:9100 direct"),
        ("10.244.1.1", 9100, before, "node node-1:9100 direct"),
        ("8.8.8.8", 53, before, "8.8.8.8:53 direct"),
    ] {
        assert_eq!(
            tcp(&index, address, port, time),
            expected,
            "{address}:{port}"
        );
    }
    // The protocol is part of a port.
    assert_eq!(
        call(&index, "10.96.0.10", Protocol::Udp, 53, before),
        "service kube-system/kube-dns:53 virtual"
    );
    assert_eq!(
        call(&index, "192.168.50.12", Protocol::Udp, 30080, before),
        "node node-2:30080 direct"
    );
}

#[test]
fn services_without_selector_know_their_backends() {
    let (index, _) = replayed();
    let backends = |name: &str| {
        let service = index.services().find(|service| service.name == name);
        service.unwrap().backends.clone()
    };
    assert_eq!(
        backends("kubernetes"),
        ["192.168.50.11".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(
        backends("legacy"),
        ["192.0.2.15".parse::<std::net::IpAddr>().unwrap()]
    );
    assert!(backends("api").is_empty());
    let mail = index.services().find(|service| service.name == "mail");
    assert!(mail.unwrap().selector.is_empty());
}

#[test]
fn the_interface_of_the_cni_is_its_node() {
    let (index, _) = replayed();
    let gateway = "10.244.1.1".parse().unwrap();
    let Endpoint::Node(node) = index.resolve_client(gateway, at(30.0)) else {
        panic!("not a node");
    };
    assert_eq!(node.name, "node-1");
    assert!(node.addresses.contains(&gateway));
    assert!(node.addresses.contains(&"192.168.50.11".parse().unwrap()));
    assert!(node.addresses.contains(&"fd00:50::11".parse().unwrap()));
    assert!(!index.node("node-1").unwrap().addresses.contains(&gateway));
}

#[test]
fn pods_on_the_hosts_network_are_known_by_uid_only() {
    let (index, _) = replayed();
    let exporter = index
        .pod_by_uid("b378197b-68c6-4880-9bfb-eb133123101e")
        .unwrap();
    assert!(exporter.host_network);
    assert_eq!(client(&index, "192.168.50.11", at(30.0)), "node node-1");
    let Endpoint::Pod { pod, service } = index.pod_endpoint(&exporter, Protocol::Tcp, Some(9100))
    else {
        panic!("not a pod");
    };
    assert_eq!(pod.name, "node-exporter-hfrvf");
    assert_eq!(service, None);
}

#[test]
fn a_pod_that_has_not_changed_is_shared() {
    let mut index = Index::default();
    index.replace(lists("list"), at(1.0));
    let uid = "2c11e8b4-2f71-4784-a554-3d2784f16a55";
    let first = index.pod_by_uid(uid).unwrap();
    index.replace(lists("list"), at(2.0));
    assert!(std::sync::Arc::ptr_eq(
        &first,
        &index.pod_by_uid(uid).unwrap()
    ));
}
