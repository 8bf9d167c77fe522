//! The keeper: the one task that owns the ledger and its store.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use flow::{
    record::FlowRecord,
    source::View,
    time::Timestamp,
    wire::{Packed, Resolve},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, error, info, warn};

use super::{
    page::page,
    round::{Naming, Round, Verdict},
    sessions::Sessions,
    status::status,
    vet::Vetting,
};
use crate::{
    ingest::{Ask, PageRequest, Receiver, Refusal, Request, Session, StatusRequest},
    ledger::{Bounds, Edge, KnownEnd},
    metrics::Meter,
    status::{Status, TopologyStatus},
    store::{Losses, State, Store, StoreError},
};

/// The most requests that share one transaction, for which the disk is waited for once. What they hold is bounded by the
/// room that they take.
const GROUP: usize = 256;

/// How long an instance is remembered after its last batch, unless it is connected: far longer than an agent would keep
/// a batch that it cannot deliver.
const REMEMBER_INSTANCES: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How often to look for what to forget. The first time is so long after the start, too: until then agents that were not
/// heard for as long as the generator was away have told what time it is.
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);

/// How long to wait after a commit that failed: a full disk stays full for a while, and the whole ledger is read again
/// each time. It doubles with each failure, but must leave time to stop within Kubernetes' thirty seconds.
const MIN_DELAY: Duration = Duration::from_millis(250);
const MAX_DELAY: Duration = Duration::from_secs(8);

/// What the ledger amounts to at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// The number of changes up to here.
    pub revision: u64,
    /// All edges.
    pub edges: Vec<Edge>,
    /// What was lost.
    pub losses: Losses,
}

impl Snapshot {
    /// What a state amounts to after so many changes.
    pub(super) fn of(revision: u64, state: &State) -> Self {
        Self {
            revision,
            edges: state.ledger.edges(),
            losses: state.losses.clone(),
        }
    }
}

/// Asks for a snapshot. There is one who asks and waits for the answer, so one place in the queue is enough.
pub(super) type SnapshotRequest = oneshot::Sender<Snapshot>;

/// How much is kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// How large the ledger may become.
    pub bounds: Bounds,
    /// For how long an observation is kept after it was made the last time; without, for ever.
    pub retain: Option<Duration>,
}

/// Owns the state and the store.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    state: State,
    /// How often it was read again.
    loads: u64,
    /// What is known of the cluster, if anything.
    topology: Option<View>,
    sessions: Sessions,
    limits: Limits,
    meter: Meter,
    started: Timestamp,
    revision: watch::Sender<u64>,
    /// When to look for what to forget.
    sweep_at: Instant,
    /// How long to wait after the last commit, if that failed.
    delay: Option<Duration>,
}

