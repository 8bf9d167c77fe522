//! The Prometheus operator's ServiceMonitor (`monitoring.coreos.com/v1`), as far as it is used.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde::{Deserialize, Serialize};

use crate::{
    load::with,
    references::{port_numbers, selects_pairs},
};

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct ServiceMonitor {
    api_version: String,
    kind: String,
    metadata: ObjectMeta,
    spec: Spec,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    selector: LabelSelector,
    endpoints: Vec<Endpoint>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Endpoint {
    port: String,
    interval: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    relabelings: Vec<Relabeling>,
}

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Relabeling {
    source_labels: Vec<String>,
    target_label: String,
}

/// From the monitor to the service to the pods and their port, and through the policy.
#[test]
fn prometheus_finds_both_programs() {
    let all = with("prometheus");
    let mut found = Vec::new();
    for monitor in &all.monitors {
        assert!(monitor.spec.selector.match_expressions.is_none());
        let wanted = monitor.spec.selector.match_labels.as_ref().unwrap();
        let [endpoint] = monitor.spec.endpoints.as_slice() else {
            panic!("one endpoint is expected");
        };
        let services = all.services.iter().filter(|service| {
            let labels = service.metadata.labels.as_ref().unwrap();
            wanted
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
        });
        for service in services {
            let spec = service.spec.as_ref().unwrap();
            let ports = spec.ports.as_ref().unwrap();
            if ports
                .iter()
                .all(|port| port.name.as_deref() != Some(endpoint.port.as_str()))
            {
                continue;
            }
            let selector = spec.selector.as_ref().unwrap();
            for (name, template) in [("agent", all.agent()), ("generator", all.generator())] {
                if selects_pairs(selector, template) {
                    assert_eq!(port_numbers(template)["metrics"], ports[0].port);
                    found.push(name);
                }
            }
        }
    }
    found.sort_unstable();
    assert_eq!(found, ["agent", "generator"]);
}

/// Each panel asks for what one of the programs counts.
#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let all = with("prometheus");
    let [map] = all.config_maps.as_slice() else {
        panic!("one ConfigMap is expected");
    };
    let data = map.data.as_ref().unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&data["microshield.json"]).unwrap();
    let sources = [
        include_str!("../../../generator/src/metrics.rs"),
        include_str!("../../../agent/src/metrics.rs"),
    ];
    let mut asked = BTreeMap::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().unwrap();
            for word in expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                if let Some(name) = word.strip_prefix("microshield_") {
                    asked.insert(name.to_owned(), panel["title"].to_string());
                }
            }
        }
    }
    assert!(asked.len() > 10, "{asked:?}");
    for (name, panel) in asked {
        let (source, name) = match name.strip_prefix("agent_") {
            // The generator has some of its own about agents.
            Some(rest) if !sources[0].contains(&format!("\"{name}\"")) => {
                (sources[1], rest.to_owned())
            }
            _ => (sources[0], name.clone()),
        };
        let counter = name.strip_suffix("_total").unwrap_or(&name);
        assert!(
            source.contains(&format!("\"{counter}\"")),
            "{panel}: {name}"
        );
    }
}
