use std::sync::Arc;

use flow::{
    endpoint::Endpoint,
    record::{Direction, Outcome},
    time::Timestamp,
};
use proptest::prelude::*;

use super::*;
use crate::samples::{
    address, any_records, bare, host_pod, labels, ledger, node, pod, record, served, service,
};

const TO_SERVER: Direction = Direction::Ingress;
const FROM_CLIENT: Direction = Direction::Egress;

/// The edges of `records`, one a line: `client -> server:port client's count/server's count`.
fn check(records: impl IntoIterator<Item = FlowRecord>, expected: &[&str]) {
    let edges: Vec<String> = ledger(records)
        .edges()
        .iter()
        .map(|edge| {
            format!(
                "{} -> {}:{} {}/{}",
                edge.client, edge.server, edge.port, edge.seen_by_client, edge.seen_by_server
            )
        })
        .collect();
    assert_eq!(edges, expected);
}

fn to_service(client: Endpoint, app: &str, count: u64) -> FlowRecord {
    let server = Endpoint::Service(service("shop", app));
    record(FROM_CLIENT, client, server, 80, count)
}

#[test]
fn both_sides_of_a_connection_are_one_edge() {
    let (web, db) = (
        served("shop", "web", "node-1"),
        served("shop", "db", "node-2"),
    );
    check(
        [
            record(FROM_CLIENT, web.clone(), db.clone(), 3306, 4),
            record(TO_SERVER, web.clone(), db.clone(), 3306, 3),
            record(TO_SERVER, web.clone(), db.clone(), 3306, 2),
            record(TO_SERVER, web, db, 9104, 1),
        ],
        &[
            "shop/web-node-1 -> shop/db-node-2:3306 4/5",
            "shop/web-node-1 -> shop/db-node-2:9104 0/1",
        ],
    );
}

/// What the service `shop/db` selects by the words of nodes, each with its second, and the ports of the edges on which a newer
/// word is another.
fn selector_by(words: &[(&str, &str, u64)]) -> (String, Vec<u16>) {
    let records = (1..).zip(words).map(|(port, (node, app, second))| {
        let mut told = (*service("shop", "db")).clone();
        told.selector = labels(&[("app", app)]);
        let Endpoint::Pod { pod, .. } = served("shop", "db", "node-2") else {
            panic!("a pod is expected");
        };
        let db = Endpoint::Pod {
            pod,
            service: Some(Arc::new(told)),
        };
        let mut record = record(TO_SERVER, served("shop", "web", "node-1"), db, port, 1);
        record.hostname = (*node).to_owned();
        record.last_seen = Timestamp::from_nanos(second * 1_000_000_000);
        record
    });
    let edges = ledger(records).edges();
    let mut selectors = edges.iter().map(|edge| match &edge.server {
        Endpoint::Pod {
            service: Some(service),
            ..
        } => service.selector["app"].clone(),
        other => panic!("{other}"),
    });
    let selector = selectors.next().unwrap();
    assert!(selectors.all(|other| other == selector));
    let disputed = edges.iter().filter(|edge| edge.is_disputed);
    (selector, disputed.map(|edge| edge.port).collect())
}

const DAY: u64 = 24 * 60 * 60;

#[test]
fn a_service_selects_what_most_nodes_say() {
    for (words, selector, disputed) in [
        (&[("a", "db", 1)][..], "db", &[][..]),
        // The newest word of one node, however often it is said, is that of one.
        (
            &[
                ("a", "db", 1),
                ("b", "db", 2),
                ("c", "all", 9),
                ("c", "all", 8),
            ],
            "db",
            &[3, 4],
        ),
        // A change is followed when most have told of it, and as soon as all that speak have where they are few.
        (
            &[("a", "old", 1), ("b", "new", 2), ("c", "new", 3)],
            "new",
            &[],
        ),
        (
            &[("a", "old", 1), ("b", "old", 2), ("c", "new", 3)],
            "old",
            &[3],
        ),
        (&[("a", "old", 1), ("b", "new", 3)], "new", &[]),
        (&[("a", "old", 1), ("a", "new", 2)], "new", &[]),
        // Nodes that are gone have no voice beside one that is there, which it is also by other words.
        (
            &[("a", "old", 1), ("b", "old", 2), ("c", "new", 9 * DAY)],
            "new",
            &[],
        ),
        (
            &[("a", "old", 1), ("b", "old", 2), ("c", "new", 7 * DAY)],
            "old",
            &[3],
        ),
        (&[("a", "old", 1)], "old", &[]),
    ] {
        assert_eq!(
            selector_by(words),
            (selector.to_owned(), disputed.to_vec()),
            "{words:?}"
        );
    }
}

