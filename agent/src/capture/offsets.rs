//! Field offsets from the running kernel's BTF.

use std::fs;

use agent_common::offset::{
    CGROUP, CGROUP_TAGGED, ENDED, FILE, Field, NETNS, OPEN, SOCKET, SOCKET_STORAGE, USER_LOCKS,
};
use btf_rs::{Btf, Type};

/// The kernel's BTF; only kernels built with `CONFIG_DEBUG_INFO_BTF` have it.
pub const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// The offsets that the programs are given, by the name of their global; what could not be found is not in it.
#[derive(Debug, Default)]
pub(super) struct Offsets {
    found: Vec<(&'static str, u32)>,
}

impl Offsets {
    /// Reads them from the kernel's BTF. Without it, or where a type is not as expected, the result has less.
    pub(super) fn of_this_kernel() -> Self {
        // Read whole: the crate's own reading of a file seeks once for each type.
        let btf = match fs::read(KERNEL_BTF) {
            Ok(bytes) => Btf::from_bytes(&bytes).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match btf {
            Ok(btf) => Self::from_btf(&btf),
            Err(error) => {
                tracing::debug!(%error, path = KERNEL_BTF, "the kernel's types cannot be read");
                Self::default()
            }
        }
    }

    fn from_btf(btf: &Btf) -> Self {
        let fields = SOCKET
            .into_iter()
            .chain(NETNS)
            .chain(CGROUP)
            .chain([CGROUP_TAGGED])
            .chain(ENDED)
            .chain(FILE)
            .chain(OPEN);
        Self {
            found: fields
                .filter_map(|field| offset_of(btf, &field).map(|offset| (field.global, offset)))
                .chain(bit_offset_of(btf, &USER_LOCKS).map(|offset| (USER_LOCKS.global, offset)))
                .chain(has_function(btf, SOCKET_STORAGE.1).then_some((SOCKET_STORAGE.0, 1)))
                .collect(),
        }
    }

    /// Every global and its offset in bytes, or 1 for a function.
    pub(super) fn globals(&self) -> &[(&'static str, u32)] {
        &self.found
    }

    /// Whether the BTF tracepoint program can read everything that it reads.
    pub(super) fn suffice_for_typed_sockets(&self) -> bool {
        self.has(&SOCKET) && self.names_netns() && self.has(&CGROUP) && self.has(&ENDED)
    }

    /// Whether the iterators can find what is older than the hooks.
    pub(super) fn suffice_for_iterators(&self) -> bool {
        self.has(&SOCKET)
            && self.names_netns()
            && self.has(&FILE)
            && self.has(&OPEN)
            && self.has(&[USER_LOCKS])
    }

    /// Whether network namespaces are known.
    pub(super) fn names_netns(&self) -> bool {
        self.has(&NETNS)
    }

    /// Whether a socket's own cgroup is known.
    pub(super) fn names_cgroup(&self) -> bool {
        self.has(&CGROUP) || (self.has(&CGROUP[1..]) && self.has(&[CGROUP_TAGGED]))
    }

    fn has(&self, fields: &[Field]) -> bool {
        fields
            .iter()
            .all(|field| self.found.iter().any(|(name, _)| *name == field.global))
    }
}

fn has_function(btf: &Btf, name: &str) -> bool {
    btf.resolve_types_by_name(name)
        .is_ok_and(|found| found.iter().any(|kind| matches!(kind, Type::Func(_))))
}

/// Offset of a field in bytes; `None` if there is no such field or it is a bit field.
fn offset_of(btf: &Btf, field: &Field) -> Option<u32> {
    let bits = bit_offset_of(btf, field)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// The same in bits, of any field.
fn bit_offset_of(btf: &Btf, field: &Field) -> Option<u32> {
    let root = btf
        .resolve_types_by_name(field.root)
        .ok()?
        .into_iter()
        .find(|kind| matches!(kind, Type::Struct(found) if !found.members.is_empty()))?;
    let mut bits = 0;
    let mut current = root;
    for name in field.path {
        let (offset, next) = member(btf, &current, name)?;
        bits += offset;
        current = next;
    }
    Some(bits)
}

/// Offset in bits and type of a member, looked for in unnamed structs and unions too.
fn member(btf: &Btf, kind: &Type, name: &str) -> Option<(u32, Type)> {
    let (Type::Struct(composite) | Type::Union(composite)) = kind else {
        return None;
    };
    for member in &composite.members {
        let member_name = btf.resolve_name(member).unwrap_or_default();
        let offset = member.bit_offset();
        if member_name == name {
            return Some((offset, named_type(btf, member)?));
        }
        if member_name.is_empty()
            && let Some(inner) = named_type(btf, member)
            && let Some((within, found)) = self::member(btf, &inner, name)
        {
            return Some((offset + within, found));
        }
    }
    None
}

/// The type of a member without its qualifiers and aliases.
fn named_type(btf: &Btf, member: &btf_rs::Member) -> Option<Type> {
    let mut kind = btf.resolve_chained_type(member).ok()?;
    loop {
        kind = match &kind {
            Type::Const(alias) | Type::Volatile(alias) | Type::Restrict(alias) => {
                btf.resolve_chained_type(alias).ok()?
            }
            Type::Typedef(alias) => btf.resolve_chained_type(alias).ok()?,
            Type::TypeTag(tag) => btf.resolve_chained_type(tag).ok()?,
            _ => return Some(kind),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's own interface pins these two: `struct sock` starts with `struct sock_common`, and that with the
    /// address pair (`include/net/sock.h`).
    #[test]
    fn offsets_are_read_from_this_kernel_s_types() {
        if !std::path::Path::new(KERNEL_BTF).exists() {
            eprintln!("skipped: this kernel has no {KERNEL_BTF}");
            return;
        }
        let offsets = Offsets::of_this_kernel();
        assert!(offsets.suffice_for_typed_sockets(), "{offsets:?}");
        let offset = |name| {
            offsets
                .globals()
                .iter()
                .find(|(global, _)| *global == name)
                .unwrap()
                .1
        };
        assert_eq!(offset("SK_REMOTE_V4"), 0);
        assert_eq!(offset("SK_LOCAL_V4"), 4);
        assert_eq!(offset("SK_REMOTE_PORT") + 2, offset("SK_LOCAL_PORT"));
        assert!(offsets.suffice_for_iterators(), "{offsets:?}");
        assert_eq!(offset(SOCKET_STORAGE.0), 1);
    }
}
