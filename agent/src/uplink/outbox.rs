//! What is to be sent, and what is sent but not acknowledged.
//!
//! With a spool each batch is in it before it is sent. A disk that takes no more, because it is full or has become
//! read-only, is no reason to keep from a generator what it could have: then batches are sent that are in memory only, as
//! all are without a spool. They are lost with this process, so they are another instance's than those in the spool: none of
//! its numbers outlives the process, and none of the spool's is missing after it.

use std::{collections::VecDeque, time::SystemTime};

use bytes::Bytes;
use flow::{
    record::{ConnectionEvent, FlowRecord},
    source::View,
    time::Timestamp,
    wire::{self, AgentMessage, Encoding, Health, Resolve, WireError, bounds},
};
use prometheus_client::metrics::gauge::Gauge;

use super::{
    loose::{Loose, Packed, RECORD_OUT_OF_BOUNDS},
    new_instance,
    spool::{Entry, Lost, Spool, SpoolError},
};
use crate::{collector::Report, metrics::Meter, scope::Receipt};

/// Batches that may be under way unacknowledged. Enough to keep the connection busy.
const MAX_IN_FLIGHT: usize = 8;

/// The reason under which connections are counted whose batch the generator refused for good.
const BATCH_REFUSED: &str = "batch_refused";

/// Makes batches of what was seen, and keeps each until it is acknowledged: with a spool on disk, else in memory.
#[derive(Debug)]
pub(super) struct Outbox {
    loose: Loose,
    /// For all that was taken in.
    receipt: Option<Receipt>,
    /// How this process names flows.
    resolve: Resolve,
    spool: Option<Spool>,
    /// That of the batches that are in memory only, and the last number that was given to one.
    instance: String,
    last_sequence: u64,
    turn: Turn,
    /// What is under way of the instance whose turn it is, by number.
    in_flight: VecDeque<Sealed>,
    meter: Meter,
    /// What the generator is told the age of.
    view: Option<View>,
    /// Whether the spool could not be written to the last time.
    is_full: bool,
    /// Whether nothing that is in the spool could be had from it the last time.
    is_stuck: bool,
    /// Whether it was said that a record is out of bounds.
    said_out_of_bounds: bool,
}

/// Whose batches are sent. A connection is one instance's, and no other's turn comes while any of its batches is under way.
#[derive(Clone, Debug)]
struct Turn {
    kept: Kept,
    instance: String,
    /// Who named its flows.
    resolve: Resolve,
}

/// Where an instance's batches are until they are acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// Batches are made when there is room for one more under way; what comes meanwhile is added up.
    Memory,
    /// Batches are made at once.
    Disk,
}

/// A batch that has its number and will not change any more.
#[derive(Clone, Debug)]
pub(super) struct Sealed {
    pub(super) sequence: u64,
    /// In MessagePack.
    pub(super) message: Bytes,
    connections: u64,
}

/// How a ledger and an outbox differ on what was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mismatch {
    /// The ledger has batches of the instance, but lacks some that were acknowledged: an older one was put back, or it is
    /// another one.
    Forgotten,
    /// The ledger has numbers that were not given yet: this process was put back, as by a virtual machine's snapshot, and
    /// gives them a second time. What bears one of them would be taken for known.
    SetBack,
}

/// What an outbox had left in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftover {
    /// Connections that nobody has.
    pub lost: u64,
    /// Batches that the spool keeps for the next run.
    pub spooled: u64,
}

impl Outbox {
    pub(super) fn new(resolve: Resolve, spool: Option<Spool>, meter: Meter) -> Self {
        let instance = new_instance();
        Self {
            loose: Loose::new(resolve, meter.clone()),
            receipt: None,
            resolve,
            spool,
            turn: Turn {
                kept: Kept::Memory,
                instance: instance.clone(),
                resolve,
            },
            instance,
            last_sequence: 0,
            in_flight: VecDeque::new(),
            meter,
            view: None,
            is_full: false,
            is_stuck: false,
            said_out_of_bounds: false,
        }
    }

