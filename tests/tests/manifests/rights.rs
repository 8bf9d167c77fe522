//! What the programs may do. Each list is whole: a right that is added here has to be wanted.

use std::collections::{BTreeMap, BTreeSet};

use flow::source::Scope;
use k8s_openapi::api::{
    core::v1::PodTemplateSpec,
    rbac::v1::{ClusterRole, PolicyRule},
};

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
    allows_reading(load().role("microshield-agent"), &Scope::BothEnds);
}

#[test]
fn the_generator_may_ask_whose_a_token_is() {
    let manifests = load();
    let rules = |rules: &Option<Vec<PolicyRule>>| -> Vec<String> {
        let rules = rules.iter().flatten();
        rules
            .map(|rule| serde_json::to_value(rule).unwrap().to_string())
            .collect()
    };
    assert_eq!(
        rules(&manifests.role("microshield-token-review").rules),
        [
            r#"{"apiGroups":["authentication.k8s.io"],"resources":["tokenreviews"],"verbs":["create"]}"#
        ]
    );
    // In its own namespace.
    let [role, readers] = manifests.roles.as_slice() else {
        panic!("two Roles are expected");
    };
    assert_eq!(
        rules(&role.rules),
        [r#"{"apiGroups":[""],"resources":["pods"],"verbs":["get"]}"#]
    );
    assert_eq!(
        rules(&readers.rules),
        [
            r#"{"apiGroups":[""],"resources":["pods"],"verbs":["list"]}"#,
            r#"{"apiGroups":[""],"resources":["pods/portforward"],"verbs":["create","get"]}"#,
            r#"{"apiGroups":[""],"resourceNames":["microshield-reader"],"resources":["serviceaccounts/token"],"verbs":["create"]}"#,
        ]
    );
    // Which is bound to nobody.
    let [binding] = manifests.role_bindings.as_slice() else {
        panic!("one RoleBinding is expected");
    };
    assert_eq!(Some(&binding.role_ref.name), role.metadata.name.as_ref());
    let [subject] = binding.subjects.as_deref().unwrap() else {
        panic!("one subject is expected");
    };
    let account = &spec(manifests.generator()).service_account_name;
    assert_eq!(Some(&subject.name), account.as_ref());
}

/// The token that agents show is good for the generator only, and the generator takes that of no other account.
#[test]
fn agents_are_known_by_a_token_of_their_own() {
    let manifests = load();
    let pod = spec(manifests.agent());
    let mut tokens = pod
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| volume.projected.as_ref()?.sources.as_ref())
        .flatten()
        .filter_map(|source| source.service_account_token.as_ref());
    let token = tokens.next().unwrap();
    assert!(tokens.next().is_none());
    let args = container(manifests.generator()).args.clone().unwrap();
    let audience = token.audience.as_ref().unwrap();
    assert!(args.contains(&format!("--token-audience={audience}")));
    let account = pod.service_account_name.as_ref().unwrap();
    assert!(args.contains(&format!("--agent-account=microshield/{account}")));
    let mut accounts = manifests.service_accounts.iter();
    let readers = accounts
        .find(|account| account.metadata.name.as_deref() == Some("microshield-reader"))
        .unwrap();
    assert_eq!(readers.automount_service_account_token, Some(false));
    assert!(args.contains(&"--reader-account=microshield/microshield-reader".to_owned()));
    assert!(token.expiration_seconds <= Some(3_600));
    for template in [manifests.agent(), manifests.generator()] {
        let container = container(template);
        let words = container.args.iter().flatten();
        let variables = container
            .env
            .iter()
            .flatten()
            .map(|variable| &variable.name);
        assert!(
            words
                .chain(variables)
                .all(|word| !word.to_lowercase().contains("insecure"))
        );
    }
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

/// For nodes that know no `CAP_BPF`: the same, with the older right in place of the newer two.
#[test]
fn the_fallback_has_one_right_in_place_of_two() {
    let file = lab::deployment::folder().join("components/sys-admin/kustomization.yaml");
    let component: serde_json::Value =
        serde_yaml::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let [patch] = component["patches"].as_array().unwrap().as_slice() else {
        panic!("one patch is expected");
    };
    assert_eq!(patch["target"]["kind"], "DaemonSet");
    assert_eq!(patch["target"]["name"], "microshield-agent");
    let operations: serde_json::Value =
        serde_yaml::from_str(patch["patch"].as_str().unwrap()).unwrap();
    let [operation] = operations.as_array().unwrap().as_slice() else {
        panic!("one operation is expected");
    };
    assert_eq!(operation["op"], "replace");
    let path = operation["path"].as_str().unwrap();
    let place = path
        .strip_prefix("/spec/template/spec/containers/0/")
        .unwrap();
    let container = serde_json::to_value(container(load().agent())).unwrap();
    let replaced = container.pointer(&format!("/{place}")).unwrap();
    assert_eq!(
        *replaced,
        serde_json::json!(["BPF", "PERFMON", "NET_ADMIN", "SYS_PTRACE"])
    );
    assert_eq!(
        operation["value"],
        serde_json::json!(["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"])
    );
}
