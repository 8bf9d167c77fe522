//! The capturing half of the agent: drains, names and reports once a second, on a thread of its own.

use std::{
    io,
    sync::mpsc as std_mpsc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use agent_common::loss::Loss;
use flow::{record::FlowRecord, source::View, time::Timestamp, wire::Window};
use tokio::sync::mpsc;

use crate::{
    capture::{self, Capture, Drained, Losses, Observation, Portion, lose},
    hold::{Hold, Released, TOPOLOGY_UNKNOWN},
    identity::Identity,
    pulse::Pulse,
    resolve::{Resolver, Sighting},
    scope::{self, Receipt, ScopeLog},
};

/// From one drain to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// How often single connections are taken out meanwhile: at the default size of their ring some 150,000 a second have room.
const SINGLES: Duration = Duration::from_millis(50);

/// At least, however late a drain was: lines of the Scope probe's log that belong together may lie a drain apart, and not more.
const PAUSE: Duration = Duration::from_millis(500);

/// How often the cgroups are looked through for one that is not known, between two drains.
const LOOKS: Duration = Duration::from_millis(250);

/// Single connections of cgroups that are not known, kept until the next drain, which looks for these again. What comes when there
/// are as many is named as well as can be.
const MAX_OWNERLESS: usize = 16_384;

/// Drains that may fail one after the other, as for a shortage of memory that passes.
const MAX_FAILURES: u32 = 5;

/// Flows with names.
#[derive(Debug)]
pub struct Report {
    /// The span of time in which they were seen: a drain's, and longer if some had to wait for their names.
    pub window: Window,
    /// The flows.
    pub records: Vec<FlowRecord>,
    /// What was lost in it.
    pub losses: Losses,
    /// To be given back once all this is handed over, and all before it.
    pub receipt: Option<Receipt>,
}

/// What the whole run came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Connections reported.
    pub connections: u64,
    /// Connections left out because both their ends were one host.
    pub loopback: u64,
    /// Connections left out because they belong to another node that shares this kernel.
    pub other_node: u64,
    /// Attempts left out because their port was 0.
    pub no_port: u64,
    /// Losses by reason.
    pub losses: Losses,
}

/// When something is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Between two drains.
    Between,
    /// With a drain.
    Drain,
    /// When no other drain will come.
    Last,
}

/// What it takes to name what was captured.
#[derive(Debug)]
pub struct Naming {
    /// Finds the owners of sockets.
    pub identity: Identity,
    /// Finds the names.
    pub resolver: Resolver,
    /// What is known of the cluster.
    pub view: View,
    /// Where waits what is not known yet.
    pub hold: Hold,
    /// What came between two drains, of cgroups that were not known: perhaps they are younger than the last look.
    ownerless: Vec<Observation>,
}

/// The running thread.
#[derive(Debug)]
pub struct Collector {
    stop: std_mpsc::Sender<std::convert::Infallible>,
    thread: thread::JoinHandle<Result<Totals, capture::Error>>,
}

