//! With `beside-scope`, the agents share two folders with the Scope probe of their node, and have one that outlives them.

use std::{fs, path::Path};

use agent::args::Args;
use clap::Parser as _;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{PodSpec, PodTemplateSpec},
};
use lab::deployment;
use serde_json::json;

use crate::{
    command_lines::{volume_of, words},
    load::{container, spec, with},
};

/// The folder of the node behind a volume.
fn host_path<'a>(pod: &'a PodSpec, volume: &str) -> (&'a str, Option<&'a str>) {
    let mut volumes = pod.volumes.iter().flatten();
    let volume = volumes.find(|own| own.name == volume).unwrap();
    let host_path = volume.host_path.as_ref().unwrap();
    (&host_path.path, host_path.type_.as_deref())
}

/// The node's path of what the container sees at `path`, and whether it may only read it.
fn on_the_node(template: &PodTemplateSpec, path: &Path) -> (String, bool) {
    let volume = volume_of(template, path);
    let mut mounts = container(template).volume_mounts.iter().flatten();
    let mount = mounts.find(|mount| mount.name == volume).unwrap();
    let (folder, _) = host_path(spec(template), volume);
    let rest = path.strip_prefix(&mount.mount_path).unwrap();
    let path = Path::new(folder).join(rest).display().to_string();
    (path, mount.read_only == Some(true))
}

#[test]
fn agents_read_the_probes_log_and_serve_it_as_a_plugin() {
    let all = with("beside-scope");
    let template = all.agent();
    let args = words("microshield-agent", container(template));
    let log = args
        .iter()
        .find_map(|word| word.strip_prefix("--scope-log="))
        .unwrap();
    assert_eq!(
        on_the_node(template, Path::new(log)),
        (
            "/var/log/pods/weave_weave-scope-agent-*/*/*.log".to_owned(),
            true
        )
    );
    let args = Args::try_parse_from(args).unwrap();
    let socket = args.to_scope.scope_plugin.unwrap();
    assert_eq!(socket.id(), "microshield");
    assert_eq!(
        on_the_node(template, socket.path()),
        (
            "/var/run/scope/plugins/microshield/microshield.sock".to_owned(),
            false
        )
    );
    // A node on which the probe has never been has no such folder.
    let plugins = volume_of(template, socket.path());
    assert_eq!(
        host_path(spec(template), plugins).1,
        Some("DirectoryOrCreate")
    );
}

/// How far the log was read is on the node, and not in the pod: the next pod goes on from there. What was read is in the spool,
/// which therefore is there as well.
#[test]
fn the_spool_and_the_position_in_the_log_outlive_their_pod() {
    let all = with("beside-scope");
    let template = all.agent();
    let args = Args::try_parse_from(words("microshield-agent", container(template))).unwrap();
    assert_eq!(args.scope.position, None, "it is in the spool's folder");
    let spool = args.stream.spool.unwrap();
    let (on_the_node, read_only) = on_the_node(template, &spool.join("0.spool"));
    assert_eq!(on_the_node, "/var/lib/microshield/0.spool");
    assert!(!read_only);
    let volume = volume_of(template, &spool);
    assert_eq!(
        host_path(spec(template), volume).1,
        Some("DirectoryOrCreate")
    );
    // Nothing else is in that folder, and so the agent sees no more of the node.
    let mounts = container(template).volume_mounts.iter().flatten();
    assert_eq!(mounts.filter(|mount| mount.name == volume).count(), 1);
}

/// The patch gives the probe the folder in which the agent's socket is. It is no whole object, so what is missing is added.
#[test]
fn the_probe_sees_the_agents_socket() {
    let path = deployment::folder().join("components/beside-scope/scope/daemonset.yaml");
    let mut patch: serde_json::Value =
        serde_yaml::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    patch["spec"]["selector"] = json!({});
    let patch: DaemonSet = serde_json::from_value(patch).unwrap();
    let template = &patch.spec.template;
    assert_eq!(container(template).name, "scope-agent");
    let plugins = Path::new("/var/run/scope/plugins");
    let of_the_probe = on_the_node(template, plugins);
    let all = with("beside-scope");
    let of_the_agent = on_the_node(all.agent(), plugins);
    assert_eq!(of_the_probe, of_the_agent);
}
