//! Every verdict of `tests/fixtures/verdicts`.

use std::{fs, path::Path};

use serde::Deserialize;

use crate::cluster::{Cluster, Query, protocol};

#[derive(Deserialize)]
struct Case {
    seed: u64,
    objects: Vec<serde_json::Value>,
    verdicts: Vec<String>,
}

#[test]
fn every_verdict_of_two_independent_engines_is_ours() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/verdicts/worlds.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    let mut judged = 0;
    let mut wrong = Vec::new();
    for line in text.lines() {
        let case: Case = serde_json::from_str(line).unwrap();
        let cluster = cluster(&case.objects);
        let (queries, expected): (Vec<Query>, Vec<bool>) =
            case.verdicts.iter().map(|verdict| parse(verdict)).unzip();
        judged += queries.len();
        for ((answer, expected), verdict) in cluster
            .answers(&queries)
            .into_iter()
            .zip(expected)
            .zip(&case.verdicts)
        {
            if answer != expected {
                wrong.push(format!("seed {}: {verdict}", case.seed));
            }
        }
    }
    assert_eq!(wrong, [""; 0], "{} verdicts are not ours", wrong.len());
    assert_eq!(judged, 41_891);
}

fn cluster(objects: &[serde_json::Value]) -> Cluster {
    let mut cluster = Cluster::default();
    for object in objects {
        fn read<T: serde::de::DeserializeOwned>(object: &serde_json::Value) -> T {
            serde_json::from_value(object.clone()).unwrap()
        }
        match object["kind"].as_str().unwrap() {
            "Namespace" => cluster.namespaces.push(read(object)),
            "Pod" => cluster.pods.push(read(object)),
            "NetworkPolicy" => cluster.policies.push(read(object)),
            kind => panic!("{kind}"),
        }
    }
    cluster
}

/// `SOURCE_IP DESTINATION_IP PROTOCOL DESTINATION_PORT allow|deny`
fn parse(verdict: &str) -> (Query, bool) {
    let fields: Vec<&str> = verdict.split(' ').collect();
    let [source, destination, transport, port, answer] = fields[..] else {
        panic!("{verdict}");
    };
    let query = Query {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        protocol: protocol(transport),
        port: port.parse().unwrap(),
    };
    let allowed = match answer {
        "allow" => true,
        "deny" => false,
        other => panic!("{other}"),
    };
    (query, allowed)
}
