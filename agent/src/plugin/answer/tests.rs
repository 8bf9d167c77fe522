use std::{collections::HashMap, fs, path::PathBuf};

use flow::record::FlowRecord;
use serde_json::{Value, json};

use super::*;
use crate::plugin::recent::Recent;

/// What reports of a running Scope have: the types of JSON by path. Where a path's part is a name that Scope's users or
/// nodes give, it is `*`.
#[derive(Debug, Default)]
struct Schema(HashMap<String, BTreeSet<&'static str>>);

impl Schema {
    /// Of the reports that were recorded.
    fn recorded() -> Self {
        let mut schema = Self::default();
        for name in ["report-kubernetes.json", "report-live.json"] {
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                .join("../tests/fixtures/scope")
                .join(name);
            let report: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
            schema.learn(&report);
        }
        // No table with columns and no plugin is in them: as Scope's `report/table.go` and its plugins have them.
        schema.learn(&json!({
            "Host": {"table_templates": {"x": {"columns": [{"id": "", "label": "", "dataType": ""}]}}},
            "Plugins": [{"id": "", "label": "", "description": "", "interfaces": [""], "api_version": ""}],
        }));
        schema
    }

    fn learn(&mut self, report: &Value) {
        walk(report, &mut Vec::new(), &mut |path, value| {
            self.0
                .entry(path.to_owned())
                .or_default()
                .insert(form(value));
        });
    }

    /// What a report has that the recorded ones have not.
    fn strange(&self, report: &Value) -> Vec<String> {
        let mut strange = Vec::new();
        walk(report, &mut Vec::new(), &mut |path, value| {
            let known = self.0.get(path);
            if !known.is_some_and(|forms| forms.contains(form(value))) {
                strange.push(format!("{path}: {} in place of {known:?}", form(value)));
            }
        });
        strange
    }
}

fn form(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn walk<'a>(value: &'a Value, path: &mut Vec<&'a str>, visit: &mut impl FnMut(&str, &Value)) {
    visit(&path.join("."), value);
    match value {
        Value::Object(entries) => {
            for (key, value) in entries {
                let named = matches!(
                    path.last(),
                    Some(
                        &("nodes"
                            | "latest"
                            | "parents"
                            | "sets"
                            | "fixedRows"
                            | "metadata_templates"
                            | "table_templates")
                    )
                );
                let is_topology = path.is_empty() && value.is_object();
                path.push(if named || is_topology { "*" } else { key });
                walk(value, path, visit);
                path.pop();
            }
        }
        Value::Array(entries) => {
            for value in entries {
                path.push("[]");
                walk(value, path, visit);
                path.pop();
            }
        }
        _ => {}
    }
}

fn who() -> Who {
    Who {
        id: "microshield".to_owned(),
        host: "vm".to_owned(),
    }
}

fn pod(name: &str, node: &str, addresses: &[&str]) -> Value {
    json!({"pod": {
        "id": format!("uid-{name};<pod>"), "namespace": "shop", "name": name, "node": node, "addresses": addresses,
        "workload": {"kind": "Deployment", "name": name}, "services": ["web"],
    }, "service": {}})
}

/// A record, as far as it is not like every other.
fn record(src: Value, dst: Value, tuple: (&str, &str, u16), more: Value) -> FlowRecord {
    let mut record = json!({
        "timestamp": 1_795_292_200.5, "hostname": "vm", "src": src, "dst": dst,
        "tuple": {"src_addr": tuple.0, "src_port": 41_000, "dst_addr": tuple.1, "dst_port": tuple.2},
    });
    for (key, value) in more.as_object().unwrap() {
        record[key] = value.clone();
    }
    serde_json::from_value(record).unwrap()
}

fn answer(records: &[FlowRecord]) -> Value {
    let recent = Recent::default();
    recent.add(records);
    let now = Timestamp::from_nanos(1_795_292_201_000_000_000);
    serde_json::from_slice(&render(&recent.seen(), &who(), now)).unwrap()
}

fn process(pid: u32) -> Value {
    json!({"pid": pid, "comm": "curl", "container": "0123456789abcdef"})
}

/// A client on this node and its servers: one over UDP, one that does not answer, one outside, one behind a service.
fn shop() -> Vec<FlowRecord> {
    let client = || pod("client", "vm", &["10.0.1.7"]);
    let egress = |more: Value| {
        let mut all = json!({"direction": "egress", "process": process(7)});
        all.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        all
    };
    let dns = pod("dns", "other", &["10.0.2.5"]);
    let mut six = dns.clone();
    six["pod"]["addresses"] = json!(["10.0.2.5", "fd00::5"]);
    let service =
        json!({"pod": {}, "service": {"id": "s;<service>", "namespace": "shop", "name": "web"}});
    vec![
        record(
            client(),
            dns,
            ("10.0.1.7", "10.0.2.5", 53),
            egress(json!({"protocol": "UDP", "count": 3})),
        ),
        record(client(), six, ("fd00::7", "fd00::5", 53), egress(json!({}))),
        record(
            client(),
            json!({"pod": {}}),
            ("10.0.1.7", "203.0.113.9", 443),
            egress(json!({"outcome": "failed"})),
        ),
        record(
            client(),
            service,
            ("10.0.1.7", "10.96.0.1", 80),
            egress(json!({})),
        ),
        record(
            pod("other", "other", &["10.0.2.6"]),
            client(),
            ("10.0.2.6", "10.0.1.7", 8080),
            json!({"process": process(7), "count": 5}),
        ),
    ]
}

#[test]
fn an_answer_has_the_form_of_the_recorded_reports() {
    let schema = Schema::recorded();
    for records in [&[][..], &shop()] {
        let answer = answer(records);
        assert_eq!(schema.strange(&answer), [""; 0]);
        walk(&answer, &mut Vec::new(), &mut |path, value| {
            if path.ends_with(".timestamp") {
                let text = value.as_str().unwrap();
                text.parse::<Time>().unwrap();
                assert!(text.ends_with('Z') && text.contains('T'), "{text}");
            }
        });
        for (name, topology) in answer.as_object().unwrap() {
            let Some(nodes) = topology.get("nodes") else {
                assert_eq!(name, "Plugins");
                continue;
            };
            for (id, node) in nodes.as_object().unwrap() {
                assert_eq!(node["id"], json!(id));
                assert_eq!(node["topology"], json!(name.to_lowercase()));
                for (parent, ids) in node["parents"].as_object().into_iter().flatten() {
                    let suffix = format!(";<{parent}>");
                    let ids = ids.as_array().unwrap();
                    assert!(
                        ids.iter().all(|id| id.as_str().unwrap().ends_with(&suffix)),
                        "{ids:?}"
                    );
                }
            }
        }
        let plugins = answer["Plugins"].as_array().unwrap();
        assert_eq!(plugins.len(), 1);
        assert_eq!(
            (&plugins[0]["id"], &plugins[0]["api_version"]),
            (&json!("microshield"), &json!("1"))
        );
    }
}

/// The check itself: what no Scope has is found.
#[test]
fn the_schema_knows_what_is_strange() {
    let schema = Schema::recorded();
    for strange in [
        json!({"Endpoint": {"nodes": {"x": {"lastest": {}}}}}),
        json!({"Endpoint": {"nodes": {"x": {"latest": {"pid": {"timestamp": 7, "value": "1"}}}}}}),
        json!({"Endpoint": {"nodes": {"x": {"latest": {"pid": {"timestamp": "", "value": 1}}}}}}),
        json!({"Endpoint": {"nodes": {"x": {"adjacency": ""}}}}),
        json!({"Endpoint": {"nodes": {"x": {"parents": {"host": "x"}}}}}),
        json!({"Pod": {"metadata_templates": {"x": {"priority": "1"}}}}),
        json!({"Plugins": "microshield"}),
    ] {
        assert_eq!(schema.strange(&strange).len(), 1, "{strange}");
    }
}

fn latest<'a>(answer: &'a Value, topology: &str, id: &str, key: &str) -> &'a str {
    answer[topology]["nodes"][id]["latest"][key]["value"]
        .as_str()
        .unwrap_or("-")
}

