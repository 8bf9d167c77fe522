//! The deployment: what the folder `deploy` renders to.
//!
//! [`kustomize`] renders what kustomize renders, as far as the folder uses it, so that every test sees the objects as the API
//! server would; where there is a real kustomize, the two are compared. [`chart`] makes the Helm chart's templates from the
//! same folder.

pub mod chart;
pub mod kustomize;
pub mod patch;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize as _;
use serde_json::Value;

/// Objects by kind and name, such as `DaemonSet/microshield-agent`: no two are alike in that.
pub type Objects = BTreeMap<String, Value>;

/// The features that can be switched on: components and overlays have their names.
pub const FEATURES: [&str; 5] = [
    "beside-scope",
    "local-resolve",
    "mtls",
    "prometheus",
    "sys-admin",
];

/// The folder of the deployment.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The objects of a text with YAML documents.
///
/// # Errors
/// If it is no YAML.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for document in serde_yaml::Deserializer::from_str(text) {
        let value = Value::deserialize(document)?;
        if !value.is_null() {
            all.push(value);
        }
    }
    Ok(all)
}

/// Objects by kind and name.
///
/// # Errors
/// If two are alike in that.
pub fn by_name(objects: Vec<Value>) -> Result<Objects> {
    let mut all = Objects::new();
    for object in objects {
        let name = name(&object)?;
        ensure!(
            all.insert(name.clone(), object).is_none(),
            "there are two {name}"
        );
    }
    Ok(all)
}

/// An object's kind and name.
///
/// # Errors
/// If it has none.
pub fn name(object: &Value) -> Result<String> {
    let text = |pointer| object.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").context("an object without kind")?;
    let name = text("/metadata/name").with_context(|| format!("a {kind} without name"))?;
    Ok(format!("{kind}/{name}"))
}

/// The paths at which two values differ.
#[must_use]
pub fn differences(one: &Value, other: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare(one, other, String::new(), &mut found);
    found
}

fn compare(one: &Value, other: &Value, path: String, found: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let mut keys: Vec<&String> = one.keys().chain(other.keys()).collect();
            keys.sort();
            keys.dedup();
            let value = |map: &serde_json::Map<_, _>, key| map.get(key).cloned();
            for key in keys {
                let (one, other) = (value(one, key), value(other, key));
                let path = format!("{path}/{key}");
                compare(
                    &one.unwrap_or_default(),
                    &other.unwrap_or_default(),
                    path,
                    found,
                );
            }
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            for (index, (one, other)) in one.iter().zip(other).enumerate() {
                compare(one, other, format!("{path}/{index}"), found);
            }
        }
        _ if one == other => {}
        _ => found.push(format!("{path}: {one} and {other}")),
    }
}
