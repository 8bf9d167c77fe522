//! Making room.

use std::{fs, io::Write as _, path::Path};

use flow::{
    observations::Observations,
    record::FlowRecord,
    wire::{self, AgentMessage, Batch, Encoding, MAX_BATCH_FLOWS, Resolve, Window},
};

use super::{
    Entry, MERGE_AT_MOST, SPOOL_CUT, SPOOL_FULL, Segment, Spool, SpoolError, add, connections,
    failed, name::Name, segment,
};
use crate::{
    capture::Losses,
    uplink::loose::{RECORD_OUT_OF_BOUNDS, encode_unnumbered},
};

/// The name of a merged segment until it is whole.
const UNFINISHED: &str = "merge.tmp";

/// A merge is worth it if it leaves at most so much of the bytes, in percent.
const WORTH: u64 = 90;

impl Spool {
    /// Sees to it that there is room for so many bytes.
    pub(super) fn make_room(&mut self, bytes: u64) -> Result<(), SpoolError> {
        while self.bytes + bytes > self.limit {
            if self.merge_oldest()? {
                continue;
            }
            let Some(position) = self.mergeable().next() else {
                // Only what is being sent and what is being appended to are left: both are small against the limit.
                return Ok(());
            };
            self.drop_segment(position)?;
        }
        Ok(())
    }

    /// Places in the list of the segments that may be changed, oldest first.
    fn mergeable(&self) -> impl Iterator<Item = usize> + use<> {
        let closed = self.segments.len() - usize::from(self.tail.is_some());
        let waiting: Vec<usize> = (0..closed)
            .filter(|&position| self.segments[position].name.numbers.is_none())
            .collect();
        waiting.into_iter()
    }

    /// Merges the oldest two neighbours for which it is worth it. `false` if there are none.
    pub(super) fn merge_oldest(&mut self) -> Result<bool, SpoolError> {
        let waiting: Vec<usize> = self.mergeable().collect();
        for pair in waiting.windows(2) {
            let &[older, newer] = pair else { continue };
            let (one, other) = (&self.segments[older], &self.segments[newer]);
            let before = one.bytes + other.bytes;
            if newer != older + 1
                // Who an address was is decided by the time in the record, which adding up would lose.
                || (one.resolve, other.resolve) != (Resolve::Both, Resolve::Both)
                || one.barren_with == Some(other.name.first)
                || before > MERGE_AT_MOST * self.segment_limit
            {
                continue;
            }
            let mut sum = Sum::default();
            for segment in [one, other] {
                sum.add(segment, &self.read_entries(segment)?);
            }
            let entries = sum.entries();
            let bytes = segment::HEADER_BYTES + entries.iter().map(Entry::len).sum::<u64>();
            if bytes * 100 > before * WORTH {
                self.segments[older].barren_with = Some(self.segments[newer].name.first);
                continue;
            }
            self.replace(older, newer, &entries, bytes)?;
            if sum.cut > 0 {
                tracing::error!(
                    connections = sum.cut,
                    "segments of the spool have become unreadable: a part of them is lost"
                );
                self.lose(SPOOL_CUT, sum.cut);
            }
            if sum.too_long > 0 {
                self.lose(RECORD_OUT_OF_BOUNDS, sum.too_long);
            }
            return Ok(true);
        }
        Ok(false)
    }

    fn read_entries(&self, segment: &Segment) -> Result<Vec<Entry>, SpoolError> {
        let path = self.path(&segment.name);
        let (bytes, _) = segment::read(&path).map_err(failed("read", &path))?;
        Ok(segment::parse(&bytes).map_or_else(Vec::new, |parsed| parsed.entries))
    }

    /// Puts one segment in the place of two. It bears the names of both, so after a crash the newer is known to be in it.
    fn replace(
        &mut self,
        older: usize,
        newer: usize,
        entries: &[Entry],
        bytes: u64,
    ) -> Result<(), SpoolError> {
        let name = Name {
            first: self.segments[older].name.first,
            last: self.segments[newer].name.last,
            numbers: None,
        };
        let unfinished = self.directory.join(UNFINISHED);
        write_segment(&unfinished, entries).map_err(failed("write", &unfinished))?;
        let path = self.path(&name);
        fs::rename(&unfinished, &path).map_err(failed("rename", &unfinished))?;
        self.sync_directory()?;
        self.remove_file(&self.segments[newer].name)?;
        self.remove_file(&self.segments[older].name)?;
        let before = self.segments[older].bytes + self.segments[newer].bytes;
        self.segments.remove(newer);
        self.segments[older] = Segment {
            name,
            anew: None,
            resolve: Resolve::Both,
            entries: entries.len() as u64,
            acknowledged: 0,
            connections: connections(entries),
            bytes,
            barren_with: None,
        };
        self.bytes = self.bytes - before + bytes;
        Ok(())
    }