    /// The same, which tells the generator for how long this view has not been current.
    pub(super) fn watching(self, view: Option<View>) -> Self {
        Self { view, ..self }
    }

    /// How things are, for the generator.
    fn health(&self) -> Health {
        let (spool_batches, spool_bytes) = match &self.spool {
            None => (0, 0),
            Some(spool) => (spool.batches(), spool.bytes()),
        };
        let since = self.view.as_ref().and_then(View::stale_since);
        let now = Timestamp::from(SystemTime::now());
        let stale = since.map_or(0, |since| now.as_nanos().saturating_sub(since.as_nanos()));
        Health {
            pending: self.loose.len() as u64,
            spool_batches,
            spool_bytes,
            watch_stale_seconds: stale / 1_000_000_000,
        }
    }

    /// The instance whose batches come next, and who named them.
    pub(super) fn identity(&mut self) -> (String, Resolve) {
        if self.in_flight.is_empty() {
            let spooled = self.spooled();
            self.turn = spooled.unwrap_or_else(|| Turn {
                kept: Kept::Memory,
                instance: self.instance.clone(),
                resolve: self.resolve,
            });
        }
        (self.turn.instance.clone(), self.turn.resolve)
    }

    /// The turn of what is in the spool, which comes first as the older; and of what will be, as long as the disk takes it.
    fn spooled(&mut self) -> Option<Turn> {
        let spool = self.spool.as_mut()?;
        if self.is_full && spool.batches() == 0 {
            return None;
        }
        match spool.identity() {
            Ok((instance, resolve)) => {
                self.is_stuck = false;
                Some(Turn {
                    kept: Kept::Disk,
                    instance,
                    resolve,
                })
            }
            Err(error) => {
                self.get_stuck(&error);
                None
            }
        }
    }

    fn get_stuck(&mut self, error: &SpoolError) {
        if !std::mem::replace(&mut self.is_stuck, true) {
            tracing::warn!(%error, "what is in the spool waits there");
        }
    }

    /// Takes in one drain.
    pub(super) fn add(&mut self, report: Report) {
        let counted = Meter::count(&report);
        if !report.records.is_empty() || !report.losses.is_empty() {
            self.loose.widen(report.window);
            for (reason, count) in &report.losses {
                self.loose.lose(reason, *count);
            }
            for mut record in report.records {
                // The ledger counts connections and does not tell them apart; what ends one has been counted before.
                let single = record.connection.as_ref();
                if single.is_some_and(|single| single.event == ConnectionEvent::Close) {
                    continue;
                }
                record.connection = None;
                record.tuple.src_port = 0;
                match bounds::record(&record) {
                    Ok(()) => self.loose.add(record),
                    Err(problem) => self.leave_out(&record, &problem),
                }
            }
        }
        self.receipt = report.receipt.or(self.receipt.take());
        self.spool();
        self.settle();
        // Counted when it is kept: whoever waits for that may rely on it.
        self.meter.add(counted);
    }

    /// Left in a batch, it would cost all of it: the generator would refuse it for good.
    fn leave_out(&mut self, record: &FlowRecord, problem: &bounds::Invalid) {
        self.loose.lose(RECORD_OUT_OF_BOUNDS, record.count);
        // There will be more for as long as the object is there that it tells of.
        if std::mem::replace(&mut self.said_out_of_bounds, true) {
            tracing::debug!(connections = record.count, %problem, "a record is out of bounds");
        } else {
            tracing::error!(
                connections = record.count,
                %problem,
                "a record is out of bounds: its connections are lost, and those of more like it"
            );
        }
    }

    /// Says how things are.
    pub(super) fn measure(&self) {
        let gauge = |gauge: &Gauge, value: u64| gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        gauge(&self.meter.in_flight, self.in_flight.len() as u64);
        gauge(&self.meter.pending, self.loose.len() as u64);
        if let Some(spool) = &self.spool {
            gauge(&self.meter.spool_bytes, spool.bytes());
            gauge(&self.meter.spool_batches, spool.batches());
        }
    }

