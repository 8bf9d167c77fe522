//! What `kubectl apply -k deploy` takes in.

use std::{collections::BTreeSet, fs};

use serde::Deserialize;

use crate::load::{container, deploy, files, load};

/// The fields that are used, and no others: kustomize itself ignores none.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kustomization {
    api_version: String,
    kind: String,
    resources: BTreeSet<String>,
    #[serde(default)]
    images: Vec<Image>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Image {
    name: String,
    new_name: String,
    new_tag: String,
}

fn read(file: &str) -> Kustomization {
    let text = fs::read_to_string(deploy().join(file)).unwrap();
    let kustomization: Kustomization =
        serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
    assert_eq!(
        (
            kustomization.api_version.as_str(),
            kustomization.kind.as_str()
        ),
        ("kustomize.config.k8s.io/v1beta1", "Kustomization"),
        "{file}"
    );
    kustomization
}

#[test]
fn every_manifest_is_listed() {
    assert_eq!(read("base/kustomization.yaml").resources, files());
    let whole = read("kustomization.yaml");
    assert_eq!(whole.resources, BTreeSet::from(["base".to_owned()]));
}

#[test]
fn every_image_can_be_replaced_and_has_this_version() {
    let manifests = load();
    let used: BTreeSet<String> = [manifests.agent(), manifests.generator()]
        .into_iter()
        .filter_map(|template| container(template).image.clone())
        .collect();
    let images = read("kustomization.yaml").images;
    let replaced = images.iter().map(|image| image.name.clone()).collect();
    assert_eq!(used, replaced);
    for image in images {
        assert_eq!(image.new_tag, env!("CARGO_PKG_VERSION"), "{}", image.name);
        assert!(!image.new_name.is_empty());
    }
}
