//! What is to be sent, and what is sent but not acknowledged.
//!
//! With a spool each batch is in it before it is sent. A disk that takes no more, because it is full or has become
//! read-only, is no reason to keep from a generator what it could have: then batches pass the spool by. Such a batch is lost
//! with this process, as all are without a spool, and the next process begins under another instance, so its number is not
//! given twice.

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
    spool::{Lost, Spool, SpoolError},
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
    kept: Kept,
    /// What is under way, by number.
    in_flight: VecDeque<Sealed>,
    /// The largest number that was acknowledged to this process under the instance whose turn it is.
    acknowledged: u64,
    meter: Meter,
    /// What the generator is told the age of.
    view: Option<View>,
    /// Whether the spool could not be written to the last time.
    failing: bool,
    /// Whether it was said that a record is out of bounds.
    said_out_of_bounds: bool,
}

#[derive(Debug)]
enum Kept {
    /// Batches are made when there is room for one more under way; what comes meanwhile is added up.
    Memory {
        instance: String,
        resolve: Resolve,
        last_sequence: u64,
    },
    /// Batches are made at once. While the disk takes none they are made as in memory, under the spool's instance.
    Disk(Box<Spool>),
}

/// A batch that has its number and will not change any more.
#[derive(Clone, Debug)]
pub(super) struct Sealed {
    pub(super) sequence: u64,
    /// In MessagePack.
    pub(super) message: Bytes,
    connections: u64,
    /// Whether it is in the spool, too.
    is_spooled: bool,
}

/// Why there is no next batch.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutboxError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

