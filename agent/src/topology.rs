//! Where the index of the cluster comes from, and how it is kept current.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use flow::{
    time::Timestamp,
    topology::{
        Index,
        file::{self, FileError, Fingerprint},
    },
};

/// How often a file is looked at for changes.
const POLL: Duration = Duration::from_secs(1);

/// A file and the state of it that was read.
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    loaded: Option<Fingerprint>,
}

/// Reads the file into a new index.
///
/// # Errors
/// If the file cannot be read or is no list of objects.
pub fn from_file(path: PathBuf) -> Result<(Source, Arc<RwLock<Index>>), FileError> {
    let index = Arc::new(RwLock::new(Index::default()));
    // Taken before the reading: a change in between shows at the next look.
    let loaded = file::fingerprint(&path).ok();
    load(&path, &index)?;
    Ok((Source { path, loaded }, index))
}

/// Reads the file again whenever it has changed and stays as it is for a second, so that nobody is still writing it; never
/// ends. A file that cannot be read leaves the index as it is.
pub async fn follow_file(source: Source, index: Arc<RwLock<Index>>) {
    let Source { path, mut loaded } = source;
    let mut seen = loaded;
    loop {
        tokio::time::sleep(POLL).await;
        write(&index).expire(Timestamp::from(SystemTime::now()));
        let before = std::mem::replace(&mut seen, file::fingerprint(&path).ok());
        if seen == loaded || seen != before {
            continue;
        }
        loaded = seen;
        let (path, index) = (path.clone(), Arc::clone(&index));
        let result = tokio::task::spawn_blocking(move || load(&path, &index)).await;
        if let Ok(Err(error)) = result {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                error,
                "the topology file cannot be read: what was known before stays in use"
            );
        }
    }
}

fn load(path: &Path, index: &RwLock<Index>) -> Result<(), FileError> {
    let loaded = file::load(path)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    if !loaded.skipped.is_empty() {
        tracing::info!(skipped = ?loaded.skipped, "objects of kinds that are not used");
    }
    write(index).replace(loaded.objects, Timestamp::from(SystemTime::now()));
    tracing::info!(path = %path.display(), "topology loaded");
    Ok(())
}

fn write(index: &RwLock<Index>) -> RwLockWriteGuard<'_, Index> {
    index.write().unwrap_or_else(PoisonError::into_inner)
}
