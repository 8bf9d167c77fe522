use serde_json::{Value, json};

use super::*;
use crate::wire::{Batch, Resolve};

fn valid_batch() -> Value {
    json!({
        "sequence": 1,
        "window": {"from": 1000.0, "to": 1001.0},
        "losses": {"ring_full": 3},
        "hostname": "node-1",
        "ends": [{
            "address": "10.0.1.2",
            "pod": {
                "id": "7b1f;<pod>", "namespace": "bookinfo", "name": "sleep-1", "labels": {"app": "sleep"},
                "workload": {"kind": "Deployment", "name": "sleep"}, "node": "node-1",
                "addresses": ["10.0.1.2"], "services": ["sleep"],
            },
        }, {
            "address": "10.0.2.3",
            "service": {
                "id": "9d23;<service>", "namespace": "bookinfo", "name": "reviews", "labels": {},
                "selector": "app=reviews", "backends": ["10.0.2.3"],
            },
        }],
        "processes": [{"pid": 7, "comm": "curl \u{1b}[31m", "container": "0a1b"}],
        "flows": [{
            "src": 0, "dst": 1, "port": 9080, "last_seen": 1000.5, "count": 5, "process": 0, "hostname": "node-2",
            "first_seen": 1000.0, "timestamp": 1000.5,
        }],
    })
}

/// The valid batch with one value replaced: at a JSON pointer.
fn with(pointer: &str, value: Value) -> Packed<End> {
    let mut json = valid_batch();
    let place = json.pointer_mut(pointer).unwrap();
    *place = value;
    serde_json::from_value(json).unwrap()
}

/// What the generator says of such a batch.
fn check(pointer: &str, value: Value) -> Result<(), String> {
    let parsed = with(pointer, value);
    let ends = parsed.ends.iter().enumerate();
    let mut ends = ends
        .map(|(index, it)| end(it).map_err(|invalid| invalid.within(&format!("ends[{index}]"))));
    batch(&parsed)
        .and_then(|()| ends.try_for_each(|checked| checked))
        .map_err(|invalid| invalid.to_string())
}

/// What the agent says of the first record of such a batch; `None` if no record has this form.
fn check_record(pointer: &str, value: Value) -> Option<Result<(), String>> {
    let batch = Batch::try_from(with(pointer, value)).ok()?;
    let checked = record(batch.flows.first()?);
    Some(checked.map_err(|invalid| invalid.to_string()))
}

/// A problem of a batch as one of its first record; `None` if it is none of a record.
fn of_a_record(problem: &str) -> Option<String> {
    let places = [
        ("flows[0].", ""),
        ("processes[0].", "process."),
        ("ends[0].", "src."),
        ("ends[1].", "dst."),
    ];
    places.iter().find_map(|(of_batch, of_record)| {
        Some(format!("{of_record}{}", problem.strip_prefix(of_batch)?))
    })
}

fn node_called(name: &str) -> Value {
    json!({"address": "fd00::1", "node": {"name": name, "addresses": ["fd00::1"]}})
}

