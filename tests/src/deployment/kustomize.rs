//! What kustomize makes of a folder, as far as the deployment uses it: resources, components, patches by JSON Patch, images,
//! ConfigMaps from files. What is not known here is an error.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{documents, name, patch::Operation};

/// A `kustomization.yaml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Kustomization {
    api_version: String,
    kind: String,
    /// Files and folders.
    #[serde(default)]
    pub resources: Vec<String>,
    /// Folders.
    #[serde(default)]
    pub components: Vec<String>,
    /// Changes.
    #[serde(default)]
    pub patches: Vec<Patch>,
    /// Where images come from.
    #[serde(default)]
    pub images: Vec<Image>,
    /// ConfigMaps of files.
    #[serde(default)]
    pub config_map_generator: Vec<ConfigMap>,
}

/// Changes of an object.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Patch {
    /// Of which.
    pub target: Target,
    /// The changes, in YAML.
    patch: String,
}

/// An object by its kind and name.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    kind: String,
    name: String,
}

/// Where an image comes from.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    /// As it is called in the manifests.
    pub name: String,
    /// Where it is.
    pub new_name: String,
    /// Its version.
    pub new_tag: String,
}

/// A ConfigMap of files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigMap {
    name: String,
    namespace: String,
    /// `KEY=PATH`.
    files: Vec<String>,
    options: ConfigMapOptions,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ConfigMapOptions {
    disable_name_suffix_hash: bool,
    labels: BTreeMap<String, String>,
}

impl Patch {
    /// The changes.
    ///
    /// # Errors
    /// If they are no such list.
    pub fn operations(&self) -> Result<Vec<Operation>> {
        serde_yaml::from_str(&self.patch).with_context(|| self.target.to_string())
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.kind, self.name)
    }
}

/// Renders a folder.
///
/// # Errors
/// If a file is missing or malformed, or asks for what is not known here.
pub fn render(folder: &Path) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    accumulate(folder, "Kustomization", &mut objects)
        .with_context(|| folder.display().to_string())?;
    Ok(objects)
}

/// Reads the kustomization of a folder.
///
/// # Errors
/// If it is missing or malformed.
pub fn read(folder: &Path) -> Result<Kustomization> {
    let text = fs::read_to_string(folder.join("kustomization.yaml"))?;
    Ok(serde_yaml::from_str(&text)?)
}

/// The objects of a component's own.
///
/// # Errors
/// If a file is missing or malformed.
pub fn own_objects(folder: &Path) -> Result<Vec<Value>> {
    let kustomization = read(folder)?;
    let mut objects = Vec::new();
    for file in &kustomization.resources {
        let text = fs::read_to_string(folder.join(file)).with_context(|| file.clone())?;
        objects.extend(documents(&text).with_context(|| file.clone())?);
    }
    for generator in &kustomization.config_map_generator {
        objects.push(generator.object(folder)?);
    }
    Ok(objects)
}

fn accumulate(folder: &Path, kind: &str, objects: &mut Vec<Value>) -> Result<()> {
    let kustomization = read(folder)?;
    let version = if kind == "Component" {
        "kustomize.config.k8s.io/v1alpha1"
    } else {
        "kustomize.config.k8s.io/v1beta1"
    };
    ensure!(
        (
            kustomization.api_version.as_str(),
            kustomization.kind.as_str()
        ) == (version, kind),
        "this is no {kind}"
    );
    for resource in &kustomization.resources {
        let path = folder.join(resource);
        if path.is_dir() {
            accumulate(&path, "Kustomization", objects).with_context(|| resource.clone())?;
        } else {
            let text = fs::read_to_string(&path).with_context(|| resource.clone())?;
            objects.extend(documents(&text).with_context(|| resource.clone())?);
        }
    }
    for component in &kustomization.components {
        accumulate(&folder.join(component), "Component", objects)
            .with_context(|| component.clone())?;
    }
    for generator in &kustomization.config_map_generator {
        objects.push(generator.object(folder)?);
    }
    for patch in &kustomization.patches {
        let target = patch.target.to_string();
        let mut found = false;
        for object in &mut *objects {
            if name(object)? == target {
                found = true;
                for operation in patch.operations()? {
                    operation.apply(object).with_context(|| target.clone())?;
                }
            }
        }
        ensure!(found, "there is no {target}");
    }
    for image in &kustomization.images {
        for object in &mut *objects {
            replace_image(object, image);
        }
    }
    Ok(())
}

impl ConfigMap {
    fn object(&self, folder: &Path) -> Result<Value> {
        if !self.options.disable_name_suffix_hash {
            bail!("{}: names with a hash are not known here", self.name);
        }
        let mut data = BTreeMap::new();
        for file in &self.files {
            let (key, path) = file
                .split_once('=')
                .context("files are named as KEY=PATH here")?;
            let text = fs::read_to_string(folder.join(path)).with_context(|| path.to_owned())?;
            data.insert(key, text);
        }
        Ok(json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": self.name, "namespace": self.namespace, "labels": self.options.labels},
            "data": data,
        }))
    }
}

fn replace_image(value: &mut Value, image: &Image) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if key == "image" && *value == image.name {
                    *value = format!("{}:{}", image.new_name, image.new_tag).into();
                } else {
                    replace_image(value, image);
                }
            }
        }
        Value::Array(list) => {
            for value in list {
                replace_image(value, image);
            }
        }
        _ => {}
    }
}
