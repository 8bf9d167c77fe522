//! Reading folders of NetworkPolicies, of whichever hand.
//!
//! Read is what `kubectl apply -f FOLDER` would apply: the files `*.yaml`, `*.yml` and `*.json` of the folder, not of folders
//! below, each with any number of documents, of which each is an object or a list of objects. Everything but policies of
//! networking.k8s.io/v1 is refused: what cannot be judged must not be passed over, because it may decide.

mod document;
mod error;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use self::document::Document;
pub use self::error::PolicyFilesError;
use crate::evaluate::{Compiler, Policies};

/// The largest file that is read, in bytes: far more than the policies of a large cluster.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// Of what was skipped, this much is described.
const MAX_DESCRIBED: usize = 10;

/// How a folder is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Go on without what is malformed or no policy, and count it.
    pub keep_going: bool,
    /// The namespace of policies that name none, as `kubectl apply -n` gives them one; without it they are refused.
    pub namespace: Option<&'a str>,
}

/// What a folder holds.
#[derive(Debug, Default)]
pub struct Folder {
    /// The policies.
    pub policies: Policies,
    /// How many files were read.
    pub files: usize,
    /// How many objects, or files that could not be read to their end, were skipped.
    pub skipped: usize,
    /// What was wrong with the first of these.
    pub problems: Vec<PolicyFilesError>,
}

/// Reads a folder, or a single file.
///
/// # Errors
/// If it cannot be read, or at the first object that is not a valid policy unless such objects are skipped.
pub fn read(path: &Path, options: Options<'_>) -> Result<Folder, PolicyFilesError> {
    let files = list(path)?;
    let mut folder = Folder {
        files: files.len(),
        ..Folder::default()
    };
    let mut compiler = Compiler::default();
    for file in &files {
        if let Err(problem) = read_file(file, options, &mut compiler, &mut folder) {
            folder.note(problem, options)?;
        }
    }
    folder.policies = compiler.finish();
    Ok(folder)
}

fn read_file(
    path: &Path,
    options: Options<'_>,
    compiler: &mut Compiler,
    folder: &mut Folder,
) -> Result<(), PolicyFilesError> {
    let text = contents(path)?;
    let (document, objects, rest) = Document::parse(path, &text);
    for object in objects {
        let added = document
            .policy(&object, options.namespace)
            .and_then(|policy| compiler.add(&policy).map_err(Into::into))
            .map_err(|flaw| document.refuse(&object, flaw));
        if let Err(problem) = added {
            folder.note(problem, options)?;
        }
    }
    rest
}

impl Folder {
    /// Counts a problem, or reports it.
    fn note(
        &mut self,
        problem: PolicyFilesError,
        options: Options<'_>,
    ) -> Result<(), PolicyFilesError> {
        if !options.keep_going {
            return Err(problem);
        }
        self.skipped += 1;
        if self.problems.len() < MAX_DESCRIBED {
            self.problems.push(problem);
        }
        Ok(())
    }
}

/// The files to read, sorted: of two policies with one name it is always the same that is refused.
fn list(path: &Path) -> Result<Vec<PathBuf>, PolicyFilesError> {
    let failed = |error| PolicyFilesError::io(path, error);
    if !fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let is_manifest = file.extension().is_some_and(|extension| {
            extension == "yaml" || extension == "yml" || extension == "json"
        });
        // Links are followed, as in a folder that is mounted from a ConfigMap.
        if is_manifest
            && !fs::metadata(&file)
                .map_err(|error| PolicyFilesError::io(&file, error))?
                .is_dir()
        {
            files.push(file);
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn contents(path: &Path) -> Result<Vec<u8>, PolicyFilesError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        File::open(path)?
            .take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|error| PolicyFilesError::io(path, error))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(PolicyFilesError::TooLarge {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
