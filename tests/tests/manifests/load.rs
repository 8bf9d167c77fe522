//! Reading the manifests into the types of the Kubernetes API.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{
        Container, Namespace, PersistentVolumeClaim, PodSpec, PodTemplateSpec, Service,
        ServiceAccount,
    },
    networking::v1::NetworkPolicy,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    scheduling::v1::PriorityClass,
};
use serde::{Deserialize as _, Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Objects by kind.
#[derive(Debug, Default)]
pub(crate) struct Manifests {
    pub(crate) namespaces: Vec<Namespace>,
    pub(crate) service_accounts: Vec<ServiceAccount>,
    pub(crate) priority_classes: Vec<PriorityClass>,
    pub(crate) claims: Vec<PersistentVolumeClaim>,
    pub(crate) daemon_sets: Vec<DaemonSet>,
    pub(crate) deployments: Vec<Deployment>,
    pub(crate) services: Vec<Service>,
    pub(crate) cluster_roles: Vec<ClusterRole>,
    pub(crate) cluster_role_bindings: Vec<ClusterRoleBinding>,
    pub(crate) roles: Vec<Role>,
    pub(crate) role_bindings: Vec<RoleBinding>,
    pub(crate) network_policies: Vec<NetworkPolicy>,
    /// `kind/name` of all of them.
    pub(crate) names: BTreeSet<String>,
    /// The namespaces that objects say they belong to, with one of those objects.
    pub(crate) used_namespaces: BTreeMap<String, String>,
}

/// The folder of the deployment.
pub(crate) fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// The manifest files of the base: every YAML file there but the kustomization.
pub(crate) fn files() -> BTreeSet<String> {
    fs::read_dir(deploy().join("base"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "kustomization.yaml")
        .collect()
}

/// The base.
pub(crate) fn load() -> Manifests {
    let mut all = Manifests::default();
    for file in files() {
        all.read(&format!("base/{file}"));
    }
    all
}

impl Manifests {
    /// Adds the objects of a file in the folder of the deployment.
    pub(crate) fn read(&mut self, file: &str) {
        let text = fs::read_to_string(deploy().join(file)).unwrap();
        for document in serde_yaml::Deserializer::from_str(&text) {
            let value = Value::deserialize(document).unwrap_or_else(|e| panic!("{file}: {e}"));
            self.push(file, value);
        }
    }

    fn push(&mut self, file: &str, value: Value) {
        let text = |pointer: &str| {
            let found = value.pointer(pointer).and_then(Value::as_str);
            found.unwrap_or_default().to_owned()
        };
        let (version, kind) = (text("/apiVersion"), text("/kind"));
        let name = format!("{kind}/{}", text("/metadata/name"));
        let namespace = text("/metadata/namespace");
        assert!(
            self.names.insert(name.clone()),
            "{file}: there are two {name}"
        );
        if !namespace.is_empty() {
            self.used_namespaces.insert(namespace, name.clone());
        }
        let place = format!("{file}: {name}");
        match (version.as_str(), kind.as_str()) {
            ("v1", "Namespace") => self.namespaces.push(strict(&place, value)),
            ("v1", "ServiceAccount") => self.service_accounts.push(strict(&place, value)),
            ("v1", "PersistentVolumeClaim") => self.claims.push(strict(&place, value)),
            ("v1", "Service") => self.services.push(strict(&place, value)),
            ("apps/v1", "DaemonSet") => self.daemon_sets.push(strict(&place, value)),
            ("apps/v1", "Deployment") => self.deployments.push(strict(&place, value)),
            ("scheduling.k8s.io/v1", "PriorityClass") => {
                self.priority_classes.push(strict(&place, value));
            }
            ("rbac.authorization.k8s.io/v1", "ClusterRole") => {
                self.cluster_roles.push(strict(&place, value));
            }
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => {
                self.cluster_role_bindings.push(strict(&place, value));
            }
            ("rbac.authorization.k8s.io/v1", "Role") => self.roles.push(strict(&place, value)),
            ("rbac.authorization.k8s.io/v1", "RoleBinding") => {
                self.role_bindings.push(strict(&place, value));
            }
            ("networking.k8s.io/v1", "NetworkPolicy") => {
                self.network_policies.push(strict(&place, value));
            }
            _ => panic!("{place}: no type is known here for {version} {kind}"),
        }
    }

    /// The agent's pods.
    pub(crate) fn agent(&self) -> &PodTemplateSpec {
        let [daemon_set] = self.daemon_sets.as_slice() else {
            panic!("one DaemonSet is expected");
        };
        &daemon_set.spec.template
    }

    /// The generator's pod.
    pub(crate) fn generator(&self) -> &PodTemplateSpec {
        let [deployment] = self.deployments.as_slice() else {
            panic!("one Deployment is expected");
        };
        &deployment.spec.template
    }
}

/// Into the type, and back: what the type does not know is missing then.
fn strict<T: DeserializeOwned + Serialize>(place: &str, value: Value) -> T {
    let typed: T =
        serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{place}: {error}"));
    let mut changed = Vec::new();
    compare(
        &value,
        &serde_json::to_value(&typed).unwrap(),
        String::new(),
        &mut changed,
    );
    assert!(
        changed.is_empty(),
        "{place}: no such field, or another form of it: {changed:?}"
    );
    typed
}

/// The paths at which two values differ.
fn compare(one: &Value, other: &Value, path: String, differences: &mut Vec<String>) {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            for key in keys {
                let value = |map: &serde_json::Map<_, _>| map.get(key).cloned().unwrap_or_default();
                compare(
                    &value(one),
                    &value(other),
                    format!("{path}.{key}"),
                    differences,
                );
            }
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            for (index, (one, other)) in one.iter().zip(other).enumerate() {
                compare(one, other, format!("{path}[{index}]"), differences);
            }
        }
        _ if one == other => {}
        _ => differences.push(path),
    }
}

pub(crate) fn spec(template: &PodTemplateSpec) -> &PodSpec {
    template.spec.as_ref().unwrap()
}

/// The only container of a pod.
pub(crate) fn container(template: &PodTemplateSpec) -> &Container {
    let spec = spec(template);
    assert!(spec.init_containers.is_none() && spec.ephemeral_containers.is_none());
    let [container] = spec.containers.as_slice() else {
        panic!("one container is expected");
    };
    container
}

#[test]
fn a_misspelt_field_is_noticed() {
    let base = deploy().join("base/agent.yaml");
    let text = fs::read_to_string(base).unwrap();
    let daemon_set = serde_yaml::Deserializer::from_str(&text).last().unwrap();
    let good = Value::deserialize(daemon_set).unwrap();
    let _parsed: DaemonSet = strict("as it is", good.clone());
    for (right, wrong) in [
        ("readOnlyRootFilesystem", "readonlyRootFilesystem"),
        ("hostPID", "hostPid"),
        ("maxSurge", "maxsurge"),
        ("mountPath", "mountpath"),
    ] {
        let text = good.to_string();
        assert!(text.contains(right));
        let bad: Value = serde_json::from_str(&text.replace(right, wrong)).unwrap();
        let result = std::panic::catch_unwind(|| strict::<DaemonSet>("misspelt", bad));
        assert!(result.is_err(), "{wrong} was accepted");
    }
}
