use super::*;

const POLICY: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: NAME
  namespace: shop
spec:
  podSelector:
    matchLabels:
      app: web
";

fn policy(name: &str) -> String {
    POLICY.replace("NAME", name)
}

/// Reads a folder with these files.
fn read_files(
    files: &[(&str, &str)],
    options: Options<'_>,
) -> (tempfile::TempDir, Result<Folder, PolicyFilesError>) {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let read = read(folder.path(), options);
    (folder, read)
}

fn names(files: &[(&str, &str)]) -> Vec<String> {
    let (_folder, read) = read_files(files, Options::default());
    let policies = read.unwrap().policies;
    policies
        .ids()
        .map(|id| policies.get(id).to_string())
        .collect()
}

/// A file with this text is refused with this message, and skipped beside a good one.
fn refused(text: &str, expected: &str) {
    let files = [("bad.yaml", text), ("good.yaml", &policy("good"))];
    let (folder, result) = read_files(&files, Options::default());
    let error = result.unwrap_err().to_string();
    let path = folder.path().join("bad.yaml");
    assert_eq!(error, format!("{}: {expected}", path.display()), "{text}");

    let skip = Options {
        keep_going: true,
        ..Options::default()
    };
    let kept = read(folder.path(), skip).unwrap();
    assert_eq!(kept.skipped, 1);
    assert_eq!(kept.problems[0].to_string(), error);
    assert!(kept.policies.find("shop", "good").is_some());
}

#[test]
fn every_form_that_kubectl_takes_is_read() {
    let json = serde_json::to_string_pretty(
        &serde_yaml::from_str::<serde_json::Value>(&policy("c")).unwrap(),
    )
    .unwrap();
    let indented = |name| policy(name).replace('\n', "\n  ");
    let list = format!(
        "apiVersion: v1\nkind: List\nitems:\n- {}\n- {}\n",
        indented("d").trim_end(),
        indented("e").trim_end()
    );
    let policies = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicyList, items: [{metadata: {name: f, namespace: bank}}]}";
    let empty = "{\"apiVersion\": \"v1\", \"kind\": \"List\", \"items\": null}";
    let found = names(&[
        (
            "1.yaml",
            &format!("---\n{}---\n---\n{}", policy("b"), policy("a")),
        ),
        (
            "2.json",
            &format!("{json}\n{}", json.replace("\"c\"", "\"g\"")),
        ),
        ("3.yml", &list),
        ("4.yaml", policies),
        ("5.json", empty),
        ("README.md", "no policy"),
        ("6.yaml.orig", "no policy"),
    ]);
    let expected = [
        "bank/f", "shop/a", "shop/b", "shop/c", "shop/d", "shop/e", "shop/g",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_single_file_is_read_and_folders_below_are_not() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("below.yaml")).unwrap();
    fs::write(folder.path().join("below.yaml/x.yaml"), "no policy").unwrap();
    let file = folder.path().join("policies");
    fs::write(&file, policy("a")).unwrap();
    assert!(
        read(folder.path(), Options::default())
            .unwrap()
            .policies
            .is_empty()
    );
    assert_eq!(read(&file, Options::default()).unwrap().policies.len(), 1);
}

#[test]
fn what_is_no_policy_is_named() {
    refused(
        "# Of our shop.\nkind: Deployment\napiVersion: apps/v1\nmetadata: {namespace: shop, name: web}\n",
        "line 2: Deployment shop/web: not a NetworkPolicy of networking.k8s.io/v1",
    );
    refused(
        &policy("a").replace("networking.k8s.io/v1", "extensions/v1beta1"),
        "line 1: NetworkPolicy shop/a: field `apiVersion`: only networking.k8s.io/v1 is understood, not extensions/v1beta1",
    );
    refused(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a}\n",
        "line 1: CiliumNetworkPolicy a: not a NetworkPolicy of networking.k8s.io/v1",
    );
    refused("- a\n", "line 1: object: not a Kubernetes object");
    refused(
        "apiVersion: v1\nkind: List\nitems: {}\n",
        "line 1: List: not a NetworkPolicy of networking.k8s.io/v1",
    );
}

#[test]
fn what_is_malformed_is_named_with_line_and_field() {
    refused(
        &policy("a").replace("app: web", "app: 7"),
        "line 9: NetworkPolicy shop/a: field `spec.podSelector.matchLabels.app`: invalid type: integer `7`, expected a string",
    );
    refused(
        &policy("a").replace("matchLabels", "matchLabel"),
        "line 8: NetworkPolicy shop/a: field `spec.podSelector.matchLabel`: not a field of a NetworkPolicy",
    );
    refused(
        &policy("a").replace(
            "    matchLabels:",
            "    matchLabels: {}\n    matchExpression:",
        ),
        "line 9: NetworkPolicy shop/a: field `spec.podSelector.matchExpression`: not a field of a NetworkPolicy",
    );
    refused(
        &policy("a").replace("spec:", "specs:"),
        "line 6: NetworkPolicy shop/a: field `specs`: not a field of a NetworkPolicy",
    );
    refused(
        &policy("a").replace("  namespace: shop\n", ""),
        "line 4: NetworkPolicy a: field `metadata.namespace`: is missing",
    );
    refused(
        &format!("{}  ingress:\n  - from:\n    - {{}}\n", policy("a")),
        "line 12: NetworkPolicy shop/a: field `spec.ingress[0].from[0]`: has none of `podSelector`, `namespaceSelector` and `ipBlock`",
    );
    let in_list = format!(
        "apiVersion: v1\nkind: List\nitems:\n- {}\n",
        policy("a")
            .replace("web", "w b")
            .replace('\n', "\n  ")
            .trim_end()
    );
    refused(
        &in_list,
        "line 12: NetworkPolicy shop/a: field `spec.podSelector.matchLabels.app`: `w b` is not the value of a label",
    );
    refused(
        &format!("{}{}", policy("a"), "    matchLabels: {}\n"),
        "line 8, column 5: spec.podSelector: duplicate entry with key \"matchLabels\"",
    );
    refused(
        &format!("{}---\nkind: [\n", policy("a")),
        "line 12, column 1: did not find expected node content",
    );
    refused(
        &format!("{}---\n{}", policy("twin"), policy("twin")),
        "line 14: NetworkPolicy shop/twin: field `metadata.name`: another policy has the same namespace and name",
    );
}

#[test]
fn metadata_of_any_version_and_a_status_are_no_mistake() {
    let text = format!("{}status: {{}}\n", policy("a"))
        .replace("  namespace: shop", "  namespace: shop\n  clusterName: x");
    assert_eq!(names(&[("a.yaml", &text)]), ["shop/a"]);
}

#[test]
fn a_namespace_can_be_given_to_policies_without() {
    let text = policy("a").replace("  namespace: shop\n", "");
    let options = Options {
        namespace: Some("bank"),
        ..Options::default()
    };
    let (_folder, read) = read_files(&[("a.yaml", &text), ("b.yaml", &policy("b"))], options);
    let policies = read.unwrap().policies;
    assert!(policies.find("bank", "a").is_some());
    assert!(policies.find("shop", "b").is_some());
}

#[test]
fn a_folder_or_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let error = read(&missing, Options::default()).unwrap_err().to_string();
    assert!(error.starts_with(&missing.display().to_string()), "{error}");

    let large = folder.path().join("large.yaml");
    File::create(&large)
        .unwrap()
        .set_len(MAX_FILE_BYTES + 1)
        .unwrap();
    let error = read(folder.path(), Options::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{}: larger than 67108864 bytes", large.display())
    );
}