#[test]
fn endpoints_are_keyed_as_scope_keys_them() {
    let answer = answer(&shop());
    let endpoints = answer["Endpoint"]["nodes"].as_object().unwrap();
    let ids: Vec<&str> = endpoints.keys().map(String::as_str).collect();
    assert_eq!(
        ids,
        [
            ";10.0.1.7;0",
            ";10.0.1.7;8080",
            ";10.0.2.5;53",
            ";10.0.2.6;0",
            ";203.0.113.9;443",
            ";fd00::5;53",
            ";fd00::7;0"
        ]
    );
    assert_eq!(
        endpoints[";10.0.1.7;0"]["adjacency"],
        json!([";10.0.2.5;53", ";203.0.113.9;443"])
    );
    assert_eq!(endpoints[";fd00::7;0"]["adjacency"], json!([";fd00::5;53"]));
    assert_eq!(
        endpoints[";10.0.2.6;0"]["adjacency"],
        json!([";10.0.1.7;8080"])
    );
    let endpoint = |id, key| latest(&answer, "Endpoint", id, key);
    for (id, key, value) in [
        (";10.0.1.7;0", "host_node_id", "vm;<host>"),
        (";10.0.1.7;0", "pid", "7"),
        (";10.0.1.7;0", "microshield_protocol", "TCP, UDP"),
        (";10.0.1.7;0", "microshield_outcome", "established, failed"),
        (";10.0.2.5;53", "host_node_id", "other;<host>"),
        (";10.0.2.5;53", "pid", "-"),
        (
            ";10.0.2.5;53",
            "microshield_workload",
            "Deployment shop/dns",
        ),
        (";203.0.113.9;443", "host_node_id", "-"),
        (";203.0.113.9;443", "microshield_outcome", "failed"),
        (";10.0.1.7;8080", "pid", "7"),
    ] {
        assert_eq!(endpoint(id, key), value, "{key} of {id}");
    }
    // What the other node's agent says of its end is newer.
    let said = |id: &str| &endpoints[id]["latest"]["host_node_id"]["timestamp"];
    assert!(said(";10.0.2.5;53").as_str() < said(";10.0.1.7;0").as_str());
}