#[test]
fn a_failed_attempt_is_kept_but_no_edge() {
    let mut failed = record(
        FROM_CLIENT,
        served("shop", "web", "node-1"),
        served("shop", "db", "node-2"),
        3306,
        4,
    );
    failed.outcome = Outcome::Failed;
    let ledger = ledger([failed]);
    assert_eq!(ledger.len(), 1);
    assert_eq!(ledger.edges(), []);
}

#[test]
fn a_call_of_a_service_is_joined_with_the_pods_that_answered() {
    let web = served("shop", "web", "node-1");
    let db = |node| served("shop", "db", node);
    check(
        [
            to_service(web.clone(), "db", 10),
            record(TO_SERVER, web.clone(), db("node-1"), 80, 4),
            record(TO_SERVER, web.clone(), db("node-2"), 80, 3),
            // Another application's pod, and another port, have answered other calls.
            record(TO_SERVER, web.clone(), served("shop", "q", "node-1"), 80, 5),
            record(TO_SERVER, web, db("node-1"), 443, 5),
        ],
        &[
            "shop/web-node-1 -> service shop/db:80 3/0",
            "shop/web-node-1 -> shop/db-node-1:80 4/4",
            "shop/web-node-1 -> shop/db-node-1:443 0/5",
            "shop/web-node-1 -> shop/db-node-2:80 3/3",
            "shop/web-node-1 -> shop/q-node-1:80 0/5",
        ],
    );
}

#[test]
fn what_the_client_called_directly_is_not_claimed_for_the_service() {
    let web = served("shop", "web", "node-1");
    let db = served("shop", "db", "node-2");
    check(
        [
            to_service(web.clone(), "db", 4),
            record(FROM_CLIENT, web.clone(), db.clone(), 80, 2),
            record(TO_SERVER, web, db, 80, 5),
        ],
        &[
            "shop/web-node-1 -> service shop/db:80 1/0",
            "shop/web-node-1 -> shop/db-node-2:80 5/5",
        ],
    );
}

#[test]
fn a_server_may_count_more_than_the_client() {
    let web = served("shop", "web", "node-1");
    check(
        [
            to_service(web.clone(), "db", 3),
            record(TO_SERVER, web, served("shop", "db", "node-2"), 80, 8),
        ],
        &["shop/web-node-1 -> shop/db-node-2:80 3/8"],
    );
}

#[test]
fn of_two_services_of_one_pod_the_one_with_fewer_pods_claims_first() {
    let web = served("shop", "web", "node-1");
    let Endpoint::Pod { pod: db, .. } = served("shop", "db", "node-1") else {
        unreachable!()
    };
    let mut both = (*db).clone();
    both.services = ["a-all", "db"].map(str::to_owned).into();
    let mut one = pod("shop", "db", "node-2");
    one.services = ["a-all".to_owned()].into();
    check(
        [
            to_service(web.clone(), "a-all", 5),
            to_service(web.clone(), "db", 5),
            record(TO_SERVER, web.clone(), bare(both), 80, 5),
            record(TO_SERVER, web, bare(one), 80, 5),
        ],
        &[
            "shop/web-node-1 -> shop/db-node-1:80 5/5",
            "shop/web-node-1 -> shop/db-node-2:80 5/5",
        ],
    );
}

#[test]
fn a_service_without_a_selector_stands_for_itself() {
    let web = served("shop", "web", "node-1");
    let mut kubernetes = (*service("default", "kubernetes")).clone();
    kubernetes.selector.clear();
    kubernetes.backends = vec![address("192.0.2.10")];
    check(
        [record(
            FROM_CLIENT,
            web,
            Endpoint::Service(kubernetes.into()),
            6443,
            2,
        )],
        &["shop/web-node-1 -> service default/kubernetes:6443 2/0"],
    );
}

#[test]
fn a_pod_that_calls_itself_through_its_service_is_not_its_node() {
    let web = served("shop", "web", "node-1");
    let sibling = served("shop", "web", "node-2");
    check(
        [
            to_service(web.clone(), "web", 6),
            record(TO_SERVER, web.clone(), sibling, 80, 2),
            record(TO_SERVER, node("node-1"), web.clone(), 80, 9),
            // Not masked as its own node, so it is the kubelet of another one.
            record(TO_SERVER, node("node-2"), web, 80, 1),
        ],
        &[
            "node node-1 -> shop/web-node-1:80 0/5",
            "node node-2 -> shop/web-node-1:80 0/1",
            "shop/web-node-1 -> shop/web-node-1:80 4/4",
            "shop/web-node-1 -> shop/web-node-2:80 2/2",
        ],
    );
}

