//! Whose process ids this process knows.

use std::{fs, path::Path};

/// The first process of the agent's pid namespace: of a container it is the container's own.
const FIRST: u32 = 1;

const OWN: &str = "/proc/self/ns/pid";

/// The first pid namespace, by its inode number (`PROC_PID_INIT_INO` in `include/linux/proc_ns.h`). The kernel programs have
/// ids of this one, wherever the agent is.
const NODE_S: &str = "pid:[4026531836]";

/// Whether `/proc` has the node's processes under the ids that the kernel programs know them by.
#[must_use]
pub fn knows_the_node_s_ids() -> bool {
    fs::read_link(OWN).is_ok_and(|namespace| namespace == Path::new(NODE_S))
}

/// Whether `/proc`, and the kernel's iterators over processes, show the node's. In a pod without `hostPID` they show the pod's own.
/// The node may be a container itself, as those of kind are: then they show its processes, under ids of its own.
#[must_use]
pub fn sees_the_node_s_processes() -> bool {
    if knows_the_node_s_ids() {
        return true;
    }
    let cgroup = |process: &str| fs::read_to_string(format!("/proc/{process}/cgroup")).ok();
    std::process::id() != FIRST && cgroup(&FIRST.to_string()) != cgroup("self")
}
