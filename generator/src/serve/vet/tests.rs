use std::sync::Arc;

use flow::{
    topology::{Change, Object, Phase, Pod},
    wire::Flow,
};
use serde_json::{Value, json};

use super::*;

fn second(second: u64) -> Timestamp {
    Timestamp::from_nanos(second * 1_000_000_000)
}

fn batch(ends: Value, flows: Value) -> Packed<KnownEnd> {
    let batch: Packed<End> = serde_json::from_value(json!({
        "sequence": 1, "window": {"from": 1000.0, "to": 1001.0}, "hostname": "node-1",
        "ends": ends, "flows": flows,
    }))
    .unwrap();
    let mut serial = 0;
    let known = batch.try_map(|end| {
        serial += 1;
        Ok::<_, ()>(KnownEnd {
            serial,
            end: Arc::new(end),
        })
    });
    known.unwrap()
}

fn pod(uid: &str, node: Value) -> Value {
    json!({"address": "10.0.0.1", "pod": {"id": uid, "namespace": "shop", "name": uid, "node": node}})
}

/// A service whose object is known, with other details than an agent's.
fn known_service() -> flow::topology::Service {
    flow::topology::Service {
        identity: Arc::new(flow::endpoint::Service {
            uid: "s".to_owned(),
            labels: flow::endpoint::Labels::new(),
            namespace: "shop".to_owned(),
            name: "db".to_owned(),
            selector: [("app".to_owned(), "db".to_owned())].into(),
            backends: Vec::new(),
        }),
        cluster_addresses: Vec::new(),
        external_addresses: Vec::new(),
        ports: Vec::new(),
        created: None,
    }
}

