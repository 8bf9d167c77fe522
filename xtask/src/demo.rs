//! The demonstration: a two-node bookinfo, two agents, one generator.

use anyhow::{Result, bail};

use crate::{
    ebpf,
    proc::{self, Unmet},
    setup::{self, Scope},
};

/// Builds what the demonstration shows, and becomes it.
///
/// # Errors
/// [`Unmet`] without root, before anything is built.
pub(crate) fn run() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(Unmet(
            "the demonstration needs root, as by `sudo -E env \"PATH=$PATH\" cargo xtask demo`: it makes network namespaces \
             and loads kernel programs"
                .into()
        ));
    }
    setup::run(Scope::Lab)?;
    ebpf::build()?;
    proc::become_program(
        "demo",
        &["lab-pod", "microshield", "microshield-agent"],
        &[],
    )
}
