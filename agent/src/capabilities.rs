//! What this process may do.

use std::{fs, io};

const STATUS: &str = "/proc/self/status";

/// A capability: its bit number in `include/uapi/linux/capability.h`, its name, and what needs it.
struct Capability {
    bit: u32,
    name: &'static str,
    needed_for: &'static str,
}

/// Kernels before 5.8 have neither of the two; there, and on every later one, `CAP_SYS_ADMIN` stands for both.
const SYS_ADMIN: u32 = 21;

const NEEDED: [Capability; 2] = [
    Capability {
        bit: 39,
        name: "CAP_BPF",
        needed_for: "to load the kernel programs and their maps",
    },
    Capability {
        bit: 38,
        name: "CAP_PERFMON",
        needed_for: "to attach them to tracepoints and let them read sockets",
    },
];

/// What this process lacks for capturing.
#[derive(Debug, thiserror::Error)]
pub enum CapabilityError {
    /// Capabilities are missing.
    #[error(
        "not permitted to capture: this process lacks {0} (root has both; in a container add them under securityContext.capabilities)"
    )]
    Missing(String),
    /// They cannot be read.
    #[error("{STATUS}")]
    Read(#[from] io::Error),
}

/// Checks that capturing is permitted.
///
/// # Errors
/// Names each missing capability, and what it is needed for.
pub fn check() -> Result<(), CapabilityError> {
    match missing(&fs::read_to_string(STATUS)?) {
        missing if missing.is_empty() => Ok(()),
        missing => Err(CapabilityError::Missing(missing.join(", and "))),
    }
}

/// What the effective set in a `status` file (`man 5 proc`) lacks. A file without that line is left for the kernel to
/// judge.
fn missing(status: &str) -> Vec<String> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    let has = |bit: u32| effective & (1 << bit) != 0;
    NEEDED
        .iter()
        .filter(|needed| !has(needed.bit) && !has(SYS_ADMIN))
        .map(|needed| format!("{} ({})", needed.name, needed.needed_for))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_capability_is_named() {
        let status = |set: u64| format!("Name:\tx\nCapEff:\t{set:016x}\nCapBnd:\t0\n");
        assert_eq!(missing(&status(1 << 39 | 1 << 38)), [""; 0]);
        assert_eq!(missing(&status(1 << SYS_ADMIN)), [""; 0]);
        let nothing = missing(&status(0));
        assert!(nothing[0].starts_with("CAP_BPF") && nothing[1].starts_with("CAP_PERFMON"));
        assert!(missing(&status(1 << 39))[0].starts_with("CAP_PERFMON"));
    }
}
