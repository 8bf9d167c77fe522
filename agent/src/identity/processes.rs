//! Whose process ids this process knows.

use std::{fs, path::Path};

const OWN: &str = "/proc/self/ns/pid";

/// The first pid namespace, by its inode number (`PROC_PID_INIT_INO` in `include/linux/proc_ns.h`). The kernel programs have
/// ids of this one, wherever the agent is.
const NODE_S: &str = "pid:[4026531836]";

/// Whether `/proc` has all of the node's processes under the ids that the kernel programs know them by. In a pod without
/// `hostPID` it has the pod's own, and so have the kernel's iterators over processes.
#[must_use]
pub fn sees_the_node_s_processes() -> bool {
    fs::read_link(OWN).is_ok_and(|namespace| namespace == Path::new(NODE_S))
}
