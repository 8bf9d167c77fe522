//! The names that kubelet and the container runtimes give to cgroups.

/// A container, as its cgroup's name tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerRef {
    /// `metadata.uid` of the pod. For a static pod it is the hash that kubelet gave it, as in the annotation
    /// `kubernetes.io/config.hash`.
    pub pod_uid: String,
    /// The container's id without the runtime's prefix; absent for a process in the pod's own cgroup.
    pub container: Option<String>,
}

/// Reads a cgroup path as kubelet makes it (`pkg/kubelet/cm` in Kubernetes), with either cgroup driver:
///
/// * systemd: `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice/cri-containerd-<id>.scope`, the
///   uid's dashes written as underscores; CRI-O writes `crio-<id>.scope`, Docker `docker-<id>.scope`;
/// * cgroupfs: `/kubepods/burstable/pod<uid>/<id>`, with CRI-O `crio-<id>`;
/// * containerd asked for the wrong driver: `…/kubepods-burstable-pod<uid>.slice:cri-containerd:<id>`.
///
/// Anything may come before, as in clusters whose nodes are containers, and a container may have cgroups of its own below.
/// `None` if the path is in no pod.
#[must_use]
pub fn parse_cgroup_path(path: &str) -> Option<ContainerRef> {
    // The last pod in the path: a node that is itself a pod's container has an outer one.
    let mut components = path.split(['/', ':']).rev();
    let mut below = Vec::new();
    let pod_uid = components.find_map(|component| {
        let uid = pod_uid(component);
        if uid.is_none() {
            below.push(component);
        }
        uid
    })?;
    Some(ContainerRef {
        pod_uid,
        container: below.into_iter().rev().find_map(container_id),
    })
}

/// The uid in `pod<uid>`, `kubepods-pod<uid>.slice` or `kubepods-<qos>-pod<uid>.slice`.
fn pod_uid(component: &str) -> Option<String> {
    let name = component.strip_suffix(".slice").unwrap_or(component);
    let uid = match name.rsplit_once("-pod") {
        Some((parent, uid)) if parent.contains("kubepods") => uid,
        _ => name.strip_prefix("pod")?,
    };
    let is_uid = uid.len() == 36
        && uid.bytes().enumerate().all(|(place, byte)| match place {
            8 | 13 | 18 | 23 => matches!(byte, b'-' | b'_'),
            _ => byte.is_ascii_hexdigit(),
        });
    // Static pods have the MD5 hash of their manifest for a uid.
    let is_hash = uid.len() == 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_uid || is_hash).then(|| uid.replace('_', "-"))
}

/// The id in `<id>`, `<runtime>-<id>` or `<runtime>-<id>.scope`.
fn container_id(component: &str) -> Option<String> {
    let name = component.strip_suffix(".scope").unwrap_or(component);
    let (runtime, id) = name.rsplit_once('-').unwrap_or(("", name));
    // conmon watches CRI-O's container from a scope of its own and is no part of it.
    if runtime.ends_with("conmon") {
        return None;
    }
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4d2f0c1b6a7988e0f1d2c3b4a5968778695a4b3c2d1e0f9e8d7c6b5a49382716";
    const UID: &str = "6a6b4d5e-90fa-4d7c-9a44-9a5b3f6f7c11";
    const UID_: &str = "6a6b4d5e_90fa_4d7c_9a44_9a5b3f6f7c11";

    #[test]
    fn names_of_all_runtimes_and_drivers() {
        let in_container = [
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{UID_}.slice/crio-{ID}.scope"),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice/docker-{ID}.scope"
            ),
            format!("/kubepods/burstable/pod{UID}/{ID}"),
            format!("/kubepods/pod{UID}/{ID}"),
            format!("/kubepods/besteffort/pod{UID}/crio-{ID}"),
            format!(
                "/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}"
            ),
            // A node in a container (kind), and its kubelet with a cgroup root of its own.
            format!(
                "/docker/{ID}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{UID_}.slice/cri-containerd-{ID}.scope"
            ),
            format!("/docker/{ID}/kubelet/kubepods/burstable/pod{UID}/{ID}"),
            // systemd inside of the container.
            format!("/kubepods/burstable/pod{UID}/{ID}/system.slice/nginx.service"),
        ];
        for path in in_container {
            assert_eq!(
                parse_cgroup_path(&path),
                Some(ContainerRef {
                    pod_uid: UID.to_owned(),
                    container: Some(ID.to_owned())
                }),
                "{path}"
            );
        }
    }

    #[test]
    fn a_process_of_the_pod_but_of_no_container() {
        for path in [
            format!("/kubepods/burstable/pod{UID}"),
            format!("/kubepods.slice/kubepods-pod{UID_}.slice/crio-conmon-{ID}.scope"),
        ] {
            let found = parse_cgroup_path(&path).unwrap();
            assert_eq!(
                (found.pod_uid.as_str(), found.container),
                (UID, None),
                "{path}"
            );
        }
    }

    #[test]
    fn a_static_pod_s_uid_is_a_hash() {
        let path = format!("/kubepods/burstable/pod90a0a137133af574f8d79fbd378e7f31/{ID}");
        let found = parse_cgroup_path(&path).unwrap();
        assert_eq!(found.pod_uid, "90a0a137133af574f8d79fbd378e7f31");
    }

    #[test]
    fn the_inner_pod_counts() {
        let outer = "11111111-2222-3333-4444-555555555555";
        let path = format!("/kubepods/pod{outer}/{ID}/kubepods/burstable/pod{UID}/{ID}");
        assert_eq!(parse_cgroup_path(&path).unwrap().pod_uid, UID);
    }

    #[test]
    fn everything_else_is_in_no_pod() {
        for path in [
            "/",
            "",
            "/system.slice/kubelet.service",
            "/user.slice/user-1000.slice/podman-1234.scope",
            "/kubepods.slice/kubepods-burstable.slice",
            "/machine.slice/pods.slice",
            "/kubepods/burstable/podnot-a-uid",
        ] {
            assert_eq!(parse_cgroup_path(path), None, "{path}");
        }
        assert_eq!(parse_cgroup_path(&format!("/docker/{ID}")), None);
    }
}