#[test]
fn loopback_is_the_hosts_own() {
    let writer = Writer {
        report: Report::default(),
        host: "vm",
        now: "",
    };
    assert_eq!(
        writer.endpoint_id("127.0.0.1".parse().unwrap(), 80),
        "vm;127.0.0.1;80"
    );
    assert_eq!(writer.endpoint_id("::1".parse().unwrap(), 0), "vm;::1;0");
}

#[test]
fn this_nodes_ends_are_linked_to_scopes_nodes() {
    let answer = answer(&shop());
    let parents = |topology: &str, id: &str| answer[topology]["nodes"][id]["parents"].clone();
    let container = "0123456789abcdef;<container>";
    assert_eq!(
        parents("Process", "vm;7"),
        json!({"container": [container], "host": ["vm;<host>"]})
    );
    assert_eq!(
        parents("Container", container),
        json!({"pod": ["uid-client;<pod>"], "host": ["vm;<host>"]})
    );
    assert_eq!(answer["Pod"]["nodes"].as_object().unwrap().len(), 1);
    let client = "uid-client;<pod>";
    for (topology, id) in [
        ("Pod", client),
        ("Container", container),
        ("Process", "vm;7"),
    ] {
        assert_eq!(
            latest(&answer, topology, id, "microshield_connections"),
            "10"
        );
        assert_eq!(latest(&answer, topology, id, "microshield_failed"), "1");
    }
    assert_eq!(
        latest(&answer, "Pod", client, "microshield_workload"),
        "Deployment client"
    );
    assert_eq!(
        latest(&answer, "Pod", client, "microshield_services"),
        "web"
    );
    assert_eq!(latest(&answer, "Pod", client, "kubernetes_ip"), "10.0.1.7");
    for (topology, key) in [
        ("Pod", "microshield_workload"),
        ("Process", "microshield_connections"),
    ] {
        assert_eq!(
            answer[topology]["metadata_templates"][key]["from"],
            "latest"
        );
    }
}

#[test]
fn an_endpoint_of_several_processes_is_nobodys() {
    let to = |port: u16, pid: u32| {
        let more = json!({"direction": "egress", "process": process(pid)});
        record(
            pod("client", "vm", &["10.0.1.7"]),
            json!({"pod": {}}),
            ("10.0.1.7", "10.0.2.5", port),
            more,
        )
    };
    let one = answer(&[to(80, 7), to(443, 7)]);
    assert_eq!(latest(&one, "Endpoint", ";10.0.1.7;0", "pid"), "7");
    let nobodys = |port| FlowRecord {
        process: None,
        ..to(port, 0)
    };
    for (two, processes) in [
        ([to(80, 7), to(443, 8)], 2),
        ([to(80, 7), to(80, 8)], 2),
        ([to(80, 7), nobodys(443)], 1),
        ([to(80, 7), nobodys(80)], 1),
    ] {
        let two = answer(&two);
        assert_eq!(latest(&two, "Endpoint", ";10.0.1.7;0", "pid"), "-");
        let nodes = two["Process"]["nodes"].as_object().unwrap();
        assert_eq!(nodes.len(), processes);
    }
}

