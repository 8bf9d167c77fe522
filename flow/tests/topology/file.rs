//! Topology files, good and bad.

use std::{fs, path::Path};

use flow::topology::file::{self, FileError, Loaded};

fn parse(text: &str) -> Result<Loaded, FileError> {
    file::parse(Path::new("cluster.yaml"), text.as_bytes())
}

const POD: &str = "apiVersion: v1
kind: Pod
metadata:
  name: cart
  namespace: shop
  uid: 1
spec:
  nodeName: node-1
status:
  phase: Running
  podIP: 10.0.0.1
";

/// `text` as an item of a list.
fn item(text: &str) -> String {
    let indented = text.trim_end().replace('\n', "\n  ");
    format!("- {indented}\n")
}

fn list(items: &[&str]) -> String {
    let items: String = items.iter().map(|text| item(text)).collect();
    format!("apiVersion: v1\nitems:\n{items}kind: List\n")
}

fn good(uid: &str) -> String {
    POD.replace("uid: 1", &format!("uid: '{uid}'"))
}

#[test]
fn all_forms_give_the_same_objects() {
    let pod = good("1");
    let expected = parse(&pod).unwrap();
    assert_eq!(expected.objects.pods.len(), 1);
    let value: serde_json::Value = serde_yaml::from_str(&pod).unwrap();
    let mut bare = value.clone();
    bare.as_object_mut().unwrap().remove("kind");
    bare.as_object_mut().unwrap().remove("apiVersion");
    for text in [
        list(&[&pod]),
        format!("---\n{pod}---\n---\n"),
        value.to_string(),
        serde_json::json!({"kind": "List", "apiVersion": "v1", "items": [value]}).to_string(),
        // The API's own lists leave the kind out of the items.
        serde_json::json!({"kind": "PodList", "apiVersion": "v1", "items": [bare]}).to_string(),
        serde_json::json!({"apiVersion": "v1", "items": [bare], "kind": "PodList"}).to_string(),
        format!(
            "{value}\n{}",
            serde_json::json!({"kind": "ServiceList", "apiVersion": "v1", "items": null})
        ),
        // Not JSON, but YAML that begins like it.
        "{apiVersion: v1, kind: Pod, metadata: {name: cart, namespace: shop, uid: '1'}, \
          spec: {nodeName: node-1}, status: {phase: Running, podIP: 10.0.0.1}}"
            .to_owned(),
    ] {
        assert_eq!(parse(&text).unwrap(), expected, "{text}");
    }
}

#[test]
fn other_kinds_are_counted() {
    let replica_set = "apiVersion: apps/v1\nkind: ReplicaSet\nmetadata: {name: x}\n";
    let knative = "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: x}\n";
    let loaded = parse(&list(&[replica_set, &good("1"), replica_set, knative])).unwrap();
    assert_eq!(loaded.objects.len(), 1);
    let skipped: Vec<_> = loaded
        .skipped
        .iter()
        .map(|(k, n)| (k.as_str(), *n))
        .collect();
    assert_eq!(
        skipped,
        [("ReplicaSet", 2), ("Service of serving.knative.dev/v1", 1)]
    );
    assert!(loaded.warnings.is_empty());
}

/// `broken` among good objects is left out, with exactly this warning.
fn check_warning(broken: &str, expected: &str) {
    let text = list(&[&good("1"), broken, &good("2")]);
    let loaded = parse(&text).unwrap();
    assert_eq!(loaded.objects.pods.len(), 2, "{text}");
    assert_eq!(loaded.warnings, [expected], "{text}");
}

#[test]
fn a_malformed_object_is_named_with_file_line_and_field() {
    // The second item begins on line 14.
    check_warning(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: cart\n  namespace: shop\n  labels:\n    version: 1.10\n",
        "cluster.yaml:20: Pod shop/cart (item 2): metadata.labels.version: \
         invalid type: floating point `1.1`, expected a string",
    );
    check_warning(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: cart\n  namespace: shop\nstatus:\n  podIP: 10.0.0.300\n",
        "cluster.yaml:20: Pod shop/cart (item 2): status.podIP: `10.0.0.300` is not an IP address",
    );
    check_warning(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: 80\n  - port: 70000\n",
        "cluster.yaml:21: Service web (item 2): spec.ports[1].port: `70000` is not a port from 1 to 65535",
    );
    check_warning(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec: none\n",
        "cluster.yaml:18: Service web (item 2): spec: invalid type: string \"none\", expected ServiceSpec",
    );
    check_warning(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: node-1\nspec:\n  podCIDRs:\n  - 10.0.0.0\n",
        "cluster.yaml:20: Node node-1 (item 2): spec.podCIDRs[0]: `10.0.0.0` is not an address range",
    );
    check_warning(
        "apiVersion: v1\nkind: Namespace\nmetadata: {}\n",
        "cluster.yaml:16: Namespace (item 2): metadata.name: `` is not a name",
    );
    check_warning(
        "apiVersion: v1\nmetadata: {name: cart}\n",
        "cluster.yaml:14: object cart (item 2): it has no `kind`",
    );
    check_warning(
        "just text\n",
        "cluster.yaml:14: object (item 2): it has no `kind`",
    );
}

#[test]
fn the_line_is_found_in_json_and_later_documents_too() {
    let pod = r#"{"apiVersion": "v1", "kind": "Pod",
 "metadata": {"name": "cart", "namespace": "shop", "uid": "1"}}
