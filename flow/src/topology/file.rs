//! The cluster's objects from a file, in the form of `kubectl get namespaces,nodes,services,endpointslices,pods -A -o yaml`.
//!
//! YAML or JSON; a `List`, a `PodList` and its like, single objects; several documents one after the other. An object
//! that is malformed does not lose the others: it is left out, with a warning that names it.

mod document;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::objects::{Objects, Phase};
use document::Reader;

/// The largest file that is read, in bytes.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

/// The most malformed objects that are named; the rest are counted.
pub(super) const MAX_WARNINGS: usize = 100;

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The objects.
    pub objects: Objects,
    /// How many objects of other kinds there are, by kind.
    pub skipped: BTreeMap<String, usize>,
    /// What is wrong with the file, each with the object's name and where it stands; the first hundred.
    pub warnings: Vec<String>,
}

/// Why a file cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It is missing or may not be read.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It is larger than [`MAX_FILE_BYTES`].
    #[error("{}: larger than {MAX_FILE_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It holds nothing, as a file does that is about to be written.
    #[error("{}: empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// It is in a form without lines, and malformed.
    #[error("{}: {message}", path.display())]
    Binary {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// It is neither YAML nor JSON, or holds something else than Kubernetes objects.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counts from 1.
        line: usize,
        /// Counts from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
}

/// Tells one state of a file from the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    modified: SystemTime,
    length: u64,
    device: u64,
    inode: u64,
}

/// The state of the file at `path`; symbolic links are followed, so a mounted ConfigMap that is swapped is another file.
///
/// # Errors
/// If it is missing or may not be looked at.
pub fn fingerprint(path: &Path) -> io::Result<Fingerprint> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path)?;
    Ok(Fingerprint {
        modified: metadata.modified()?,
        length: metadata.len(),
        device: metadata.dev(),
        inode: metadata.ino(),
    })
}

/// Reads a file.
///
/// # Errors
/// If it cannot be read or is no list of Kubernetes objects. Single malformed objects are warnings.
pub fn load(path: &Path) -> Result<Loaded, FileError> {
    parse(path, &read(path)?)
}

/// The text of a file.
fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let io_error = |source| FileError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io_error)?;
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(io_error)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(FileError::TooLarge {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// Reads the text of a file; `path` is only for messages.
///
/// # Errors
/// If it is no list of Kubernetes objects.
pub fn parse(path: &Path, text: &[u8]) -> Result<Loaded, FileError> {
    let mut reader = Reader::new(path, text);
    reader.read()?;
    let Reader {
        objects,
        skipped,
        mut warnings,
        unsaid,
        ..
    } = reader;
    if objects.is_empty() && skipped.is_empty() && warnings.is_empty() {
        return Err(FileError::Empty {
            path: path.to_owned(),
        });
    }
    if unsaid > 0 {
        warnings.push(format!(
            "{}: {unsaid} more malformed objects",
            path.display()
        ));
    }
    warnings.extend(suspicious(path, &objects));
    Ok(Loaded {
        objects,
        skipped,
        warnings,
    })
}

/// What is well-formed but hardly meant.
fn suspicious(path: &Path, objects: &Objects) -> Vec<String> {
    let mut without_address = Vec::new();
    let mut twice = Vec::new();
    let mut by_uid = HashMap::new();
    for pod in &objects.pods {
        let identity = &pod.identity;
        let name = format!("{}/{}", identity.namespace, identity.name);
        if pod.phase == Phase::Running && identity.addresses.is_empty() {
            without_address.push(name.clone());
        }
        if let Some(other) = by_uid.insert(identity.uid.as_str(), name.clone()) {
            twice.push(format!("{other} and {name}"));
        }
    }
    let path = path.display();
    let mut warnings = Vec::new();
    if !without_address.is_empty() {
        warnings.push(format!(
            "{path}: pods that are running and have no address: {}",
            listing(&without_address)
        ));
    }
    if !twice.is_empty() {
        warnings.push(format!(
            "{path}: pods with one uid, of which only the last is known: {}",
            listing(&twice)
        ));
    }
    warnings
}

/// The first few names, and how many more there are.
fn listing(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}
