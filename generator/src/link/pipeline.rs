//! The way of a log through the threads.
//!
//! The caller's thread reads pieces of whole lines and deals them out in turn; it collects what became of them in the same
//! turn, so that records keep the order of their lines. Only as many pieces are on their way as keep all threads busy, and
//! their buffers are used again: memory is bounded by [`PIECE_BYTES`] and the number of threads.

use std::{
    io::{self, Read, Write},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use flow::scope_log::{Ends, Parser, Problem};
use memchr::{memchr, memchr_iter, memrchr};

use super::{
    LinkError, Options, Summary,
    names::{Names, Topology},
    render::{Rendered, render},
};
use crate::flows::{FlowsError, Input, MAX_DESCRIBED, MAX_LINE_BYTES, OnBadLine};

/// How much is read at once. A piece of this size takes a thread some hundred microseconds.
const PIECE_BYTES: usize = 128 << 10;

/// Pieces on their way for each thread: one that it works on, and one that waits.
const PIECES_PER_THREAD: usize = 2;

/// Some lines, and what became of them.
#[derive(Default)]
struct Piece {
    text: Vec<u8>,
    /// A line that is longer than [`MAX_LINE_BYTES`]; its text is gone.
    is_too_long: bool,
    records: Vec<u8>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    lines: u64,
    records: u64,
    outside: u64,
    skipped: u64,
    /// What is wrong with which line, counted from 0 in this piece.
    problems: Vec<(u64, Fault)>,
    /// A record that could not be written as JSON.
    failure: Option<serde_json::Error>,
}

enum Fault {
    TooLong,
    Malformed(Problem),
}

pub(super) fn run(
    log: impl Read,
    input: &Input,
    topology: &Topology,
    options: Options,
    records: impl Write,
) -> Result<Summary, LinkError> {
    let mut reader = Reader {
        log,
        rest: Vec::new(),
        on_bad_line: options.on_bad_line,
        has_ended: false,
    };
    let mut collector = Collector {
        input,
        on_bad_line: options.on_bad_line,
        records,
        summary: Summary::default(),
    };
    let failed = |error| FlowsError::Io {
        input: input.to_string(),
        error,
    };
    if options.threads.get() == 1 {
        let mut worker = Worker::new(topology, options);
        let mut piece = Piece::default();
        while reader.fill(&mut piece).map_err(failed)? {
            worker.work(&mut piece);
            collector.collect(&mut piece)?;
        }
        return collector.finish();
    }

    thread::scope(|scope| {
        let threads: Vec<Thread> = (0..options.threads.get())
            .map(|_| {
                let (todo, pieces) = sync_channel::<Piece>(PIECES_PER_THREAD);
                let (finished, done) = sync_channel(PIECES_PER_THREAD);
                scope.spawn(move || {
                    let mut worker = Worker::new(topology, options);
                    for mut piece in pieces {
                        worker.work(&mut piece);
                        if finished.send(piece).is_err() {
                            return;
                        }
                    }
                });
                Thread { todo, done }
            })
            .collect();
        let most = threads.len() * PIECES_PER_THREAD;
        let mut spare: Vec<Piece> = (0..most).map(|_| Piece::default()).collect();
        let (mut dealt, mut collected) = (0, 0);
        loop {
            // A thread that has panicked takes and gives nothing: the scope passes its panic on.
            while let Some(mut piece) = spare.pop() {
                if !reader.fill(&mut piece).map_err(failed)?
                    || threads[dealt % threads.len()].todo.send(piece).is_err()
                {
                    break;
                }
                dealt += 1;
            }
            if collected == dealt {
                break;
            }
            let Ok(mut piece) = threads[collected % threads.len()].done.recv() else {
                break;
            };
            collected += 1;
            collector.collect(&mut piece)?;
            spare.push(piece);
        }
        Ok::<_, LinkError>(())
    })?;
    collector.finish()
}

struct Thread {
    todo: SyncSender<Piece>,
    done: Receiver<Piece>,
}

struct Reader<R> {
    log: R,
    /// What was read beyond the piece.
    rest: Vec<u8>,
    on_bad_line: OnBadLine,
    has_ended: bool,
}

impl<R: Read> Reader<R> {
    /// Makes the piece the next one; says whether there was one.
    fn fill(&mut self, piece: &mut Piece) -> io::Result<bool> {
        piece.is_too_long = false;
        piece.text.clear();
        piece.text.append(&mut self.rest);
        while !self.has_ended {
            if self.read(&mut piece.text)? == 0 {
                self.has_ended = true;
            } else if let Some(end) = memrchr(b'\n', &piece.text) {
                let end = end + 1;
                self.rest.extend_from_slice(&piece.text[end..]);
                piece.text.truncate(end);
                return Ok(true);
            } else if piece.text.len() > MAX_LINE_BYTES {
                piece.is_too_long = true;
                self.skip_line(&mut piece.text)?;
                return Ok(true);
            }
        }
        Ok(!piece.text.is_empty())
    }

    /// Appends what is there to be read.
    fn read(&mut self, text: &mut Vec<u8>) -> io::Result<usize> {
        let known = text.len();
        text.resize(known + PIECE_BYTES, 0);
        let read = loop {
            match self.log.read(&mut text[known..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        text.truncate(known + *read.as_ref().unwrap_or(&0));
        read
    }

    /// Leaves `text` empty, and the next line as the rest.
    fn skip_line(&mut self, text: &mut Vec<u8>) -> io::Result<()> {
        text.clear();
        text.shrink_to(PIECE_BYTES);
        if self.on_bad_line == OnBadLine::Refuse {
            // Nobody wants the rest.
            self.has_ended = true;
            return Ok(());
        }
        while self.read(text)? > 0 {
            if let Some(end) = memchr(b'\n', text) {
                self.rest.extend_from_slice(&text[end + 1..]);
                break;
            }
            text.clear();
        }
        text.clear();
        Ok(())
    }
}

struct Worker<'a> {
    options: Options,
    parser: Parser,
    names: Names<'a>,
}

impl<'a> Worker<'a> {
    fn new(topology: &'a Topology, options: Options) -> Self {
        Self {
            options,
            parser: Parser::new(if options.external {
                Ends::Both
            } else {
                Ends::Servers
            }),
            names: Names::new(topology),
        }
    }

    fn work(&mut self, piece: &mut Piece) {
        piece.records.clear();
        piece.counts = Counts::default();
        let counts = &mut piece.counts;
        if piece.is_too_long {
            counts.add_problem(Fault::TooLong);
            counts.lines = 1;
            return;
        }
        let text = piece.text.as_slice();
        let unended = (text.last() != Some(&b'\n')).then_some(text.len());
        let mut start = 0;
        for end in memchr_iter(b'\n', text).chain(unended) {
            let is_ended = Some(end) != unended;
            self.line(&text[start..end], is_ended, counts, &mut piece.records);
            counts.lines += 1;
            start = end + 1;
            let is_over = self.options.on_bad_line == OnBadLine::Refuse && counts.skipped > 0;
            if is_over || counts.failure.is_some() {
                break;
            }
        }
    }

    fn line(&mut self, line: &[u8], is_ended: bool, counts: &mut Counts, records: &mut Vec<u8>) {
        if line.len() > MAX_LINE_BYTES {
            counts.add_problem(Fault::TooLong);
            return;
        }
        let parsed = if is_ended {
            self.parser.parse(line)
        } else {
            self.parser.parse_unended(line)
        };
        match parsed {
            Ok(None) => {}
            Ok(Some(connection)) => {
                match render(&connection, &mut self.names, self.options.external, records) {
                    Ok(Rendered::Record) => counts.records += 1,
                    Ok(Rendered::Outside) => counts.outside += 1,
                    Ok(Rendered::Loopback | Rendered::Accepted) => {}
                    Err(error) => counts.failure = Some(error),
                }
            }
            Err(problem) => counts.add_problem(Fault::Malformed(problem)),
        }
    }
}

impl Counts {
    fn add_problem(&mut self, fault: Fault) {
        self.skipped += 1;
        if self.problems.len() < MAX_DESCRIBED {
            self.problems.push((self.lines, fault));
        }
    }
}

struct Collector<'a, W> {
    input: &'a Input,
    on_bad_line: OnBadLine,
    records: W,
    summary: Summary,
}

impl<W: Write> Collector<'_, W> {
    fn collect(&mut self, piece: &mut Piece) -> Result<(), LinkError> {
        self.records
            .write_all(&piece.records)
            .map_err(LinkError::Write)?;
        let counts = &mut piece.counts;
        if let Some(error) = counts.failure.take() {
            return Err(LinkError::Write(error.into()));
        }
        let summary = &mut self.summary;
        for (line, fault) in counts.problems.drain(..) {
            let input = self.input.to_string();
            let line = summary.lines + line + 1;
            let problem = match fault {
                Fault::TooLong => FlowsError::TooLong { input, line },
                Fault::Malformed(problem) => FlowsError::Malformed {
                    input,
                    line,
                    column: problem.offset + 1,
                    field: problem.field.to_owned(),
                    message: problem.message,
                },
            };
            if self.on_bad_line == OnBadLine::Refuse {
                return Err(problem.into());
            }
            if summary.problems.len() < MAX_DESCRIBED {
                summary.problems.push(problem);
            }
        }
        summary.lines += counts.lines;
        summary.records += counts.records;
        summary.outside += counts.outside;
        summary.skipped += counts.skipped;
        Ok(())
    }

    fn finish(mut self) -> Result<Summary, LinkError> {
        self.records.flush().map_err(LinkError::Write)?;
        Ok(self.summary)
    }
}
