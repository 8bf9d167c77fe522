//! The keeper: the one task that owns the ledger and its store.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use flow::{
    source::View,
    time::Timestamp,
    wire::{Batch, Resolve},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep},
};
use tracing::{debug, error, info, warn};

use super::round::{MAX_OBSERVATIONS, Round, Verdict};
use crate::{
    ingest::{Ask, Receiver, Refusal, Request, Session},
    ledger::Edge,
    store::{Losses, State, Store, StoreError},
};

/// The most requests that share one transaction, for which the disk is waited for once. What they hold is bounded by the
/// room that they take.
const GROUP: usize = 256;

/// How long an instance is remembered after its last batch, unless it is connected: far longer than an agent would keep
/// a batch that it cannot deliver.
const REMEMBER_INSTANCES: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How often to look for instances to forget.
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

/// Asks for a snapshot. There is one who asks and waits for the answer, so one place in the queue is enough.
pub(super) type SnapshotRequest = oneshot::Sender<Snapshot>;

/// Owns the state and the store.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    state: State,
    /// What is known of the cluster, if anything.
    topology: Option<View>,
    /// The last connection of each instance.
    sessions: HashMap<String, Weak<Session>>,
    revision: watch::Sender<u64>,
    swept: Timestamp,
    /// How long to wait after the last commit, if that failed.
    delay: Option<Duration>,
}

impl Keeper {
    /// Loads the state from the store. With a view of the cluster, agents may leave names to the keeper.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn load(mut store: Store, topology: Option<View>) -> Result<Self, StoreError> {
        let state = store.load().await?;
        let (revision, _) = watch::channel(0);
        Ok(Self {
            store,
            state,
            topology,
            sessions: HashMap::new(),
            revision,
            swept: Timestamp::default(),
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
        Snapshot {
            revision: *self.revision.borrow(),
            edges: self.state.ledger.edges(),
            losses: self.state.losses.clone(),
        }
    }

    /// Serves requests until nobody is left who could make one, then closes the store and gives a last snapshot.
    ///
    /// # Errors
    /// If the store fails, and cannot even be read again. What was acknowledged is stored.
    pub async fn run(
        mut self,
        mut requests: Receiver,
        mut snapshots: mpsc::Receiver<SnapshotRequest>,
    ) -> Result<Snapshot, StoreError> {
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
                Some(wanted) = snapshots.recv() => {
                    if wanted.send(self.snapshot()).is_err() {
                        debug!("nobody waits for the snapshot");
                    }
                }
            }
        }
        let last = self.snapshot();
        self.store.close().await?;
        Ok(last)
    }

    /// Does what a group of requests asks for in one transaction, then answers them.
    async fn settle(&mut self, group: impl Iterator<Item = Request>) -> Result<(), StoreError> {
        let now = Timestamp::from(SystemTime::now());
        let mut round = Round::new(MAX_OBSERVATIONS);
        let mut answers = Vec::with_capacity(GROUP);
        self.sweep(&mut round, now);
        for Request { session, ask, room } in group {
            let answered = match ask {
                Ask::Join => self.join(&session),
                Ask::Store(_) if session.is_refused() => false,
                Ask::Store(batch) => self.apply(&mut round, &session, batch, now),
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
        let changed = !changes.observations.is_empty() || !changes.losses.is_empty();
        match self.store.commit(&changes).await {
            Ok(()) => {
                self.delay = None;
                self.answer(&answers);
                for (node, reason, count) in round.losses() {
                    error!(node, reason, count, "observations lost");
                }
                if changed {
                    self.revision.send_modify(|revision| *revision += 1);
                }
                Ok(())
            }
            Err(failure) => self.recover(failure, &answers).await,
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

    /// Whether the session is let in. The older connection of an instance makes way for the newer: its agent has given it
    /// up.
    fn join(&mut self, session: &Arc<Session>) -> bool {
        if let Err(refusal) = self.can_name(session.hello.resolve) {
            session.refuse(refusal);
            return false;
        }
        self.sessions
            .retain(|_, session| session.strong_count() > 0);
        let instance = session.hello.instance.clone();
        let older = self.sessions.insert(instance, Arc::downgrade(session));
        if let Some(older) = older.and_then(|older| older.upgrade()) {
            older.refuse(Refusal::policy("the same instance has connected again"));
        }
        true
    }

    /// Whether the batch is to be acknowledged once the round is committed.
    fn apply(
        &mut self,
        round: &mut Round,
        session: &Session,
        mut batch: Batch,
        now: Timestamp,
    ) -> bool {
        let hello = &session.hello;
        let sequence = batch.sequence;
        if let (Resolve::Local, Some(view)) = (hello.resolve, &self.topology) {
            let index = view.index();
            for record in &mut batch.flows {
                index.name_ends(record);
            }
        }
        round.make_room_for(&mut self.state, &hello.instance, |instance| {
            is_connected(&self.sessions, instance)
        });
        match round.apply(&mut self.state, hello, batch, now) {
            Verdict::Applied => true,
            Verdict::Known => {
                debug!(instance = hello.instance, sequence, "batch is known");
                true
            }
            Verdict::Refused(reason) => {
                session.refuse(Refusal::protocol(reason));
                false
            }
        }
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
        self.state = self.store.load().await?;
        self.delay = Some(match self.delay {
            Some(delay) => (2 * delay).min(MAX_DELAY),
            None => MIN_DELAY,
        });
        Ok(())
    }

    fn sweep(&mut self, round: &mut Round, now: Timestamp) {
        if now < self.swept.saturating_add(SWEEP_EVERY) {
            return;
        }
        self.swept = now;
        let before = self.state.agents.iter().count();
        round.forget_before(
            &mut self.state,
            now.saturating_sub(REMEMBER_INSTANCES),
            |instance| is_connected(&self.sessions, instance),
        );
        let forgotten = before - self.state.agents.iter().count();
        if forgotten > 0 {
            info!(forgotten, "agent instances forgotten");
        }
    }
}

fn is_connected(sessions: &HashMap<String, Weak<Session>>, instance: &str) -> bool {
    sessions
        .get(instance)
        .is_some_and(|session| session.strong_count() > 0)
}
