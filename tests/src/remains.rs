//! What labs leave on the machine, found by name and removed.

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File, TryLockError},
    io::ErrorKind,
    path::{Path, PathBuf},
    process,
    sync::{
        Mutex, PoisonError, RwLock,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    mount::{MntFlags, umount2},
};

use crate::{cgroup, network};

/// The start of the name of every lab's namespaces, cgroups and folders; the maker's process id follows. It is for the
/// reader: another process may have the same in another pid namespace.
const PREFIX: &str = "microshield-lab-";

/// The labs of this process.
static OWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A lab's name and its folder, which is locked as long as this is there. The kernel unlocks it when its process ends,
/// however that comes about, and then the lab is stale.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) name: String,
    _locked_folder: File,
}

/// Held for reading while something is made, and for writing from the moment on when nothing may be made any more.
pub(crate) static GATE: RwLock<()> = RwLock::new(());

/// Takes the first name that is free, and makes its folder.
///
/// # Errors
/// If there can be no folder.
pub(crate) fn claim() -> Result<Claim> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // It has its name only once it is locked: nobody finds it in between and takes it for stale.
    let unnamed = tempfile::Builder::new().prefix("lab-").tempdir()?;
    let locked = File::open(unnamed.path())?;
    locked.lock().context("locking a lab's folder")?;
    let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}", process::id());
        let folder = folder(&name);
        let flags = RenameFlags::RENAME_NOREPLACE;
        match renameat2(AT_FDCWD, unnamed.path(), AT_FDCWD, &folder, flags) {
            Err(Errno::EEXIST) => {}
            Err(error) => return Err(error).with_context(|| folder.display().to_string()),
            Ok(()) => {
                let _old_path = unnamed.keep();
                own.insert(name.clone());
                return Ok(Claim {
                    name,
                    _locked_folder: locked,
                });
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
        own.remove(&self.name);
    }
}

/// The folder for a lab's files.
pub(crate) fn folder(lab: &str) -> PathBuf {
    env::temp_dir().join(lab)
}

/// The directory of a lab's cgroups.
pub(crate) fn cgroups(lab: &str) -> Result<PathBuf> {
    Ok(cgroup::mount()?.join(lab))
}

/// Removes everything that is named after a lab. What is gone already is no error.
///
/// # Errors
/// The first thing that cannot be removed; the others are, as far as possible.
pub(crate) fn remove(lab: &str) -> Result<()> {
    // Programs first: they hold namespaces and cgroups.
    let cgroups = cgroups(lab).and_then(|path| cgroup::remove(&path));
    // All programs are in the v2 hierarchy too, and were ended with it.
    let v1 = cgroup::v1_mounts()
        .iter()
        .try_for_each(|mount| cgroup::remove_empty(&mount.join(lab)));
    let namespaces = entries(Path::new(network::NAMESPACES))
        .filter(|namespace| namespace.starts_with(&format!("{lab}-")))
        .try_for_each(|namespace| remove_namespace(&network::path(&namespace)));
    cgroups?;
    v1?;
    namespaces?;
    // Last, because whatever has no folder is stale.
    match fs::remove_dir_all(folder(lab)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Removes all labs of this process, for good: no other can be made afterwards.
///
/// # Errors
/// As [`remove`].
pub(crate) fn remove_own() -> Result<()> {
    // A poisoned gate is as shut as any. Leaking the guard keeps it so.
    std::mem::forget(GATE.write());
    let own = OWN.lock().unwrap_or_else(PoisonError::into_inner);
    own.iter().try_for_each(|lab| remove(lab))
}

/// Removes the labs of processes that are no more.
///
/// # Errors
/// As [`remove`].
pub(crate) fn remove_stale() -> Result<()> {
    for lab in labs() {
        // Held to the end, so that two who sweep do not meet.
        let locked = match File::open(folder(&lab)) {
            Ok(folder) => Some(folder),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| lab),
        };
        match locked.as_ref().map_or(Ok(()), File::try_lock) {
            Ok(()) => remove(&lab)?,
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| lab),
        }
    }
    Ok(())
}

/// The names of all labs of which anything is left.
fn labs() -> BTreeSet<String> {
    [
        PathBuf::from(network::NAMESPACES),
        env::temp_dir(),
        cgroup::mount().unwrap_or_default(),
        cgroup::v1_mount().unwrap_or_default(),
    ]
    .into_iter()
    .flat_map(|folder| entries(&folder))
    .filter_map(|entry| {
        // A namespace's name goes on after the lab's.
        let mut parts = entry.strip_prefix(PREFIX)?.split('-');
        let (pid, number) = (parts.next()?, parts.next()?);
        Some(format!("{PREFIX}{pid}-{number}"))
    })
    .collect()
}

/// What `ip netns del` does, except that a namespace which another removes meanwhile is no error.
fn remove_namespace(file: &Path) -> Result<()> {
    match umount2(file, MntFlags::MNT_DETACH) {
        // `EINVAL`: its maker was killed between making the file and mounting the namespace on it.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(error) => return Err(error).with_context(|| file.display().to_string()),
    }
    match fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| file.display().to_string())
        }
        _ => Ok(()),
    }
}

fn entries(folder: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}
