//! What `kubectl apply -k` takes in.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use lab::deployment::{self, FEATURES, by_name, kustomize};

use crate::load::{container, load};

/// The manifest files of a folder: every YAML file there but the kustomization.
fn files(folder: &str) -> BTreeSet<String> {
    fs::read_dir(deployment::folder().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".yaml") && name != "kustomization.yaml")
        .collect()
}

#[test]
fn every_manifest_is_listed() {
    let components = FEATURES.map(|feature| format!("components/{feature}"));
    for folder in components.iter().map(String::as_str).chain(["base"]) {
        let listed = kustomize::read(&deployment::folder().join(folder)).unwrap();
        let listed: BTreeSet<String> = listed.resources.into_iter().collect();
        assert_eq!(listed, files(folder), "{folder}");
    }
}

/// Every component is an overlay, and can be switched on in the deployment.
#[test]
fn every_feature_can_be_switched_on() {
    for folder in ["components", "overlays"] {
        let folder = deployment::folder().join(folder);
        let found: BTreeSet<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(found, FEATURES.map(str::to_owned).into());
    }
    let whole = fs::read_to_string(deployment::folder().join("kustomization.yaml")).unwrap();
    for feature in FEATURES {
        assert!(whole.contains(&format!("  # - components/{feature}\n")));
    }
}

/// All features at once are what each of them is alone: they do not meet.
#[test]
fn features_go_together() {
    let folder = tempfile::tempdir_in(deployment::folder().join("..")).unwrap();
    let list: Vec<String> = FEATURES
        .map(|feature| format!("- ../deploy/components/{feature}\n"))
        .into();
    let text = format!(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [../deploy/base]\ncomponents:\n{}",
        list.concat()
    );
    fs::write(folder.path().join("kustomization.yaml"), text).unwrap();
    let all = by_name(kustomize::render(folder.path()).unwrap()).unwrap();
    for feature in FEATURES {
        let overlay = deployment::folder().join("overlays").join(feature);
        let alone = by_name(kustomize::render(&overlay).unwrap()).unwrap();
        for (name, object) in alone {
            let args = |object: &serde_json::Value| -> BTreeSet<String> {
                let args = object.pointer("/spec/template/spec/containers/0/args");
                let args = args
                    .and_then(serde_json::Value::as_array)
                    .into_iter()
                    .flatten();
                args.map(ToString::to_string).collect()
            };
            let missing: Vec<String> = args(&object)
                .difference(&args(&all[&name]))
                .filter(|arg| !arg.starts_with("\"--generator="))
                .cloned()
                .collect();
            assert!(missing.is_empty(), "{feature}: {name}: {missing:?}");
        }
    }
}

#[test]
fn every_image_can_be_replaced_and_has_this_version() {
    let manifests = load();
    let used: BTreeSet<String> = [manifests.agent(), manifests.generator()]
        .into_iter()
        .filter_map(|template| container(template).image.clone())
        .collect();
    let images = kustomize::read(&deployment::folder().join("images"))
        .unwrap()
        .images;
    let replaced = images.iter().map(|image| image.name.clone()).collect();
    assert_eq!(used, replaced);
    for image in images {
        assert_eq!(image.new_tag, env!("CARGO_PKG_VERSION"), "{}", image.name);
        assert!(!image.new_name.is_empty());
    }
}

/// What `kubectl delete -k` does not reach would stay: everything is in the namespace, or is named as ours.
#[test]
fn removal_leaves_no_trace() {
    let mut outside = BTreeMap::new();
    for feature in FEATURES {
        let overlay = deployment::folder().join("overlays").join(feature);
        for object in kustomize::render(&overlay).unwrap() {
            if object["metadata"]["namespace"] != "microshield" {
                let name = deployment::name(&object).unwrap();
                outside.insert(name, object["metadata"]["labels"].clone());
            }
        }
    }
    let names: Vec<&str> = outside.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "ClusterRole/microshield-agent",
            "ClusterRole/microshield-generator",
            "ClusterRole/microshield-token-review",
            "ClusterRoleBinding/microshield-agent",
            "ClusterRoleBinding/microshield-generator",
            "ClusterRoleBinding/microshield-token-review",
            "Namespace/microshield",
            "PriorityClass/microshield-agent",
        ]
    );
    for (name, labels) in &outside {
        assert_eq!(labels["app.kubernetes.io/name"], "microshield", "{name}");
    }
}