fn many_labels(count: usize) -> Value {
    (0..count)
        .map(|number| (number.to_string(), Value::from("x")))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

#[test]
fn what_is_within_the_bounds_passes() {
    for (pointer, value) in [
        ("/sequence", json!(u64::MAX)),
        ("/flows/0/hostname", json!("ip-10-0-0-1.ec2.internal")),
        ("/flows/0/count", json!(MAX_COUNT)),
        ("/flows/0/count", json!(0)),
        ("/ends/0/pod/labels", many_labels(MAX_LABELS)),
        ("/ends/0/pod/labels/app", json!("x".repeat(MAX_STRING))),
        ("/ends/0/pod/name", json!("x".repeat(MAX_NAME))),
        ("/losses", json!({})),
        ("/ends/1", node_called("fd00::1")),
        ("/ends/1", node_called("192.0.2.1")),
    ] {
        assert_eq!(check(pointer, value.clone()), Ok(()), "{pointer}");
        let record = check_record(pointer, value);
        assert!(
            matches!(record, None | Some(Ok(()))),
            "{pointer}: {record:?}"
        );
    }
}

#[test]
fn what_is_not_is_named() {
    let long = || json!("x".repeat(MAX_STRING + 1));
    let flow = valid_batch()["flows"][0].clone();
    for (pointer, value, problem) in [
        (
            "/sequence",
            json!(0),
            "sequence: batches are numbered from 1",
        ),
        ("/window/to", json!(999.0), "window: ends before it begins"),
        (
            "/window/to",
            json!(17e9),
            "window.to: is after the year 2262",
        ),
        (
            "/flows",
            json!(vec![flow; MAX_BATCH_FLOWS + 1]),
            "flows: 1001 entries, the limit is 1000",
        ),
        (
            "/losses/ring_full",
            json!(u64::MAX),
            "losses.ring_full: 18446744073709551615 is too many",
        ),
        (
            "/losses",
            json!({"two words": 1}),
            "losses: two words has other than printable characters",
        ),
        (
            "/losses",
            many_losses(),
            "losses: 65 entries, the limit is 64",
        ),
        (
            "/flows/0/hostname",
            json!("a\nb"),
            "flows[0].hostname: a\\nb is not a name",
        ),
        (
            "/flows/0/count",
            json!(MAX_COUNT + 1),
            "flows[0].count: 1099511627777 is more than 1099511627776",
        ),
        (
            "/ends/0/pod/namespace",
            json!("../../etc"),
            "ends[0].pod.namespace: ../../etc is not a name",
        ),
        (
            "/ends/0/pod/namespace",
            json!(".."),
            "ends[0].pod.namespace: .. is not a name",
        ),
        ("/ends/0/pod/name", json!(""), "ends[0].pod.name: is empty"),
        (
            "/ends/0/pod/name",
            long(),
            "ends[0].pod.name: 1025 bytes, the limit is 253",
        ),
        (
            "/ends/0/pod/id",
            long(),
            "ends[0].pod.id: 1025 bytes, the limit is 1024",
        ),
        (
            "/ends/0/pod/labels",
            many_labels(257),
            "ends[0].pod.labels: 257 entries, the limit is 256",
        ),
        (
            "/ends/0/pod/labels/app",
            long(),
            "ends[0].pod.labels: 1025 bytes, the limit is 1024",
        ),
        (
            "/ends/0/pod/workload/name",
            json!("a/b"),
            "ends[0].pod.workload.name: a/b is not a name",
        ),
        (
            "/ends/0/pod/node",
            json!("a b"),
            "ends[0].pod.node: a b is not a name",
        ),
        (
            "/ends/0/pod/services/0",
            json!("é"),
            "ends[0].pod.services: \\u{e9} is not a name",
        ),
        (
            "/ends/1/service/name",
            json!("a\0"),
            "ends[1].service.name: a\\u{0} is not a name",
        ),
        (
            "/ends/1/service/backends",
            json!(vec!["10.0.0.1"; 2_000]),
            "ends[1].labels, addresses and names: 34058 bytes, the limit is 32768",
        ),
        (
            "/ends/1/service/backends",
            json!(vec!["10.0.0.1"; 4_097]),
            "ends[1].service.backends: 4097 entries, the limit is 4096",
        ),
        (
            "/ends/1",
            node_called("fd00::1::2"),
            "ends[1].node.name: fd00::1::2 is not a name",
        ),
        (
            "/flows/0/port",
            json!(0),
            "flows[0].port: 0: the server's port is missing",
        ),
        (
            "/flows/0/src",
            json!(2),
            "flows[0].src: there is no 2 in the batch's table",
        ),
        ("/flows/0/dst", json!(0), "ends[1]: is that of no flow"),
        ("/flows", json!([]), "ends[0]: is that of no flow"),
        (
            "/flows/0/process",
            json!(1),
            "flows[0].process: there is no 1 in the batch's table",
        ),
        (
            "/flows/0/first_seen",
            json!(1000.75),
            "flows[0].last_seen: is before `first_seen`",
        ),
        (
            "/flows/0/last_seen",
            json!(17e9),
            "flows[0].last_seen: is after the year 2262",
        ),
        ("/hostname", json!(""), "hostname: is empty"),
        (
            "/processes/0/comm",
            long(),
            "processes[0].comm: 1025 bytes, the limit is 1024",
        ),
        (
            "/processes/0/container",
            json!(""),
            "processes[0].container: is empty",
        ),
    ] {
        let said = check(pointer, value.clone());
        assert_eq!(said, Err(problem.to_owned()), "{pointer}");
        // A record that the agent passes does not make the generator refuse the batch.
        if let Some(said) = check_record(pointer, value) {
            assert_eq!(said.err(), of_a_record(problem), "{pointer}");
        }
    }
}

fn many_losses() -> Value {
    (0..=MAX_REASONS)
        .map(|number| (number.to_string(), Value::from(1)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

#[test]
fn a_hello_is_fit_for_a_log() {
    let valid = Hello {
        instance: "5c3b8f3e-0d62-4a4e-8a38-6f6d0a3c1c11".to_owned(),
        node: "node-1".to_owned(),
        version: "0.1.0+abc".to_owned(),
        resolve: Resolve::Both,
        capabilities: Vec::new(),
        clock: None,
    };
    assert_eq!(hello(&valid), Ok(()));
    let bad = [
        Hello {
            instance: String::new(),
            ..valid.clone()
        },
        Hello {
            instance: "x".repeat(MAX_NAME + 1),
            ..valid.clone()
        },
        Hello {
            node: "node 1".to_owned(),
            ..valid.clone()
        },
        Hello {
            capabilities: vec!["two words".to_owned()],
            ..valid.clone()
        },
        Hello {
            version: "1\u{1b}[2J".to_owned(),
            ..valid
        },
    ];
    for hello in bad {
        assert!(super::hello(&hello).is_err(), "{hello:?}");
    }
}
