//! Numbers for batches, in the order in which they are sent.

use std::fs::{self, File};

use flow::wire::Resolve;

use super::{
    Entry, SPOOL_CUT, Segment, Spool, SpoolError, failed,
    name::{Name, Numbers},
    segment,
};
use crate::uplink::new_instance;

/// A batch that is to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::uplink) struct Numbered {
    pub(in crate::uplink) sequence: u64,
    pub(in crate::uplink) entry: Entry,
}

/// Up to where batches were taken for sending.
#[derive(Debug)]
pub(super) struct Cursor {
    pub(super) segment: u64,
    /// The file, and where the next entry is in it; absent if what comes before that cannot be read.
    place: Option<(File, u64)>,
    entry: u64,
    /// Those of all entries before that one.
    connections: u64,
}

impl Spool {
    /// The instance whose turn it is now that a connection is made, and who named its flows: to be said in the hello.
    pub(in crate::uplink) fn identity(&mut self) -> (String, Resolve) {
        let mut resolve = self.resolve;
        self.turn.clone_from(&self.instance);
        if !self.segments.is_empty() {
            match self.give_numbers(0) {
                Ok(()) => {
                    let front = &self.segments[0];
                    resolve = front.resolve;
                    self.turn = instance_of(front).to_owned();
                }
                // It waits until the disk lets it have some; what passes the spool by does not wait for it.
                Err(error) => tracing::debug!(%error, "batches in the spool get no numbers"),
            }
        }
        (self.turn.clone(), resolve)
    }

    /// The instance whose turn it is already, and who named its flows.
    pub(in crate::uplink) fn turn(&self) -> (String, Resolve) {
        let mut segments = self.segments.iter();
        let segment = segments.find(|segment| instance_of(segment) == self.turn);
        let resolve = segment.map_or(self.resolve, |segment| segment.resolve);
        (self.turn.clone(), resolve)
    }

    /// Whether a batch may have the next number of this process's own instance without being in the spool: it is that one's
    /// turn, and everything that has a smaller number was taken for sending.
    pub(in crate::uplink) fn may_pass(&self) -> bool {
        self.turn == self.instance && self.taken == self.last_sequence
    }

    /// The number of a batch that passes the spool by, as it [may](Self::may_pass).
    pub(in crate::uplink) fn pass(&mut self) -> u64 {
        // The place in a file says a batch's number, so what comes later goes into another one.
        if let Err(error) = self.close_tail() {
            tracing::debug!(%error, "a segment is closed");
        }
        self.last_sequence += 1;
        self.taken = self.last_sequence;
        self.last_sequence
    }

    /// The next batch of the instance whose turn it is; `None` if there is none at the moment.
    ///
    /// # Errors
    /// If it cannot be read, or given a number.
    pub(in crate::uplink) fn next(&mut self) -> Result<Option<Numbered>, SpoolError> {
        loop {
            let Some(position) = self.place_cursor()? else {
                return Ok(None);
            };
            let (Some(cursor), Some(segment)) = (&mut self.cursor, self.segments.get(position))
            else {
                return Ok(None);
            };
            if instance_of(segment) != self.turn {
                return Ok(None);
            }
            if cursor.entry < segment.entries {
                let read = cursor.place.as_mut().and_then(|(file, offset)| {
                    let entry = segment::read_entry(file, *offset)?;
                    *offset += entry.len();
                    Some(entry)
                });
                let Some(entry) = read else {
                    let (entries, connections) = (cursor.entry, cursor.connections);
                    self.cut(position, entries, connections)?;
                    continue;
                };
                let base = segment
                    .name
                    .numbers
                    .as_ref()
                    .map_or(1, |numbers| numbers.base);
                let sequence = base + cursor.entry;
                if self.turn == self.instance {
                    self.taken = sequence;
                }
                cursor.entry += 1;
                cursor.connections = cursor.connections.saturating_add(entry.connections);
                return Ok(Some(Numbered { sequence, entry }));
            }
            // On to the next segment, if it is the same instance's.
            let Some(next) = self.segments.get(position + 1) else {
                return Ok(None);
            };
            let same = match &next.name.numbers {
                Some(numbers) => numbers.instance == instance_of(segment),
                None => {
                    next.resolve == self.resolve
                        && next.entries > 0
                        && instance_of(segment) == self.instance
                }
            };
            if !same {
                return Ok(None);
            }
            self.give_numbers(position + 1)?;
            self.cursor = Some(self.cursor_at(position + 1)?);
        }
    }

