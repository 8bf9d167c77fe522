use std::{fs, path::PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::{endpoint::Endpoint, topology::Index};

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
