//! The folder of policies.
//!
//! It may hold files of other hands. A file is ours if it holds exactly one NetworkPolicy with the label
//! [`MANAGED_BY_LABEL`]`: `[`MANAGED_BY`]; the namespace in it decides whether this run may replace or remove it.
//! Whatever else is there is never changed.
//!
//! The files change as a set: whatever happens while they are written, the folder has the old set or, once the next run has
//! [completed](recover) it, the new one ([`commit`]). Nobody ever reads half a policy. New policies are in place before old
//! ones go.

mod commit;

use std::{
    collections::BTreeMap,
    fs::{self, File, FileType},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use self::commit::Step;
use crate::policy::{MANAGED_BY, MANAGED_BY_LABEL, Namespaces};

/// Larger files are not looked into: the API server takes no object of more than 3 MiB.
const MAX_FILE_BYTES: u64 = 8 << 20;

/// What became of the files in the folder, by name, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// New, or with new contents.
    pub written: Vec<String>,
    /// Already as they should be, and not touched.
    pub unchanged: Vec<String>,
    /// Ours, but no policy of this run.
    pub removed: Vec<String>,
    /// YAML and JSON files of other hands, or of namespaces that this run does not write. `kubectl apply -f FOLDER` applies
    /// them too.
    pub kept: Vec<String>,
}

/// Why the folder could not be written.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system refused.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// What a run left behind that did not come to its end cannot be understood.
    #[error(
        "{}: not a list of changes by microshield: remove it, and the folder is as it stands", path.display()
    )]
    Journal {
        /// The file.
        path: PathBuf,
    },
    /// A file of another hand has the name of one to be written. Nothing was changed.
    #[error(
        "{} was not written by microshield: rename it, remove it, or choose another folder", path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A policy of a namespace that this run does not write has the name of one to be written. Nothing was changed.
    #[error(
        "{} holds a policy of namespace {namespace}, which is not chosen: choose another folder", path.display()
    )]
    OtherNamespace {
        /// The file.
        path: PathBuf,
        /// The namespace of the policy in it.
        namespace: String,
    },
}

/// What stands under a name in the folder.
#[derive(Debug, PartialEq, Eq)]
enum Present {
    /// A policy of ours: its text and its namespace.
    Ours {
        text: String,
        namespace: String,
    },
    Foreign,
}

/// Makes the folder hold exactly `files` (name to text) of what is ours in the chosen namespaces.
///
/// # Errors
/// If something cannot be read or written, or would overwrite what is not ours.
pub fn write(
    folder: &Path,
    files: &BTreeMap<String, String>,
    namespaces: &Namespaces,
) -> Result<Changes, FolderError> {
    write_in_steps(folder, files, namespaces, &mut |_| {})
}

/// Completes what a run has begun to change that did not come to its end. [`write`] does so by itself; who only reads the
/// folder may want it too.
///
/// # Errors
/// If something cannot be read or written.
pub fn recover(folder: &Path) -> Result<(), FolderError> {
    let lock = commit::lock(folder)?;
    commit::recover(folder, &lock, &mut |_| {})
}

/// `before` is called before each step that changes something on disk.
fn write_in_steps(
    folder: &Path,
    files: &BTreeMap<String, String>,
    namespaces: &Namespaces,
    before: &mut dyn FnMut(Step),
) -> Result<Changes, FolderError> {
    fs::create_dir_all(folder).map_err(failed("create folder", folder))?;
    let lock = commit::lock(folder)?;
    commit::recover(folder, &lock, before)?;
    let present = list(folder)?;
    for name in files.keys() {
        let path = folder.join(name);
        match present.get(name) {
            Some(Present::Foreign) => return Err(FolderError::Foreign { path }),
            Some(Present::Ours { namespace, .. }) if !namespaces.contains(namespace) => {
                return Err(FolderError::OtherNamespace {
                    path,
                    namespace: namespace.clone(),
                });
            }
            _ => {}
        }
    }

    let mut changes = Changes::default();
    for (name, text) in files {
        match present.get(name) {
            Some(Present::Ours { text: known, .. }) if known == text => {
                changes.unchanged.push(name.clone());
            }
            _ => changes.written.push(name.clone()),
        }
    }
    for (name, present) in present {
        match present {
            _ if files.contains_key(&name) => {}
            Present::Ours { namespace, .. } if namespaces.contains(&namespace) => {
                changes.removed.push(name);
            }
            Present::Ours { .. } | Present::Foreign => changes.kept.push(name),
        }
    }
    let written = changes.written.iter();
    let written = written.map(|name| (name.as_str(), files[name].as_str()));
    commit::commit(folder, &lock, written, &changes.removed, before)?;
    Ok(changes)
}

/// What `kubectl apply -f FOLDER` would look at: `.yaml`, `.yml` and `.json`, not in folders below.
fn list(folder: &Path) -> Result<BTreeMap<String, Present>, FolderError> {
    let mut present = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(failed("list folder", folder))? {
        let entry = entry.map_err(failed("list folder", folder))?;
        let path = entry.path();
        // Our own names are UTF-8: a file with another name is not in the way.
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let is_manifest = path.extension().is_some_and(|extension| {
            ["yaml", "yml", "json"]
                .iter()
                .any(|known| extension == *known)
        });
        if !is_manifest {
            continue;
        }
        let kind = entry.file_type().map_err(failed("look at", &path))?;
        present.insert(name, look_at(&path, kind)?);
    }
    Ok(present)
}

/// `kind` is the entry's own: a link is not followed, it is of another hand.
fn look_at(path: &Path, kind: FileType) -> Result<Present, FolderError> {
    if kind.is_file() {
        look_into(path)
    } else {
        Ok(Present::Foreign)
    }
}

fn look_into(path: &Path) -> Result<Present, FolderError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes))
        .map_err(failed("read", path))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Ok(Present::Foreign);
    }
    let Ok(text) = String::from_utf8(bytes) else {
        return Ok(Present::Foreign);
    };
    Ok(match namespace_of_ours(&text) {
        Some(namespace) => Present::Ours { text, namespace },
        None => Present::Foreign,
    })
}

/// The namespace of the policy in a file of ours; `None` for a file of another hand.
fn namespace_of_ours(text: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Manifest {
        #[serde(rename = "apiVersion")]
        api_version: String,
        kind: String,
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        namespace: String,
        labels: BTreeMap<String, String>,
    }

    // Somebody may have appended a document of their own, which must not be lost.
    if text.contains("\n---") || text.contains("\n...") {
        return None;
    }
    // The rules can be long and tell nothing about the origin; a policy's `spec` is its last field.
    let head = text.split("\nspec:").next()?;
    let manifest: Manifest = serde_yaml::from_str(head).ok()?;
    let managed_by = manifest.metadata.labels.get(MANAGED_BY_LABEL)?;
    (manifest.api_version.starts_with("networking.k8s.io/")
        && manifest.kind == "NetworkPolicy"
        && managed_by == MANAGED_BY)
        .then_some(manifest.metadata.namespace)
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FolderError + 'a {
    move |error| FolderError::Io {
        action,
        path: path.to_owned(),
        error,
    }
}

#[cfg(test)]
mod tests;