    /// Moves what is pending into the spool, if there is one. What cannot be written stays pending.
    fn spool(&mut self) {
        loop {
            let health = self.health();
            let Some(spool) = &mut self.spool else {
                return;
            };
            let Packed { entry, batch } = match self.loose.pack(health) {
                Ok(Some(packed)) => packed,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "a batch cannot be encoded");
                    return;
                }
            };
            let appended = spool.append(&entry);
            let Lost { here, before } = spool.take_losses();
            if !here.is_empty() || !before.is_empty() {
                // They belong to the time of the batch whose coming made room for itself.
                self.loose.widen(batch.window);
                for (reason, count) in &here {
                    self.loose.lose(reason, *count);
                }
                for (reason, count) in &before {
                    self.loose.tell(reason, *count);
                }
            }
            if let Err(error) = appended {
                if !std::mem::replace(&mut self.is_full, true) {
                    tracing::warn!(%error, "flows are kept in memory, and sent from there: a restart loses what is not stored");
                }
                self.loose.unpack(batch);
                return;
            }
            self.is_full = false;
        }
    }

    /// The next batch to send, if there is one and room for one more under way.
    pub(super) fn seal(&mut self) -> Result<Option<Sealed>, WireError> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Ok(None);
        }
        self.spool();
        let sealed = match self.turn.kept {
            Kept::Memory => self.seal_loose()?,
            Kept::Disk => self.seal_spooled()?,
        };
        self.in_flight.extend(sealed.clone());
        Ok(sealed)
    }

    /// A batch of what is in none yet.
    fn seal_loose(&mut self) -> Result<Option<Sealed>, WireError> {
        let health = self.health();
        let Some(Packed { entry, .. }) = self.loose.pack(health)? else {
            return Ok(None);
        };
        self.last_sequence += 1;
        Sealed::new(self.last_sequence, &entry).map(Some)
    }

    fn seal_spooled(&mut self) -> Result<Option<Sealed>, WireError> {
        match self.spool.as_mut().map(Spool::next) {
            Some(Ok(Some(next))) => Sealed::new(next.sequence, &next.entry).map(Some),
            Some(Ok(None)) | None => Ok(None),
            Some(Err(error)) => {
                self.get_stuck(&error);
                Ok(None)
            }
        }
    }

    /// Forgets all batches up to this one, of the instance whose turn it is.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        while self
            .in_flight
            .front()
            .is_some_and(|batch| batch.sequence <= sequence)
        {
            self.meter.acknowledged.inc();
            self.in_flight.pop_front();
        }
        if self.turn.kept == Kept::Disk
            && let Some(spool) = &mut self.spool
        {
            spool.acknowledge(sequence);
        }
        self.settle();
    }

    /// Gives the receipt back once nothing that was taken in can be lost with this process.
    fn settle(&mut self) {
        if (self.in_flight.is_empty() || self.turn.kept == Kept::Disk)
            && self.loose.is_empty()
            && let Some(receipt) = self.receipt.take()
        {
            receipt.handed_over();
        }
    }

    /// Why a ledger that has the batches up to this number is not the one that the numbers of the instance whose turn it is
    /// were given for, if it is not.
    pub(super) fn mismatch(&self, last_sequence: u64) -> Option<Mismatch> {
        let given = match (self.turn.kept, &self.spool) {
            (Kept::Disk, Some(spool)) => spool.last_given(),
            _ => Some(self.last_sequence),
        };
        let first = self.first_unacknowledged();
        // As an instance that the ledger does not know we may go on with any number.
        if last_sequence > 0 && last_sequence.saturating_add(1) < first {
            Some(Mismatch::Forgotten)
        } else {
            let is_ahead = given.is_some_and(|given| last_sequence > given);
            is_ahead.then_some(Mismatch::SetBack)
        }
    }

    /// The number of the first batch of the instance whose turn it is that is not acknowledged, or that will be the next.
    pub(super) fn first_unacknowledged(&self) -> u64 {
        match (self.in_flight.front(), self.turn.kept, &self.spool) {
            (Some(first), _, _) => first.sequence,
            (None, Kept::Disk, Some(spool)) => spool.first_unacknowledged(),
            (None, _, _) => self.last_sequence + 1,
        }
    }

    /// Has what is not acknowledged of the instance whose turn it is come to the ledger as something new, under another. A
    /// ledger that has forgotten is told so by a first number that is none; it counts that as a loss.
    pub(super) fn start_anew(&mut self, mismatch: Mismatch) {
        let first = match mismatch {
            Mismatch::Forgotten => self.first_unacknowledged(),
            Mismatch::SetBack => 1,
        };
        let under_way = std::mem::take(&mut self.in_flight);
        match (self.turn.kept, &mut self.spool) {
            (Kept::Disk, Some(spool)) => spool.start_anew(first),
            _ => {
                self.instance = new_instance();
                self.last_sequence = first - 1;
                for batch in under_way {
                    match wire::decode(&batch.message, Encoding::MessagePack) {
                        Ok(AgentMessage::Batch(batch)) => self.loose.unpack(batch),
                        Ok(AgentMessage::Hello(_)) | Err(_) => {
                            self.loose.lose(BATCH_REFUSED, batch.connections);
                        }
                    }
                }
            }
        }
    }

    /// Whether nothing of this instance is under way, and it is another's turn.
    pub(super) fn is_turn_of_another(&mut self, instance: &str) -> bool {
        self.in_flight.is_empty() && self.identity().0 != instance
    }

    /// Replaces the first batch, which no generator will ever accept, by one that only says so under the same number.
    /// Returns how many connections that costs; `None` if there is nothing to give up.
    pub(super) fn give_up_first(&mut self) -> Option<u64> {
        let first = self.in_flight.front_mut()?;
        let AgentMessage::Batch(mut batch) =
            wire::decode(&first.message, Encoding::MessagePack).ok()?
        else {
            return None;
        };
        batch.flows.clear();
        let told = batch.losses.entry(BATCH_REFUSED.to_owned()).or_default();
        *told = told.saturating_add(first.connections);
        first.message = wire::encode(&AgentMessage::Batch(batch), Encoding::MessagePack)
            .ok()?
            .into();
        let lost = std::mem::take(&mut first.connections);
        self.meter.lose(BATCH_REFUSED, lost);
        Some(lost)
    }

    /// The first batch after this number that is under way.
    pub(super) fn unacknowledged_after(&self, sequence: u64) -> Option<Sealed> {
        self.in_flight
            .iter()
            .find(|batch| batch.sequence > sequence)
            .cloned()
    }

    /// Whether nothing is left to send or to be acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        let stored = self.spool.as_ref().map_or(0, Spool::batches);
        self.in_flight.is_empty() && self.loose.is_empty() && stored == 0
    }

    /// Brings to rest what is left, and says what it is.
    pub(super) fn close(&mut self) -> Leftover {
        self.spool();
        self.settle();
        let mut lost = self.loose.connections();
        if self.turn.kept == Kept::Memory {
            let under_way = self.in_flight.iter().map(|batch| batch.connections);
            lost = under_way.fold(lost, u64::saturating_add);
        }
        match &mut self.spool {
            None => Leftover { lost, spooled: 0 },
            Some(spool) => {
                if let Err(error) = spool.sync() {
                    tracing::warn!(%error, "the spool may not survive a power failure");
                }
                Leftover {
                    lost,
                    spooled: spool.batches(),
                }
            }
        }
    }
}

impl Sealed {
    fn new(sequence: u64, entry: &Entry) -> Result<Self, WireError> {
        Ok(Self {
            sequence,
            message: wire::with_sequence(&entry.message, sequence)?.into(),
            connections: entry.connections,
        })
    }
}

#[cfg(test)]
mod tests;