/// How a ledger and an outbox differ on what was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mismatch {
    /// The ledger lacks batches that were acknowledged: an older one was put back, or it is another one.
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
        let kept = match spool {
            Some(spool) => Kept::Disk(Box::new(spool)),
            None => Kept::Memory {
                instance: new_instance(),
                resolve,
                last_sequence: 0,
            },
        };
        Self {
            loose: Loose::new(resolve, meter.clone()),
            receipt: None,
            kept,
            in_flight: VecDeque::new(),
            acknowledged: 0,
            meter,
            view: None,
            failing: false,
            said_out_of_bounds: false,
        }
    }

    /// The same, which tells the generator for how long this view has not been current.
    pub(super) fn watching(self, view: Option<View>) -> Self {
        Self { view, ..self }
    }

    /// How things are, for the generator.
    fn health(&self) -> Health {
        let (spool_batches, spool_bytes) = match &self.kept {
            Kept::Memory { .. } => (0, 0),
            Kept::Disk(spool) => (spool.batches(), spool.bytes()),
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

    /// The instance whose batches come next, and who named them. What is under way has its numbers within the one whose
    /// turn it is, so until it is acknowledged no other's turn comes.
    pub(super) fn identity(&mut self) -> (String, Resolve) {
        match &mut self.kept {
            Kept::Memory {
                instance, resolve, ..
            } => (instance.clone(), *resolve),
            Kept::Disk(spool) if self.in_flight.is_empty() => spool.identity(),
            Kept::Disk(spool) => spool.turn(),
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
        if let Kept::Disk(spool) = &self.kept {
            gauge(&self.meter.spool_bytes, spool.bytes());
            gauge(&self.meter.spool_batches, spool.batches());
        }
    }

    /// Moves what is pending into the spool, if there is one. What cannot be written stays pending.
    fn spool(&mut self) {
        let Kept::Disk(_) = &self.kept else {
            return;
        };
        loop {
            let packed = match self.pack() {
                Ok(packed) => packed,
                Err(error) => {
                    tracing::error!(%error, "a batch cannot be encoded");
                    return;
                }
            };
            let Some(Packed { entry, batch }) = packed else {
                break;
            };
            let Kept::Disk(spool) = &mut self.kept else {
                return;
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
                if !self.failing {
                    tracing::warn!(%error, "flows are kept in memory, and sent from there: a restart loses what is not stored");
                }
                self.failing = true;
                self.loose.unpack(batch);
                return;
            }
            self.failing = false;
        }
    }

    /// The next batch to send, if there is one and room for one more under way.
    pub(super) fn seal(&mut self) -> Result<Option<Sealed>, OutboxError> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Ok(None);
        }
        self.spool();
        let sealed = match &mut self.kept {
            Kept::Memory { .. } => self.seal_loose()?,
            Kept::Disk(spool) => match spool.next() {
                Ok(Some(next)) => Some(Sealed {
                    sequence: next.sequence,
                    message: wire::with_sequence(&next.entry.message, next.sequence)?.into(),
                    connections: next.entry.connections,
                    is_spooled: true,
                }),
                // What cannot get into the spool need not wait for that.
                Ok(None) | Err(_) if self.failing && spool.may_pass() => self.seal_loose()?,
                next => {
                    next?;
                    None
                }
            },
        };
        self.in_flight.extend(sealed.clone());
        Ok(sealed)
    }

    /// A batch of what is in none yet, kept in memory only.
    fn seal_loose(&mut self) -> Result<Option<Sealed>, WireError> {
        let Some(Packed { entry, .. }) = self.pack()? else {
            return Ok(None);
        };
        let sequence = match &mut self.kept {
            Kept::Memory { last_sequence, .. } => {
                *last_sequence += 1;
                *last_sequence
            }
            Kept::Disk(spool) => spool.pass(),
        };
        Ok(Some(Sealed {
            sequence,
            message: wire::with_sequence(&entry.message, sequence)?.into(),
            connections: entry.connections,
            is_spooled: false,
        }))
    }

    /// Takes a batch out of what is in none yet; `None` if there is nothing.
    fn pack(&mut self) -> Result<Option<Packed>, WireError> {
        let health = self.health();
        self.loose.pack(health)
    }

    /// Forgets all batches up to this one, of the instance whose turn it is.
    pub(super) fn acknowledge(&mut self, sequence: u64) -> Result<(), SpoolError> {
        while self
            .in_flight
            .front()
            .is_some_and(|batch| batch.sequence <= sequence)
        {
            self.meter.acknowledged.inc();
            self.in_flight.pop_front();
        }
        let known = match &mut self.kept {
            Kept::Memory { last_sequence, .. } => sequence.min(*last_sequence),
            Kept::Disk(spool) => {
                spool.acknowledge(sequence)?;
                sequence
            }
        };
        self.acknowledged = self.acknowledged.max(known);
        self.settle();
        Ok(())
    }

    /// Gives the receipt back once nothing that was taken in can be lost with this process.
    fn settle(&mut self) {
        if self.in_flight.iter().all(|batch| batch.is_spooled)
            && self.loose.is_empty()
            && let Some(receipt) = self.receipt.take()
        {
            receipt.handed_over();
        }
    }

    /// Why a ledger that has the batches up to this number is not the one that the numbers of the instance whose turn it is
    /// were given for, if it is not.
    pub(super) fn mismatch(&self, last_sequence: u64) -> Option<Mismatch> {
        let (first, given) = match &self.kept {
            Kept::Memory {
                last_sequence: given,
                ..
            } => (None, Some(*given)),
            Kept::Disk(spool) => {
                let spooled = spool.first_unacknowledged();
                // What has passed the spool by is under way, or was acknowledged.
                let under_way = self.in_flight.front().map(|batch| batch.sequence);
                let first = under_way.map_or(spooled, |under_way| under_way.min(spooled));
                (Some(first), spool.last_given())
            }
        };
        // As an instance that the ledger does not know we may go on with any number.
        let is_gap = |first| last_sequence > 0 && last_sequence.saturating_add(1) < first;
        if last_sequence < self.acknowledged || first.is_some_and(is_gap) {
            Some(Mismatch::Forgotten)
        } else {
            let is_ahead = given.is_some_and(|given| last_sequence > given);
            is_ahead.then_some(Mismatch::SetBack)
        }
    }

    /// Gives the instance whose turn it is another name, under which what is not acknowledged comes to the ledger as
    /// something new.
    pub(super) fn start_anew(&mut self) -> Result<(), SpoolError> {
        self.acknowledged = 0;
        match &mut self.kept {
            Kept::Memory { instance, .. } => {
                *instance = new_instance();
                Ok(())
            }
            Kept::Disk(spool) => spool.start_anew(),
        }
    }

    /// Whether nothing of this instance is left, but something of another.
    pub(super) fn is_turn_of_another(&mut self, instance: &str) -> bool {
        if !self.in_flight.is_empty() {
            return false;
        }
        let (next, _) = self.identity();
        if next == instance {
            return false;
        }
        self.acknowledged = 0;
        true
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
        let stored = match &self.kept {
            Kept::Memory { .. } => 0,
            Kept::Disk(spool) => spool.batches(),
        };
        self.in_flight.is_empty() && self.loose.is_empty() && stored == 0
    }

    /// Brings to rest what is left, and says what it is.
    pub(super) fn close(&mut self) -> Leftover {
        self.spool();
        self.settle();
        let in_memory = self.in_flight.iter().filter(|batch| !batch.is_spooled);
        let in_memory = in_memory.map(|batch| batch.connections);
        let lost = in_memory.fold(self.loose.connections(), u64::saturating_add);
        match &mut self.kept {
            Kept::Memory { .. } => Leftover { lost, spooled: 0 },
            Kept::Disk(spool) => {
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

#[cfg(test)]
mod tests;