#[test]
fn a_node_that_was_only_a_mask_disappears() {
    let web = served("shop", "web", "node-1");
    check(
        [
            to_service(web.clone(), "web", 6),
            record(TO_SERVER, node("node-1"), web, 80, 6),
        ],
        &["shop/web-node-1 -> shop/web-node-1:80 6/6"],
    );
}

#[test]
fn a_pod_in_the_nodes_network_is_named_by_its_own_side() {
    let (web, agent) = (
        served("shop", "web", "node-2"),
        host_pod("kube-system", "agent", "node-1"),
    );
    check(
        [
            record(FROM_CLIENT, agent.clone(), web.clone(), 80, 3),
            record(TO_SERVER, node("node-1"), web.clone(), 80, 5),
            record(FROM_CLIENT, web.clone(), node("node-1"), 9100, 4),
            record(TO_SERVER, web, agent, 9100, 3),
        ],
        &[
            "kube-system/agent-node-1 -> shop/web-node-2:80 3/3",
            "node node-1 -> shop/web-node-2:80 0/2",
            "shop/web-node-2 -> kube-system/agent-node-1:9100 3/3",
            "shop/web-node-2 -> node node-1:9100 1/0",
        ],
    );
}

/// The addresses of the edges between the client and the server, with the counts of both sides.
fn check_addresses(records: impl IntoIterator<Item = FlowRecord>, expected: &[&str]) {
    let edges: Vec<String> = ledger(records)
        .edges()
        .iter()
        .map(|edge| {
            format!(
                "{} {} -> {} {} {}/{}",
                edge.client,
                edge.client_address,
                edge.server,
                edge.server_address,
                edge.seen_by_client,
                edge.seen_by_server
            )
        })
        .collect();
    assert_eq!(edges, expected);
}

#[test]
fn a_client_in_the_nodes_network_has_the_addresses_that_servers_saw() {
    let agent = host_pod("kube-system", "agent", "node-1");
    let web = served("shop", "web", "node-2");
    let from = |mut record: FlowRecord, client: &str| {
        record.tuple.src_addr = address(client);
        record.tuple.dst_addr = address("10.1.2.3");
        record
    };
    let called = record(FROM_CLIENT, agent, web.clone(), 80, 5);
    let seen = |count| record(TO_SERVER, node("node-1"), web.clone(), 80, count);
    check_addresses(
        [
            from(called, "192.0.2.1"),
            // Over the tunnel and from another of the node's interfaces: each is an address for a rule.
            from(seen(2), "10.1.1.0"),
            from(seen(3), "192.0.2.77"),
        ],
        &[
            "kube-system/agent-node-1 10.1.1.0 -> shop/web-node-2 10.1.2.3 2/2",
            "kube-system/agent-node-1 192.0.2.77 -> shop/web-node-2 10.1.2.3 3/3",
        ],
    );
}

#[test]
fn a_server_in_the_nodes_network_has_the_addresses_that_clients_called() {
    let web = served("shop", "web", "node-2");
    let agent = host_pod("kube-system", "agent", "node-1");
    let to = |mut record: FlowRecord, server: &str| {
        record.tuple.src_addr = address("10.1.2.3");
        record.tuple.dst_addr = address(server);
        record
    };
    let called = |count| record(FROM_CLIENT, web.clone(), node("node-1"), 9100, count);
    check_addresses(
        [
            to(called(2), "192.0.2.1"),
            to(called(3), "192.0.2.77"),
            to(record(TO_SERVER, web.clone(), agent, 9100, 5), "10.1.1.0"),
        ],
        &[
            "shop/web-node-2 10.1.2.3 -> kube-system/agent-node-1 192.0.2.1 2/2",
            "shop/web-node-2 10.1.2.3 -> kube-system/agent-node-1 192.0.2.77 3/3",
        ],
    );
}

#[test]
fn a_service_that_leads_to_the_nodes_network_is_given_by_the_servers_address() {
    let web = served("shop", "web", "node-2");
    let mut agent = pod("shop", "agent", "node-1");
    agent.host_network = true;
    agent.services = ["agent".to_owned()].into();
    let mut called = to_service(web.clone(), "agent", 4);
    called.tuple.src_addr = address("10.1.2.3");
    called.tuple.dst_addr = address("10.96.0.9");
    let mut seen = record(TO_SERVER, web, bare(agent), 80, 4);
    seen.tuple.src_addr = address("10.1.2.3");
    seen.tuple.dst_addr = address("192.0.2.1");
    check_addresses(
        [called, seen],
        &["shop/web-node-2 10.1.2.3 -> shop/agent-node-1 192.0.2.1 4/4"],
    );
}

