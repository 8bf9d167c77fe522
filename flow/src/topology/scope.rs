//! The cluster's objects from a report of Weave Scope, in JSON or MessagePack: what its app answers to `GET /api/report`.
//!
//! A report is read as a stream: one node at a time, of which no more is kept than naming uses. Neither its text nor a tree
//! of it is ever in memory.
//!
//! It knows less than the API: no endpoints, one address a pod, selectors only if the probe is the one that MicroShield
//! modified. What it says is taken as it is; nothing is guessed from names or port numbers. Of its topologies
//!
//! - **Pod, Service, Namespace, Host** and the controllers are what they are in the API;
//! - **Container** says on which host a pod is, because probes that read the whole cluster leave it out of the pods;
//! - **Endpoint** says where a service's port leads: for a connection that was translated it has the service's address and
//!   port as a copy of the pod's (`copy_of`);
//! - **Process** is not read: which pod a process is of, the agent knows from its cgroup, and for every process, not only for
//!   those that Scope has found. Neither are the edges (`adjacency`): they are what this project sees by itself.

mod document;
mod draft;
mod node;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
};

use self::{document::ReportSeed, draft::Draft};
use super::{
    file::{FileError, Loaded, MAX_FILE_BYTES},
    objects::Objects,
};
use crate::metered::Metered;

/// The longest report that is read, in bytes, after decompression.
pub const MAX_REPORT_BYTES: usize = 512 << 20;

/// The longest text of one node, in bytes. Scope's own, with all of a container's environment, have some ten thousand.
pub const MAX_NODE_BYTES: usize = 1 << 20;

/// The most nodes of the topologies that are read.
pub const MAX_NODES: usize = 2_000_000;

/// How deep MessagePack may be nested; a report is seven levels deep. JSON has a bound of its own, of 128.
const MAX_DEPTH: usize = 64;

/// Size of the buffer in front of the parser, in bytes.
const BUFFER: usize = 64 << 10;

/// What a report says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The objects, in an order that does not depend on the report's.
    pub objects: Objects,
    /// What is wrong with it, each with the node's id; the first hundred.
    pub warnings: Vec<String>,
}

/// Why a report cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Nothing came.
    #[error("empty")]
    Empty,
    /// It is JSON, but no report, or too large.
    #[error("{message}")]
    Json {
        /// Counts from 1.
        line: usize,
        /// Counts from 1.
        column: usize,
        /// What is wrong, and where.
        message: String,
    },
    /// It is MessagePack, but no report, or too large.
    #[error("{message}{at}")]
    MessagePack {
        /// What is wrong.
        message: String,
        /// After which node.
        at: String,
    },
    /// It is neither.
    #[error("neither JSON nor MessagePack: it begins with the byte {first:#04x}")]
    Unknown {
        /// Its first byte.
        first: u8,
    },
    /// It cannot be read to its beginning.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads a file.
///
/// # Errors
/// If it cannot be read or is no report. Nodes of the report that say too little are warnings.
pub fn load(path: &Path) -> Result<Loaded, FileError> {
    let io_error = |source| FileError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(io_error)?;
    if file.metadata().map_err(io_error)?.len() > MAX_FILE_BYTES {
        return Err(FileError::TooLarge {
            path: path.to_owned(),
        });
    }
    // A file that grows meanwhile is cut off, and so malformed.
    loaded(path, read(file.take(MAX_FILE_BYTES)))
}

/// Reads the text of a report; `path` is only for messages.
///
/// # Errors
/// If it is no report.
pub fn parse(path: &Path, text: &[u8]) -> Result<Loaded, FileError> {
    loaded(path, read(text))
}

fn loaded(path: &Path, report: Result<Report, ReportError>) -> Result<Loaded, FileError> {
    let path = path.to_owned();
    let report = match report {
        Ok(report) => report,
        Err(ReportError::Empty) => return Err(FileError::Empty { path }),
        Err(ReportError::Io(source)) => return Err(FileError::Io { path, source }),
        Err(ReportError::Json {
            line,
            column,
            message,
        }) => {
            return Err(FileError::Malformed {
                path,
                line,
                column,
                message,
            });
        }
        Err(error @ (ReportError::MessagePack { .. } | ReportError::Unknown { .. })) => {
            return Err(FileError::Binary {
                path,
                message: error.to_string(),
            });
        }
    };
    let named = |warning| format!("{}: {warning}", path.display());
    Ok(Loaded {
        objects: report.objects,
        skipped: BTreeMap::new(),
        warnings: report.warnings.into_iter().map(named).collect(),
    })
}

/// Reads a report while it arrives. Which of the two forms it has its first byte tells.
///
/// # Errors
/// If it is no report, or exceeds [`MAX_REPORT_BYTES`], [`MAX_NODE_BYTES`] or [`MAX_NODES`]. Single nodes that are malformed
/// or say too little are warnings.
pub fn read(text: impl Read) -> Result<Report, ReportError> {
    let (text, _) = Metered::new(text, "a report", MAX_REPORT_BYTES);
    let (text, allowance) = Metered::new(text, "a node", MAX_NODE_BYTES);
    let mut text = BufReader::with_capacity(BUFFER, text);
    let first = first_byte(&mut text)?;
    let mut draft = Draft::new(MAX_NODES);
    let seed = ReportSeed {
        draft: &mut draft,
        allowance,
    };
    match first {
        None => return Err(ReportError::Empty),
        // Maps of up to 15, 65,535 and four thousand million pairs.
        Some(0x80..=0x8f | 0xde | 0xdf) => {
            let mut document = rmp_serde::Deserializer::new(text);
            document.set_max_depth(MAX_DEPTH);
            let read = serde::de::DeserializeSeed::deserialize(seed, &mut document);
            let read = read.map_err(|error| error.to_string());
            let ended = read.and_then(|()| match document.into_inner().fill_buf() {
                Ok([]) => Ok(()),
                Ok(_) => Err("something follows the report".to_owned()),
                Err(error) => Err(error.to_string()),
            });
            ended.map_err(|message| ReportError::MessagePack {
                message,
                at: draft.last_read(),
            })?;
        }
        Some(b'{') => {
            let mut document = serde_json::Deserializer::from_reader(text);
            serde::de::DeserializeSeed::deserialize(seed, &mut document)
                .and_then(|()| document.end())
                .map_err(|error| ReportError::Json {
                    line: error.line(),
                    column: error.column(),
                    message: error.to_string(),
                })?;
        }
        Some(first) => return Err(ReportError::Unknown { first }),
    }
    Ok(draft.finish())
}

/// The first byte that is no white space, which is left to be read.
fn first_byte(text: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let buffered = text.fill_buf()?;
        if let Some(first) = buffered.iter().find(|byte| !byte.is_ascii_whitespace()) {
            return Ok(Some(*first));
        }
        let blank = buffered.len();
        if blank == 0 {
            return Ok(None);
        }
        text.consume(blank);
    }
}

#[cfg(test)]
mod tests;