impl Keeper {
    /// Loads the state from the store. With a view of the cluster, agents may leave names to the keeper.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn load(
        mut store: Store,
        topology: Option<View>,
        limits: Limits,
        meter: Meter,
    ) -> Result<Self, StoreError> {
        let state = store.load().await?;
        let (revision, _) = watch::channel(0);
        Ok(Self {
            store,
            state,
            loads: 0,
            topology,
            sessions: Sessions::default(),
            limits,
            meter,
            started: Timestamp::from(SystemTime::now()),
            revision,
            sweep_at: Instant::now() + SWEEP_EVERY,
            delay: None,
        })
    }

    /// Counts the changes of the ledger.
    #[must_use]
    pub fn revision(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// What the ledger amounts to.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        Snapshot::of(*self.revision.borrow(), &self.state)
    }

    /// Serves requests until nobody is left who could make one, then closes the store and gives what it had, and after how many
    /// changes.
    ///
    /// # Errors
    /// If the store fails, and cannot even be read again. What was acknowledged is stored.
    pub async fn run(
        mut self,
        mut requests: Receiver,
        mut snapshots: mpsc::Receiver<SnapshotRequest>,
        mut statuses: mpsc::Receiver<StatusRequest>,
        mut pages: mpsc::Receiver<PageRequest>,
    ) -> Result<(u64, State), StoreError> {
        let mut group = Vec::with_capacity(GROUP);
        // Agents wait meanwhile, and the snapshots of what is stored go on.
        let mut pause = pin!(sleep(Duration::ZERO));
        let mut pausing = false;
        loop {
            tokio::select! {
                received = requests.recv_many(&mut group, GROUP), if !pausing => {
                    if received == 0 {
                        break;
                    }
                    self.settle(group.drain(..)).await?;
                    if let Some(delay) = self.delay {
                        pause.as_mut().reset(Instant::now() + delay);
                        pausing = true;
                    }
                }
                () = &mut pause, if pausing => pausing = false,
                () = sleep_until(self.sweep_at), if !pausing => {
                    self.settle(std::iter::empty()).await?;
                }
                Some(wanted) = statuses.recv() => {
                    if wanted.send(self.status().await).is_err() {
                        debug!("nobody waits for the status");
                    }
                }
                Some(PageRequest { after, answer }) = pages.recv() => {
                    if after.is_some_and(|end| end.load != self.loads) {
                        // Its places are others now. The body ends early, and the reader asks again.
                        debug!("an export is cut off: the ledger was read again");
                        continue;
                    }
                    match page(&self.state, self.loads, after) {
                        Ok(page) => drop(answer.send(page)),
                        // Records of flows have a form in JSON; the reader is told by the end of its body.
                        Err(error) => error!(%error, "a page of the ledger cannot be written"),
                    }
                }
                Some(wanted) = snapshots.recv() => {
                    if wanted.send(self.snapshot()).is_err() {
                        debug!("nobody waits for the snapshot");
                    }
                }
            }
        }
        self.store.close().await?;
        let revision = *self.revision.borrow();
        Ok((revision, self.state))
    }

    async fn status(&mut self) -> Status {
        let now = Timestamp::from(SystemTime::now());
        let mut status = status(&self.state, &self.sessions);
        status.version = env!("CARGO_PKG_VERSION").to_owned();
        status.now = now;
        status.started = self.started;
        status.ledger.database_bytes = self.store.bytes().await.unwrap_or(0);
        status.topology = self.topology.as_ref().map(|view| TopologyStatus {
            ready: view.is_ready(),
            stale_seconds: view.stale_since().map_or(0, |since| {
                now.as_nanos().saturating_sub(since.as_nanos()) / 1_000_000_000
            }),
        });
        status
    }

    /// Does what a group of requests asks for in one transaction, then answers them.
    async fn settle(&mut self, group: impl Iterator<Item = Request>) -> Result<(), StoreError> {
        let now = Timestamp::from(SystemTime::now());
        let mut round = Round::new(self.limits.bounds);
        let mut answers = Vec::with_capacity(GROUP);
        let (mut flows, mut batches) = (0, 0);
        let retired = self.sweep(&mut round, now);
        for Request { session, ask, room } in group {
            let answered = match ask {
                Ask::Join => self.join(&session),
                Ask::Store(_) if session.is_refused() => false,
                Ask::Store(mut batch) => match self.apply(&mut round, &session, &mut batch, now) {
                    Verdict::Applied => {
                        flows += batch.flows.len() as u64;
                        batches += 1;
                        true
                    }
                    Verdict::Known => true,
                    Verdict::Refused(reason) => {
                        session.refuse(Refusal::protocol(reason));
                        false
                    }
                },
            };
            drop(room);
            if answered {
                answers.push(session);
            }
        }
        let changes = round.changes(&self.state);
        if changes.is_empty() {
            self.answer(&answers);
            return Ok(());
        }
        // Losses hold policies back as long as they are known, so it counts as well that they are forgotten.
        let changed = !changes.ledger.is_empty()
            || !changes.losses.is_empty()
            || !changes.forgotten_losses.is_empty()
            || retired > 0;
        match self.store.commit(&changes).await {
            Ok(()) => {
                self.state.ledger.stored();
                self.delay = None;
                self.answer(&answers);
                self.meter.commits.inc();
                self.meter.flows.inc_by(flows);
                self.meter.batches.inc_by(batches);
                for (node, reason, count) in round.losses() {
                    error!(node, reason, count, "observations lost");
                }
                if changed {
                    self.revision.send_modify(|revision| *revision += 1);
                }
                if retired > 0 {
                    info!(retired, "observations forgotten: not seen for too long");
                    if let Err(error) = self.store.compact().await {
                        warn!(%error, "the database keeps its size");
                    }
                }
                Ok(())
            }
            Err(failure) => {
                self.meter.failures.inc();
                self.recover(failure, &answers).await
            }
        }
    }

    /// Whether the names that an agent leaves to the generator can be found.
    fn can_name(&self, resolve: Resolve) -> Result<(), Refusal> {
        match (resolve, &self.topology) {
            (Resolve::Both, _) => Ok(()),
            (Resolve::Local, None) => Err(Refusal::policy(
                "this generator has no --topology to name the other ends of --resolve local",
            )),
            (Resolve::Local, Some(view)) if view.is_ready() => Ok(()),
            (Resolve::Local, Some(_)) => {
                Err(Refusal::failure("the cluster's objects are not known yet"))
            }
        }
    }

    /// Whether the session is let in.
    fn join(&mut self, session: &Arc<Session>) -> bool {
        let hello = &session.hello;
        let stored = self.state.agents.get(&hello.instance);
        let joined = self.can_name(hello.resolve).and_then(|()| {
            self.sessions
                .join(session, stored.map(|agent| &*agent.node))
        });
        if let Err(refusal) = joined {
            session.refuse(refusal);
            return false;
        }
        true
    }

    /// Adds a batch to the round: unless it is refused, it is to be acknowledged once the round is committed.
    fn apply(
        &mut self,
        round: &mut Round,
        session: &Session,
        batch: &mut Packed<KnownEnd>,
        now: Timestamp,
    ) -> Verdict {
        let hello = &session.hello;
        let sequence = batch.sequence;
        let known = self.topology.as_ref().map(View::index);
        Vetting {
            now,
            node: session.is_node_proven.then_some(&*hello.node),
            index: known.as_deref(),
        }
        .vet(batch);
        let index = known.filter(|_| hello.resolve == Resolve::Local);
        let name = |record: &mut FlowRecord| {
            if let Some(index) = &index {
                index.name_ends(record);
            }
        };
        let naming = index.is_some().then_some(&name as Naming<'_>);
        round.make_room_for(&mut self.state, hello, |instance| {
            self.sessions.has(instance)
        });
        let verdict = round.apply(&mut self.state, hello, batch, naming, now);
        match verdict {
            Verdict::Applied => {
                self.sessions
                    .report(&hello.instance, batch.window.to, batch.health);
            }
            Verdict::Known => {
                self.meter.repeated.inc();
                debug!(instance = hello.instance, sequence, "batch is known");
            }
            Verdict::Refused(_) => {}
        }
        verdict
    }

    fn answer(&self, sessions: &[Arc<Session>]) {
        for session in sessions {
            session.acknowledge(self.state.agents.last_sequence(&session.hello.instance));
        }
    }

    /// After a failed commit the store tells what is true. Who waits for an answer is sent away, and will deliver again.
    async fn recover(
        &mut self,
        failure: StoreError,
        waiting: &[Arc<Session>],
    ) -> Result<(), StoreError> {
        warn!(error = %failure, "batches not stored, their agents will send them again");
        for session in waiting {
            session.refuse(Refusal::failure("the batch cannot be stored now"));
        }
        // There is no room for two: what is not true goes before what is comes.
        self.state = State::default();
        self.state = self.store.load().await?;
        self.loads += 1;
        self.delay = Some(match self.delay {
            Some(delay) => (2 * delay).min(MAX_DELAY),
            None => MIN_DELAY,
        });
        Ok(())
    }

    /// Forgets what is too old, now and then. Returns how many observations were.
    ///
    /// Nothing becomes older than what agents have told of since: neither a clock of this node that is ahead nor a time in
    /// which nobody could report takes away what is known.
    fn sweep(&mut self, round: &mut Round, now: Timestamp) -> usize {
        if Instant::now() < self.sweep_at {
            return 0;
        }
        self.sweep_at = Instant::now() + SWEEP_EVERY;
        let now = now.min(self.newest());
        let before = self.state.agents.iter().count();
        round.forget_before(
            &mut self.state,
            now.saturating_sub(REMEMBER_INSTANCES),
            |instance| self.sessions.has(instance),
        );
        let forgotten = before - self.state.agents.iter().count();
        if forgotten > 0 {
            info!(forgotten, "agent instances forgotten");
        }
        match self.limits.retain {
            Some(retain) => round.retire(&mut self.state, now.saturating_sub(retain)),
            None => 0,
        }
    }

    /// The last moment that agents have told of; the epoch if there is none.
    fn newest(&self) -> Timestamp {
        let observed = self.state.ledger.last_seen();
        let lost = self.state.losses.iter();
        observed
            .into_iter()
            .chain(lost.map(|(_, _, loss)| loss.window.to))
            .chain(self.sessions.reported_until())
            .max()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
