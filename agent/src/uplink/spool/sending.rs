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
    pub(super) entry: u64,
    /// Those of all entries before that one.
    connections: u64,
}

impl Spool {
    /// The instance whose turn it is now that nothing is under way, and who named its flows: to be said in the hello.
    ///
    /// # Errors
    /// If what is to be sent first cannot be opened, or given numbers.
    pub(in crate::uplink) fn identity(&mut self) -> Result<(String, Resolve), SpoolError> {
        if !self.segments.is_empty() {
            self.give_numbers(0)?;
            self.place_cursor()?;
        }
        let front = self.segments.front();
        let resolve = front.map_or(self.resolve, |front| front.resolve);
        let numbers = front.and_then(Segment::numbers);
        let instance = numbers.map_or(&self.instance, |numbers| &numbers.instance);
        self.turn.clone_from(instance);
        Ok((self.turn.clone(), resolve))
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
            let Some(numbers) = segment.numbers().filter(|it| it.instance == self.turn) else {
                return Ok(None);
            };
            if cursor.entry < segment.entries {
                let read = cursor.place.as_mut().and_then(|(file, offset)| {
                    let entry = segment::read_entry(file, *offset)?;
                    *offset += entry.len();
                    Some(entry)
                });
                let Some(entry) = read else {
                    let (entries, connections) = (cursor.entry, cursor.connections);
                    self.cut(position, entries, connections);
                    continue;
                };
                let sequence = numbers.after(cursor.entry);
                cursor.entry += 1;
                cursor.connections = cursor.connections.saturating_add(entry.connections);
                return Ok(Some(Numbered { sequence, entry }));
            }
            // On to the next segment, if it is the same instance's.
            let Some(next) = self.segments.get(position + 1) else {
                return Ok(None);
            };
            let is_same = match next.numbers() {
                Some(numbers) => numbers.instance == self.turn,
                None => {
                    next.resolve == self.resolve && next.entries > 0 && self.turn == self.instance
                }
            };
            if !is_same {
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

    /// What follows these entries, which have so many connections, has become unreadable and is lost. The ledger has none of
    /// it, nor anything that comes after it in the instance: the cursor is as far as sending is, or was begun where the
    /// ledger ends.
    fn cut(&mut self, position: usize, entries: u64, connections: u64) {
        let segment = &mut self.segments[position];
        // A batch may have nothing but word of losses.
        let lost = segment.connections.saturating_sub(connections).max(1);
        tracing::error!(
            segment = %segment.name,
            entry = entries,
            connections = lost,
            "a segment of the spool has become unreadable: the rest of it is lost"
        );
        segment.entries = entries;
        segment.connections = connections;
        if position + 1 == self.segments.len() {
            self.tail = None;
        }
        self.lose(SPOOL_CUT, lost);
        // The numbers of what was cut off would be missing before those of what follows.
        self.renumber(position + 1, 1);
        self.discard_if_acknowledged(position);
    }

    /// Gives numbers to the batches of a segment, if they have none yet, or are to have others: from here on it stays as it
    /// is.
    fn give_numbers(&mut self, position: usize) -> Result<(), SpoolError> {
        let segment = &self.segments[position];
        let is_own = segment.resolve == self.resolve;
        match (&segment.anew, &segment.name.numbers) {
            (Some(anew), _) => self.rename(position, anew.clone())?,
            (None, Some(_)) => {}
            (None, None) if is_own => {
                let numbers = Numbers {
                    instance: self.instance.clone(),
                    base: self.last_sequence + 1,
                    done: 0,
                };
                let entries = segment.entries;
                self.rename(position, numbers)?;
                self.last_sequence += entries;
            }
            // One hello cannot say both.
            (None, None) => {
                let numbers = Numbers {
                    instance: new_instance(),
                    base: 1,
                    done: 0,
                };
                self.rename(position, numbers)?;
            }
        }
        if !self.is_synced {
            self.sync_directory()?;
            self.is_synced = true;
        }
        Ok(())
    }

    /// What the instance whose turn it is has left goes to the ledger as something new, under another instance and with the
    /// numbers from `first` on. A file that cannot be renamed now waits for that, and is not sent before.
    pub(in crate::uplink) fn start_anew(&mut self, first: u64) {
        self.renumber(0, first);
        self.cursor = None;
        for position in 0..self.segments.len() {
            // The next process goes by the names, and has not heard what is wrong with the old ones.
            if let Some(anew) = self.segments[position].anew.clone()
                && let Err(error) = self.rename(position, anew)
            {
                tracing::debug!(%error, "batches in the spool wait for their numbers");
            }
        }
    }

    /// What the instance whose turn it is has left in segments from this place on is to have the numbers from `first` on under
    /// another instance, as is what may be appended to them.
    fn renumber(&mut self, from: usize, first: u64) {
        let new = new_instance();
        let mut base = first;
        for segment in self.segments.iter_mut().skip(from) {
            if segment.is_of(&self.turn) {
                segment.anew = Some(Numbers {
                    instance: new.clone(),
                    base,
                    done: segment.acknowledged,
                });
                base += segment.entries - segment.acknowledged;
            }
        }
        if self.instance == self.turn {
            self.instance = new;
            self.last_sequence = base - 1;
        }
    }

    fn rename(&mut self, position: usize, numbers: Numbers) -> Result<(), SpoolError> {
        let segment = &self.segments[position];
        let name = Name {
            numbers: Some(numbers),
            ..segment.name
        };
        let (from, to) = (self.path(&segment.name), self.path(&name));
        fs::rename(&from, &to).map_err(failed("rename", &from))?;
        self.is_synced = false;
        let segment = &mut self.segments[position];
        segment.name = name;
        segment.anew = None;
        Ok(())
    }
}
