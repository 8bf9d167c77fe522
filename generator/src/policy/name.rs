//! Names of policies.

use std::{collections::BTreeSet, hash::Hasher};

use fnv::FnvHasher;

use super::target::TargetId;
use crate::syntax::is_subdomain;

/// The longest name. Kubernetes allows 253 bytes; a file's name, at most 255 bytes long, holds a namespace besides.
const MAX_BYTES: usize = 180;

/// A name for each target, in the order of the targets: `policy-NAME`. A name that is too long, that is none for
/// Kubernetes, or that another target of the namespace has already gets a hash of the target's identity.
pub(super) fn names<'a>(targets: impl Iterator<Item = &'a TargetId>) -> Vec<String> {
    let mut taken = BTreeSet::new();
    targets
        .map(|id| {
            let plain = format!("policy-{}", id.name());
            let name = if is_usable(&plain) && !taken.contains(&(&id.namespace, plain.clone())) {
                plain
            } else {
                let mut name = hashed(&plain, &id.to_string());
                while taken.contains(&(&id.namespace, name.clone())) {
                    name = hashed(&plain, &name);
                }
                name
            };
            taken.insert((&id.namespace, name.clone()));
            name
        })
        .collect()
}

fn is_usable(name: &str) -> bool {
    name.len() <= MAX_BYTES && is_subdomain(name)
}

/// As much of `name` as is valid and fits, and a hash of `identity`.
fn hashed(name: &str, identity: &str) -> String {
    // The standard library's hasher may change with its version; names must not.
    let mut hasher = FnvHasher::default();
    hasher.write(identity.as_bytes());
    let hash = hasher.finish();
    let hash = hash >> 32 ^ hash & 0xffff_ffff;
    let kept: String = name
        .chars()
        .map(|c| match c.to_ascii_lowercase() {
            c @ ('a'..='z' | '0'..='9' | '-') => c,
            _ => '-',
        })
        .take(MAX_BYTES - "-01234567".len())
        .collect();
    format!("{}-{hash:08x}", kept.trim_end_matches('-'))
}
