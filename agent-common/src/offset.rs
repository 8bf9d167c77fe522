//! Where the running kernel keeps the socket fields that no tracepoint reports.
//!
//! The agent reads the offsets from the kernel's BTF and sets them as read-only globals before it loads the programs, so
//! the verifier sees constants. None is guessed: 0 means "not known", which no used field can have but the first.

/// One field: the global's name in the object, and the path to the field in the kernel's types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name of the `u32` global that takes the offset.
    pub global: &'static str,
    /// The type that the path starts from.
    pub root: &'static str,
    /// Member names; unnamed structs and unions on the way are stepped through.
    pub path: &'static [&'static str],
}

const fn field(global: &'static str, root: &'static str, path: &'static [&'static str]) -> Field {
    Field { global, root, path }
}

/// What the BTF tracepoint program reads of every socket, in bytes from `struct sock`.
pub const SOCKET: [Field; 9] = [
    field("SK_FAMILY", "sock", &["__sk_common", "skc_family"]),
    field("SK_LOCAL_V4", "sock", &["__sk_common", "skc_rcv_saddr"]),
    field("SK_REMOTE_V4", "sock", &["__sk_common", "skc_daddr"]),
    field("SK_LOCAL_V6", "sock", &["__sk_common", "skc_v6_rcv_saddr"]),
    field("SK_REMOTE_V6", "sock", &["__sk_common", "skc_v6_daddr"]),
    field("SK_LOCAL_PORT", "sock", &["__sk_common", "skc_num"]),
    field("SK_REMOTE_PORT", "sock", &["__sk_common", "skc_dport"]),
    field("SK_PROTOCOL", "sock", &["sk_protocol"]),
    field("SK_SOCKET", "sock", &["sk_socket"]),
];

/// What is read of a TCP socket that ends, in bytes from `struct tcp_sock`, which begins with the `struct sock`.
pub const ENDED: [Field; 4] = [
    field(
        "TCP_OWN_PORT",
        "tcp_sock",
        &["inet_conn", "icsk_inet", "inet_sport"],
    ),
    field("TCP_BYTES_SENT", "tcp_sock", &["bytes_sent"]),
    field("TCP_BYTES_AGAIN", "tcp_sock", &["bytes_retrans"]),
    field("TCP_BYTES_RECEIVED", "tcp_sock", &["bytes_received"]),
];

/// The way from a socket to its network namespace's inode number.
pub const NETNS: [Field; 2] = [
    field("SK_NET", "sock", &["__sk_common", "skc_net", "net"]),
    field("NET_INUM", "net", &["ns", "inum"]),
];

/// The way from a socket to its cgroup's id. Since 5.15 `sock_cgroup_data` holds a typed pointer.
pub const CGROUP: [Field; 3] = [
    field("SK_CGROUP", "sock", &["sk_cgrp_data", "cgroup"]),
    field("CGROUP_KN", "cgroup", &["kn"]),
    field("KN_ID", "kernfs_node", &["id"]),
];

/// The same first step before 5.15: an integer that is a pointer if its lowest bit is clear, its second bit a flag.
pub const CGROUP_TAGGED: Field = field("SK_CGROUP_TAGGED", "sock", &["sk_cgrp_data", "val"]);

/// The way from an open file of a process to a socket, for what is older than the hooks. A file is a socket if its file
/// system is sockfs.
pub const FILE: [Field; 7] = [
    field("FILE_INODE", "file", &["f_inode"]),
    field("FILE_PRIVATE", "file", &["private_data"]),
    field("INODE_SUPER", "inode", &["i_sb"]),
    field("SUPER_MAGIC", "super_block", &["s_magic"]),
    field("SOCKET_SK", "socket", &["sk"]),
    field("TASK_TGID", "task_struct", &["tgid"]),
    field("TASK_COMM", "task_struct", &["comm"]),
];

/// What is read of a socket that is older than the hooks, and of connections that wait in its queue to be accepted.
pub const OPEN: [Field; 5] = [
    field("SK_STATE", "sock", &["__sk_common", "skc_state"]),
    field("SK_MAX_BACKLOG", "sock", &["sk_max_ack_backlog"]),
    field(
        "ACCEPT_QUEUE",
        "inet_connection_sock",
        &["icsk_accept_queue", "rskq_accept_head"],
    ),
    field("REQUEST_NEXT", "request_sock", &["dl_next"]),
    field("REQUEST_SK", "request_sock", &["sk"]),
];

/// What the kernel has chosen of a socket's own end, and what the process: a bit field, so its offset is in bits.
pub const USER_LOCKS: Field = field("SK_USERLOCKS_BIT", "sock", &["sk_userlocks"]);

/// Not a field but a function of the kernel, whose global is 1 where it is there: by it tracing programs keep something with a socket.
pub const SOCKET_STORAGE: (&str, &str) = ("TRACING_KEEPS", "bpf_sk_storage_get_tracing");
