//! From the log of the modified Weave Scope probe to flow records, as MicroShield's `linker.py` makes them.
//!
//! A record comes of each accepted connection ([`flow::scope_log`]) whose ends the cluster's topology knows ([`names`]), in the order
//! of the log. The log is read in pieces that several threads turn into text ([`pipeline`]); memory does not grow with it.

mod names;
mod pipeline;
mod render;

use std::{
    fs::File,
    io::{self, Write},
    num::NonZeroUsize,
};

pub use self::names::Topology;
use crate::flows::{FlowsError, Input, OnBadLine};

/// How a log is linked.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What to do with a line of a connection that is malformed. Other lines of the probe's log are passed over.
    pub on_bad_line: OnBadLine,
    /// Whether to write connections with one end that the topology does not know, which then is an external address. What is
    /// made to one is seen at the client only, everything else also where it is accepted.
    pub external: bool,
    /// How many threads turn lines into records.
    pub threads: NonZeroUsize,
}

/// What became of the lines of a log.
#[derive(Debug, Default)]
pub struct Summary {
    /// All lines.
    pub lines: u64,
    /// Records written.
    pub records: u64,
    /// Connections with an end that the topology does not know, not written. Loopback is not among them.
    pub outside: u64,
    /// Malformed lines.
    pub skipped: u64,
    /// What was wrong with the first of these.
    pub problems: Vec<FlowsError>,
}

/// Why a log could not be linked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] FlowsError),
    /// The records cannot be written.
    #[error("cannot write the records: {0}")]
    Write(#[source] io::Error),
}

/// Reads a log and writes its records, one JSON object a line.
///
/// # Errors
/// If the log cannot be read or the records cannot be written, or at the first malformed line unless such lines are
/// skipped. Records of earlier lines may have been written by then.
pub fn link(
    log: &Input,
    topology: &Topology,
    options: Options,
    records: impl Write,
) -> Result<Summary, LinkError> {
    match log {
        Input::Stdin => pipeline::run(io::stdin().lock(), log, topology, options, records),
        Input::File(path) => {
            let file = File::open(path).map_err(|error| FlowsError::Io {
                input: log.to_string(),
                error,
            })?;
            pipeline::run(file, log, topology, options, records)
        }
    }
}

#[cfg(test)]
mod tests;
