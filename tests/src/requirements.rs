//! What a lab needs of the machine.

use std::{env, fs, path::PathBuf};

use crate::cgroup;

/// Capabilities by their number in `linux/capability.h`.
const CAPABILITIES: [(u32, &str); 3] = [
    (12, "CAP_NET_ADMIN"),
    (21, "CAP_SYS_ADMIN"),
    (39, "CAP_BPF"),
];

/// Whether a lab can be made here, and what is missing if not.
///
/// # Errors
/// The reason, as a clause.
pub fn root_or_reason() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("not root".to_owned());
    }
    let effective = effective_capabilities();
    for (number, name) in CAPABILITIES {
        if effective >> number & 1 == 0 {
            return Err(format!("root without {name}"));
        }
    }
    for program in ["ip", "nft"] {
        let path = env::var_os("PATH").unwrap_or_default();
        if !env::split_paths(&path).any(|folder: PathBuf| folder.join(program).is_file()) {
            return Err(format!("`{program}` is not installed (cargo xtask setup)"));
        }
    }
    cgroup::mount().map_err(|error| error.to_string())?;
    Ok(())
}

fn effective_capabilities() -> u64 {
    fs::read_to_string("/proc/self/status")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}
