//! Names in one object that mean another.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::{
        core::v1::{PodTemplateSpec, Probe},
        rbac::v1::{ClusterRole, ClusterRoleBinding},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use crate::load::{Manifests, container, load, spec};

const NAMESPACE: &str = "microshield";

fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap()
}

fn labels(template: &PodTemplateSpec) -> &BTreeMap<String, String> {
    let metadata = template.metadata.as_ref().unwrap();
    metadata.labels.as_ref().unwrap()
}

/// The pairs of a selector, which has no other form here.
pub(crate) fn pairs(selector: &LabelSelector) -> &BTreeMap<String, String> {
    assert!(selector.match_expressions.is_none());
    let pairs = selector.match_labels.as_ref().unwrap();
    assert!(!pairs.is_empty(), "it would select everything");
    pairs
}

pub(crate) fn selects_pairs(
    selector: &BTreeMap<String, String>,
    template: &PodTemplateSpec,
) -> bool {
    let labels = labels(template);
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Asserts that the pairs select this one's pods and not the other's.
pub(crate) fn select_only(
    selector: &BTreeMap<String, String>,
    wanted: &PodTemplateSpec,
    other: &PodTemplateSpec,
) {
    assert!(selects_pairs(selector, wanted), "{selector:?}");
    assert!(!selects_pairs(selector, other), "{selector:?}");
}

pub(crate) fn port_numbers(template: &PodTemplateSpec) -> BTreeMap<String, i32> {
    let ports = container(template).ports.iter().flatten();
    ports
        .map(|port| (port.name.clone().unwrap(), port.container_port))
        .collect()
}

#[test]
fn everything_is_in_the_namespace_that_is_made() {
    let manifests = load();
    let made: BTreeSet<&str> = manifests
        .namespaces
        .iter()
        .map(|namespace| name(&namespace.metadata))
        .collect();
    assert_eq!(made, BTreeSet::from([NAMESPACE]));
    let used: Vec<&String> = manifests.used_namespaces.keys().collect();
    assert_eq!(used, [NAMESPACE], "{:?}", manifests.used_namespaces);
}

#[test]
fn controllers_select_their_own_pods_only() {
    let manifests = load();
    let (agent, generator) = (manifests.agent(), manifests.generator());
    let daemon_set = &manifests.daemon_sets[0].spec;
    select_only(pairs(&daemon_set.selector), agent, generator);
    let deployment = &manifests.deployments[0].spec;
    select_only(pairs(&deployment.selector), generator, agent);
}

#[test]
fn the_service_leads_to_a_port_of_the_generator() {
    let manifests = load();
    let [service] = manifests.services.as_slice() else {
        panic!("one Service is expected");
    };
    let service_spec = service.spec.as_ref().unwrap();
    let selector = service_spec.selector.as_ref().unwrap();
    select_only(selector, manifests.generator(), manifests.agent());
    let known = port_numbers(manifests.generator());
    for port in service_spec.ports.as_ref().unwrap() {
        let Some(IntOrString::String(target)) = &port.target_port else {
            panic!("the target is named, so that it follows the container's port");
        };
        assert!(known.contains_key(target), "{target}");
    }
}

#[test]
fn pods_use_what_exists() {
    let manifests = load();
    for template in [manifests.agent(), manifests.generator()] {
        check_pod(&manifests, template);
    }
}

fn check_pod(manifests: &Manifests, template: &PodTemplateSpec) {
    let exists = |kind: &str, name: &str| {
        let name = format!("{kind}/{name}");
        assert!(manifests.names.contains(&name), "there is no {name}");
    };
    let pod = spec(template);
    exists(
        "ServiceAccount",
        pod.service_account_name.as_deref().unwrap(),
    );
    if let Some(class) = &pod.priority_class_name {
        exists("PriorityClass", class);
    }
    let mut volumes = BTreeSet::new();
    for volume in pod.volumes.iter().flatten() {
        volumes.insert(volume.name.as_str());
        if let Some(claim) = &volume.persistent_volume_claim {
            exists("PersistentVolumeClaim", &claim.claim_name);
        }
        assert!(volume.config_map.is_none());
        // With `mtls`, administrators make it.
        let secret = volume.secret.as_ref();
        assert!(secret.is_none_or(|secret| secret.secret_name.is_some()));
    }
    let container = container(template);
    let mounted = container.volume_mounts.iter().flatten();
    let mounted: BTreeSet<&str> = mounted.map(|mount| mount.name.as_str()).collect();
    assert_eq!(mounted, volumes);

    let ports = port_numbers(template);
    let probes = [
        &container.startup_probe,
        &container.readiness_probe,
        &container.liveness_probe,
    ];
    for probe in probes.into_iter().flatten() {
        assert!(ports.contains_key(probed_port(probe)), "{probe:?}");
    }
}

fn probed_port(probe: &Probe) -> &str {
    let port = match (&probe.tcp_socket, &probe.http_get) {
        (Some(tcp), None) => &tcp.port,
        (None, Some(http)) => &http.port,
        _ => panic!("{probe:?}"),
    };
    match port {
        IntOrString::String(name) => name,
        IntOrString::Int(_) => panic!("the port is named, so that it follows the container's"),
    }
}

#[test]
fn roles_are_bound_to_those_who_need_them() {
    let manifests = load();
    let [agents, generators] = manifests.cluster_role_bindings.as_slice() else {
        panic!("two ClusterRoleBindings are expected");
    };
    binds(
        agents,
        manifests.role("microshield-agent"),
        manifests.agent(),
    );
    let reviewing = manifests.role("microshield-token-review");
    binds(generators, reviewing, manifests.generator());
}

#[test]
fn the_budget_is_the_generator_s_and_lets_nodes_be_drained() {
    let manifests = load();
    let [budget] = manifests.budgets.as_slice() else {
        panic!("one PodDisruptionBudget is expected");
    };
    let budget = budget.spec.as_ref().unwrap();
    assert_eq!(budget.max_unavailable, Some(IntOrString::Int(1)));
    assert_eq!(budget.min_available, None);
    let selector = pairs(budget.selector.as_ref().unwrap());
    select_only(selector, manifests.generator(), manifests.agent());
}

/// Asserts that a binding gives a role to the account of these pods, and to nobody else.
pub(crate) fn binds(binding: &ClusterRoleBinding, role: &ClusterRole, template: &PodTemplateSpec) {
    let wanted = &binding.role_ref;
    assert_eq!(wanted.kind, "ClusterRole");
    assert_eq!(wanted.name, name(&role.metadata));
    let [subject] = binding.subjects.as_deref().unwrap() else {
        panic!("one subject is expected");
    };
    assert_eq!(subject.kind, "ServiceAccount");
    assert_eq!(subject.namespace.as_deref(), Some(NAMESPACE));
    let account = &spec(template).service_account_name;
    assert_eq!(Some(&subject.name), account.as_ref());
}
