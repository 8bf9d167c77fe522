//! What the programs may do. Each list is whole: a right that is added here has to be wanted.

use std::collections::{BTreeMap, BTreeSet};

use flow::source::Scope;
use k8s_openapi::api::{core::v1::PodTemplateSpec, rbac::v1::ClusterRole};

use crate::load::{container, load, spec};

/// Asserts that a role allows reading the kinds that are read, and nothing else.
pub(crate) fn allows_reading(role: &ClusterRole, scope: &Scope) {
    let mut granted = BTreeMap::<(String, String), BTreeSet<String>>::new();
    for rule in role.rules.iter().flatten() {
        assert!(rule.non_resource_urls.is_none() && rule.resource_names.is_none());
        for group in rule.api_groups.iter().flatten() {
            for resource in rule.resources.iter().flatten() {
                let verbs = granted
                    .entry((group.clone(), resource.clone()))
                    .or_default();
                verbs.extend(rule.verbs.iter().cloned());
            }
        }
    }
    let reading = BTreeSet::from(["get", "list", "watch"].map(str::to_owned));
    let wanted = scope.kinds().iter().map(|kind| {
        let key = (kind.group().to_owned(), kind.resource().to_owned());
        (key, reading.clone())
    });
    assert_eq!(granted, wanted.collect());
}

#[test]
fn agents_may_read_what_names_both_ends() {
    allows_reading(&load().cluster_roles[0], &Scope::BothEnds);
}

#[test]
fn only_the_agents_are_given_a_token() {
    let manifests = load();
    let token = |template| spec(template).automount_service_account_token;
    assert_eq!(token(manifests.agent()), Some(true));
    assert_eq!(token(manifests.generator()), Some(false));
}

#[test]
fn both_containers_are_locked_down() {
    let manifests = load();
    let capabilities = |template: &PodTemplateSpec| {
        let pod = spec(template);
        assert_eq!(pod.enable_service_links, Some(false));
        assert_eq!(pod.host_network, None);
        assert_eq!(pod.host_ipc, None);
        let profile = pod.security_context.as_ref().unwrap();
        let profile = profile.seccomp_profile.as_ref().unwrap();
        assert_eq!(profile.type_, "RuntimeDefault");

        let security = container(template).security_context.as_ref().unwrap();
        assert_eq!(security.privileged, Some(false));
        assert_eq!(security.allow_privilege_escalation, Some(false));
        assert_eq!(security.read_only_root_filesystem, Some(true));
        assert_eq!(security.seccomp_profile, None);
        assert_eq!(security.run_as_user, None);
        assert_eq!(security.run_as_non_root, None);
        let capabilities = security.capabilities.as_ref().unwrap();
        assert_eq!(capabilities.drop, Some(vec!["ALL".to_owned()]));
        capabilities.add.clone().unwrap_or_default()
    };
    assert_eq!(
        capabilities(manifests.agent()),
        ["BPF", "PERFMON", "NET_ADMIN", "SYS_PTRACE"]
    );
    assert!(capabilities(manifests.generator()).is_empty());
}

#[test]
fn the_generator_is_nobody() {
    let manifests = load();
    let pod = spec(manifests.generator());
    assert_eq!(pod.host_pid, None);
    let security = pod.security_context.as_ref().unwrap();
    assert_eq!(security.run_as_non_root, Some(true));
    assert!(security.run_as_user > Some(0));
    // Else the volume would be root's.
    assert!(security.fs_group > Some(0));
}

#[test]
fn the_node_s_files_are_mounted_read_only() {
    let manifests = load();
    let mut host_paths = BTreeSet::new();
    for template in [manifests.agent(), manifests.generator()] {
        for volume in spec(template).volumes.iter().flatten() {
            let Some(host) = &volume.host_path else {
                continue;
            };
            host_paths.insert(host.path.clone());
            let mounts = container(template).volume_mounts.iter().flatten();
            for mount in mounts.filter(|mount| mount.name == volume.name) {
                assert_eq!(mount.read_only, Some(true), "{}", host.path);
                // The agent looks where the node has it.
                assert_eq!(mount.mount_path, host.path);
            }
        }
    }
    let wanted = ["/sys/fs/cgroup", "/sys/kernel/tracing"].map(str::to_owned);
    assert_eq!(host_paths, BTreeSet::from(wanted));
}

#[test]
fn every_node_has_an_agent_which_preempts_nobody() {
    let manifests = load();
    let pod = spec(manifests.agent());
    let [toleration] = pod.tolerations.as_deref().unwrap() else {
        panic!("one toleration is expected");
    };
    assert_eq!(toleration.operator.as_deref(), Some("Exists"));
    assert_eq!((&toleration.key, &toleration.effect), (&None, &None));
    let [class] = manifests.priority_classes.as_slice() else {
        panic!("one PriorityClass is expected");
    };
    assert_eq!(class.preemption_policy.as_deref(), Some("Never"));
    assert_ne!(class.global_default, Some(true));
}