#[test]
fn every_edge_of_a_pod_has_its_newest_labels() {
    let web = served("shop", "web", "node-1");
    let relabelled = |time: u64, label: &str| {
        let mut db = pod("shop", "db", "node-2");
        Arc::make_mut(&mut db.labels).insert("tier".to_owned(), label.to_owned());
        let mut record = record(TO_SERVER, web.clone(), bare(db), time as u16, 1);
        record.last_seen = Timestamp::from_nanos(200_000_000_000 + time);
        record
    };
    let edges = ledger([relabelled(2, "new"), relabelled(1, "old")]).edges();
    for edge in &edges {
        let Endpoint::Pod { pod, .. } = &edge.server else {
            panic!("{edge:?}");
        };
        assert_eq!(pod.labels["tier"], "new");
    }
    assert_eq!(edges.len(), 2);
}

#[test]
fn the_labels_of_a_pod_are_those_that_its_own_side_says() {
    let (web, db) = (pod("shop", "web", "node-1"), pod("shop", "db", "node-2"));
    let said = |direction, label: &str, time: u64| {
        let mut db = db.clone();
        Arc::make_mut(&mut db.labels).insert("app".to_owned(), label.to_owned());
        let mut record = record(direction, bare(web.clone()), bare(db), 80, 1);
        record.last_seen = Timestamp::from_nanos(time);
        record
    };
    let label = |records: Vec<FlowRecord>| {
        let edges = ledger(records).edges();
        let Endpoint::Pod { pod, .. } = &edges[0].server else {
            panic!("{edges:?}");
        };
        pod.labels["app"].clone()
    };
    let own = said(TO_SERVER, "db", 1);
    let (first, second) = (said(FROM_CLIENT, "web", 2), said(FROM_CLIENT, "admin", 3));
    assert_eq!(label(vec![first.clone(), second.clone()]), "admin");
    assert_eq!(label(vec![first, own, second]), "db");
}

#[test]
fn everything_that_is_sent_has_a_weight() {
    let usual = || {
        record(
            TO_SERVER,
            node("node-1"),
            served("shop", "db", "node-2"),
            80,
            1,
        )
    };
    let weight = |record: FlowRecord| ledger([record]).bytes();
    let least = weight(usual());
    let mut addresses = usual();
    addresses.src = Endpoint::Node(Arc::new(flow::endpoint::Node {
        name: "node-1".to_owned(),
        addresses: vec![address("2001:db8::1"); 1_000],
    }));
    let mut hostname = usual();
    hostname.hostname = "x".repeat(253);
    let mut process = usual();
    process.process = Some(flow::record::Process {
        pid: 1,
        comm: "x".repeat(1_000),
        container: Some("x".repeat(253)),
        fd: None,
    });
    let mut labels = pod("shop", "web", "node-1");
    labels.labels = Arc::new(
        (0..200)
            .map(|number| (number.to_string(), String::new()))
            .collect(),
    );
    let labels = record(TO_SERVER, bare(labels), usual().dst, 80, 1);
    for (record, more) in [
        (addresses, 1_000 * size_of::<IpAddr>()),
        (hostname, 240),
        (process, 1_253),
        // The heads of two strings each, and what the allocator rounds up.
        (labels, 200 * 100),
    ] {
        let text = serde_json::to_string(&record).unwrap();
        assert!(weight(record) >= least + more, "{text}");
    }
}

#[test]
fn what_is_forgotten_or_replaced_weighs_nothing() {
    let named = |time: u64, comm: usize| {
        let mut record = record(
            TO_SERVER,
            node("node-1"),
            served("shop", "db", "node-2"),
            80,
            1,
        );
        record.last_seen = Timestamp::from_nanos(time);
        record.process = Some(flow::record::Process {
            pid: 1,
            comm: "x".repeat(comm),
            container: None,
            fd: None,
        });
        record
    };
    let mut one = ledger([named(1, 900)]);
    one.observe(named(2, 5));
    assert_eq!(one.bytes(), ledger([named(2, 5)]).bytes());
    one.observe(named(1, 500));
    assert_eq!(one.bytes(), ledger([named(2, 5)]).bytes());
    assert_eq!(one.forget_before(Timestamp::from_nanos(3)), 1);
    assert_eq!(one.bytes(), 0);
}

