use std::{fs, path::PathBuf, time::Instant};

use serde_json::{Value, json};

use super::*;
use crate::{
    endpoint::{self, Endpoint},
    record::Protocol,
    time::Timestamp,
    topology::{Index, Phase, Pod, Service, TargetPort, file},
    wire::{End, bounds},
};

fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../tests/fixtures").join(name)
}

fn index(loaded: Loaded) -> Index {
    let mut index = Index::default();
    index.replace(loaded.objects, Timestamp::from_nanos(u64::MAX / 2));
    index
}

/// The end that an address is, as people read it, at the time at which the report was taken.
fn name(index: &Index, address: &str) -> String {
    let at = Timestamp::from_nanos(1_795_292_200_000_000_000);
    let endpoint = index.resolve_client(address.parse().unwrap(), at);
    match &endpoint {
        Endpoint::Pod {
            service: Some(service),
            ..
        } => format!("{endpoint} of {}", service.name),
        _ => endpoint.to_string(),
    }
}

fn parse_json(report: &Value) -> Result<Loaded, FileError> {
    parse(Path::new("report.json"), report.to_string().as_bytes())
}

fn node(latest: &[(&str, &str)], extra: Value) -> Value {
    let mut node = json!({"latest": {}, "parents": null, "sets": null});
    for (key, value) in latest {
        node["latest"][key] = json!({"timestamp": "2026-11-21T20:16:26Z", "value": value});
    }
    for (key, value) in extra.as_object().unwrap() {
        node[key] = value.clone();
    }
    node
}

fn pod(name: &str, address: &str, more: &[(&str, &str)], extra: Value) -> Value {
    let mut latest = vec![
        ("kubernetes_name", name),
        ("kubernetes_namespace", "shop"),
        ("kubernetes_ip", address),
    ];
    latest.extend(more);
    node(&latest, extra)
}

#[test]
fn a_report_of_a_real_cluster_names_what_lives() {
    let loaded = load(&fixture("scope/report-kubernetes.json")).unwrap();
    assert_eq!(loaded.warnings, [""; 0]);
    let objects = &loaded.objects;
    assert_eq!((objects.pods.len(), objects.services.len()), (19, 8));
    assert_eq!((objects.namespaces.len(), objects.nodes.len()), (7, 6));
    let front = objects
        .pods
        .iter()
        .find(|pod| pod.identity.name == "front-67796785cb-lk686");
    let front = &front.unwrap().identity;
    assert_eq!(front.workload.as_ref().unwrap().kind, "Deployment");
    assert_eq!(front.workload.as_ref().unwrap().name, "front");
    let api = objects
        .services
        .iter()
        .find(|service| service.identity.name == "api-node")
        .unwrap();
    assert_eq!(
        (api.ports[0].port, api.ports[0].node_port),
        (80, Some(30080))
    );

    let index = index(loaded);
    // A Job that has ended once had the address.
    assert_eq!(name(&index, "10.244.1.12"), "shop/api-56c994bcff-4tg24");
    assert_eq!(name(&index, "10.244.3.11"), "data/db-1");
    // `node-exporter` runs there, in its node's network.
    assert_eq!(name(&index, "192.168.50.11"), "node 192.168.50.11");
    assert_eq!(name(&index, "203.0.113.7"), "203.0.113.7");
}

#[test]
fn a_report_of_the_modified_probe_has_selectors() {
    let index = index(load(&fixture("microshield/report.json")).unwrap());
    assert_eq!(
        name(&index, "10.0.1.167"),
        "sock-shop/front-end-6585d48b5c-hm4kj of front-end"
    );
    // The API server and etcd, of which neither is said to be the younger one.
    assert_eq!(name(&index, "192.168.218.133"), "node 192.168.218.133");
}

