//! A log that comes by standard input.

use std::{
    io::{self, Read as _},
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    thread,
};

use super::{
    follow::PIECE_BYTES,
    lines::{Lines, Text},
};

/// Pieces of standard input that may wait; its writer then does.
const MAX_PIECES: usize = 16;

/// Follows it.
#[derive(Debug)]
pub(super) struct Stdin {
    pieces: Receiver<Vec<u8>>,
    lines: Lines,
    has_ended: bool,
}

impl Stdin {
    /// # Errors
    /// If there is no thread to be had.
    pub(super) fn new() -> io::Result<Self> {
        let (sender, pieces) = sync_channel(MAX_PIECES);
        // It ends with its input or with the process: nothing else wakes one who reads.
        thread::Builder::new()
            .name("scope-log".to_owned())
            .spawn(move || {
                let mut input = io::stdin().lock();
                loop {
                    let mut piece = vec![0; PIECE_BYTES];
                    match input.read(&mut piece) {
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => {
                            tracing::warn!(%error, "cannot read the probe's log from standard input");
                            return;
                        }
                        Ok(0) => return,
                        Ok(read) => {
                            piece.truncate(read);
                            if sender.send(piece).is_err() {
                                return;
                            }
                        }
                    }
                }
            })?;
        Ok(Self {
            pieces,
            lines: Lines::at(0),
            has_ended: false,
        })
    }

    /// Hands out the lines that have come, as far as there is room; of pieces, so it may be a piece more.
    pub(super) fn read(&mut self, room: &mut usize, sink: &mut dyn FnMut(Text<'_>)) {
        while *room > 0 && !self.has_ended {
            match self.pieces.try_recv() {
                Ok(piece) => {
                    *room = room.saturating_sub(piece.len());
                    self.lines.take(&piece, sink);
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.has_ended = true;
                    self.lines.finish(sink);
                }
            }
        }
    }
}
