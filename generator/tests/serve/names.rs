//! Names that agents leave to the generator.

use std::{fs, path::Path};

use flow::{
    record::FlowRecord,
    wire::{AgentMessage, Encoding, GeneratorMessage, Resolve},
};
use serde_json::json;

use crate::{
    client::{Client, batch, hello},
    generator::{Generator, export, run},
};

const TOPOLOGY: &str = r#"
apiVersion: v1
kind: List
items:
- {kind: Node, apiVersion: v1, metadata: {name: node-1}, status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}}
- {kind: Node, apiVersion: v1, metadata: {name: node-2}, status: {addresses: [{type: InternalIP, address: 192.168.0.2}]}}
- kind: Service
  apiVersion: v1
  metadata: {name: cart, namespace: shop, uid: service-cart}
  spec: {clusterIP: 10.96.0.1, selector: {app: cart}, ports: [{port: 80, targetPort: 8080}]}
- kind: Pod
  apiVersion: v1
  metadata: {name: front, namespace: shop, uid: pod-front, labels: {app: front}}
  spec: {nodeName: node-1, containers: [{name: main}]}
  status: {phase: Running, podIP: 10.0.1.2, startTime: "2026-11-21T20:00:00Z"}
- kind: Pod
  apiVersion: v1
  metadata: {name: cart, namespace: shop, uid: pod-cart, labels: {app: cart}}
  spec: {nodeName: node-2, containers: [{name: main}]}
  status: {phase: Running, podIP: 10.0.2.3, startTime: "2026-11-21T20:00:00Z"}
"#;

/// A call of `front` to an address and port, as front's node sees it with `--resolve local`.
fn call(address: &str, port: u16) -> FlowRecord {
    serde_json::from_value(json!({
        "timestamp": 1_795_300_000.5, "hostname": "node-1", "direction": "egress", "count": 3,
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": address, "dst_port": port},
        "src": {"pod": {"id": "pod-front;<pod>", "namespace": "shop", "name": "front"}, "service": {}},
        "dst": {"pod": {}, "service": {}, "external": true},
    }))
    .unwrap()
}

fn local_hello() -> AgentMessage {
    let AgentMessage::Hello(mut hello) = hello("local") else {
        panic!("no hello");
    };
    hello.resolve = Resolve::Local;
    AgentMessage::Hello(hello)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test]
async fn the_generator_names_what_agents_leave_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let (data, file) = (
        folder.path().join("data"),
        folder.path().join("topology.yaml"),
    );
    fs::write(&file, TOPOLOGY).unwrap();
    let source = format!("file={}", text(&file));
    let generator = Generator::on(&data, &["--topology", &source]);
    let mut client = Client::connect(generator.address, Encoding::MessagePack).await;
    client.say(&local_hello()).await;
    let welcome = GeneratorMessage::Welcome { last_sequence: 0 };
    assert_eq!(client.hear().await.unwrap(), welcome);
    let calls = vec![
        call("10.0.2.3", 8080),
        call("10.96.0.1", 80),
        call("192.168.0.2", 10250),
        call("203.0.113.7", 443),
    ];
    client.deliver(1, calls).await;
    assert!(generator.terminate().0.success());

    let mut named: Vec<String> = export(&data)
        .iter()
        .map(|record| {
            let via = record
                .via
                .map_or_else(String::new, |via| format!(" via {via}"));
            format!(
                "{} -> {}:{}{via}",
                record.src, record.dst, record.tuple.dst_port
            )
        })
        .collect();
    named.sort();
    assert_eq!(
        named,
        [
            "shop/front -> 203.0.113.7:443",
            "shop/front -> node node-2:10250",
            "shop/front -> service shop/cart:8080 via 10.96.0.1:80",
            "shop/front -> shop/cart:8080",
        ]
    );
    // What its agent did not know of the end that it saw.
    let labels = |record: &FlowRecord| match &record.src {
        flow::endpoint::Endpoint::Pod { pod, .. } => pod.labels.clone(),
        other => panic!("{other}"),
    };
    assert!(
        export(&data)
            .iter()
            .all(|record| labels(record)["app"] == "front")
    );
}

#[tokio::test]
async fn without_a_topology_such_agents_are_sent_away() {
    let generator = Generator::start(&[]);
    let mut client = Client::connect(generator.address, Encoding::Json).await;
    client.say(&local_hello()).await;
    let end = client.end().await;
    assert!(end.refusal.unwrap().contains("--topology"));
    // Others are welcome.
    let (mut other, _) = Client::join(generator.address, "other").await;
    other.say(&batch(1, Vec::new())).await;
    let acknowledged = GeneratorMessage::Ack { sequence: 1 };
    assert_eq!(other.hear().await.unwrap(), acknowledged);
}

#[tokio::test]
async fn as_long_as_the_cluster_is_unknown_they_are_told_to_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("kubeconfig");
    // Nobody listens on the discard port.
    let text_of = "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}]\n\
         contexts: [{name: c, context: {cluster: c, user: c}}]\nusers: [{name: c, user: {}}]\n";
    fs::write(&kubeconfig, text_of).unwrap();
    let generator = Generator::start(&["--topology", "kube", "--kubeconfig", text(&kubeconfig)]);
    let mut client = Client::connect(generator.address, Encoding::Json).await;
    client.say(&local_hello()).await;
    let end = client.end().await;
    assert!(end.refusal.unwrap().contains("not known yet"));
    generator.wait_for_log("cannot be reached");
}

#[test]
fn a_topology_that_was_asked_for_and_cannot_be_is_wrong_usage() {
    for (arguments, reason) in [
        (&["--topology", "file=/nowhere"][..], "/nowhere"),
        (
            &["--topology", "kube", "--kubeconfig", "/nowhere"],
            "/nowhere",
        ),
        (
            &["--topology", "cube"],
            "expected kube, file=PATH, scope=URL or scope=PATH",
        ),
    ] {
        let mut all = vec!["serve", "--listen", "127.0.0.1:0"];
        all.extend(arguments);
        let output = run(&all);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(reason), "{said}");
    }
}

#[tokio::test]
async fn in_a_pod_without_a_token_the_generator_does_without() {
    let generator = Generator::start(&["--in-cluster", "10.96.0.1"]);
    generator.wait_for_log("will be sent away");
    Client::join(generator.address, "other").await;
}