    /// Where in the list the cursor's segment is; the cursor is put on the first batch that is not acknowledged if it is
    /// nowhere.
    fn place_cursor(&mut self) -> Result<Option<usize>, SpoolError> {
        if self.segments.is_empty() {
            return Ok(None);
        }
        let Some(cursor) = &self.cursor else {
            self.give_numbers(0)?;
            self.cursor = Some(self.cursor_at(0)?);
            return Ok(Some(0));
        };
        let wanted = cursor.segment;
        Ok(self
            .segments
            .iter()
            .position(|segment| segment.name.first == wanted))
    }

    fn cursor_at(&self, position: usize) -> Result<Cursor, SpoolError> {
        let segment = &self.segments[position];
        let path = self.path(&segment.name);
        let file = segment::open(&path).map_err(failed("open", &path))?;
        let mut place = file.map(|file| (file, segment::HEADER_BYTES));
        let mut connections = 0_u64;
        for _ in 0..segment.acknowledged {
            place = place.and_then(|(file, offset)| {
                let entry = segment::read_entry(&file, offset)?;
                connections = connections.saturating_add(entry.connections);
                Some((file, offset + entry.len()))
            });
        }
        Ok(Cursor {
            segment: segment.name.first,
            place,
            entry: segment.acknowledged,
            connections,
        })
    }

    /// What follows these entries, which have so many connections, has become unreadable and is lost. None of it was sent:
    /// the cursor is as far as sending is.
    fn cut(&mut self, position: usize, entries: u64, connections: u64) -> Result<(), SpoolError> {
        let segment = &mut self.segments[position];
        // A batch may have nothing but word of losses.
        let lost = segment.connections.saturating_sub(connections).max(1);
        tracing::error!(
            segment = %segment.name,
            entry = entries,
            connections = lost,
            "a segment of the spool has become unreadable: the rest of it is lost"
        );
        if let Some(numbers) = &segment.name.numbers
            && numbers.instance == self.instance
        {
            self.last_sequence = numbers.base + entries - 1;
        }
        segment.entries = entries;
        segment.connections = connections;
        if position + 1 == self.segments.len() {
            self.tail = None;
        }
        self.lose(SPOOL_CUT, lost);
        self.remove_if_acknowledged(position)
    }

    /// Gives numbers to the batches of a segment, if they have none yet: from here on it stays as it is.
    fn give_numbers(&mut self, position: usize) -> Result<(), SpoolError> {
        let segment = &self.segments[position];
        if segment.name.numbers.is_some() {
            return Ok(());
        }
        let own = segment.resolve == self.resolve;
        let numbers = if own {
            Numbers {
                instance: self.instance.clone(),
                base: self.last_sequence + 1,
            }
        } else {
            // One hello cannot say both.
            Numbers {
                instance: new_instance(),
                base: 1,
            }
        };
        let entries = segment.entries;
        self.rename(position, numbers)?;
        if own {
            self.last_sequence += entries;
        }
        self.sync_directory()
    }

    /// For a ledger that has forgotten what it had acknowledged: what the instance whose turn it is has left goes on under
    /// another name.
    ///
    /// # Errors
    /// If a file cannot be renamed.
    pub(in crate::uplink) fn start_anew(&mut self) -> Result<(), SpoolError> {
        let old = self.turn.clone();
        let new = new_instance();
        for position in 0..self.segments.len() {
            let segment = &self.segments[position];
            if let Some(numbers) = &segment.name.numbers
                && numbers.instance == old
            {
                let numbers = Numbers {
                    instance: new.clone(),
                    base: numbers.base,
                };
                self.rename(position, numbers)?;
            }
        }
        if self.instance == old {
            self.instance.clone_from(&new);
        }
        self.turn = new;
        self.sync_directory()
    }

    fn rename(&mut self, position: usize, numbers: Numbers) -> Result<(), SpoolError> {
        let segment = &self.segments[position];
        let name = Name {
            numbers: Some(numbers),
            ..segment.name
        };
        let (from, to) = (self.path(&segment.name), self.path(&name));
        fs::rename(&from, &to).map_err(failed("rename", &from))?;
        self.segments[position].name = name;
        Ok(())
    }
}

pub(super) fn instance_of(segment: &Segment) -> &str {
    segment
        .name
        .numbers
        .as_ref()
        .map_or("", |numbers| numbers.instance.as_str())
}