#[test]
fn nodes_have_the_addresses_of_their_interfaces_and_of_the_pods_in_their_network() {
    let host = |networks: &[&str]| node(&[], json!({"sets": {"local_networks": networks}}));
    let report = json!({
        "Pod": {"nodes": {
            "1;<pod>": pod("agent", "192.0.2.1", &[("kubernetes_is_in_host_network", "true")],
                json!({"parents": {"host": ["node-1;<host>"]}})),
            "2;<pod>": pod("web", "10.0.1.7", &[], json!({})),
        }},
        "Host": {"nodes": {
            "node-1;<host>": host(&["10.0.1.224/24", "172.17.0.1/16", "127.0.0.1/8"]),
            "node-2;<host>": host(&["10.0.2.187/24", "172.17.0.1/16"]),
        }},
    });
    let index = index(parse_json(&report).unwrap());
    assert_eq!(name(&index, "192.0.2.1"), "node node-1");
    assert_eq!(name(&index, "10.0.1.224"), "node node-1");
    assert_eq!(name(&index, "10.0.2.187"), "node node-2");
    assert_eq!(name(&index, "10.0.1.7"), "shop/web");
    for nobodys in ["172.17.0.1", "127.0.0.1"] {
        assert_eq!(name(&index, nobodys), nobodys);
    }
}

#[test]
fn a_node_that_says_too_little_is_named_and_left_out() {
    let nameless = node(&[("kubernetes_namespace", "shop")], json!({}));
    let wrong_address = pod("web", "10.0.1", &[], json!({}));
    let wrong_time = pod(
        "db",
        "10.0.0.2",
        &[("kubernetes_created", "now")],
        json!({}),
    );
    let service = |ports| pod("api", "None", &[("kubernetes_ports", ports)], json!({}));
    let report = json!({
        "Pod": {"nodes": {"1;<pod>": nameless, "2;<pod>": wrong_address, "3;<pod>": wrong_time}},
        "Service": {"nodes": {
            "4;<service>": service("80"),
            "5;<service>": service("80:0/TCP"),
            "6;<service>": pod("x", "", &[("kubernetes_selector", "app")], json!({})),
            "7;<service>": service("80:30080/TCP,53/UDP"),
        }},
    });
    let loaded = parse_json(&report).unwrap();
    assert_eq!(
        loaded.warnings,
        [
            "report.json: node `1;<pod>`: kubernetes_name is missing",
            "report.json: node `2;<pod>`: kubernetes_ip: `10.0.1` is not an address",
            "report.json: node `3;<pod>`: kubernetes_created: `now` is not a time",
            "report.json: node `4;<service>`: kubernetes_ports: `80` is not PORT[:NODEPORT]/PROTOCOL",
            "report.json: node `5;<service>`: kubernetes_ports: `80:0/TCP` is not PORT[:NODEPORT]/PROTOCOL",
            "report.json: node `6;<service>`: kubernetes_selector: `app` has no `=`",
        ]
    );
    assert_eq!(loaded.objects.pods, []);
    assert_eq!(loaded.objects.services[0].ports.len(), 2);
}

#[test]
fn what_is_no_report_is_refused_where_it_goes_wrong() {
    let text = fs::read(fixture("scope/report-live.json")).unwrap();
    assert_eq!(parse(Path::new("r"), &text).unwrap().objects.pods.len(), 4);
    let truncated = &text[..text.len() / 2];
    for (text, expected) in [
        (truncated, "r:1:"),
        (b" \n", "r: empty"),
        (b"{\n\"Service\": {}}", "r:2:"),
        (b"{\"Pod\":\n{\"nodes\": 7}}", "r:2:"),
    ] {
        let error = parse(Path::new("r"), text).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let error = load(Path::new("/nonexistent/report.json"))
        .unwrap_err()
        .to_string();
    assert!(error == "/nonexistent/report.json", "{error}");
}

#[test]
fn both_forms_say_the_same() {
    let json = load(&fixture("scope/report-kubernetes.json")).unwrap();
    let binary = load(&fixture("scope/report-kubernetes.msgpack")).unwrap();
    assert_eq!(json.objects.pods.len(), 19);
    assert_eq!(json, binary);
    // However it arrives.
    let text = fs::read(fixture("scope/report-kubernetes.msgpack")).unwrap();
    let trickle = Trickle(&text);
    assert_eq!(read(trickle).unwrap().objects, json.objects);
}

/// Gives out a few bytes at a time.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(7);
        self.0.read(&mut buffer[..most])
    }
}

