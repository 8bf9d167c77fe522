//! Debian's kernels, unpacked from their packages and installed nowhere.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use super::Set;
use crate::{
    apt::Apt,
    proc::{output, target_dir},
};

/// A kernel to test on.
pub(crate) struct Kernel {
    /// Its version, as far as it does not change.
    pub(crate) series: &'static str,
    /// The package that depends on the newest of it.
    package: &'static str,
    /// The release of Debian that has it.
    release: &'static str,
    /// The smallest set that it is tested in.
    pub(crate) set: Set,
    /// Tests, by parts of their names, of what it does not have.
    pub(crate) lacks: &'static [&'static str],
}

/// The kernels for clouds have what the lab needs and are half as large as the others.
pub(crate) const KERNELS: [Kernel; 3] = [
    Kernel {
        series: "6.12",
        package: "linux-image-6.12-cloud-amd64",
        release: "bookworm",
        set: Set::Core,
        lacks: &[],
    },
    Kernel {
        series: "6.1",
        package: "linux-image-cloud-amd64",
        release: "bookworm",
        set: Set::Core,
        // No limit to a socket's memory by the network namespace.
        lacks: &["udp::no_memory"],
    },
    Kernel {
        series: "5.10",
        package: "linux-image-cloud-amd64",
        release: "bullseye",
        set: Set::All,
        // No multipath TCP in this build of it, and no iterator over the sockets of processes: who spoke first on a UDP socket
        // that is older than the agent is not known then.
        lacks: &["edge_cases::multipath", "before::answers", "udp::no_memory"],
    },
];

/// A kernel on this machine.
pub(crate) struct Unpacked {
    /// The kernel's image.
    pub(crate) image: PathBuf,
    /// The folder of its modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// Finds it below `target/vm`, or has apt fetch it. What is there is not asked for again.
    ///
    /// # Errors
    /// If apt has no source of it, or it is not what it should be.
    pub(crate) fn unpacked(&self) -> Result<Unpacked> {
        let folder = target_dir().join("vm").join(self.series);
        if !folder.exists() {
            self.fetch(&folder)?;
        }
        let image = only_file(&folder.join("boot"), "vmlinuz-")?;
        let modules = only_file(&folder.join("lib/modules"), "")?;
        let name = modules.file_name().unwrap_or_default().to_string_lossy();
        ensure!(
            name.starts_with(&format!("{}.", self.series)),
            "{} is not Linux {}: remove {}",
            name,
            self.series,
            folder.display()
        );
        Ok(Unpacked { image, modules })
    }

    fn fetch(&self, folder: &Path) -> Result<()> {
        let apt = Apt::updated(self.release).with_context(|| {
            format!(
                "Linux {} is not below {} yet, and comes from Debian's mirrors",
                self.series,
                folder.display()
            )
        })?;
        let depends = output(apt.command("apt-cache").args(["depends", self.package]))?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .map(|rest| format!("linux-image-{rest}"))
            .with_context(|| format!("{} depends on no kernel:\n{depends}", self.package))?;
        apt.unpack(&package, folder)
    }
}

/// The one file in a folder whose name begins so.
fn only_file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match found.pop() {
        Some(file) if found.is_empty() => Ok(file),
        _ => bail!("{} has not one file `{prefix}…`", folder.display()),
    }
}
