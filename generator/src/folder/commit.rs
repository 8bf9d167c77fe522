//! Changing several files as one.
//!
//! All new texts are written beside their places and brought to disk. Then a journal that lists what is to be renamed and
//! removed takes its name: from here on the change is decided. Only then are the files renamed and removed, and the journal
//! at last. Who finds a journal does what it lists, as far as it is not done yet; who finds none removes the new texts that
//! a run left behind. All these names begin with a dot and have no suffix that `kubectl` looks at.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Component, Path},
};

use nix::unistd::syncfs;
use serde::{Deserialize, Serialize};

use super::{FolderError, Present, failed, look_at};

const JOURNAL: &str = ".microshield.journal";
const UNDECIDED_JOURNAL: &str = ".microshield.journal.tmp";

/// A journal has less than 600 bytes for each file.
const MAX_JOURNAL_BYTES: u64 = 64 << 20;

/// Of more files than these the whole file system is brought to disk at once: one by one takes some milliseconds each.
const FEW_FILES: usize = 16;

/// Something that is about to happen on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// A new text is written beside its place.
    Write,
    /// The journal is written.
    WriteJournal,
    /// The journal takes its name.
    Decide,
    /// A new text takes its place.
    Place,
    /// An old file goes.
    Remove,
    /// The journal goes, or what a run left behind that decided nothing.
    CleanUp,
    /// What was done in the folder so far comes to disk.
    Sync,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Journal {
    /// New texts and their places.
    place: Vec<(String, String)>,
    remove: Vec<String>,
}

/// The folder, as long as nobody else changes it.
pub(super) type Lock = File;

/// Waits until nobody else changes the folder. The lock is on the folder itself and leaves no file behind.
pub(super) fn lock(folder: &Path) -> Result<Lock, FolderError> {
    let lock = || {
        let folder = File::open(folder)?;
        loop {
            match folder.lock() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(|()| folder),
            }
        }
    };
    lock().map_err(failed("lock folder", folder))
}

/// Gives these names (none of which is another hand's) these texts, and removes those files, all or nothing.
pub(super) fn commit<'a>(
    folder: &Path,
    lock: &Lock,
    written: impl Iterator<Item = (&'a str, &'a str)>,
    removed: &[String],
    before: &mut dyn FnMut(Step),
) -> Result<(), FolderError> {
    let mut journal = Journal {
        place: Vec::new(),
        remove: removed.to_vec(),
    };
    let prepared = prepare(folder, lock, written, &mut journal, before);
    if journal.place.is_empty() && journal.remove.is_empty() {
        return prepared;
    }
    let decided = prepared.and_then(|()| decide(folder, lock, &journal, before));
    if let Err(error) = decided {
        // What cannot be removed now the next run will.
        return match clean_up(folder, before) {
            Ok(()) | Err(_) => Err(error),
        };
    }
    complete(folder, lock, &journal, before)
}

/// Completes what another run has decided, and removes what it has not.
pub(super) fn recover(
    folder: &Path,
    lock: &Lock,
    before: &mut dyn FnMut(Step),
) -> Result<(), FolderError> {
    let path = folder.join(JOURNAL);
    let read = || {
        let mut text = Vec::new();
        File::open(&path)?
            .take(MAX_JOURNAL_BYTES)
            .read_to_end(&mut text)?;
        Ok::<_, io::Error>(text)
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("read", &path)(error)),
        Ok(text) => {
            let journal = serde_json::from_slice::<Journal>(&text).ok();
            let journal = journal.filter(is_ours);
            let journal = journal.ok_or(FolderError::Journal { path })?;
            complete(folder, lock, &journal, before)?;
        }
    }
    clean_up(folder, before)
}

/// Writes the new texts beside their places, and brings them to disk.
fn prepare<'a>(
    folder: &Path,
    lock: &Lock,
    written: impl Iterator<Item = (&'a str, &'a str)>,
    journal: &mut Journal,
    before: &mut dyn FnMut(Step),
) -> Result<(), FolderError> {
    for (number, (name, text)) in written.enumerate() {
        let temporary = temporary(number);
        before(Step::Write);
        write_new(&folder.join(&temporary), text.as_bytes())?;
        journal.place.push((temporary, name.to_owned()));
    }
    if journal.place.len() > FEW_FILES {
        syncfs(lock).map_err(|error| failed("sync", folder)(error.into()))?;
    }
    // After `syncfs` there is nothing left to write, but older kernels tell only here that it failed.
    for (temporary, _) in &journal.place {
        let path = folder.join(temporary);
        let sync = || File::open(&path)?.sync_all();
        sync().map_err(failed("sync", &path))?;
    }
    Ok(())
}