/// As far as a report that only one probe for the whole cluster has made knows it.
#[test]
fn a_report_says_what_the_api_says_of_the_same_cluster() {
    let known = |pod: &Pod| endpoint::Pod {
        node: None,
        ..pod.identity.clone()
    };
    let report = load(&fixture("scope/report-kubernetes.json"))
        .unwrap()
        .objects;
    let api = |kind: &str| {
        let loaded = file::load(&fixture(&format!("kube-1.24/after-{kind}.json"))).unwrap();
        loaded.objects
    };
    let api_pods = api("pods").pods;
    let mut compared = 0;
    for pod in &report.pods {
        // The cluster lived on between the two recordings.
        let same = api_pods
            .iter()
            .find(|other| other.identity.uid == pod.identity.uid);
        let Some(same) = same.filter(|same| same.phase == pod.phase) else {
            continue;
        };
        let (mut of_report, mut of_api) = (known(pod), known(same));
        // Of two addresses Scope has the first.
        of_api.addresses.truncate(1);
        if of_report.workload.is_none() {
            // Scope has no parents for pods that are about to go.
            of_report.workload = of_api.workload.clone();
        }
        assert_eq!(of_report, of_api);
        compared += 1;
    }
    assert!(compared >= 10, "{compared} pods");

    let api_services = api("services").services;
    let mut compared = 0;
    for service in &report.services {
        let same = api_services
            .iter()
            .find(|other| other.identity.uid == service.identity.uid);
        let Some(same) = same else { continue };
        let known = |service: &Service| {
            let identity = &service.identity;
            let ports: Vec<_> = service
                .ports
                .iter()
                .map(|port| (port.protocol, port.port, port.node_port))
                .collect();
            (
                identity.namespace.clone(),
                identity.name.clone(),
                identity.labels.clone(),
                ports,
            )
        };
        assert_eq!(known(service), known(same));
        let first = same.cluster_addresses.first();
        assert_eq!(service.cluster_addresses.first(), first);
        compared += 1;
    }
    assert!(compared >= 6, "{compared} services");
    let mut compared = 0;
    for namespace in &api("namespaces").namespaces {
        let same = report
            .namespaces
            .iter()
            .find(|own| own.name == namespace.name);
        let Some(same) = same else { continue };
        // Some were given more labels before the report was made.
        for (key, value) in &namespace.labels {
            assert_eq!(same.labels.get(key), Some(value), "{same:?}");
        }
        compared += 1;
    }
    assert!(compared >= 6, "{compared} namespaces");
    for node in &api("nodes").nodes {
        let name = &node.identity.name;
        assert!(
            report.nodes.iter().any(|own| own.identity.name == *name),
            "{name}"
        );
    }
}

/// Both forms of one report.
fn forms(report: &Value) -> [Vec<u8>; 2] {
    [
        report.to_string().into_bytes(),
        rmp_serde::to_vec_named(report).unwrap(),
    ]
}

#[test]
fn what_is_malformed_costs_its_own_node_only() {
    let good = pod("web", "10.0.1.7", &[], json!({}));
    let long = "x".repeat(20_000);
    let wrong = [
        ("1;<pod>", json!(7), "it is no map"),
        ("2;<pod>", json!([good.clone()]), "it is no map"),
        ("3;<pod>", json!({"latest": "x"}), "latest is no map"),
        (
            "4;<pod>",
            json!({"latest": {"kubernetes_name": "x"}}),
            "a value in latest is no map",
        ),
        (
            "5;<pod>",
            json!({"latest": {"kubernetes_name": {"value": 7}}}),
            "kubernetes_name has a value that is no text, or too long",
        ),
        (
            "6;<pod>",
            json!({"latest": {"kubernetes_labels_app": {"value": long}}}),
            "kubernetes_labels_app has a value that is no text, or too long",
        ),
        (
            "7;<pod>",
            json!({"parents": {"service": "x"}}),
            "parents has something else than a list of texts",
        ),
        (
            "8;<pod>",
            json!({"sets": {"local_networks": [1]}}),
            "sets has something else than a list of texts",
        ),
        ("9;<pod>", json!(null), "kubernetes_namespace is missing"),
    ];
    let mut nodes = json!({"good;<pod>": good});
    for (id, node, _) in &wrong {
        nodes[*id] = node.clone();
    }
    // What is not read may be anything.
    nodes["good;<pod>"]["metrics"] = json!([[{"a": [1, 2.5, null, true]}], -3]);
    let report = json!({
        "TS": 1.5, "Window": -1, "Plugins": [[null, true], {"x": {}}],
        "Pod": {"shape": {"deep": [1]}, "nodes": nodes},
        "Service": null,
    });
    for text in forms(&report) {
        let report = read(&text[..]).unwrap();
        let names: Vec<_> = report
            .objects
            .pods
            .iter()
            .map(|pod| &pod.identity.name)
            .collect();
        assert_eq!(names, ["web"]);
        for (id, _, problem) in &wrong {
            let warning = format!("node `{id}`: {problem}");
            assert!(
                report.warnings.contains(&warning),
                "{warning} in {:?}",
                report.warnings
            );
        }
        assert_eq!(report.warnings.len(), wrong.len());
    }
}

