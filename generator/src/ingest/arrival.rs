//! The message that arrives on a connection, and the room that it takes.

use std::{future::pending, pin::pin, time::Duration};

use futures_util::future::BoxFuture;
use tokio::time::{Instant, sleep_until};

use super::{
    Refusal,
    connection::Ending,
    queue::{Aside, Ended, Room, Sender},
};

/// How long a message may take to arrive in the room that others wait for, from when it has the room.
pub(super) const PATIENCE: Duration = Duration::from_millis(250);

/// How long it may take then, in room of its own. Pings between its pieces do not prolong it, or a peer could keep the room
/// for ever.
pub(super) const ARRIVAL_DEADLINE: Duration = Duration::from_secs(60);

/// The message that arrives, if there is one.
pub(super) struct Arrival<'a> {
    queue: &'a Sender,
    node: &'a str,
    /// Of the last message that was announced.
    length: usize,
    stage: Stage<'a>,
}

/// How far a message is.
enum Stage<'a> {
    /// There is none.
    Idle,
    /// It has been announced. Its place in the line for room outlives the turns of the connection's loop.
    Waiting(BoxFuture<'a, Result<Room, Ended>>),
    /// It is read, and others wait for its room.
    Hurried { room: Room, until: Instant },
    /// It is read, and nobody waits for it.
    Aside { aside: Aside, due: Instant },
}

impl<'a> Arrival<'a> {
    pub(super) fn new(queue: &'a Sender, node: &'a str) -> Self {
        Self {
            queue,
            node,
            length: 0,
            stage: Stage::Idle,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    pub(super) fn waits(&self) -> bool {
        matches!(self.stage, Stage::Waiting(_))
    }

    pub(super) fn has_room(&self) -> bool {
        matches!(self.stage, Stage::Hurried { .. } | Stage::Aside { .. })
    }

    /// A message of this length is to come.
    pub(super) fn announce(&mut self, length: usize) {
        let queue = self.queue;
        self.length = length;
        self.stage = Stage::Waiting(Box::pin(queue.reserve(length)));
    }

    /// It has come. Its room, if it had any.
    pub(super) fn complete(&mut self) -> Option<Room> {
        match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Hurried { room, .. } => Some(room),
            // Now another message of the node may be slow.
            Stage::Aside { aside, .. } => Some(aside.room),
            Stage::Idle | Stage::Waiting(_) => None,
        }
    }

    /// Ready when it has got room, or was set aside. Nothing is lost if it is not waited for to the end.
    pub(super) async fn proceed(&mut self) -> Result<(), Ending> {
        match &mut self.stage {
            Stage::Idle => pending().await,
            Stage::Waiting(reserving) => {
                let room = reserving.await?;
                let until = Instant::now() + PATIENCE;
                self.stage = Stage::Hurried { room, until };
                Ok(())
            }
            Stage::Hurried { until, .. } => {
                sleep_until(*until).await;
                let aside = self.queue.set_aside(self.node, self.length)?;
                let due = Instant::now() + ARRIVAL_DEADLINE;
                self.stage = Stage::Aside { aside, due };
                Ok(())
            }
            Stage::Aside { due, .. } => {
                sleep_until(*due).await;
                let seconds = ARRIVAL_DEADLINE.as_secs();
                let reason = format!("a message took more than {seconds} s to arrive");
                Err(Refusal::policy(reason).into())
            }
        }
    }

    /// Writes while the message's room is seen to: a peer that does not read would hold it otherwise, also room that it
    /// is given meanwhile.
    pub(super) async fn during(
        &mut self,
        write: impl Future<Output = Result<(), Ending>>,
    ) -> Result<(), Ending> {
        let mut write = pin!(write);
        loop {
            tokio::select! {
                biased;
                written = &mut write => return written,
                proceeded = self.proceed() => proceeded.map_err(|_unsaid| Ending::unread())?,
            }
        }
    }
}
