//! The file source: read when it changes.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{now, view::Shared};
use crate::topology::file::{self, FileError, Fingerprint, Loaded};

/// How often a file is looked at for changes.
const POLL: Duration = Duration::from_secs(1);

/// How a file of some form is read.
pub(super) type Load = fn(&Path) -> Result<Loaded, FileError>;

/// Reads the file into the index, and returns what has to go on for it to stay current.
pub(super) fn start(
    path: &Path,
    load: Load,
    shared: &Shared,
) -> Result<impl Future<Output = ()> + Send + use<>, FileError> {
    // Looked at before it is read: a change in between is then seen as one.
    let known = file::fingerprint(path).ok();
    replace(path, load, shared)?;
    Ok(follow(path.to_owned(), load, known, shared.clone()))
}

fn replace(path: &Path, load: Load, shared: &Shared) -> Result<(), FileError> {
    let loaded = load(path)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    if !loaded.skipped.is_empty() {
        tracing::info!(skipped = ?loaded.skipped, "objects of kinds that are not used");
    }
    shared.write().replace(loaded.objects, now());
    tracing::info!(path = %path.display(), "topology loaded");
    Ok(())
}

/// Reads the file again whenever it has changed and stays as it is for a second, so that nobody is still writing it; never
/// ends. A file that cannot be read leaves the index as it is.
async fn follow(path: PathBuf, load: Load, mut loaded: Option<Fingerprint>, shared: Shared) {
    let mut seen = loaded;
    loop {
        tokio::time::sleep(POLL).await;
        let before = std::mem::replace(&mut seen, file::fingerprint(&path).ok());
        if seen == loaded || seen != before {
            continue;
        }
        loaded = seen;
        let (path, shared) = (path.clone(), shared.clone());
        let result = tokio::task::spawn_blocking(move || replace(&path, load, &shared)).await;
        if let Ok(Err(error)) = result {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                error,
                "the topology file cannot be read: what was known before stays in use"
            );
        }
    }
}
