//! The local end of a flow: cgroup → container → pod.

mod cgroup_name;
mod mounts;
mod processes;
mod tree;

use std::{fs, path::PathBuf};

pub use self::{
    cgroup_name::{ContainerRef, parse_cgroup_path},
    mounts::{Mounts, MountsError},
    processes::{knows_the_node_s_ids, sees_the_node_s_processes},
    tree::CgroupTree,
};

/// Who owns a cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A container of a pod.
    Container(ContainerRef),
    /// A process of the node itself.
    Host,
    /// As [`Self::Container`], by the socket's process: its id may be another process's by now.
    ContainerOfProcess(ContainerRef),
    /// As [`Self::Host`], likewise.
    HostProcess,
}

/// Finds the owner of a process on this node.
#[derive(Debug)]
pub struct Identity {
    tree: CgroupTree,
    /// Whether pods may be told apart in a cgroup v1 hierarchy only.
    hybrid: bool,
    knows_ids: bool,
}

impl Identity {
    /// Looks below `root`, a folder of the cgroup v2 hierarchy. With `hybrid`, a process that is in no pod's cgroup there
    /// is looked up in `/proc/PID/cgroup`, which lists the v1 hierarchies too, if this process `knows_ids`, see
    /// [`knows_the_node_s_ids`].
    #[must_use]
    pub fn new(root: PathBuf, hybrid: bool, knows_ids: bool) -> Self {
        Self {
            tree: CgroupTree::new(root),
            hybrid,
            knows_ids,
        }
    }

    /// The owner of the cgroup with this id, or of the process if the cgroup does not tell; `None` if neither says that
    /// it is of this node.
    pub fn owner(&mut self, cgroup: u64, pid: u32) -> Option<Owner> {
        match self.tree.owner(cgroup)? {
            Owner::Host if self.hybrid && self.knows_ids => owner_of_process(pid),
            Owner::Host if self.hybrid => None,
            owner => Some(owner),
        }
    }

    /// To be called once a drain: what was looked for in vain may be looked for again.
    pub fn next_round(&mut self) {
        self.tree.next_round();
    }

    /// To be called some times between two drains, if anything is named there: the same, but nothing grows older by it.
    pub fn look_again(&mut self) {
        self.tree.look_again();
    }
}

/// The owner of a process by any of its cgroup hierarchies; `None` if the process is not known or gone, so that nothing can
/// be said.
fn owner_of_process(pid: u32) -> Option<Owner> {
    if pid == 0 {
        return None;
    }
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    Some(container_in(&text).map_or(Owner::HostProcess, Owner::ContainerOfProcess))
}

/// Lines are `hierarchy:controllers:path` (`man 7 cgroups`).
fn container_in(proc_cgroup: &str) -> Option<ContainerRef> {
    proc_cgroup
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .find_map(parse_cgroup_path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_tells_only_if_its_id_is_the_node_s() {
        use std::os::unix::fs::MetadataExt as _;

        let root = tempfile::tempdir().unwrap();
        let (cgroup, pid) = (root.path().metadata().unwrap().ino(), std::process::id());
        let owner = |hybrid, knows_ids| {
            let mut identity = Identity::new(root.path().to_owned(), hybrid, knows_ids);
            identity.owner(cgroup, pid)
        };
        assert_eq!(owner(false, true), Some(Owner::Host));
        assert_eq!(owner(false, false), Some(Owner::Host));
        assert!(matches!(
            owner(true, true),
            Some(Owner::HostProcess | Owner::ContainerOfProcess(_))
        ));
        assert_eq!(owner(true, false), None);
    }

    #[test]
    fn a_hybrid_node_s_pod_is_found_in_a_v1_hierarchy() {
        let text = "12:memory:/kubepods/burstable/pod6a6b4d5e-90fa-4d7c-9a44-9a5b3f6f7c11/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
1:name=systemd:/kubepods/burstable/pod6a6b4d5e-90fa-4d7c-9a44-9a5b3f6f7c11/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
0::/system.slice/containerd.service
";
        let container = container_in(text).unwrap();
        assert_eq!(container.pod_uid, "6a6b4d5e-90fa-4d7c-9a44-9a5b3f6f7c11");
        assert_eq!(container_in("0::/user.slice\n"), None);
    }
}
