//! Why policies could not be read.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why policies could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFilesError {
    /// A file or folder is missing or may not be read.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// A file is larger than [`MAX_FILE_BYTES`](super::MAX_FILE_BYTES).
    #[error("{}: larger than {} bytes", path.display(), super::MAX_FILE_BYTES)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// A file is neither YAML nor JSON.
    #[error("{}: line {line}, column {column}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// An object is not a policy of networking.k8s.io/v1, or one that the API server would refuse.
    #[error("{}: {}{object}: {}{message}", path.display(), place(.line), place_in_object(.field))]
    Object {
        /// The file.
        path: PathBuf,
        /// The line of the field, from 1.
        line: Option<usize>,
        /// Kind, namespace and name, as far as they are known.
        object: String,
        /// The field's path; empty if it concerns the whole object.
        field: String,
        /// What is wrong with it.
        message: String,
    },
}

impl PolicyFilesError {
    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            error,
        }
    }
}

fn place(line: &Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!("line {line}: "))
}

fn place_in_object(field: &str) -> String {
    match field {
        "" => String::new(),
        field => format!("field `{field}`: "),
    }
}