impl Collector {
    /// Starts the thread. What it captures is merged with the log of `scope`, if there is one. Reports go to
    /// `reports`; when that channel is full the thread waits, and the kernel's map goes on counting. `pulse` beats with each
    /// drain.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(
        capture: Capture,
        naming: Naming,
        scope: Option<ScopeLog>,
        reports: mpsc::Sender<Report>,
        pulse: Pulse,
    ) -> io::Result<Self> {
        let (stop, stopped) = std_mpsc::channel();
        let mut worker = Worker {
            capture,
            naming,
            scope,
            reports,
            pulse,
            totals: Totals::default(),
            looked: Instant::now(),
        };
        let thread = thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || {
                let ended = worker.run(&stopped);
                worker.pulse.stop();
                ended.map(|()| worker.totals)
            })?;
        Ok(Self { stop, thread })
    }

    /// Whether the thread has ended by itself: its receiver is gone, or capturing failed.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends capturing after a last drain.
    ///
    /// # Errors
    /// If a drain failed.
    pub fn stop(self) -> Result<Totals, capture::Error> {
        // The thread also stops when the sender is gone.
        drop(self.stop);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// What the worker asks of [`Capture`].
trait Drain {
    fn drain(&mut self, last: bool) -> Result<Drained, capture::Error>;

    /// Whether there may be something between two drains.
    fn tells_apart(&self) -> bool;

    /// What there is between two drains.
    fn take_single(&mut self) -> Result<Option<Portion>, capture::Error>;
}

impl Drain for Capture {
    fn drain(&mut self, last: bool) -> Result<Drained, capture::Error> {
        Self::drain(self, last)
    }

    fn tells_apart(&self) -> bool {
        Self::tells_apart(self)
    }

    fn take_single(&mut self) -> Result<Option<Portion>, capture::Error> {
        Self::take_single(self)
    }
}

struct Worker<C> {
    capture: C,
    naming: Naming,
    scope: Option<ScopeLog>,
    reports: mpsc::Sender<Report>,
    pulse: Pulse,
    totals: Totals,
    /// When the cgroups could be looked through anew.
    looked: Instant,
}

impl<C: Drain> Worker<C> {
    fn run(
        &mut self,
        stopped: &std_mpsc::Receiver<std::convert::Infallible>,
    ) -> Result<(), capture::Error> {
        let mut next = Instant::now() + INTERVAL;
        let mut failures = 0;
        loop {
            let stopping = match self.wait_until(next, stopped) {
                Ok(stopping) => stopping,
                Err(error) => {
                    self.give_up();
                    return Err(error);
                }
            };
            let report = match self.drain(stopping) {
                Ok(report) => report,
                Err(error) if stopping || failures == MAX_FAILURES => {
                    self.give_up();
                    return Err(error);
                }
                Err(error) => {
                    failures += 1;
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(
                        error,
                        failures,
                        "a drain failed: the next one reports it all"
                    );
                    next = Instant::now() + INTERVAL;
                    continue;
                }
            };
            failures = 0;
            if self.reports.blocking_send(report).is_err() || stopping {
                return Ok(());
            }
            next = (next + INTERVAL).max(Instant::now() + PAUSE);
        }
    }

    /// Waits for the next drain, or for the end, and says whether that has come. Takes out single connections meanwhile, but for
    /// those that the log of the Scope probe tells of, too: they are merged a drain at a time.
    fn wait_until(
        &mut self,
        next: Instant,
        stopped: &std_mpsc::Receiver<std::convert::Infallible>,
    ) -> Result<bool, capture::Error> {
        let tells_apart = self.capture.tells_apart() && self.scope.is_none();
        loop {
            let left = next.saturating_duration_since(Instant::now());
            let wait = if tells_apart { left.min(SINGLES) } else { left };
            let stopping = !matches!(
                stopped.recv_timeout(wait),
                Err(std_mpsc::RecvTimeoutError::Timeout)
            );
            if tells_apart {
                let until = next.max(Instant::now());
                self.take_single(until)?;
            }
            if stopping || wait == left {
                return Ok(stopping);
            }
        }
    }

    /// Reports single connections, a portion at a time, until there are few left or another drain is due.
    fn take_single(&mut self, until: Instant) -> Result<(), capture::Error> {
        if self.looked.elapsed() >= LOOKS {
            self.looked = Instant::now();
            self.naming.identity.look_again();
        }
        while let Some(Portion { drained, is_full }) = self.capture.take_single()? {
            let report = self.report(drained, Turn::Between);
            let is_taken = self.reports.blocking_send(report).is_ok();
            if !is_full || !is_taken || Instant::now() >= until {
                break;
            }
        }
        Ok(())
    }

    fn drain(&mut self, last: bool) -> Result<Report, capture::Error> {
        if let Some(scope) = &mut self.scope {
            scope.read();
        }
        let drained = self.capture.drain(last)?;
        self.naming.identity.next_round();
        self.looked = Instant::now();
        self.pulse.beat();
        Ok(self.report(drained, if last { Turn::Last } else { Turn::Drain }))
    }

    /// Reports what still waits, when there will be no other drain. What the kernel has is lost.
    fn give_up(&mut self) {
        let now = Timestamp::from(SystemTime::now());
        let nothing = Drained {
            window: Window { from: now, to: now },
            observations: Box::new(std::iter::empty()),
            losses: Losses::new(),
        };
        let report = self.report(nothing, Turn::Last);
        if self.reports.blocking_send(report).is_err() {
            tracing::debug!("nobody is left to report to");
        }
    }

    fn report(&mut self, mut drained: Drained, turn: Turn) -> Report {
        let log = self.scope.as_mut().map(|scope| {
            let drain = scope::Drain {
                window: drained.window,
                losses: &drained.losses,
                is_last: turn == Turn::Last,
            };
            (scope, drain)
        });
        let released = self.naming.name(drained.observations, log, turn);
        let held = self.naming.hold.oldest();
        // What is lost here may be read again.
        let is_whole = released.lost == 0 && released.lost_closes == 0;
        let scope = self.scope.as_ref().filter(|_| is_whole);
        let receipt = scope.and_then(|scope| scope.receipt(held));
        self.totals.loopback += released.loopback;
        self.totals.other_node += released.other_node;
        self.totals.no_port += released.no_port;
        let mut window = drained.window;
        for record in &released.records {
            self.totals.connections += record.count;
            window.from = window.from.min(record.first_seen);
        }
        let losses = &mut drained.losses;
        lose(losses, TOPOLOGY_UNKNOWN, released.lost);
        lose(losses, Loss::ClosesLost.name(), released.lost_closes);
        for (reason, count) in losses {
            lose(&mut self.totals.losses, reason, *count);
        }
        if !drained.losses.is_empty() {
            tracing::error!(losses = ?drained.losses, "observations lost");
        }
        Report {
            window,
            records: released.records,
            losses: drained.losses,
            receipt,
        }
    }
}

impl Naming {
    /// Nothing waits yet.
    #[must_use]
    pub fn new(identity: Identity, resolver: Resolver, view: View, hold: Hold) -> Self {
        Self {
            identity,
            resolver,
            view,
            hold,
            ownerless: Vec::new(),
        }
    }

    /// When the API was last heard, if that is known.
    fn heard(&self, now: Instant) -> Instant {
        let Some(since) = self.view.stale_since() else {
            return now;
        };
        let wall = Timestamp::from(SystemTime::now());
        let age = wall.as_nanos().saturating_sub(since.as_nanos());
        now.checked_sub(Duration::from_nanos(age)).unwrap_or(now)
    }

    /// Names what can be named for good, and keeps the rest unless this is the last time. What the log of the Scope probe
    /// tells is merged first, for which all of a drain has to be there; without one each is named as it comes.
    fn name(
        &mut self,
        observations: impl Iterator<Item = Observation>,
        log: Option<(&mut ScopeLog, scope::Drain<'_>)>,
        turn: Turn,
    ) -> Released {
        let now = Instant::now();
        let heard = self.heard(now);
        let Self {
            identity,
            resolver,
            view,
            hold,
            ownerless,
        } = self;
        let index = view.index();
        let earlier = match turn {
            Turn::Between => Vec::new(),
            Turn::Drain | Turn::Last => std::mem::take(ownerless),
        };
        let seen = earlier.into_iter().chain(observations);
        let seen = seen.filter_map(|observation| {
            let owner = identity.owner(observation.cgroup, observation.pid);
            let is_doubtful = owner.is_none() && observation.cgroup != 0;
            if turn == Turn::Between && is_doubtful && ownerless.len() < MAX_OWNERLESS {
                ownerless.push(observation);
                return None;
            }
            Some(Sighting {
                owner,
                observation,
                log: None,
                round: 0,
            })
        });
        let sightings: Box<dyn Iterator<Item = Sighting>> = match log {
            None => Box::new(seen),
            Some((scope, drain)) => {
                let is_here = |address, at| resolver.is_here(address, at, &index);
                Box::new(scope.merge(drain, seen.collect(), &is_here).into_iter())
            }
        };
        match (view.is_ready(), turn) {
            (true, Turn::Between) => hold.release_new(sightings, resolver, &index, now, heard),
            (true, Turn::Drain) => hold.release(sightings, resolver, &index, now, heard),
            (true, Turn::Last) => hold.release_all(sightings, resolver, &index),
            (false, Turn::Between | Turn::Drain) => hold.keep(sightings, now),
            (false, Turn::Last) => hold.lose_all(sightings),
        }
    }
}

#[cfg(test)]
mod tests;
