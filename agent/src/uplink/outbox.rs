//! What is to be sent, and what is sent but not acknowledged.

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
    /// Batches are made at once.
    Disk(Box<Spool>),
}

/// A batch that has its number and will not change any more.
#[derive(Clone, Debug)]
pub(super) struct Sealed {
    pub(super) sequence: u64,
    /// In MessagePack.
    pub(super) message: Bytes,
    connections: u64,
}

/// Why there is no next batch.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutboxError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
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

    /// The instance whose batches come next, and who named them.
    pub(super) fn identity(&mut self) -> Result<(String, Resolve), SpoolError> {
        match &mut self.kept {
            Kept::Memory {
                instance, resolve, ..
            } => Ok((instance.clone(), *resolve)),
            Kept::Disk(spool) => spool.identity(),
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
                    tracing::warn!(%error, "flows are kept in memory");
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
            Kept::Memory { last_sequence, .. } => {
                let sequence = *last_sequence + 1;
                let Some(Packed { entry, .. }) = self.pack()? else {
                    return Ok(None);
                };
                if let Kept::Memory { last_sequence, .. } = &mut self.kept {
                    *last_sequence = sequence;
                }
                Sealed {
                    sequence,
                    message: wire::with_sequence(&entry.message, sequence)?.into(),
                    connections: entry.connections,
                }
            }
            Kept::Disk(spool) => {
                let Some(next) = spool.next()? else {
                    return Ok(None);
                };
                Sealed {
                    sequence: next.sequence,
                    message: wire::with_sequence(&next.entry.message, next.sequence)?.into(),
                    connections: next.entry.connections,
                }
            }
        };
        self.in_flight.push_back(sealed.clone());
        Ok(Some(sealed))
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
        let is_kept = match &self.kept {
            Kept::Memory { .. } => self.in_flight.is_empty(),
            Kept::Disk(_) => true,
        };
        if is_kept
            && self.loose.is_empty()
            && let Some(receipt) = self.receipt.take()
        {
            receipt.handed_over();
        }
    }

    /// Whether a ledger that has the batches up to this number lacks some that were acknowledged.
    pub(super) fn is_forgotten_by(&self, last_sequence: u64) -> bool {
        let first = match &self.kept {
            Kept::Memory { .. } => return last_sequence < self.acknowledged,
            Kept::Disk(spool) => spool.first_unacknowledged(),
        };
        // As an instance that the ledger does not know we may go on with any number.
        last_sequence < self.acknowledged
            || (last_sequence > 0 && last_sequence.saturating_add(1) < first)
    }

    /// Gives the instance whose turn it is another name, for a ledger that has forgotten what it had acknowledged.
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
    pub(super) fn is_turn_of_another(&mut self, instance: &str) -> Result<bool, SpoolError> {
        if !self.in_flight.is_empty() {
            return Ok(false);
        }
        let (next, _) = self.identity()?;
        if next == instance {
            return Ok(false);
        }
        self.acknowledged = 0;
        Ok(true)
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
        let lost = self.loose.connections();
        match &mut self.kept {
            Kept::Memory { .. } => {
                let sealed = self.in_flight.iter().map(|batch| batch.connections);
                Leftover {
                    lost: lost.saturating_add(sealed.sum()),
                    spooled: 0,
                }
            }
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
