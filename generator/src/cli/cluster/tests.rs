use serde_json::json;

use super::*;

fn pod(name: &str, ready: &str, deleted: bool) -> Pod {
    let mut value = json!({
        "metadata": {"name": name},
        "status": {"conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": ready},
        ]},
    });
    if deleted {
        value["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    }
    serde_json::from_value(value).unwrap()
}

#[test]
fn the_pod_that_is_ready_and_stays_is_chosen() {
    let pods = vec![
        pod("starting", "False", false),
        pod("leaving", "True", true),
        pod("right", "True", false),
    ];
    let chosen = choose(pods.clone()).unwrap();
    assert_eq!(chosen.metadata.name.as_deref(), Some("right"));
    let error = choose(pods[..2].to_vec()).unwrap_err();
    assert_eq!(error.to_string(), "none of 2 pods is ready");
    let error = choose(Vec::new()).unwrap_err();
    assert!(error.to_string().contains("--generator-namespace"));
}

fn of(value: serde_json::Value) -> Container {
    serde_json::from_value(value).unwrap()
}

#[test]
fn the_pod_says_what_its_generator_asks_for() {
    let plain = of(json!({
        "name": "generator",
        "args": ["serve", "--token-audience=flows", "--reader-account", "monitoring/reader"],
        "ports": [{"name": "metrics", "containerPort": 9465}, {"name": "agents", "containerPort": 9000}],
    }));
    assert_eq!(port(&plain), 9000);
    assert_eq!(setting(&plain, "tls-cert"), None);
    let wanted = Reader {
        namespace: "monitoring".to_owned(),
        name: "reader".to_owned(),
        audience: "flows".to_owned(),
    };
    assert_eq!(reader(&plain), Some(wanted));

    let other = of(json!({
        "name": "generator",
        "args": ["serve", "--tls-cert-of-another=x", "--reader-account=reader", "--token-audience=flows"],
        "env": [{"name": "MICROSHIELD_TLS_CERT", "value": "/tls.crt"}],
    }));
    assert_eq!(port(&other), 8765);
    assert_eq!(setting(&other, "tls-cert"), Some("/tls.crt"));
    assert_eq!(reader(&other), None);
}
