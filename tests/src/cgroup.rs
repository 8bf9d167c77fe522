//! Control groups: where pods' processes are found by.

use std::{
    fs,
    io::{self, ErrorKind, Write as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    cluster::{Node, Pod},
    pace,
};

/// How a kubelet names the cgroups of pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// Slices and scopes, as systemd has them.
    #[default]
    Systemd,
    /// Plain directories.
    Cgroupfs,
}

/// How a container runtime names the cgroups of containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Runtime {
    /// containerd.
    #[default]
    Containerd,
    /// CRI-O.
    Crio,
    /// Docker.
    Docker,
}

/// Finds where cgroup v2 is mounted: at `/sys/fs/cgroup`, or beside the v1 hierarchies on a hybrid system.
///
/// # Errors
/// If it is not mounted.
pub fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context("cgroup v2 is not mounted")
}

/// Finds where a cgroup v1 hierarchy is mounted that a process may join without further settings: systemd's own, or
/// that of a controller which only counts. `None` if there is none.
#[must_use]
pub fn v1_mount() -> Option<PathBuf> {
    ["name=systemd", "pids", "memory"]
        .into_iter()
        .find_map(v1_mount_of)
}

/// Finds where the cgroup v1 hierarchy with a controller is mounted. `None` if there is none.
#[must_use]
pub(crate) fn v1_mount_of(controller: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .filter(|fields| fields.get(2) == Some(&"cgroup"))
        .find(|fields| {
            let options = fields.get(3).unwrap_or(&"");
            options.split(',').any(|option| option == controller)
        })
        .map(|fields| PathBuf::from(fields[1]))
}

/// Where all cgroup v1 hierarchies are mounted: runc puts a container into each.
#[must_use]
pub(crate) fn v1_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let lines = mounts.lines().map(|line| line.split(' '));
    lines
        .filter_map(|mut fields| {
            let point = fields.nth(1)?;
            (fields.next()? == "cgroup").then(|| PathBuf::from(point))
        })
        .collect()
}

/// The cgroup of a pod's container, below its node's.
#[must_use]
pub(crate) fn of_pod(node: &Node, pod: &Pod) -> PathBuf {
    let uid = pod.uid();
    let container = pod.container();
    match node.driver {
        Driver::Systemd => {
            let prefix = match node.runtime {
                Runtime::Containerd => "cri-containerd",
                Runtime::Crio => "crio",
                Runtime::Docker => "docker",
            };
            let uid = uid.replace('-', "_");
            ["kubepods.slice", "kubepods-burstable.slice"]
                .iter()
                .collect::<PathBuf>()
                .join(format!("kubepods-burstable-pod{uid}.slice"))
                .join(format!("{prefix}-{container}.scope"))
        }
        Driver::Cgroupfs => {
            // CRI-O prefixes its name here too; containerd and Docker use the bare id.
            let prefix = if node.runtime == Runtime::Crio {
                "crio-"
            } else {
                ""
            };
            Path::new("kubepods/burstable")
                .join(format!("pod{uid}"))
                .join(format!("{prefix}{container}"))
        }
    }
}

/// Kills every process in a cgroup and below, and removes them all. One that does not exist is removed already.
///
/// # Errors
/// If a process does not die in time.
pub(crate) fn remove(cgroup: &Path) -> Result<()> {
    let deadline = Instant::now() + pace::patience(Duration::from_secs(5));
    match kill(cgroup) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        result => result.with_context(|| cgroup.display().to_string())?,
    }
    while is_populated(cgroup) {
        if Instant::now() > deadline {
            bail!("{} still has processes", cgroup.display());
        }
        thread::sleep(Duration::from_millis(2));
    }
    remove_tree(cgroup).with_context(|| cgroup.display().to_string())
}

/// Removes cgroups whose processes have ended, or are about to. One that does not exist is removed already.
///
/// # Errors
/// If there are processes for longer than half a second.
pub(crate) fn remove_empty(cgroup: &Path) -> Result<()> {
    remove_tree(cgroup).with_context(|| cgroup.display().to_string())
}

/// By `cgroup.kill`, which leaves no fork behind, or one by one where the kernel is older than 5.14.
fn kill(cgroup: &Path) -> io::Result<()> {
    // Not `fs::write`, which would make the file: where it is not, that is not permitted.
    let file = fs::OpenOptions::new()
        .write(true)
        .open(cgroup.join("cgroup.kill"));
    match file.and_then(|mut file| file.write_all(b"1")) {
        // The directory is there and the file is not: an old kernel.
        Err(error) if error.kind() != ErrorKind::NotFound || !cgroup.is_dir() => Err(error),
        Err(_) => kill_one_by_one(cgroup),
        Ok(()) => Ok(()),
    }
}

fn kill_one_by_one(cgroup: &Path) -> io::Result<()> {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    for child in children(cgroup)? {
        kill_one_by_one(&child)?;
    }
    for pid in fs::read_to_string(cgroup.join("cgroup.procs"))?.lines() {
        // A zombie of another pid namespace is listed as 0, which as a signal's target means this process's own group.
        if let Ok(pid @ 1..) = pid.parse::<i32>()
            && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGKILL)
            && error != nix::errno::Errno::ESRCH
        {
            return Err(error.into());
        }
    }
    Ok(())
}

fn is_populated(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|text| text.contains("populated 1"))
}

/// Children first; a directory that another removes meanwhile is as well.
fn remove_tree(cgroup: &Path) -> io::Result<()> {
    let list = match children(cgroup) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        list => list?,
    };
    for child in list {
        remove_tree(&child)?;
    }
    // A process that was just reaped can hold its cgroup for a moment longer.
    for _ in 0..100 {
        match fs::remove_dir(cgroup) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
    fs::remove_dir(cgroup)
}

fn children(cgroup: &Path) -> io::Result<Vec<PathBuf>> {
    let mut children = Vec::new();
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}