fn decide(
    folder: &Path,
    lock: &Lock,
    journal: &Journal,
    before: &mut dyn FnMut(Step),
) -> Result<(), FolderError> {
    let undecided = folder.join(UNDECIDED_JOURNAL);
    let text = serde_json::to_vec(journal)
        .map_err(io::Error::from)
        .map_err(failed("write", &undecided))?;
    before(Step::WriteJournal);
    write_new(&undecided, &text)?;
    let sync_journal = || File::open(&undecided)?.sync_all();
    sync_journal().map_err(failed("sync", &undecided))?;
    before(Step::Sync);
    sync(folder, lock)?;
    before(Step::Decide);
    fs::rename(&undecided, folder.join(JOURNAL)).map_err(failed("rename", &undecided))?;
    Ok(())
}

/// Does what a journal lists, as far as it is not done. A file of another hand that has come to stand in a place since
/// stays.
fn complete(
    folder: &Path,
    lock: &Lock,
    journal: &Journal,
    before: &mut dyn FnMut(Step),
) -> Result<(), FolderError> {
    before(Step::Sync);
    sync(folder, lock)?;
    for (temporary, name) in &journal.place {
        let (from, to) = (folder.join(temporary), folder.join(name));
        if exists(&from)? && !is_foreign(&to)? {
            before(Step::Place);
            fs::rename(&from, &to).map_err(failed("write", &to))?;
        }
    }
    for name in &journal.remove {
        let path = folder.join(name);
        if exists(&path)? && !is_foreign(&path)? {
            before(Step::Remove);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    before(Step::Sync);
    sync(folder, lock)?;
    before(Step::CleanUp);
    let journal = folder.join(JOURNAL);
    fs::remove_file(&journal).map_err(failed("remove", &journal))
}

/// Removes new texts that were not put in their places.
fn clean_up(folder: &Path, before: &mut dyn FnMut(Step)) -> Result<(), FolderError> {
    for entry in fs::read_dir(folder).map_err(failed("list folder", folder))? {
        let entry = entry.map_err(failed("list folder", folder))?;
        let name = entry.file_name();
        let path = entry.path();
        let kind = entry.file_type().map_err(failed("look at", &path))?;
        if kind.is_file() && name.to_str().is_some_and(is_left_behind) {
            before(Step::CleanUp);
            fs::remove_file(&path).map_err(failed("remove", &path))?;
        }
    }
    Ok(())
}

fn temporary(number: usize) -> String {
    format!(".microshield-{number}.tmp")
}

fn is_left_behind(name: &str) -> bool {
    let number = name
        .strip_prefix(".microshield-")
        .and_then(|name| name.strip_suffix(".tmp"));
    name == UNDECIDED_JOURNAL
        || number.is_some_and(|number| {
            !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
        })
}

/// Whether a journal speaks of nothing outside its folder.
fn is_ours(journal: &Journal) -> bool {
    let is_plain = |name: &String| {
        let mut components = Path::new(name).components();
        matches!(components.next(), Some(Component::Normal(only)) if only == name.as_str())
            && components.next().is_none()
    };
    let mut names = journal.remove.iter();
    names.all(is_plain)
        && journal
            .place
            .iter()
            .all(|(temporary, name)| is_left_behind(temporary) && is_plain(name))
}

/// A new file; neither it nor its name is on disk yet.
fn write_new(path: &Path, text: &[u8]) -> Result<(), FolderError> {
    let write = || {
        // The mode is cut by the umask, as for any new file.
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o666)
            .open(path)?;
        file.write_all(text)
    };
    write().map_err(failed("write", path))
}

fn sync(folder: &Path, lock: &Lock) -> Result<(), FolderError> {
    lock.sync_all().map_err(failed("sync folder", folder))
}

fn exists(path: &Path) -> Result<bool, FolderError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("look at", path)(error)),
    }
}

fn is_foreign(path: &Path) -> Result<bool, FolderError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(look_at(path, metadata.file_type())? == Present::Foreign),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("look at", path)(error)),
    }
}
