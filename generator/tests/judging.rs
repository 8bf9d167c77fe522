//! The commands that judge policies, as users run them: `audit`, `explain`, `diff`, and the proof of `generate`.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests are not seen as tests by clippy"
)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder in which the command runs.
struct Place(TempDir);

/// What the command said.
struct Answer {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, file: &str, text: &str) -> &Self {
        let path = self.0.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// Writes `flows.json`.
    fn flows(&self, records: &[Value]) -> &Self {
        let lines: Vec<String> = records.iter().map(ToString::to_string).collect();
        self.write("flows.json", &lines.join("\n"))
    }

    /// Writes `NAME.yaml` in a folder: a policy of the namespace `sock-shop`.
    fn policy(&self, folder: &str, name: &str, spec: &str) -> &Self {
        self.write(
            &format!("{folder}/{name}.yaml"),
            &format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: sock-shop}}\nspec: {spec}\n"
            ),
        )
    }

    fn run(&self, args: &str) -> Answer {
        let mut command = Command::new(env!("CARGO_BIN_EXE_microshield"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MICROSHIELD_") {
                command.env_remove(name);
            }
        }
        let output = command
            .args(args.split(' '))
            .current_dir(self.0.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        Answer {
            code: output.status.code().unwrap(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs a command that succeeds or answers no, and says nothing on standard error.
    fn answer(&self, args: &str, code: i32) -> String {
        let answer = self.run(args);
        assert_eq!((answer.code, answer.stderr.as_str()), (code, ""), "{args}");
        answer.stdout
    }

    /// Runs a command that refuses its input.
    fn refused(&self, args: &str, expected: &str) {
        let answer = self.run(args);
        assert_eq!(answer.code, 2, "{}", answer.stderr);
        assert!(answer.stderr.contains(expected), "{}", answer.stderr);
        assert_eq!(answer.stdout, "");
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/microshield")
}

fn pod(app: &str, extra: Value) -> Value {
    let mut pod = json!({
        "id": format!("uid-{app};<pod>"), "namespace": "sock-shop", "name": format!("{app}-5f495f9cf8-68w5j"),
        "labels": {"name": app}, "workload": {"kind": "Deployment", "name": app}, "node": "node-1",
    });
    pod.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    json!({"pod": pod, "service": {}})
}

/// Connections that the server's side saw.
fn record(src: (&str, &Value), dst: (&str, &Value), port: u16) -> Value {
    json!({
        "timestamp": 1_660_793_051.5, "first_seen": 1_660_793_041.5, "hostname": "node-1", "count": 3, "direction": "ingress",
        "tuple": {"src_addr": src.0, "src_port": 0, "dst_addr": dst.0, "dst_port": port},
        "src": src.1, "dst": dst.1,
    })
}

fn front_end_to_carts_db() -> Value {
    record(
        ("10.0.1.167", &pod("front-end", json!({}))),
        ("10.0.0.5", &pod("carts-db", json!({}))),
        27017,
    )
}

const SELECT_DB: &str = "podSelector: {matchLabels: {name: carts-db}}";

#[test]
fn a_blocked_flow_is_told_in_one_sentence() {
    let place = Place::new();
    place.flows(&[front_end_to_carts_db()]);
    place.policy("one", "policy-carts-db", &format!("{{{SELECT_DB}}}"));
    let head = "TCP connection from sock-shop/front-end (10.0.1.167) to sock-shop/carts-db (10.0.0.5):27017 would be blocked: ";
    assert_eq!(
        place.answer("audit -f flows.json -p one", 1),
        format!(
            "{head}ingress of policy-carts-db has no rule for it\n\
             flows: 1 judged, 0 allowed, 1 would be blocked; failed attempts, not judged: 0; policies: 1\n"
        )
    );

    place
        .policy("more", "a", "{}")
        .policy("more", "b", &format!("{{{SELECT_DB}}}"))
        .policy(
            "more",
            "c",
            "{policyTypes: [Egress], podSelector: {matchLabels: {name: front-end}}}",
        )
        .policy(
            "more",
            "d",
            "{policyTypes: [Egress], podSelector: {matchLabels: {name: carts}}}",
        );
    let text = place.answer("audit -f flows.json -p more", 1);
    let sentence = "egress of c has no rule for it, and ingress of a and b has no rule for it\n";
    assert!(text.starts_with(&format!("{head}{sentence}")), "{text}");

    let json: Value =
        serde_json::from_str(&place.answer("audit -f flows.json -p more --json", 1)).unwrap();
    assert_eq!(json["allowed"], 0);
    assert_eq!(json["blocked"][0]["count"], 3);
    assert_eq!(
        json["blocked"][0]["client"],
        "sock-shop/front-end-5f495f9cf8-68w5j"
    );
    let denials = json!([
        {"direction": "egress", "policies": ["sock-shop/c"]},
        {"direction": "ingress", "policies": ["sock-shop/a", "sock-shop/b"]},
    ]);
    assert_eq!(json["blocked"][0]["denials"], denials);
}

#[test]
fn other_ends_are_named_as_they_are() {
    let place = Place::new();
    let external = json!({"pod": {}, "service": {}});
    let node = json!({"pod": {}, "service": {}, "node": {"name": "node-2"}});
    let mut outwards = record(
        ("fd00::7", &pod("carts-db", json!({}))),
        ("2001:db8::1", &external),
        443,
    );
    outwards["protocol"] = "UDP".into();
    place.flows(&[
        record(
            ("192.0.2.7", &external),
            ("10.0.0.5", &pod("carts-db", json!({}))),
            80,
        ),
        record(
            ("10.1.0.2", &node),
            ("10.0.0.5", &pod("carts-db", json!({}))),
            81,
        ),
        outwards,
    ]);
    place.policy("p", "db", "{policyTypes: [Ingress, Egress]}");
    let text = place.answer("audit -f flows.json -p p", 1);
    for expected in [
        "TCP connection from 192.0.2.7 to sock-shop/carts-db (10.0.0.5):80 would be blocked: ingress of db",
        "TCP connection from node node-2 (10.1.0.2) to sock-shop/carts-db (10.0.0.5):81 would be blocked: ingress of db",
        "UDP connection from sock-shop/carts-db (fd00::7) to [2001:db8::1]:443 would be blocked: egress of db",
    ] {
        assert!(text.contains(expected), "{text}\n{expected}");
    }
}

#[test]
fn what_failed_need_not_be_allowed() {
    let place = Place::new();
    let mut failed = front_end_to_carts_db();
    failed["outcome"] = "failed".into();
    place.flows(&[failed]).policy("p", "deny", "{}");
    assert_eq!(
        place.answer("audit -f flows.json -p p", 0),
        "flows: 0 judged, 0 allowed, 0 would be blocked; failed attempts, not judged: 3; policies: 1\n"
    );
}

#[test]
fn the_clusters_objects_tell_what_flows_do_not() {
    let place = Place::new();
    place.flows(&[front_end_to_carts_db()]).write(
        "cluster.yaml",
        "apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Namespace, metadata: {name: sock-shop, labels: {env: prod}}}
- apiVersion: v1
  kind: Pod
  metadata: {name: carts-db-5f495f9cf8-68w5j, namespace: sock-shop, uid: uid-carts-db, labels: {name: carts-db}}
  spec: {nodeName: node-1, containers: [{name: c, ports: [{name: mongo, containerPort: 27017}]}]}
  status: {phase: Running, podIP: 10.0.0.5, podIPs: [{ip: 10.0.0.5}]}
",
    );
    // The name of a namespace is known from flows.
    place.policy(
        "names",
        "db",
        &format!("{{{SELECT_DB}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: sock-shop}}}}}}]}}]}}"),
    );
    place.answer("audit -f flows.json -p names", 0);
    for (name, rule, hint) in [
        (
            "labels",
            "from: [{namespaceSelector: {matchLabels: {env: prod}}}]",
            "labels of namespaces that flow records do not tell, and are judged as if there were none of them: `env`;",
        ),
        (
            "ports",
            "ports: [{port: mongo}]",
            "names of ports of pods that flow records do not tell, and are judged as if there were none of them: `mongo`;",
        ),
    ] {
        place.policy(
            name,
            "db",
            &format!("{{{SELECT_DB}, ingress: [{{{rule}}}]}}"),
        );
        let args = format!("audit -f flows.json -p {name}");
        let answer = place.run(&args);
        assert_eq!(answer.code, 1);
        assert!(answer.stderr.contains(hint), "{}", answer.stderr);
        assert!(answer.stderr.contains("--topology"), "{}", answer.stderr);
        let json: Value =
            serde_json::from_str(&place.run(&format!("{args} --json")).stdout).unwrap();
        assert!(json["hints"][0].as_str().unwrap().contains(hint), "{json}");
        for other in [
            format!("explain -f flows.json -p {name} sock-shop/db"),
            format!("diff -f flows.json -p {name} -p {name}"),
        ] {
            let answer = place.run(&other);
            assert!(answer.stderr.contains(hint), "{other}: {}", answer.stderr);
        }
        place.answer(&format!("diff -p {name} -p {name}"), 0);
        place.answer(
            &format!("audit -f flows.json -p {name} --topology file=cluster.yaml"),
            0,
        );
    }
}

/// With the cluster's objects the proof of `generate` is about all pods, and not only about those with flows.
#[test]
fn a_proof_may_be_about_the_whole_cluster() {
    let place = Place::new();
    place.flows(&[front_end_to_carts_db()]).write(
        "cluster.yaml",
        "apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Pod
  metadata: {name: idle, namespace: sock-shop, uid: uid-idle, labels: {name: front-end, idle: \"yes\"}}
  spec: {nodeName: node-1, containers: [{name: c}]}
  status: {phase: Running, podIP: 10.0.0.9, podIPs: [{ip: 10.0.0.9}]}
",
    );
    let args = "generate -f flows.json -o p -n sock-shop -a";
    let proof = |args: &str| {
        let json: Value = serde_json::from_str(&place.answer(args, 0)).unwrap();
        json["proof"].clone()
    };
    let of_flows = proof(&format!("{args} --json"));
    let of_cluster = proof(&format!("{args} --json --topology file=cluster.yaml"));
    assert_eq!(
        (&of_flows["reachable_before"], &of_flows["never_seen"]),
        (&json!(2), &json!(0))
    );
    assert_eq!(
        (&of_cluster["reachable_before"], &of_cluster["never_seen"]),
        (&json!(6), &json!(1))
    );
    assert_eq!(of_cluster["denied"], json!([]));
    place.refused(&format!("{args} --topology file=none.yaml"), "none.yaml");
}

#[test]
fn bad_input_is_named_and_can_be_skipped() {
    let place = Place::new();
    let good = front_end_to_carts_db().to_string();
    place.write(
        "flows.json",
        &format!(
            "{good}\n{}\n",
            good.replace("\"TCP\"", "\"\"").replace("hostname", "host")
        ),
    );
    place.policy("p", "a", "{ingress: [{}]}");
    place.refused("audit -f flows.json -p p", "flows.json: line 2");
    place.write(
        "p/b.yaml",
        "apiVersion: v1\nkind: Service\nmetadata: {name: x}\n",
    );
    place.refused(
        "audit -f flows.json -p p",
        "p/b.yaml: line 1: Service x: not a NetworkPolicy",
    );
    let answer = place.run("audit -f flows.json -p p --keep-going");
    assert_eq!(answer.code, 0, "{}", answer.stderr);
    assert!(
        answer
            .stdout
            .ends_with("policies: 1; lines skipped: 1; objects skipped: 1\n"),
        "{}",
        answer.stdout
    );
    assert_eq!(answer.stderr.lines().count(), 2, "{}", answer.stderr);
    // That nothing is blocked would say nothing.
    place
        .write("empty.json", "")
        .policy("q/deeper", "a", "{ingress: [{}]}");
    place.refused(
        "audit -f empty.json -p p --keep-going",
        "no flow record was read",
    );
    place.refused(
        "audit -f flows.json -p q --keep-going",
        "q: no policy in it",
    );
    place.refused("audit -f missing.json -p p --keep-going", "missing.json");
    place.refused("audit -f flows.json -p missing", "missing");
    place.refused(
        "audit -f flows.json -p p --keep-going --topology file=missing.yaml",
        "missing.yaml",
    );
    place.refused(
        "audit -f flows.json -p p --topology kubernetes",
        "unknown source `kubernetes`: expected kube, file=PATH",
    );
}

#[test]
fn a_rule_is_explained_by_the_flows_that_need_it() {
    let place = Place::new();
    let mut by_client = front_end_to_carts_db();
    by_client["direction"] = "egress".into();
    by_client["timestamp"] = json!(1_660_793_061.5);
    place.flows(&[front_end_to_carts_db(), by_client]).policy(
        "p",
        "db",
        &format!(
            "{{{SELECT_DB}, ingress: [{{ports: [{{port: 80}}]}}, {{ports: [{{port: 27017}}]}}]}}"
        ),
    );
    assert_eq!(
        place.answer("explain -f flows.json -p p sock-shop/db", 0),
        "sock-shop/db selects 1 of the known pods, nothing new was seen of them for 20s\n\
         ingress[0]: no flow asked for it\n\
         ingress[1]: flows: 1, connections: 3, from 2022-08-18T03:24:01Z to 2022-08-18T03:24:21Z, seen by both, by 1 of 1 pods\n  \
         sock-shop/front-end-5f495f9cf8-68w5j (10.0.1.167) -> sock-shop/carts-db-5f495f9cf8-68w5j (10.0.0.5) 27017/TCP: \
         3 times from 2022-08-18T03:24:01Z to 2022-08-18T03:24:21Z, seen by both\n\
         egress: not concerned\n"
    );
    let json: Value =
        serde_json::from_str(&place.answer("explain -f flows.json -p p sock-shop/db --json", 0))
            .unwrap();
    assert_eq!(json["pods"], 1);
    assert_eq!(json["ingress"][0]["flows"], json!([]));
    assert_eq!(json["ingress"][0].get("count"), None);
    assert_eq!(json["ingress"][1]["flows"][0]["seen_by_client"], 3);
    let of_rule = &json["ingress"][1];
    assert_eq!(
        (
            &of_rule["count"],
            &of_rule["pods"],
            &of_rule["of_pods"],
            &of_rule["seen_by"]
        ),
        (&json!(3), &json!(1), &json!(1), &json!("both"))
    );
    assert_eq!(of_rule["last_seen"], json!(1_660_793_061.5));
    assert_eq!(json["quiet_seconds"], json!(20.0));
    assert_eq!(json["egress"], Value::Null);
    place.refused(
        "explain -f flows.json -p p sock-shop/web",
        "p: no policy sock-shop/web",
    );
    place.refused(
        "explain -f flows.json -p p db",
        "p: no policy db (NAMESPACE/NAME)",
    );
}

#[test]
fn folders_are_compared_by_what_they_allow() {
    let place = Place::new();
    let rule = |ports: &str| {
        format!("{{{SELECT_DB}, ingress: [{{from: [{{podSelector: {{}}}}], ports: [{ports}]}}]}}")
    };
    place
        .policy("before", "db", &rule("{port: 27017}"))
        .policy(
            "same",
            "other-name",
            &rule("{port: 27017, endPort: 27017, protocol: TCP}"),
        )
        .policy("after", "db", &rule("{port: mongo}"))
        .flows(&[front_end_to_carts_db()]);
    assert_eq!(
        place.answer("diff -p before -p same", 0),
        "opened: 0, closed: 0; pairs of endpoints: 21\n"
    );
    assert_eq!(
        place.answer("diff -p before:same", 0),
        place.answer("diff -p before -p same", 0)
    );
    // Without a cluster any pod may call the port.
    let text = place.answer("diff -p before -p after", 1);
    let end = "opened: 2, closed: 2; pairs of endpoints: 21\n";
    assert!(text.ends_with(end), "{text}");
    for expected in [
        "+ sock-shop/(other pods) -> sock-shop/(name=carts-db) mongo/TCP: ingress[0] of sock-shop/db\n",
        "- sock-shop/(other pods) -> sock-shop/(name=carts-db) 27017/TCP: ingress of sock-shop/db has no rule for it, as ingress[0] of sock-shop/db had\n",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    // No pod is known to have a port of that name.
    let line = "- sock-shop/front-end -> sock-shop/carts-db 27017/TCP: ingress of sock-shop/db has no rule for it, as ingress[0] of sock-shop/db had\n";
    let answer = place.run("diff -p before -p after -f flows.json");
    assert_eq!(
        (answer.code, answer.stdout),
        (
            1,
            format!("{line}opened: 0, closed: 1; pairs of endpoints: 2\n")
        )
    );
    assert!(
        answer.stderr.contains("names of ports"),
        "{}",
        answer.stderr
    );
    let json: Value =
        serde_json::from_str(&place.answer("diff -p before -p after --json", 1)).unwrap();
    assert_eq!(json["named_ports"][0]["name"], "mongo");
    assert_eq!(json["changes"].as_array().unwrap().len(), 4);
    place.refused("diff -p before", "-p BEFORE -p AFTER");
}

#[test]
fn microshields_own_policies_block_the_clients_that_have_no_service() {
    let place = Place::new();
    let fixtures = fixtures();
    let (flows, golden) = (
        fixtures.join("linked.json"),
        fixtures.join("golden/sock-shop-svc"),
    );
    let args = format!("audit -f {} -p {}", flows.display(), golden.display());
    let text = place.answer(&args, 1);
    let blocked: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("would be blocked:"))
        .collect();
    assert_eq!(blocked.len(), 4, "{text}");
    assert!(
        blocked
            .iter()
            .all(|line| line.starts_with("TCP connection from weave/weave-scope-agent-")),
        "{text}"
    );

    let flows = flows.display();
    let text = place.answer(&format!("generate -f {flows} -o ours -n sock-shop -a"), 0);
    assert!(text.contains("\nflows allowed: 25, denied: 0\n"), "{text}");
    place.answer(&format!("audit -f {flows} -p ours"), 0);
    let json = place.answer(
        &format!("generate -f {flows} -o ours -n sock-shop -a --json"),
        0,
    );
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["proof"]["allowed"], 25);
    assert_eq!(json["proof"]["denied"], json!([]));
}
