//! The manifests as the types of the Kubernetes API: of the newest one that k8s-openapi knows, and of 1.22.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{
        ConfigMap, Container, Namespace, PersistentVolumeClaim, PodSpec, PodTemplateSpec, Service,
        ServiceAccount,
    },
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    scheduling::v1::PriorityClass,
};
use k8s_openapi_1_22::api as old;
use lab::deployment::{self, FEATURES, differences, kustomize};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::monitor::ServiceMonitor;

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
    pub(crate) budgets: Vec<PodDisruptionBudget>,
    pub(crate) config_maps: Vec<ConfigMap>,
    pub(crate) monitors: Vec<ServiceMonitor>,
    /// `kind/name` of all of them.
    pub(crate) names: BTreeSet<String>,
    /// The namespaces that objects say they belong to, with one of those objects.
    pub(crate) used_namespaces: BTreeMap<String, String>,
}

/// The base.
pub(crate) fn load() -> Manifests {
    Manifests::of("base")
}

/// The base with a feature switched on.
pub(crate) fn with(feature: &str) -> Manifests {
    Manifests::of(&format!("overlays/{feature}"))
}

impl Manifests {
    /// What a folder of the deployment renders to.
    fn of(folder: &str) -> Self {
        let objects = kustomize::render(&deployment::folder().join(folder));
        let mut all = Self::default();
        for object in objects.unwrap_or_else(|error| panic!("{error:#}")) {
            all.push(folder, object);
        }
        all
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
            ("v1", "Namespace") => self
                .namespaces
                .push(both::<_, old::core::v1::Namespace>(&place, value)),
            ("v1", "ServiceAccount") => self
                .service_accounts
                .push(both::<_, old::core::v1::ServiceAccount>(&place, value)),
            ("v1", "PersistentVolumeClaim") => self
                .claims
                .push(both::<_, old::core::v1::PersistentVolumeClaim>(
                    &place, value,
                )),
            ("v1", "Service") => self
                .services
                .push(both::<_, old::core::v1::Service>(&place, value)),
            ("v1", "ConfigMap") => self
                .config_maps
                .push(both::<_, old::core::v1::ConfigMap>(&place, value)),
            ("apps/v1", "DaemonSet") => self
                .daemon_sets
                .push(both::<_, old::apps::v1::DaemonSet>(&place, value)),
            ("apps/v1", "Deployment") => self
                .deployments
                .push(both::<_, old::apps::v1::Deployment>(&place, value)),
            ("scheduling.k8s.io/v1", "PriorityClass") => {
                self.priority_classes
                    .push(both::<_, old::scheduling::v1::PriorityClass>(&place, value))
            }
            ("rbac.authorization.k8s.io/v1", "ClusterRole") => {
                self.cluster_roles
                    .push(both::<_, old::rbac::v1::ClusterRole>(&place, value))
            }
            ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding") => self
                .cluster_role_bindings
                .push(both::<_, old::rbac::v1::ClusterRoleBinding>(&place, value)),
            ("rbac.authorization.k8s.io/v1", "Role") => {
                self.roles
                    .push(both::<_, old::rbac::v1::Role>(&place, value))
            }
            ("rbac.authorization.k8s.io/v1", "RoleBinding") => {
                self.role_bindings
                    .push(both::<_, old::rbac::v1::RoleBinding>(&place, value))
            }
            ("networking.k8s.io/v1", "NetworkPolicy") => {
                self.network_policies
                    .push(both::<_, old::networking::v1::NetworkPolicy>(&place, value))
            }
            ("policy/v1", "PodDisruptionBudget") => self
                .budgets
                .push(both::<_, old::policy::v1::PodDisruptionBudget>(
                    &place, value,
                )),
            ("monitoring.coreos.com/v1", "ServiceMonitor") => {
                self.monitors.push(strict(&place, value));
            }
            _ => panic!("{place}: no type is known here for {version} {kind}"),
        }
    }

    /// The ClusterRole of this name.
    pub(crate) fn role(&self, name: &str) -> &ClusterRole {
        let mut roles = self.cluster_roles.iter();
        roles
            .find(|role| role.metadata.name.as_deref() == Some(name))
            .unwrap_or_else(|| panic!("no ClusterRole {name}"))
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

/// The object in today's types, if it is the same in those of Kubernetes 1.22.
fn both<T, Old>(place: &str, value: Value) -> T
where
    T: DeserializeOwned + Serialize,
    Old: DeserializeOwned + Serialize,
{
    let _: Old = strict(&format!("{place} (1.22)"), value.clone());
    strict(place, value)
}

/// Into the type, and back: what the type does not know is missing then.
fn strict<T: DeserializeOwned + Serialize>(place: &str, value: Value) -> T {
    let typed: T =
        serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{place}: {error}"));
    let changed = differences(&value, &serde_json::to_value(&typed).unwrap());
    assert!(
        changed.is_empty(),
        "{place}: no such field, or another form of it: {changed:?}"
    );
    typed
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
fn every_overlay_has_known_objects_only() {
    for feature in FEATURES {
        let all = with(feature);
        assert!(!all.names.is_empty());
        assert!(all.names.is_superset(&load().names), "{feature}");
    }
}

#[test]
fn a_misspelt_field_is_noticed() {
    let good = serde_json::to_value(&load().daemon_sets[0]).unwrap();
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

#[test]
fn a_field_that_1_22_does_not_have_is_noticed() {
    let mut newer = serde_json::to_value(&load().daemon_sets[0]).unwrap();
    newer["spec"]["template"]["spec"]["hostUsers"] = true.into();
    let _parsed: DaemonSet = strict("today", newer.clone());
    let result = std::panic::catch_unwind(|| strict::<old::apps::v1::DaemonSet>("1.22", newer));
    assert!(result.is_err());
}
