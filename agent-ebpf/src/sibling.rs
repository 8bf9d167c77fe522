//! UDP sockets that share a port: the one that takes what strangers send, and one for each peer beside it.
//!
//! Servers of DTLS and the like are asked on a socket that is not connected, and go on with a client on another of the same
//! port, which they connect to it. That one speaks first, and is no client for it.

use agent_common::types::Roles;
use aya_ebpf::{
    bindings::{
        BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_sk_storage_get},
    programs::SkBuffContext,
};

use crate::{maps::UDP_ROLES, packet::End};

/// The cookie of the socket that takes what strangers send to this end, if there is one and somebody has spoken to it first. Of
/// several that share the work (`SO_REUSEPORT`) it is the one whose turn it is.
#[inline(always)]
pub(crate) fn cookie_of_the_asked(ctx: &SkBuffContext, local: &End) -> Option<u64> {
    let mut tuple = bpf_sock_tuple {
        __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 {
            ipv6: bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
                saddr: [0; 4],
                daddr: local.address.quarters(),
                sport: 0,
                dport: local.port.to_be(),
            },
        },
    };
    let size = match local.address.v4() {
        Some(v4) => {
            tuple.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
                saddr: 0,
                daddr: v4.to_be(),
                sport: 0,
                dport: local.port.to_be(),
            };
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>()
        }
        None => size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>(),
    };
    // Nobody sends from port 0, so no connected socket is meant.
    // SAFETY: the helper takes the context of this program and a tuple of one of the two sizes; the verifier sees that what it
    // gives is checked and given back.
    unsafe {
        let socket = bpf_sk_lookup_udp(
            ctx.skb.skb.cast(),
            &raw mut tuple,
            size as u32,
            BPF_F_CURRENT_NETNS as i64 as u64,
            0,
        );
        if socket.is_null() {
            return None;
        }
        let roles = bpf_sk_storage_get(
            (&raw const UDP_ROLES).cast_mut().cast(),
            socket.cast(),
            core::ptr::null_mut(),
            0,
        )
        .cast::<Roles>();
        let cookie = if roles.is_null() { 0 } else { (*roles).cookie };
        bpf_sk_release(socket.cast());
        (cookie != 0).then_some(cookie)
    }
}