#[test]
fn message_packs_own_types_are_passed_over() {
    // {"TS": extension, "Pod": {"nodes": {"1;<pod>": {"latest": extension, 7: bytes}}}}
    let extension: &[u8] = &[0xd7, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut report = b"\x82\xa2TS".to_vec();
    report.extend(extension);
    report.extend(b"\xa3Pod\x81\xa5nodes\x81\xa71;<pod>\x82\xa6latest");
    report.extend(extension);
    report.extend(b"\x07\xc4\x01x");
    let read = read(&report[..]).unwrap();
    assert_eq!(read.warnings, ["node `1;<pod>`: latest is no map"]);
    report.push(0xc0);
    let error = super::read(&report[..]).unwrap_err().to_string();
    assert_eq!(error, "something follows the report, after node `1;<pod>`");
}

#[test]
fn a_node_that_nothing_names_bears_a_name_that_a_batch_can_say() {
    let own = &[("kubernetes_is_in_host_network", "true")];
    for address in ["192.0.2.1", "fd00::1"] {
        let report = json!({"Pod": {"nodes": {"1;<pod>": pod("agent", address, own, json!({}))}}});
        let index = index(parse_json(&report).unwrap());
        assert_eq!(name(&index, address), format!("node {address}"));
        let address = address.parse().unwrap();
        let endpoint = index.resolve_client(address, Timestamp::from_nanos(u64::MAX / 2));
        assert_eq!(bounds::end(&End { address, endpoint }), Ok(()));
    }
}

#[test]
fn containers_tell_the_nodes_of_pods() {
    let container = |pod: &str, host: &str| {
        node(
            &[("host_node_id", host)],
            json!({"parents": {"pod": [pod]}}),
        )
    };
    let report = json!({
        "Container": {"nodes": {
            "c1;<container>": container("1;<pod>", "node-1;<host>"),
            "c2;<container>": container("2;<pod>", "node-2;<host>"),
            "c3;<container>": node(&[("host_node_id", "node-2;<host>")], json!({})),
        }},
        "Pod": {"nodes": {
            "1;<pod>": pod("web", "10.0.1.7", &[], json!({})),
            "2;<pod>": pod("agent", "192.0.2.2", &[("kubernetes_is_in_host_network", "true")], json!({})),
            "3;<pod>": pod("lost", "10.0.1.8", &[], json!({})),
        }},
        "Host": {"nodes": {"node-1;<host>": node(&[], json!({})), "node-2;<host>": node(&[], json!({}))}},
    });
    let loaded = parse_json(&report).unwrap();
    let nodes: Vec<_> = loaded
        .objects
        .pods
        .iter()
        .map(|pod| pod.identity.node.as_deref())
        .collect();
    assert_eq!(nodes, [Some("node-1"), Some("node-2"), None]);
    assert_eq!(name(&index(loaded), "192.0.2.2"), "node node-2");
}

#[test]
fn translated_connections_tell_where_a_services_port_leads() {
    let copy = |of: &str| node(&[("copy_of", of)], json!({}));
    let report = json!({
        "Endpoint": {"nodes": {
            ";10.96.0.1;80": copy(";10.0.1.7;8080"),
            ";10.96.0.1;443": copy(";203.0.113.1;8443"),
            // A client behind its node's address.
            ";192.0.2.1;40000": copy(";10.0.1.7;50000"),
            ";10.96.0.1;x": copy("nonsense"),
        }},
        "Pod": {"nodes": {
            "1;<pod>": pod("web", "10.0.1.7", &[], json!({"parents": {"service": ["2;<service>"]}})),
        }},
        "Service": {"nodes": {
            "2;<service>": pod("web", "10.96.0.1", &[("kubernetes_ports", "80/TCP,443/TCP,80/UDP")], json!({})),
        }},
    });
    for text in forms(&report) {
        let loaded = parse(Path::new("r"), &text).unwrap();
        assert_eq!(loaded.warnings, [""; 0]);
        let ports = &loaded.objects.services[0].ports;
        let targets: Vec<_> = ports
            .iter()
            .map(|port| (port.protocol, port.target.clone()))
            .collect();
        let to = TargetPort::Number;
        assert_eq!(
            targets,
            [
                (Protocol::Tcp, to(8080)),
                (Protocol::Tcp, to(443)),
                (Protocol::Udp, to(80))
            ]
        );
        // Without a selector its pods are known by what they say of themselves.
        let index = index(loaded);
        let service = index.services().next().unwrap();
        assert_eq!(
            service.backends,
            ["10.0.1.7".parse::<std::net::IpAddr>().unwrap()]
        );
    }
}

/// So many bytes of `piece`, between `head` and nothing.
struct Endless<'a> {
    head: &'a [u8],
    piece: &'a [u8],
    read: usize,
}