"#;
    let broken = pod.replace(r#""uid": "1""#, r#""uid": 1"#);
    let loaded = parse(&format!("{pod}{broken}")).unwrap();
    assert_eq!(
        loaded.warnings[0],
        "cluster.yaml:4: Pod shop/cart (document 2): metadata.uid: \
         invalid type: integer `1`, expected a string"
    );
    let loaded = parse(&format!("{}---\n{POD}", good("2"))).unwrap();
    assert_eq!(
        loaded.warnings[0],
        "cluster.yaml:18: Pod shop/cart (document 2): metadata.uid: \
         invalid type: integer `1`, expected a string"
    );
}

#[test]
fn many_malformed_objects_are_counted() {
    let text = list(&vec![POD; 250]);
    let loaded = parse(&text).unwrap();
    assert_eq!(loaded.warnings.len(), 101);
    assert_eq!(
        loaded.warnings[100],
        "cluster.yaml: 150 more malformed objects"
    );
}

#[test]
fn what_is_hardly_meant_is_said() {
    let without_address = good("2").replace("  podIP: 10.0.0.1\n", "");
    let pending = good("3")
        .replace("  podIP: 10.0.0.1\n", "")
        .replace("Running", "Pending");
    let twice = good("1").replace("cart", "copy");
    let loaded = parse(&list(&[&good("1"), &without_address, &pending, &twice])).unwrap();
    assert_eq!(loaded.objects.pods.len(), 4);
    assert_eq!(
        loaded.warnings,
        [
            "cluster.yaml: pods that are running and have no address: shop/cart",
            "cluster.yaml: pods with one uid, of which only the last is known: shop/cart and shop/copy",
        ]
    );
}

/// Such a file is refused with a message that begins so.
fn check_refused(text: &str, expected: &str) {
    let message = parse(text).unwrap_err().to_string();
    assert!(message.starts_with(expected), "{message}");
    assert!(message.len() < 500, "{message}");
}

#[test]
fn what_is_no_list_of_objects_is_refused() {
    check_refused("", "cluster.yaml: empty");
    check_refused("\n# nothing yet\n---\n", "cluster.yaml: empty");
    check_refused(
        "hello, world\n",
        "cluster.yaml:1:1: invalid type: string \"hello, world\", expected a Kubernetes object or a list of them",
    );
    check_refused(
        "a: 1\nb: 2\n",
        "cluster.yaml:1:1: neither `kind` nor `apiVersion`",
    );
    check_refused(
        "kind: List\nitems: 5\n",
        "cluster.yaml:2:8: items: invalid type: integer `5`",
    );
    check_refused(
        "kind: List\nitems:\n- a: [1, 2\n- b\n",
        "cluster.yaml:5:1: did not find expected ',' or ']', while parsing a flow sequence at line 3 column 6",
    );
    check_refused(
        "kind: List\nitems:\n- a: 1\n  a: 2\n",
        "cluster.yaml:3:3: items[0]: duplicate entry with key \"a\"",
    );
    check_refused(
        "\t\tkind: List\n",
        "cluster.yaml:1:1: found character that cannot start any token",
    );
    check_refused(
        "{\"kind\": \"List\",\n \"items\": [}",
        "cluster.yaml:2:12: expected value",
    );
    check_refused(
        &"x".repeat(100_000),
        "cluster.yaml:1:1: invalid type: string",
    );
    let binary = file::parse(
        Path::new("cluster.yaml"),
        &[0x7f, b'E', b'L', b'F', 2, 0, 0xff],
    );
    assert!(matches!(binary, Err(FileError::Malformed { .. })));
}

#[test]
fn hostile_files_are_refused_without_harm() {
    // More than either parser goes into, and few enough for libyaml, which takes quadratic time over them.
    let deep = 2_000;
    let nested = format!(
        "kind: List\nitems:\n- a: {}{}\n",
        "[".repeat(deep),
        "]".repeat(deep)
    );
    check_refused(&nested, "cluster.yaml:3:");
    check_refused(
        &nested.replace("kind: List\nitems:\n- a: ", ""),
        "cluster.yaml:1:",
    );
    check_refused(&format!("{{\"a\": {}", "[".repeat(deep)), "cluster.yaml:1:");
    check_refused(&"{".repeat(deep), "cluster.yaml:1:");
    check_refused(&"- ".repeat(deep), "cluster.yaml:1:");
    // Each line doubles what the one before stands for.
    let mut bomb = "kind: ConfigMap\na0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for i in 1..30 {
        let alias = format!("*a{}", i - 1);
        bomb.push_str(&format!(
            "a{i}: &a{i} [{alias}, {alias}, {alias}, {alias}]\n"
        ));
    }
    check_refused(&bomb, "cluster.yaml:1:1: repetition limit exceeded");
}

#[test]
fn files_are_read_and_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cluster.yaml");
    let Err(FileError::Io { .. }) = file::load(&path) else {
        panic!("there is no file yet");
    };
    assert!(file::fingerprint(&path).is_err());

    fs::write(&path, good("1")).unwrap();
    assert_eq!(file::load(&path).unwrap().objects.len(), 1);
    let first = file::fingerprint(&path).unwrap();
    assert_eq!(first, file::fingerprint(&path).unwrap());
    // Replaced by another of the same length.
    let other = folder.path().join("other.yaml");
    fs::write(&other, good("2")).unwrap();
    fs::rename(&other, &path).unwrap();
    assert_ne!(first, file::fingerprint(&path).unwrap());

    let sparse = fs::File::create(&path).unwrap();
    sparse.set_len(file::MAX_FILE_BYTES + 1).unwrap();
    assert!(matches!(file::load(&path), Err(FileError::TooLarge { .. })));
    assert!(matches!(
        file::load(folder.path()),
        Err(FileError::Io { .. })
    ));
}
