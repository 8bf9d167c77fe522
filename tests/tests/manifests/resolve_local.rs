//! The component `components/local-resolve`, and what it makes of the base.

use std::fs;

use agent::args::{Args, Resolve};
use clap::Parser as _;
use flow::source::{Scope, Source};
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::PodTemplateSpec,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    command_lines::words,
    load::{Manifests, container, deploy, load, spec},
    references::binds,
    rights::allows_reading,
};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Component {
    api_version: String,
    kind: String,
    resources: Vec<String>,
    patches: Vec<Patch>,
}

/// Either a file, to be laid over the object of its name, or operations on a target.
#[derive(Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Patch {
    File { path: String },
    Operations { target: Target, patch: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Target {
    kind: String,
    name: String,
}

/// As RFC 6902 has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Operation {
    op: String,
    path: String,
    value: Value,
}

fn component() -> Component {
    let text =
        fs::read_to_string(deploy().join("components/local-resolve/kustomization.yaml")).unwrap();
    let component: Component = serde_yaml::from_str(&text).unwrap();
    assert_eq!(
        (component.api_version.as_str(), component.kind.as_str()),
        ("kustomize.config.k8s.io/v1alpha1", "Component")
    );
    component
}

/// The base's object with the operations on it.
fn patched<T: Serialize + DeserializeOwned>(kind: &str, name: &str, object: &T) -> T {
    let mut value = serde_json::to_value(object).unwrap();
    let mut count = 0;
    for patch in component().patches {
        let Patch::Operations { target, patch } = patch else {
            continue;
        };
        if (target.kind.as_str(), target.name.as_str()) != (kind, name) {
            continue;
        }
        let operations: Vec<Operation> = serde_yaml::from_str(&patch).unwrap();
        for Operation {
            op,
            path,
            value: new,
        } in operations
        {
            count += 1;
            match (op.as_str(), path.strip_suffix("/-")) {
                ("add", Some(list)) => {
                    let list = value.pointer_mut(list).and_then(Value::as_array_mut);
                    list.unwrap_or_else(|| panic!("{path}")).push(new);
                }
                ("replace", None) => {
                    let old = value.pointer_mut(&path);
                    *old.unwrap_or_else(|| panic!("{path}")) = new;
                }
                _ => panic!("{op} {path}: not known here"),
            }
        }
    }
    assert!(count > 0, "nothing changes {kind} {name}");
    serde_json::from_value(value).unwrap()
}

fn agent() -> PodTemplateSpec {
    let base = load();
    let daemon_set: DaemonSet = patched("DaemonSet", "microshield-agent", &base.daemon_sets[0]);
    daemon_set.spec.template
}

fn generator() -> PodTemplateSpec {
    let base = load();
    let deployment: Deployment =
        patched("Deployment", "microshield-generator", &base.deployments[0]);
    deployment.spec.template
}

/// The objects in the component's files.
fn own() -> Manifests {
    let component = component();
    let mut own = Manifests::default();
    for file in &component.resources {
        own.read(&format!("components/local-resolve/{file}"));
    }
    for patch in &component.patches {
        if let Patch::File { path } = patch {
            own.read(&format!("components/local-resolve/{path}"));
        }
    }
    own
}

#[test]
fn agents_leave_names_to_the_generator() {
    let args = Args::try_parse_from(words("microshield-agent", container(&agent()))).unwrap();
    assert_eq!(args.topology.source(), Source::Kube);
    assert_eq!(args.resolve, Resolve::Local);

    let template = generator();
    assert_eq!(spec(&template).automount_service_account_token, Some(true));
    let mut words = words("microshield", container(&template));
    words.extend(["--data-dir", "/ledger"]);
    let matches = generator::cli::command()
        .try_get_matches_from(words)
        .unwrap();
    let (_, serve) = matches.subcommand().unwrap();
    assert_eq!(serve.get_one("topology"), Some(&Source::Kube));
}

#[test]
fn each_may_read_what_it_reads() {
    let (base, own) = (load(), own());
    let [generators, agents] = own.cluster_roles.as_slice() else {
        panic!("two ClusterRoles are expected");
    };
    // Of the same name, so that it is laid over the base's.
    assert_eq!(agents.metadata.name, base.cluster_roles[0].metadata.name);
    allows_reading(agents, &Scope::OneNode("node-1".to_owned()));
    allows_reading(generators, &Scope::Everything);
    let [binding] = own.cluster_role_bindings.as_slice() else {
        panic!("one ClusterRoleBinding is expected");
    };
    binds(binding, generators, &generator());
}