impl Read for Endless<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.head.is_empty() {
            return self.head.read(buffer);
        }
        let count = buffer.len() / self.piece.len();
        for place in buffer.chunks_exact_mut(self.piece.len()) {
            place.copy_from_slice(self.piece);
        }
        self.read += count * self.piece.len();
        Ok(count * self.piece.len())
    }
}

#[test]
fn whatever_does_not_end_is_refused_early() {
    let check = |head: &[u8], piece: &[u8], expected: &str, most: usize| {
        let mut text = Endless {
            head,
            piece,
            read: 0,
        };
        let start = Instant::now();
        let error = read(&mut text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(text.read <= most, "{} bytes were read", text.read);
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
    };
    let node = 2 * MAX_NODE_BYTES;
    check(
        br#"{"Pod": {"nodes": {""#,
        b"x",
        "a node of more than",
        node,
    );
    check(
        br#"{"Pod": {"nodes": {"a": {"latest": {"#,
        br#""k":{"value":""},"#,
        "a node of more than",
        node,
    );
    check(br#"{"TS": ""#, b"x", "a node of more than", node);
    check(
        br#"{"Pod": {"nodes": {"a": "#,
        b"[",
        "a node of more than",
        node,
    );
    check(
        br#"{"Pod": {"nodes": {"a": "#,
        b" ",
        "a node of more than",
        node,
    );
    // A text of four thousand million bytes, a map and a list of as many.
    check(
        b"\x81\xdb\xff\xff\xff\xff",
        b"x",
        "a node of more than",
        node,
    );
    check(
        b"\x81\xa3Pod\x81\xa5nodes\x81\xa1a\xdf\xff\xff\xff\xff",
        b"\xa1k\xc0",
        "a node of more than",
        node,
    );
    check(b"\x81\xa3Pod\x81\xa5nodes\x81\xa1a", b"\x91", "depth", node);
    check(
        b"",
        b"junk",
        "neither JSON nor MessagePack: it begins with the byte 0x6a",
        node,
    );
    check(b"", b" ", "a node of more than", node);
    // Nodes without end are counted.
    let many = br#"{"Pod": {"nodes": {"#;
    check(
        many,
        br#""a":0,"#,
        "more than 2000000 nodes",
        6 * MAX_NODES + node,
    );
}

#[test]
fn a_report_that_breaks_off_says_where() {
    let text = fs::read(fixture("scope/report-kubernetes.msgpack")).unwrap();
    let error = parse(Path::new("r"), &text[..text.len() / 2])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("r: ") && error.contains(", after node `"),
        "{error}"
    );
    let error = read(&b"\x80"[..]).unwrap_err().to_string();
    assert!(error.contains("missing field `Pod`"), "{error}");
}

#[test]
fn pods_of_every_phase() {
    let report = json!({"Pod": {"nodes": {
        "1;<pod>": pod("a", "", &[("kubernetes_state", "Pending")], json!({})),
        "2;<pod>": pod("b", "10.0.0.2", &[("kubernetes_state", "Failed")], json!({})),
        "3;<pod>": pod("c", "10.0.0.3", &[("kubernetes_state", "Terminating")], json!({})),
    }}});
    let loaded = parse_json(&report).unwrap();
    let phases: Vec<_> = loaded.objects.pods.iter().map(|pod| pod.phase).collect();
    assert_eq!(
        phases,
        [Phase::Pending, Phase::Finished { at: None }, Phase::Running]
    );
}