    fn drop_segment(&mut self, position: usize) -> Result<(), SpoolError> {
        let segment = &self.segments[position];
        let connections = segment.connections;
        let told = self.read_entries(segment)?;
        // First of all: what stays is not lost.
        self.remove_file(&segment.name)?;
        // What it knew to be lost stays known.
        for (reason, count) in told
            .iter()
            .filter_map(decoded)
            .flat_map(|batch| batch.losses)
        {
            add(&mut self.lost.before, &reason, count);
        }
        self.lose(SPOOL_FULL, connections);
        tracing::error!(
            connections,
            "the spool is full: its oldest connections are lost"
        );
        self.forget(position);
        Ok(())
    }
}

fn write_segment(path: &Path, entries: &[Entry]) -> std::io::Result<()> {
    let mut file = segment::create(path, Resolve::Both)?;
    for entry in entries {
        file.write_all(&segment::to_bytes(entry)?)?;
    }
    file.sync_all()
}

fn decoded(entry: &Entry) -> Option<Batch> {
    match wire::decode(&entry.message, Encoding::MessagePack) {
        Ok(AgentMessage::Batch(batch)) => Some(batch),
        // A checksum that is right over a message that is not: somebody else has written it.
        Ok(AgentMessage::Hello(_)) | Err(_) => None,
    }
}

/// What segments hold, added up.
#[derive(Debug, Default)]
struct Sum {
    observations: Observations,
    losses: Losses,
    /// Absent if there is nothing.
    window: Option<Window>,
    /// Connections of what cannot be read.
    cut: u64,
    /// Connections of records that have become longer than a message.
    too_long: u64,
}

impl Sum {
    /// Adds what could be read of a segment.
    fn add(&mut self, segment: &Segment, entries: &[Entry]) {
        let (mut batches, mut connections) = (0, 0_u64);
        for batch in entries.iter().filter_map(decoded) {
            batches += 1;
            let window = self.window.get_or_insert(batch.window);
            *window = window.widened(batch.window);
            for (reason, count) in batch.losses {
                add(&mut self.losses, &reason, count);
            }
            for record in batch.flows {
                connections = connections.saturating_add(record.count);
                self.observations.observe(record);
            }
        }
        if batches < segment.entries {
            // A batch may have nothing but word of losses.
            let missing = segment.connections.saturating_sub(connections).max(1);
            self.cut = self.cut.saturating_add(missing);
        }
    }

    /// All that was added, in as few batches as it fits in.
    fn entries(&mut self) -> Vec<Entry> {
        let mut entries = Vec::new();
        let Some(window) = self.window else {
            return entries;
        };
        while !self.observations.is_empty() || !self.losses.is_empty() {
            let flows = self.observations.take(MAX_BATCH_FLOWS);
            self.encode(flows, window, &mut entries);
        }
        entries
    }

    /// Into one entry, or into two halves where one would be too long.
    fn encode(&mut self, flows: Vec<FlowRecord>, window: Window, into: &mut Vec<Entry>) {
        let counts = flows.iter().map(|flow| flow.count);
        let connections = counts.fold(0, u64::saturating_add);
        let batch = AgentMessage::Batch(Batch {
            sequence: 0,
            window,
            flows,
            losses: std::mem::take(&mut self.losses),
            health: None,
        });
        if let Ok(message) = encode_unnumbered(&batch) {
            into.push(Entry {
                connections,
                message,
            });
            return;
        }
        let AgentMessage::Batch(batch) = batch else {
            return;
        };
        let mut flows = batch.flows;
        self.losses = batch.losses;
        if flows.len() > 1 {
            let rest = flows.split_off(flows.len() / 2);
            self.encode(flows, window, into);
            self.encode(rest, window, into);
        } else {
            // It was in a message before; added up it has become a few bytes too long.
            self.too_long = self.too_long.saturating_add(connections);
        }
    }
}
