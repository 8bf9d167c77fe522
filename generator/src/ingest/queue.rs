//! The way from the connections to the keeper of the ledger, and how much may be on it.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use flow::wire::{MAX_MESSAGE_BYTES, Packed};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{MAX_CONNECTIONS, Refusal, Session};
use crate::{ledger::KnownEnd, status::QueueStatus};

/// How much may arrive and wait for the keeper: KiB of messages as they come, however many agents there are. A message is
/// read only when there is room for it. When there is none, connections wait and read no further, so that their agents are
/// held back by TCP; room is given in the order in which it was asked for.
const ROOM: usize = 8 << 10;

/// The same for messages that arrive slowly, for which nobody else is to wait: of each node one that has not come yet.
const ROOM_ASIDE: usize = 32 << 10;

/// How much batches may take in memory while they wait for the keeper, in KiB. Decoded a made-up one takes many times what
/// it takes as a message, so this is counted apart.
const ROOM_DECODED: usize = 128 << 10;

/// The most that what is new of a batch's ends may take in memory, in bytes: eight times the longest message. A label of a
/// few letters takes twenty-five times what it takes in a message; those of usual ends are longer.
pub(super) const MAX_DECODED_BYTES: usize = 32 << 20;

/// The connections' way to the keeper.
#[derive(Clone, Debug)]
pub struct Sender {
    requests: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    aside: Arc<Semaphore>,
    slow: SlowNodes,
    decoded: Arc<Semaphore>,
}

/// The keeper's end.
pub type Receiver = mpsc::Receiver<Request>;

/// Room for one request.
#[derive(Debug)]
pub struct Room {
    _units: OwnedSemaphorePermit,
    /// For what the message becomes.
    decoded: Option<OwnedSemaphorePermit>,
}

/// Room for a message that arrives slowly, until it has come.
#[derive(Debug)]
pub(super) struct Aside {
    pub(super) room: Room,
    _node: SlowNode,
}

impl Room {
    /// Gives up what is not needed of the room for a decoded batch: it takes so many bytes.
    pub fn is_of(&mut self, bytes: usize) {
        if let Some(decoded) = &mut self.decoded {
            let spare = decoded
                .num_permits()
                .saturating_sub(bytes.div_ceil(1 << 10));
            drop(decoded.split(spare));
        }
    }
}

impl From<OwnedSemaphorePermit> for Room {
    fn from(units: OwnedSemaphorePermit) -> Self {
        Self {
            _units: units,
            decoded: None,
        }
    }
}

/// The queue between the connections and the keeper.
#[must_use]
pub fn queue() -> (Sender, Receiver) {
    // A message takes at least one of the units of room, so there is always a place for one that has its room; and a join takes
    // none, so that it does not wait for messages, but there is one of a connection at most.
    let (requests, receiver) = mpsc::channel(ROOM + ROOM_ASIDE + MAX_CONNECTIONS);
    let sender = Sender {
        requests,
        room: Arc::new(Semaphore::new(ROOM)),
        aside: Arc::new(Semaphore::new(ROOM_ASIDE)),
        slow: SlowNodes::default(),
        decoded: Arc::new(Semaphore::new(ROOM_DECODED)),
    };
    (sender, receiver)
}

/// The units of room that so many bytes take.
fn units(bytes: usize) -> u32 {
    const { assert!(MAX_MESSAGE_BYTES.div_ceil(1 << 10) <= ROOM) }
    bytes.min(MAX_MESSAGE_BYTES).div_ceil(1 << 10).max(1) as u32
}

/// The keeper has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the keeper of the ledger has ended")]
pub struct Ended;

impl Sender {
    /// Waits for room for a message of so many bytes, at most [`MAX_MESSAGE_BYTES`].
    ///
    /// # Errors
    /// If nobody is there to make room.
    pub async fn reserve(&self, bytes: usize) -> Result<Room, Ended> {
        Ok(self.acquire(&self.room, units(bytes)).await?.into())
    }

    /// Waits until there is room for all that a message may become.
    ///
    /// # Errors
    /// If nobody is there to make room.
    pub async fn reserve_decoded(&self, room: &mut Room) -> Result<(), Ended> {
        const UNITS: usize = MAX_DECODED_BYTES >> 10;
        const { assert!(UNITS <= ROOM_DECODED) }
        room.decoded = Some(self.acquire(&self.decoded, UNITS as u32).await?);
        Ok(())
    }

    async fn acquire(
        &self,
        semaphore: &Arc<Semaphore>,
        units: u32,
    ) -> Result<OwnedSemaphorePermit, Ended> {
        tokio::select! {
            permit = Arc::clone(semaphore).acquire_many_owned(units) => permit.or(Err(Ended)),
            () = self.requests.closed() => Err(Ended),
        }
    }

    /// Room for a message that takes its time to arrive.
    ///
    /// # Errors
    /// If there is none, or if another message of its node arrives as slowly.
    pub(super) fn set_aside(&self, node: &str, bytes: usize) -> Result<Aside, Refusal> {
        let slow = SlowNode::enter(&self.slow, node).ok_or_else(|| {
            Refusal::failure("another message of this node arrives as slowly as this one")
        })?;
        let permit = Arc::clone(&self.aside).try_acquire_many_owned(units(bytes));
        let permit = permit
            .map_err(|_none| Refusal::failure("too many messages arrive as slowly as this one"))?;
        Ok(Aside {
            room: permit.into(),
            _node: slow,
        })
    }

    /// What waits at the moment.
    #[must_use]
    pub fn load(&self) -> QueueStatus {
        QueueStatus {
            requests: (self.requests.max_capacity() - self.requests.capacity()) as u64,
            kib: (ROOM + ROOM_ASIDE
                - self.room.available_permits()
                - self.aside.available_permits()) as u64,
        }
    }

    /// Passes a request on.
    ///
    /// # Errors
    /// If nobody is there to receive it.
    pub async fn send(
        &self,
        session: &Arc<Session>,
        ask: Ask,
        room: Option<Room>,
    ) -> Result<(), Ended> {
        let request = Request {
            session: Arc::clone(session),
            ask,
            room,
        };
        self.requests.send(request).await.or(Err(Ended))
    }
}

/// A connection asks the keeper for something. The answer comes as [`Feedback`].
#[derive(Debug)]
pub struct Request {
    /// The connection.
    pub session: Arc<Session>,
    /// What it asks for.
    pub ask: Ask,
    /// To be dropped when the batch is.
    pub room: Option<Room>,
}

/// What a connection asks for.
#[derive(Debug)]
pub enum Ask {
    /// An agent has said who it is.
    Join,
    /// It sent a batch, of valid content.
    Store(Box<Packed<KnownEnd>>),
}

/// The nodes of which a message arrives slowly.
type SlowNodes = Arc<Mutex<HashSet<String>>>;

/// A node's place among them.
#[derive(Debug)]
struct SlowNode {
    slow: SlowNodes,
    node: String,
}

impl SlowNode {
    /// Takes the place, unless a message of this node has it.
    fn enter(slow: &SlowNodes, node: &str) -> Option<Self> {
        let mut nodes = slow.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.insert(node.to_owned()).then(|| Self {
            slow: Arc::clone(slow),
            node: node.to_owned(),
        })
    }
}

impl Drop for SlowNode {
    fn drop(&mut self) {
        let mut nodes = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.remove(&self.node);
    }
}
