//! kubectl, whose kustomize people render `deploy/` with: the tests hold what they look at against it.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    apt::Apt,
    proc::{Unmet, find, target_dir},
};

/// The first release of Debian whose kubectl knows kustomize's components: that of Debian 12 is kubectl 1.20.
const RELEASE: &str = "trixie";

/// Kubernetes 1.21 was the first to have them.
const OLDEST: u32 = 21;

/// Has apt fetch it where there is none that is new enough.
///
/// # Errors
/// If it cannot be had from here.
pub(crate) fn ensure() -> Result<()> {
    if program().is_some() {
        return Ok(());
    }
    if find("apt-get").is_none() {
        bail!(Unmet(format!(
            "the tests render the manifests with kubectl, 1.{OLDEST} or newer; this is no Debian to take one from: install it"
        )));
    }
    eprintln!("missing: kubectl (the tests render the manifests as its users do)");
    let folder = unpacked();
    Apt::updated(RELEASE)
        .and_then(|apt| apt.unpack("kubectl", &folder))
        .context("kubectl comes from Debian's mirrors")?;
    match program() {
        Some(_) => Ok(()),
        None => bail!("{} does not run here", folder.display()),
    }
}

/// The one in `PATH`, or else that which was fetched, if it is new enough.
pub(crate) fn program() -> Option<PathBuf> {
    let fetched = unpacked().join("usr/bin/kubectl");
    find("kubectl")
        .into_iter()
        .chain([fetched])
        .find(|program| minor(program).is_some_and(|minor| minor >= OLDEST))
}

fn unpacked() -> PathBuf {
    target_dir().join("kubectl")
}

/// The second number of its version.
fn minor(program: &Path) -> Option<u32> {
    let output = Command::new(program)
        .args(["version", "--client", "--output=json"])
        .output()
        .ok()?;
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let minor = said["clientVersion"]["minor"].as_str()?;
    minor.trim_end_matches('+').parse().ok()
}
