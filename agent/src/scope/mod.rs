//! The modified Scope probe on this node: its log is read, and what it tells is merged with what the kernel programs count.
//!
//! [`follow`] reads the files, [`lines`] and [`flow::scope_log`] the lines, `told` lays their times over ours, and `merge`
//! sets them against the sightings of each drain. [`position`] is how far all this has come, kept over restarts.

mod account;
mod coverage;
mod follow;
mod groups;
mod lines;
mod merge;
mod pair;
pub mod position;
mod queue;
#[cfg(test)]
mod samples;
mod stdin;
mod told;

use std::{fs, io, net::IpAddr, path::PathBuf};

use agent_common::loss::Loss;
use flow::{
    scope_log::{Ends, Parser},
    time::Timestamp,
    wire::{UDP_OPEN_BEFORE_UNKNOWN, Window},
};

use self::{
    follow::Follower,
    lines::Text,
    merge::{Merger, Round},
    position::{Keeper, Position, PositionError},
    told::{Reader, Told},
};
pub use self::{follow::LogSource, merge::FromLog, position::Receipt, told::Process};
use crate::{
    capture::{Clock, Losses},
    metrics::ScopeMeter,
    resolve::Sighting,
};

/// Which boot of the system this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What to read, and where to keep how far.
#[derive(Clone, Debug)]
pub struct Config {
    /// The log.
    pub sources: Vec<LogSource>,
    /// The file for the position.
    pub position: Option<PathBuf>,
}

/// Why the log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// The position cannot be read.
    #[error(transparent)]
    Position(#[from] PositionError),
    /// The system gives no thread.
    #[error("cannot read standard input")]
    Thread(#[source] io::Error),
}

/// A drain of the kernel programs.
#[derive(Clone, Copy, Debug)]
pub struct Drain<'a> {
    /// From the last one to this one.
    pub window: Window,
    /// What was lost in it.
    pub losses: &'a Losses,
    /// Whether there will be no other.
    pub is_last: bool,
}

/// The probe's log.
#[derive(Debug)]
pub struct ScopeLog {
    follower: Follower,
    parser: Parser,
    reader: Reader,
    merger: Merger,
    /// Read and not merged.
    told: Vec<Told>,
    round: u64,
    keeper: Option<Keeper>,
    boot: String,
    meter: ScopeMeter,
}

impl ScopeLog {
    /// Goes on where the position says.
    ///
    /// # Errors
    /// If the position cannot be read.
    pub fn open(config: &Config, meter: ScopeMeter) -> Result<Self, ScopeError> {
        let position = match &config.position {
            Some(path) => Position::read(path)?,
            None => Position::default(),
        };
        let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
        let boot = boot.trim().to_owned();
        let counted = if position.boot == boot {
            [position.counted, Vec::new()]
        } else {
            [Vec::new(), position.counted]
        };
        Ok(Self {
            follower: Follower::new(&config.sources, position.files).map_err(ScopeError::Thread)?,
            parser: Parser::new(Ends::Both),
            reader: Reader::default(),
            merger: Merger::new(counted),
            told: Vec::new(),
            round: 0,
            keeper: config.position.clone().map(Keeper::new),
            boot,
            meter,
        })
    }

    /// Reads what is new. To be called before each drain: what lines tell of has been counted when it comes.
    pub fn read(&mut self) {
        let Ok(clock) = Clock::read() else {
            return;
        };
        let Self {
            follower,
            parser,
            reader,
            told,
            meter,
            ..
        } = self;
        let before = told.len();
        let bytes = follower.read(&mut |text, is_live| {
            let line = match text {
                Text::Line(line) => line,
                Text::TooLong => {
                    meter.too_long.inc();
                    return;
                }
            };
            match parser.parse(line) {
                Ok(None) => {}
                Ok(Some(connection)) => told.push(reader.read(&connection, &clock, is_live)),
                Err(problem) => {
                    meter.malformed.inc();
                    tracing::debug!(
                        line = %String::from_utf8_lossy(line),
                        field = problem.field,
                        column = problem.offset + 1,
                        "malformed record of the probe: {}",
                        problem.message
                    );
                }
            }
        });
        self.meter.bytes.inc_by(bytes as u64);
        self.meter.records.inc_by((self.told.len() - before) as u64);
    }

    /// Takes in what a drain gave; returns what need not wait for the log any longer. `is_here` says whether an address is of
    /// this node.
    pub fn merge(
        &mut self,
        drain: Drain<'_>,
        mut sightings: Vec<Sighting>,
        is_here: &dyn Fn(IpAddr, Timestamp) -> bool,
    ) -> Vec<Sighting> {
        self.round += 1;
        for sighting in &mut sightings {
            sighting.round = self.round;
        }
        let Ok(clock) = Clock::read() else {
            return sightings;
        };
        let losses = drain.losses.keys();
        let round = Round {
            number: self.round,
            window: drain.window,
            clock,
            // Where draining failed, the window has no length.
            is_complete: drain.window.from < drain.window.to
                && !losses.into_iter().any(|reason| is_connection(reason)),
            is_last: drain.is_last,
        };
        let told = std::mem::take(&mut self.told);
        let (released, counts) = self.merger.merge(round, sightings, told, is_here);
        self.meter.count("merged", counts.merged);
        self.meter.count("counted_before", counts.covered);
        self.meter.count("probe_only", counts.alone);
        self.meter.count("passed_on", counts.passed_on);
        self.meter.count("left_out", counts.left_out);
        if let Some(keeper) = &self.keeper {
            let boot = self.boot.clone();
            let (counted, files) = (self.merger.counted(), self.follower.places());
            keeper.push(self.round, Position::new(boot, counted, files));
        }
        released
    }

    /// To be given back when everything is handed over that was released until now; `held` is the earliest drain of which
    /// something waits elsewhere.
    pub fn receipt(&self, held: Option<u64>) -> Option<Receipt> {
        let oldest = self.merger.oldest().into_iter().chain(held).min();
        let done = oldest.map_or(self.round, |oldest| oldest.saturating_sub(1));
        self.keeper.as_ref().map(|keeper| keeper.receipt(done))
    }
}

/// Whether a loss for this reason is a connection of which the probe's log may tell that was not counted.
fn is_connection(reason: &str) -> bool {
    match Loss::ALL.into_iter().find(|loss| loss.name() == reason) {
        Some(loss) => loss.is_connection(),
        None => !reason.ends_with("_not_captured") && reason != UDP_OPEN_BEFORE_UNKNOWN,
    }
}

#[cfg(test)]
mod tests;
