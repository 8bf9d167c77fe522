//! What is in no batch yet.

use std::collections::VecDeque;

use flow::{
    observations::Observations,
    record::FlowRecord,
    wire::{
        self, AgentMessage, Batch, Encoding, Health, MAX_BATCH_FLOWS, MAX_MESSAGE_BYTES, Resolve,
        Window, WireError,
    },
};

use super::spool::Entry;
use crate::{capture::Losses, metrics::Meter};

/// Distinct flows that may wait in memory. While the generator is away equal flows are added up, so this bounds distinct
/// edges and not connections; a record takes about half a KiB. What exceeds it is counted as lost.
pub(super) const MAX_FLOWS: usize = 100_000;

/// The reason under which connections are counted that found no room.
pub(super) const OUTBOX_FULL: &str = "outbox_full";

/// The reason under which connections are counted whose record no generator would accept: it says what
/// [`flow::wire::bounds`] does not let it say, or is longer alone than a message may be.
pub(super) const RECORD_OUT_OF_BOUNDS: &str = "record_out_of_bounds";

/// Flows and losses that are in no batch yet, and of which time they are.
#[derive(Debug)]
pub(super) struct Loose {
    flows: Flows,
    losses: Losses,
    meter: Meter,
    /// Absent if there is nothing.
    window: Option<Window>,
}

/// A batch without a number.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) entry: Entry,
    /// The same, to be loose again if it cannot be kept.
    pub(super) batch: Batch,
}

impl Loose {
    pub(super) fn new(resolve: Resolve, meter: Meter) -> Self {
        Self {
            flows: Flows::new(resolve),
            losses: Losses::new(),
            meter,
            window: None,
        }
    }

    /// Takes in a flow that is within bounds, in a window that was named before.
    pub(super) fn add(&mut self, record: FlowRecord) {
        if self.flows.len() >= MAX_FLOWS && !self.flows.knows(&record) {
            self.lose(OUTBOX_FULL, record.count);
        } else {
            self.flows.add(record);
        }
    }

    /// Counts what is lost, in a window that was named before.
    pub(super) fn lose(&mut self, reason: &str, count: u64) {
        self.meter.lose(reason, count);
        self.tell(reason, count);
    }

    /// Passes on word of a loss that was counted where it arose.
    pub(super) fn tell(&mut self, reason: &str, count: u64) {
        if count > 0 {
            let sum = self.losses.entry(reason.to_owned()).or_default();
            *sum = sum.saturating_add(count);
        }
    }

    pub(super) fn widen(&mut self, window: Window) {
        self.window = Some(self.window.map_or(window, |known| known.widened(window)));
    }

    /// Makes a batch of the oldest; `None` if there is nothing.
    pub(super) fn pack(&mut self, health: Health) -> Result<Option<Packed>, WireError> {
        let mut room = MAX_BATCH_FLOWS;
        while let Some(window) = self.window {
            let flows = self.flows.take(room);
            if flows.is_empty() && self.losses.is_empty() {
                self.window = None;
                break;
            }
            let connections = total(flows.iter());
            let message = AgentMessage::Batch(Batch {
                sequence: 0,
                window,
                flows,
                losses: self.losses.clone(),
                health: Some(health),
            });
            let encoded = encode_unnumbered(&message);
            let AgentMessage::Batch(batch) = message else {
                break;
            };
            match encoded {
                Ok(message) => {
                    self.losses.clear();
                    if self.flows.is_empty() {
                        self.window = None;
                    }
                    let entry = Entry {
                        connections,
                        message,
                    };
                    return Ok(Some(Packed { entry, batch }));
                }
                Err(WireError::TooLong(_)) => {
                    room = (batch.flows.len() / 2).max(1);
                    self.put_back(batch.flows);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Takes a batch apart that could not be kept.
    pub(super) fn unpack(&mut self, batch: Batch) {
        self.widen(batch.window);
        for (reason, count) in &batch.losses {
            self.tell(reason, *count);
        }
        for record in batch.flows {
            self.flows.add(record);
        }
    }

    /// A batch that was too long goes back; a single record that is too long alone is lost.
    fn put_back(&mut self, flows: Vec<FlowRecord>) {
        if let [record] = flows.as_slice() {
            self.lose(RECORD_OUT_OF_BOUNDS, record.count);
            return;
        }
        for record in flows {
            self.flows.add(record);
        }
    }

    /// Distinct flows.
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether there is nothing, no loss either.
    pub(super) fn is_empty(&self) -> bool {
        self.window.is_none()
    }

    pub(super) fn connections(&self) -> u64 {
        match &self.flows {
            Flows::Merged(observations) => total(observations.records()),
            Flows::Apart(records) => total(records.iter()),
        }
    }
}

/// Encodes a batch of number 0 in such a way that there is room for any other number.
pub(super) fn encode_unnumbered(batch: &AgentMessage) -> Result<Vec<u8>, WireError> {
    let message = wire::encode(batch, Encoding::MessagePack)?;
    let longest = message.len() + size_of::<u64>();
    if longest > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLong(longest));
    }
    Ok(message)
}

fn total<'a>(records: impl Iterator<Item = &'a FlowRecord>) -> u64 {
    records.fold(0, |sum, record| sum.saturating_add(record.count))
}

/// Records that wait to be sent.
#[derive(Debug)]
enum Flows {
    /// Added up.
    Merged(Observations),
    /// Each by itself: who an address was is decided by the time in the record, and adding up would lose that. Records of
    /// one drain have distinct keys already, so what could be added up is of different seconds, between which an address
    /// may have moved on; a wrong name makes a wrong rule, while what finds no room is counted and said.
    Apart(VecDeque<FlowRecord>),
}

impl Flows {
    fn new(resolve: Resolve) -> Self {
        match resolve {
            Resolve::Both => Self::Merged(Observations::default()),
            Resolve::Local => Self::Apart(VecDeque::new()),
        }
    }

    fn add(&mut self, record: FlowRecord) {
        match self {
            Self::Merged(observations) => observations.observe(record),
            Self::Apart(records) => records.push_back(record),
        }
    }

    /// Whether the record would take no more room.
    fn knows(&self, record: &FlowRecord) -> bool {
        match self {
            Self::Merged(observations) => observations.knows(record),
            Self::Apart(_) => false,
        }
    }

    fn take(&mut self, most: usize) -> Vec<FlowRecord> {
        match self {
            Self::Merged(observations) => observations.take(most),
            Self::Apart(records) => records.drain(..most.min(records.len())).collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Merged(observations) => observations.len(),
            Self::Apart(records) => records.len(),
        }
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