#[test]
fn the_host_has_a_table_of_the_flows() {
    let client = |number: usize| format!("10.1.{}.{}", number / 250, number % 250);
    let records: Vec<_> = (0..MAX_ROWS + 20)
        .map(|number| {
            let more = json!({"direction": "egress", "count": number + 1});
            let tuple = (&*client(number), "10.0.2.5", 80);
            record(json!({"pod": {}}), json!({"pod": {}}), tuple, more)
        })
        .collect();
    let answer = answer(&records);
    let host = "vm;<host>";
    let cell = |row: usize, column: &str| {
        let key = format!("microshield_flows_{row:03}___{column}");
        latest(&answer, "Host", host, &key).to_owned()
    };
    assert_eq!(cell(0, "client"), client(MAX_ROWS + 19));
    assert_eq!((&*cell(0, "port"), &*cell(0, "count")), ("80/TCP", "120"));
    assert_eq!(
        (&*cell(0, "outcome"), &*cell(0, "seen")),
        ("established", "client")
    );
    assert_eq!(cell(0, "last"), "2026-11-21T20:16:40.5Z");
    assert_eq!(cell(MAX_ROWS, "client"), "-");
    assert_eq!(latest(&answer, "Host", host, TABLE_LEFT_OUT), "20");
    assert_eq!(latest(&answer, "Host", host, "microshield_flows"), "120");
    let template = &answer["Host"]["table_templates"][TABLE];
    assert_eq!(
        (&template["type"], &template["prefix"]),
        (&json!("multicolumn-table"), &json!(TABLE))
    );
    // The app splits every such key, and breaks where there is nothing to split.
    let columns: BTreeSet<&str> = COLUMNS.iter().map(|(id, _, _)| *id).collect();
    for key in answer["Host"]["nodes"][host]["latest"]
        .as_object()
        .unwrap()
        .keys()
    {
        if let Some(cell) = key.strip_prefix(TABLE) {
            let (_, column) = cell.split_once("___").unwrap();
            assert!(columns.contains(column), "{key}");
        }
    }
}

/// The probe takes no more than 50 MB, and parses it again and again.
#[test]
fn a_full_answer_is_a_fraction_of_what_the_probe_takes() {
    let records: Vec<_> = (0..u16::try_from(crate::plugin::recent::MAX_FLOWS).unwrap() + 10)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            let client = pod(&format!("client-{number}"), "vm", &[&format!("10.1.{high}.{low}")]);
            let server = pod(&format!("server-{number}"), "other", &[&format!("10.2.{high}.{low}")]);
            let tuple = (&*format!("10.1.{high}.{low}"), &*format!("10.2.{high}.{low}"), 80);
            let more = json!({"direction": "egress", "process": {
                "pid": 10_000 + u32::from(number), "comm": "curl", "container": format!("{number:064x}"),
            }});
            record(client, server, tuple, more)
        })
        .collect();
    let recent = Recent::default();
    recent.add(&records);
    let text = render(&recent.seen(), &who(), Timestamp::from_nanos(1));
    assert!(
        (4 << 20..20 << 20).contains(&text.len()),
        "{} bytes",
        text.len()
    );
    let answer: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(
        latest(&answer, "Host", "vm;<host>", "microshield_left_out"),
        "10"
    );
}

/// It would be a second node for one pod.
#[test]
fn a_static_pod_is_left_to_scope() {
    let mut proxy = pod("proxy-vm", "vm", &["192.0.2.1"]);
    let to = |src: &Value| {
        let more = json!({"direction": "egress", "process": process(7)});
        answer(&[record(
            src.clone(),
            json!({"pod": {}}),
            ("192.0.2.1", "10.0.2.5", 80),
            more,
        )])
    };
    let pods = |answer: &Value| answer["Pod"]["nodes"].as_object().unwrap().len();
    assert_eq!(pods(&to(&proxy)), 1);
    proxy["pod"].as_object_mut().unwrap().remove("workload");
    let answer = to(&proxy);
    assert_eq!(pods(&answer), 0);
    assert_eq!(
        latest(&answer, "Process", "vm;7", "microshield_connections"),
        "1"
    );
}
