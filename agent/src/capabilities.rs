//! What this process may do.

use std::{fs, io};

const STATUS: &str = "/proc/self/status";

/// A capability, and what it is good for.
#[derive(Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number in `include/uapi/linux/capability.h`.
    bit: u32,
    /// Its name there.
    pub name: &'static str,
    /// What it is needed for, as the end of a sentence.
    pub needed_for: &'static str,
    /// What is lost without it, as a sentence.
    pub lost: &'static str,
    /// Whether nothing can be captured without it.
    pub required: bool,
    /// Whether `CAP_SYS_ADMIN` stands for it: in all that has to do with BPF it does (`bpf_capable`, `perfmon_capable` in
    /// `include/linux/capability.h`; `bpf_prog_load` for programs of the network).
    by_sys_admin: bool,
}

/// The rest of what root has is good for nothing here.
pub const NEEDED: [Capability; 4] = [
    Capability {
        bit: 39,
        name: "CAP_BPF",
        needed_for: "to load the kernel programs and their maps",
        lost: "nothing is captured",
        required: true,
        by_sys_admin: true,
    },
    Capability {
        bit: 38,
        name: "CAP_PERFMON",
        needed_for: "to attach them to tracepoints and let them read sockets",
        lost: "nothing is captured",
        required: true,
        by_sys_admin: true,
    },
    Capability {
        bit: 12,
        name: "CAP_NET_ADMIN",
        needed_for: "for the programs that see packets",
        lost: "UDP and SCTP are not captured",
        required: false,
        by_sys_admin: true,
    },
    Capability {
        bit: 19,
        name: "CAP_SYS_PTRACE",
        needed_for: "to see in /proc which sockets other processes have open, where the kernel cannot list them",
        lost: "there, the owners of sockets that are older than the agent are known by their addresses only",
        required: false,
        by_sys_admin: false,
    },
];

/// Kernels before 5.8 and runtimes of that time know neither `CAP_BPF` nor `CAP_PERFMON`.
const SYS_ADMIN: u32 = 21;

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

/// The effective capabilities of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effective(u64);

impl Effective {
    /// Those of this process.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn read() -> io::Result<Self> {
        Ok(Self::parse(&fs::read_to_string(STATUS)?))
    }

    /// From a `status` file (`man 5 proc`). A file without that line is left for the kernel to judge.
    fn parse(status: &str) -> Self {
        let set = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
        Self(set.unwrap_or(u64::MAX))
    }

    /// Whether a capability is among them, or one that stands for it.
    #[must_use]
    pub fn has(self, capability: &Capability) -> bool {
        let bit = |bit: u32| self.0 & (1 << bit) != 0;
        bit(capability.bit) || (capability.by_sys_admin && bit(SYS_ADMIN))
    }

    /// Those that are missing of what is needed.
    pub fn missing(self) -> impl Iterator<Item = &'static Capability> {
        NEEDED.iter().filter(move |needed| !self.has(needed))
    }
}

/// Checks that capturing is permitted, and says what will be missing in it.
///
/// # Errors
/// Names each missing capability without which nothing can be captured, and what it is needed for.
pub fn check() -> Result<(), CapabilityError> {
    let effective = Effective::read()?;
    let missing = required(effective);
    if !missing.is_empty() {
        return Err(CapabilityError::Missing(missing));
    }
    for missing in effective.missing() {
        tracing::warn!(
            needed = missing.needed_for,
            "this process lacks {}: {}",
            missing.name,
            missing.lost
        );
    }
    Ok(())
}

/// What is missing and cannot be.
fn required(effective: Effective) -> String {
    effective
        .missing()
        .filter(|needed| needed.required)
        .map(|needed| format!("{} ({})", needed.name, needed.needed_for))
        .collect::<Vec<_>>()
        .join(", and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_capability_is_named() {
        let of = |bits: &[u32]| {
            let set: u64 = bits.iter().map(|bit| 1 << bit).sum();
            Effective::parse(&format!("Name:\tx\nCapEff:\t{set:016x}\nCapBnd:\t0\n"))
        };
        let names = |bits: &[u32]| -> Vec<&str> {
            of(bits).missing().map(|missing| missing.name).collect()
        };
        assert_eq!(names(&[12, 19, 38, 39]), [""; 0]);
        assert_eq!(names(&[SYS_ADMIN]), ["CAP_SYS_PTRACE"]);
        assert_eq!(names(&[38, 39]), ["CAP_NET_ADMIN", "CAP_SYS_PTRACE"]);
        assert_eq!(required(of(&[38, 39])), "");
        assert!(required(of(&[12, 19, 39])).starts_with("CAP_PERFMON (to attach"));
        let nothing = required(of(&[]));
        assert!(nothing.starts_with("CAP_BPF (to load") && nothing.contains("CAP_PERFMON"));
        // No such line: the kernel says what it thinks of it.
        assert_eq!(Effective::parse("Name:\tx\n").missing().count(), 0);
    }
}
