//! The filter of system calls that containerd and Docker put on a container by default.
//!
//! Both publish theirs as a list of what is allowed. This is the other side of it: what is refused, or comes back with a
//! capability, of all that Linux on 64-bit machines has. Docker's documentation has the table and the reasons
//! (`docs.docker.com/engine/security/seccomp`).

use std::collections::BTreeSet;

use serde_json::{Value, json};

/// Refused whatever a container may do.
const ALWAYS: &str = "_sysctl add_key create_module get_kernel_syms io_uring_enter io_uring_register io_uring_setup \
    kexec_file_load kexec_load keyctl migrate_pages move_pages nfsservctl pivot_root query_module request_key swapoff \
    swapon sysfs uselib userfaultfd ustat vserver";

/// Refused without one of these capabilities.
const WITHOUT: [(&str, &str); 14] = [
    ("CAP_BPF CAP_SYS_ADMIN", "bpf"),
    ("CAP_PERFMON CAP_SYS_ADMIN", "perf_event_open"),
    ("CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    (
        "CAP_SYS_ADMIN",
        "fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr lsm_list_modules \
         lsm_set_self_attr mount mount_setattr move_mount open_tree quotactl quotactl_fd setdomainname sethostname setns \
         umount umount2 unshare",
    ),
    ("CAP_SYS_ADMIN CAP_SYSLOG", "syslog"),
    ("CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    ("CAP_SYS_BOOT", "reboot"),
    ("CAP_SYS_CHROOT", "chroot"),
    ("CAP_SYS_MODULE", "delete_module finit_module init_module"),
    ("CAP_SYS_PACCT", "acct"),
    ("CAP_SYS_RAWIO", "ioperm iopl"),
    ("CAP_SYS_TIME", "clock_settime settimeofday stime"),
    ("CAP_SYS_TTY_CONFIG", "vhangup"),
    (
        "CAP_SYS_NICE",
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    ),
];

/// `CLONE_NEW…` of `linux/sched.h`: cgroup, ipc, mount, network, pid, user and uts namespaces.
const NAMESPACES: [u64; 7] = [
    0x0200_0000,
    0x0800_0000,
    0x0002_0000,
    0x4000_0000,
    0x2000_0000,
    0x1000_0000,
    0x0400_0000,
];

/// `AF_ALG` and `AF_VSOCK`.
const FAMILIES: [u64; 2] = [38, 40];

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// As `linux.seccomp` of a runtime configuration has it, for a container with these capabilities.
pub(crate) fn filter(capabilities: &BTreeSet<String>) -> Value {
    let mut refused: Vec<&str> = ALWAYS.split_whitespace().collect();
    for (unless, calls) in WITHOUT {
        if !unless.split(' ').any(|name| capabilities.contains(name)) {
            refused.extend(calls.split_whitespace());
        }
    }
    let mut rules = vec![refuse(&refused, EPERM, json!([]))];
    if !capabilities.contains("CAP_SYS_ADMIN") {
        // Its flags are behind a pointer, so that callers are sent to `clone`.
        rules.push(refuse(&["clone3"], ENOSYS, json!([])));
        for flag in NAMESPACES {
            let argument =
                json!({"index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ"});
            rules.push(refuse(&["clone"], EPERM, json!([argument])));
        }
    }
    for family in FAMILIES {
        let argument = json!({"index": 0, "value": family, "op": "SCMP_CMP_EQ"});
        rules.push(refuse(&["socket"], EPERM, json!([argument])));
    }
    json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
}

fn refuse(names: &[&str], errno: u32, arguments: Value) -> Value {
    json!({"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": arguments})
}
