//! What the kernel counts as a container's memory: the program's own, what the kernel holds for it, such as BPF maps, and
//! the files that it has read and written.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::{cgroup, lab::Lab};

/// The memory of a container from its start on.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// What it may take, in bytes.
    pub limit: u64,
    /// The most that it took, in bytes.
    pub most: u64,
    /// What it takes now, in bytes.
    pub now: u64,
    /// How many of its processes were killed for want of memory.
    pub kills: u64,
}

impl Memory {
    /// Of the only container of a lab that runs.
    ///
    /// # Errors
    /// If there is none or more than one, or the kernel does not count (v2: before 5.19).
    pub fn of_the_container(lab: &Lab) -> Result<Self> {
        if let Some(mount) = cgroup::v1_mount_of("memory") {
            let folder = only_container(&mount.join(lab.name()), lab)?;
            return Ok(Self {
                limit: number(&folder, "memory.limit_in_bytes")?,
                most: number(&folder, "memory.max_usage_in_bytes")?,
                now: number(&folder, "memory.usage_in_bytes")?,
                kills: field(&folder, "memory.oom_control", "oom_kill ")?,
            });
        }
        let folder = only_container(&cgroup::mount()?.join(lab.name()), lab)?;
        Ok(Self {
            limit: number(&folder, "memory.max")?,
            most: number(&folder, "memory.peak")?,
            now: number(&folder, "memory.current")?,
            kills: field(&folder, "memory.events", "oom_kill ")?,
        })
    }
}

/// The cgroup that [`crate::Container`] gave its container.
fn only_container(of_lab: &Path, lab: &Lab) -> Result<PathBuf> {
    let prefix = format!("{}-c", lab.name());
    let mut found = Vec::new();
    for entry in fs::read_dir(of_lab).with_context(|| of_lab.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            found.push(entry.path());
        }
    }
    match found.as_slice() {
        [folder] => Ok(folder.clone()),
        _ => bail!("one container is expected: {found:?}"),
    }
}

fn number(folder: &Path, file: &str) -> Result<u64> {
    let file = folder.join(file);
    let context = || file.display().to_string();
    let text = fs::read_to_string(&file).with_context(context)?;
    text.trim().parse().with_context(context)
}

fn field(folder: &Path, file: &str, name: &str) -> Result<u64> {
    let file = folder.join(file);
    let context = || file.display().to_string();
    let text = fs::read_to_string(&file).with_context(context)?;
    let rest = text.lines().find_map(|line| line.strip_prefix(name));
    rest.with_context(context)?.parse().with_context(context)
}