#[test]
fn records_share_their_pods_and_services() {
    let calls = (1..=9).map(|port| {
        record(
            TO_SERVER,
            served("shop", "web", "node-1"),
            served("shop", "db", "node-2"),
            port,
            1,
        )
    });
    let ledger = ledger(calls);
    let mut ends = ledger.records().map(|record| match &record.dst {
        Endpoint::Pod {
            pod,
            service: Some(service),
        } => (Arc::as_ptr(pod), Arc::as_ptr(service)),
        other => panic!("{other:?}"),
    });
    let first = ends.next().unwrap();
    assert_eq!(ends.filter(|end| *end == first).count(), 8);
}

/// Few ends may be many bytes, of pods whose labels change again and again.
#[test]
fn ends_that_nobody_uses_are_swept_out_by_their_weight() {
    const LABEL: usize = 200_000;
    let mut ledger = Ledger::default();
    let mut most = 0;
    for time in 1..=900 {
        let mut db = pod("shop", "db", "node-2");
        let label = format!("{time}{}", "x".repeat(LABEL));
        Arc::make_mut(&mut db.labels).insert("tier".to_owned(), label);
        let mut record = record(TO_SERVER, served("shop", "web", "node-1"), bare(db), 80, 1);
        record.last_seen = Timestamp::from_nanos(200_000_000_000 + time as u64);
        ledger.observe(record);
        most = most.max(ledger.bytes());
    }
    assert_eq!(ledger.len(), 1);
    // Together they have 180 MB.
    assert!(most < 80_000_000, "{most}");
    assert!(most > 60_000_000, "swept for less than it is worth: {most}");
}

/// A sweep looks at the whole ledger, so what is refused must not cost one each time.
#[test]
fn a_full_ledger_is_swept_only_once_it_may_free_something() {
    let call = |app: &str| record(TO_SERVER, served("shop", app, "node-1"), node("n"), 80, 1);
    let mut ledger = ledger((0..200).map(|app| call(&app.to_string())));
    let bounds = Bounds {
        observations: 1_000,
        bytes: ledger.bytes(),
    };
    assert!(!ledger.has_room(bounds));
    let (mut sweeps, mut most) = (0, 0);
    for refused in 1_000..1_100 {
        assert_eq!(ledger.observe_known(call(&refused.to_string())), Err(Full));
        let before = ledger.bytes();
        most = before.max(most);
        assert!(!ledger.has_room(bounds));
        sweeps += usize::from(ledger.bytes() < before);
    }
    assert!((1..50).contains(&sweeps), "{sweeps}");
    assert!(most < bounds.bytes * 11 / 10, "{most}");
}

#[test]
fn a_called_address_is_not_taken_for_the_servers_own() {
    let Endpoint::Pod { pod: agent, .. } = host_pod("kube-system", "agent", "node-1") else {
        unreachable!()
    };
    let mut agent = (*agent).clone();
    agent.addresses = vec![address("fd00::1"), address("192.0.2.7")];
    let mut call = record(
        FROM_CLIENT,
        served("shop", "web", "node-2"),
        bare(agent),
        9100,
        1,
    );
    call.tuple.dst_addr = address("10.96.0.7");
    call.via = Some((call.tuple.dst_addr, 80).into());
    let edges = ledger([call]).edges();
    assert_eq!(edges[0].server_address, address("192.0.2.7"));
}

proptest! {
    #[test]
    fn the_ledger_does_not_depend_on_the_order_of_observation(
        (records, shuffled) in any_records()
            .prop_flat_map(|records| (Just(records.clone()), Just(records).prop_shuffle()))
    ) {
        let (one, other) = (ledger(records), ledger(shuffled));
        prop_assert_eq!(one.edges(), other.edges());
        prop_assert_eq!(one, other);
    }

    #[test]
    fn a_ledger_can_be_restored_from_its_records_in_parts(records in any_records(), cut in 0..60_usize) {
        let (head, tail) = records.split_at(cut.min(records.len()));
        let restored = ledger(ledger(head.to_vec()).records().chain(ledger(tail.to_vec()).records()));
        prop_assert_eq!(restored, ledger(records));
    }

    #[test]
    fn joining_conserves_the_counts_of_both_sides(records in any_records()) {
        let seen = |direction| {
            records
                .iter()
                .filter(|record| record.outcome == Outcome::Established && record.direction == direction)
                .map(|record| record.count)
                .sum::<u64>()
        };
        let ledger = ledger(records.clone());
        let edges = ledger.edges();
        prop_assert_eq!(edges.iter().map(|edge| edge.seen_by_client).sum::<u64>(), seen(FROM_CLIENT));
        prop_assert_eq!(edges.iter().map(|edge| edge.seen_by_server).sum::<u64>(), seen(TO_SERVER));
        prop_assert_eq!(ledger.edges(), edges);
    }
}
