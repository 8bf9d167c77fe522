//! The capturing half of the agent: drains, names and reports once a second, on a thread of its own.

use std::{
    io,
    sync::{Arc, RwLock, mpsc as std_mpsc},
    thread,
    time::{Duration, Instant},
};

use flow::{record::FlowRecord, topology::Index, wire::Window};
use tokio::sync::mpsc;

use crate::{
    capture::{self, Capture, Losses},
    resolve::{Resolver, Skipped},
};

/// From one drain to the next.
const INTERVAL: Duration = Duration::from_secs(1);

/// Drains that may fail one after the other, as for a shortage of memory that passes.
const MAX_FAILURES: u32 = 5;

/// One drain's flows, named.
#[derive(Debug)]
pub struct Report {
    /// The span of time in which they were seen.
    pub window: Window,
    /// The flows.
    pub records: Vec<FlowRecord>,
    /// What was lost in it.
    pub losses: Losses,
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
    /// Losses by reason.
    pub losses: Losses,
}

/// The running thread.
#[derive(Debug)]
pub struct Collector {
    stop: std_mpsc::Sender<std::convert::Infallible>,
    thread: thread::JoinHandle<Result<Totals, capture::Error>>,
}

impl Collector {
    /// Starts the thread. Reports go to `reports`; when that channel is full the thread waits, and the kernel's map goes
    /// on counting.
    ///
    /// # Errors
    /// If no thread can be had.
    pub fn start(
        capture: Capture,
        resolver: Resolver,
        index: Arc<RwLock<Index>>,
        reports: mpsc::Sender<Report>,
    ) -> io::Result<Self> {
        let (stop, stopped) = std_mpsc::channel();
        let mut worker = Worker {
            capture,
            resolver,
            index,
            reports,
            totals: Totals::default(),
        };
        let thread = thread::Builder::new()
            .name("collector".to_owned())
            .spawn(move || worker.run(&stopped).map(|()| worker.totals))?;
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

struct Worker {
    capture: Capture,
    resolver: Resolver,
    index: Arc<RwLock<Index>>,
    reports: mpsc::Sender<Report>,
    totals: Totals,
}

impl Worker {
    fn run(
        &mut self,
        stopped: &std_mpsc::Receiver<std::convert::Infallible>,
    ) -> Result<(), capture::Error> {
        let mut next = Instant::now() + INTERVAL;
        let mut failures = 0;
        loop {
            let wait = next.saturating_duration_since(Instant::now());
            let stopping = !matches!(
                stopped.recv_timeout(wait),
                Err(std_mpsc::RecvTimeoutError::Timeout)
            );
            let report = match self.drain() {
                Ok(report) => report,
                Err(error) if stopping || failures == MAX_FAILURES => return Err(error),
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
            next = (next + INTERVAL).max(Instant::now());
        }
    }

    fn drain(&mut self) -> Result<Report, capture::Error> {
        let drained = self.capture.drain()?;
        let mut records = Vec::with_capacity(drained.observations.len());
        {
            let index = self
                .index
                .read()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            let resolved = self.resolver.resolve_all(&drained.observations, &index);
            for (observation, result) in drained.observations.iter().zip(resolved) {
                let sum = match result {
                    Ok(record) => {
                        records.push(record);
                        &mut self.totals.connections
                    }
                    Err(Skipped::Loopback) => &mut self.totals.loopback,
                    Err(Skipped::OtherNode) => &mut self.totals.other_node,
                };
                *sum += observation.count;
            }
        }
        for (reason, count) in &drained.losses {
            *self.totals.losses.entry(reason.clone()).or_default() += count;
        }
        if !drained.losses.is_empty() {
            tracing::error!(losses = ?drained.losses, "the kernel lost observations");
        }
        Ok(Report {
            window: drained.window,
            records,
            losses: drained.losses,
        })
    }
}