#[test]
fn a_service_that_is_known_selects_what_its_object_says() {
    let mut index = index();
    let object = Object::Service(known_service());
    index.apply(Change::Upsert(object), second(1));
    let service = |name: &str, selector: &str| json!({"id": "s", "namespace": "shop", "name": name, "selector": selector});
    let mut told = pod("web", json!("node-1"));
    told["service"] = service("db", "team=shop");
    let ends = json!([
        told,
        {"address": "10.9.0.1", "service": service("db", "team=shop")},
        {"address": "10.9.0.1", "service": service("db", "app=db")},
        {"address": "10.9.0.2", "service": service("other", "team=shop")},
    ]);
    let mut batch = batch(ends, json!([]));
    Vetting {
        now: second(1_001),
        node: None,
        index: Some(&index),
    }
    .vet(&mut batch);
    let told: Vec<(u64, String)> = batch
        .ends
        .iter()
        .map(|known| match &known.end.endpoint {
            Endpoint::Pod {
                service: Some(service),
                ..
            }
            | Endpoint::Service(service) => (known.serial, format!("{:?}", service.selector)),
            other => panic!("{other}"),
        })
        .collect();
    let (db, team) = (r#"{"app": "db"}"#, r#"{"team": "shop"}"#);
    let expected = [(0, db), (0, db), (3, db), (4, team)];
    assert_eq!(
        told,
        expected.map(|(serial, text)| (serial, text.to_owned()))
    );
}

/// Knows one pod, which is on the second node.
fn index() -> Index {
    let mut index = Index::default();
    let pod = Pod {
        identity: flow::endpoint::Pod {
            uid: "db".to_owned(),
            namespace: "shop".to_owned(),
            name: "db".to_owned(),
            labels: Arc::default(),
            workload: None,
            node: Some("node-2".into()),
            host_network: false,
            addresses: Vec::new(),
            services: Arc::default(),
        },
        static_uid: None,
        ports: Arc::default(),
        phase: Phase::Running,
        started: Some(second(1)),
    };
    index.apply(Change::Upsert(Object::Pod(pod)), second(1));
    index
}

/// Whether a flow is taken in that was observed at this end.
fn is_taken(end: &Value, node: Option<&str>, index: Option<&Index>) -> bool {
    let vetting = Vetting {
        now: second(1_001),
        node,
        index,
    };
    let other = pod("other", json!("node-9"));
    let taken = [("egress", 0, 1), ("ingress", 1, 0)].map(|(direction, src, dst)| {
        let flow = json!([{
            "src": src, "dst": dst, "direction": direction, "port": 80, "count": 7, "last_seen": 1000.5
        }]);
        let mut batch = batch(json!([end, other]), flow);
        vetting.vet(&mut batch);
        let lost = batch.losses.get(OTHER_NODE).copied().unwrap_or(0);
        assert_eq!(lost, if batch.flows.is_empty() { 7 } else { 0 });
        !batch.flows.is_empty()
    });
    assert_eq!(taken[0], taken[1], "{end}");
    taken[0]
}

#[test]
fn an_agent_reports_of_its_own_node() {
    let index = index();
    let node = |name| json!({"address": "10.0.0.1", "node": {"name": name}});
    let service =
        json!({"address": "10.0.0.1", "service": {"id": "s", "namespace": "shop", "name": "s"}});
    for (end, without_topology, with) in [
        (pod("web", json!("node-1")), true, true),
        (pod("web", json!("node-2")), false, false),
        // Not every topology has it.
        (pod("web", Value::Null), true, true),
        (pod("db", Value::Null), true, false),
        (pod("db", json!("node-1")), true, false),
        (node("node-1"), true, true),
        (node("node-2"), false, false),
        (json!({"address": "10.0.0.1"}), true, true),
        (service, false, false),
    ] {
        assert!(is_taken(&end, None, Some(&index)), "{end}");
        assert_eq!(
            is_taken(&end, Some("node-1"), None),
            without_topology,
            "{end}"
        );
        assert_eq!(is_taken(&end, Some("node-1"), Some(&index)), with, "{end}");
    }
}

/// An address that is none of the node's is nobody's that is known; what others are said to be at is not looked at.
#[test]
fn an_agent_does_not_lend_its_node_an_address() {
    let mut index = index();
    let node = flow::topology::Node {
        identity: Arc::new(flow::endpoint::Node {
            name: "node-1".to_owned(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
        }),
        interfaces: Vec::new(),
        pod_cidrs: vec!["10.1.1.0/24".parse().unwrap()],
        created: None,
    };
    index.apply(Change::Upsert(Object::Node(node)), second(1));
    let on_node = |address: &str| json!({"address": address, "node": {"name": "node-1"}});
    let mut host_pod = pod("web", json!("node-1"));
    host_pod["pod"]["host_network"] = json!(true);
    host_pod["address"] = json!("203.0.113.9");
    let ends = json!([
        on_node("192.0.2.1"),
        on_node("10.1.1.1"),
        on_node("203.0.113.9"),
        host_pod,
        pod("web", json!("node-1")),
    ]);
    let flows: Vec<Value> = (0..5)
        .map(|end| json!({"src": end, "dst": 2, "direction": "egress", "port": 80, "last_seen": 1000.5}))
        .chain([json!({"src": 4, "dst": 3, "direction": "ingress", "port": 80, "last_seen": 1000.5})])
        .collect();
    let pairs = |node, index| {
        let mut batch = batch(ends.clone(), json!(flows));
        Vetting {
            now: second(1_001),
            node,
            index,
        }
        .vet(&mut batch);
        let name = |place: u32| batch.ends[place as usize].end.endpoint.to_string();
        let flows = batch.flows.iter();
        flows
            .map(|flow| format!("{} {}", name(flow.src), name(flow.dst)))
            .collect::<Vec<String>>()
    };
    let as_told = [
        "node node-1 node node-1",
        "node node-1 node node-1",
        "node node-1 node node-1",
        "shop/web node node-1",
        "shop/web node node-1",
        "shop/web shop/web",
    ];
    assert_eq!(pairs(None, Some(&index)), as_told);
    assert_eq!(pairs(Some("node-1"), None), as_told);
    assert_eq!(
        pairs(Some("node-1"), Some(&index)),
        [
            "node node-1 node node-1",
            "node node-1 node node-1",
            "203.0.113.9 node node-1",
            "203.0.113.9 node node-1",
            "shop/web node node-1",
            "shop/web 203.0.113.9",
        ]
    );
}

#[test]
fn an_agent_reports_as_its_own_node() {
    let end = pod("web", json!("node-1"));
    let flows = json!([
        {"src": 0, "dst": 1, "direction": "egress", "port": 80, "last_seen": 1000.5},
        {"src": 0, "dst": 1, "direction": "egress", "port": 81, "last_seen": 1000.5, "hostname": "node-2", "sources": ["scope"]},
    ]);
    let hostnames = |node| {
        let mut batch = batch(json!([end, {"address": "192.0.2.1"}]), flows.clone());
        batch.hostname = "node-3".to_owned();
        let vetting = Vetting {
            now: second(1_001),
            node,
            index: None,
        };
        vetting.vet(&mut batch);
        let flows = batch.flows.iter();
        let own = flows.map(|Flow { hostname, .. }| hostname.as_deref().unwrap_or(&batch.hostname));
        own.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(hostnames(Some("node-1")), ["node-1", "node-1"]);
    assert_eq!(hostnames(None), ["node-3", "node-2"]);
}

#[test]
fn nothing_is_seen_long_after_it_arrives() {
    let flows = json!([
        {"src": 0, "dst": 1, "port": 80, "first_seen": 900.0, "last_seen": 1000.5, "timestamp": 1000.25},
        {"src": 0, "dst": 1, "port": 81, "first_seen": 900.0, "last_seen": 9000.0},
        {"src": 0, "dst": 1, "port": 82, "first_seen": 8000.0, "last_seen": 9000.0, "timestamp": 8500.0},
    ]);
    let mut batch = batch(
        json!([{"address": "192.0.2.1"}, {"address": "192.0.2.2"}]),
        flows,
    );
    batch.window.to = second(9_000);
    let vetting = Vetting {
        now: second(1_001),
        node: None,
        index: None,
    };
    vetting.vet(&mut batch);
    let latest = second(1_001).saturating_add(MAX_AHEAD);
    assert_eq!(
        (batch.window.from, batch.window.to),
        (second(1_000), latest)
    );
    let half = second(1_000).saturating_add(Duration::from_millis(500));
    let quarter = second(1_000).saturating_add(Duration::from_millis(250));
    let times: Vec<_> = batch
        .flows
        .iter()
        .map(|flow| (flow.first_seen(), flow.last_seen, flow.timestamp()))
        .collect();
    assert_eq!(
        times,
        [
            (second(900), half, quarter),
            (second(900), latest, latest),
            (latest, latest, latest),
        ]
    );
}
