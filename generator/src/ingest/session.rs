//! A connection as the keeper of the ledger knows it.

use std::sync::Arc;

use flow::{time::Timestamp, wire::Hello};
use tokio::sync::watch;

use super::Refusal;

/// One connection of one agent, from its hello to its end.
#[derive(Debug)]
pub struct Session {
    /// What the agent said of itself.
    pub hello: Hello,
    /// How far its clock is ahead of ours, in seconds, if it said what its clock says. The time that the hello was on its way
    /// is in it.
    pub clock_ahead: Option<f64>,
    /// Whether its token says that it is on the node that the hello names.
    pub is_node_proven: bool,
    feedback: watch::Sender<Feedback>,
}

/// What the keeper has said so far. Only the latest is kept, so the keeper never waits for a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Feedback {
    /// The last batch of the instance that is in the store. Nothing until the join is answered.
    pub stored: Option<u64>,
    /// The connection is to be closed. Nothing that it asks for after this is done.
    pub refusal: Option<Refusal>,
}

impl Session {
    /// A session that begins now, and where its feedback arrives.
    #[must_use]
    pub fn new(
        hello: Hello,
        is_node_proven: bool,
        now: Timestamp,
    ) -> (Arc<Self>, watch::Receiver<Feedback>) {
        let (feedback, receiver) = watch::channel(Feedback::default());
        let seconds = |time: Timestamp| time.as_nanos() as f64 / 1e9;
        let clock_ahead = hello.clock.map(|clock| seconds(clock) - seconds(now));
        let session = Self {
            hello,
            clock_ahead,
            is_node_proven,
            feedback,
        };
        (Arc::new(session), receiver)
    }

    /// Tells the connection that batches are stored up to this number, also if it knows that already.
    pub fn acknowledge(&self, sequence: u64) {
        self.feedback
            .send_modify(|feedback| feedback.stored = Some(sequence));
    }

    /// Tells the connection to close. The first reason stands.
    pub fn refuse(&self, refusal: Refusal) {
        self.feedback.send_if_modified(|feedback| {
            let first = feedback.refusal.is_none();
            feedback.refusal.get_or_insert(refusal);
            first
        });
    }

    /// Whether it was told to close.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.feedback.borrow().refusal.is_some()
    }
}
