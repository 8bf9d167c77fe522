//! The conversation with one agent.

use std::{
    convert::Infallible,
    future::pending,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use flow::{
    time::Timestamp,
    wire::{self, Encoding, GeneratorMessage, MAX_MESSAGE_BYTES, RawMessage, bounds},
};
use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::tungstenite::{
    self, Bytes,
    protocol::{
        CloseFrame,
        frame::{
            Frame,
            coding::{CloseCode, Data, OpCode},
        },
    },
};
use tracing::{debug, info, warn};

use super::{
    Refusal,
    door::Stranger,
    ends::Ends,
    session::{Ask, Ended, Feedback, Room, Sender, Session},
    socket::{Heard, Socket},
};
use crate::{auth::Admission, metrics::Meter};

/// The longest hello, in bytes. There is always room for it.
const MAX_HELLO_BYTES: usize = 16 << 10;

/// How long a message may take to arrive in the room that others wait for, from when it has the room.
const PATIENCE: Duration = Duration::from_millis(250);

/// How long a peer may take to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// How long a peer may be silent before it is pinged.
const PING_AFTER: Duration = Duration::from_secs(20);

/// How long a peer may be silent, and not answer pings. A message counts when it is complete.
const SILENCE_DEADLINE: Duration = Duration::from_secs(60);

/// How long a message may take to arrive in all, from when it has room. Pings between its pieces do not prolong it, or
/// a peer could keep the room for ever.
const ARRIVAL_DEADLINE: Duration = Duration::from_secs(60);

/// How long a join may wait for room. Nothing is heard from the peer meanwhile, so it may be gone.
const JOIN_DEADLINE: Duration = Duration::from_secs(60);

/// How long a peer may take to read what it is sent.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a peer may take to read why it is refused.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// How a conversation ends.
#[derive(Debug)]
enum Ending {
    /// The connection broke.
    Gone(String),
    /// The peer has said goodbye.
    Closed(Option<CloseFrame>),
    /// The peer does what it must not.
    Refused(Refusal),
    /// The generator is stopping.
    Stopping,
}

impl Ending {
    /// It cannot be told to the peer: what follows an unfinished frame would be taken for the rest of it.
    fn unread() -> Self {
        Self::Gone("the peer does not read".to_owned())
    }
}

impl From<tungstenite::Error> for Ending {
    fn from(error: tungstenite::Error) -> Self {
        Refusal::from_socket(&error).map_or_else(|| Self::Gone(error.to_string()), Self::Refused)
    }
}

impl From<Refusal> for Ending {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

/// The keeper ends first only when the generator stops or fails.
impl From<Ended> for Ending {
    fn from(_: Ended) -> Self {
        Self::Stopping
    }
}

impl From<wire::WireError> for Ending {
    fn from(error: wire::WireError) -> Self {
        Self::Refused(error.into())
    }
}

impl From<bounds::Invalid> for Ending {
    fn from(invalid: bounds::Invalid) -> Self {
        Self::Refused(Refusal::invalid(invalid.to_string()))
    }
}

/// Who calls.
pub(super) struct Call {
    pub(super) peer: SocketAddr,
    /// What its token says of it.
    pub(super) admission: Admission,
    /// Its place in the door, given up with the hello.
    pub(super) stranger: Stranger,
    /// What is known of the ends of flows.
    pub(super) ends: Ends,
    pub(super) meter: Meter,
}

/// Speaks with a peer until either end has enough of it. `stop` turns true when the generator stops.
pub(super) async fn converse<S>(stream: S, call: Call, queue: Sender, stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let peer = call.peer;
    let mut connection = Connection {
        socket: Socket::new(stream, MAX_HELLO_BYTES),
        encoding: Encoding::MessagePack,
        ends: call.ends,
        stop,
    };
    let ending = match connection.greet(&call.admission).await {
        Ok((session, feedback)) => {
            drop(call.stranger);
            connection.attend(peer, &session, feedback, &queue).await
        }
        Err(ending) => {
            if let Ending::Refused(refusal) = &ending {
                warn!(%peer, reason = %refusal, "connection refused");
            }
            ending
        }
    };
    if let Ending::Refused(_) = &ending {
        call.meter.refused.inc();
    }
    // A peer that does not want to hear it loses nothing that the ledger has.
    if timeout(CLOSE_DEADLINE, connection.close(ending))
        .await
        .is_err()
    {
        debug!(%peer, "peer did not wait for the end");
    }
}

struct Connection<S> {
    socket: Socket<S>,
    /// How the peer spoke last.
    encoding: Encoding,
    ends: Ends,
    stop: watch::Receiver<bool>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Waits for the hello.
    async fn greet(
        &mut self,
        admission: &Admission,
    ) -> Result<(Arc<Session>, watch::Receiver<Feedback>), Ending> {
        let deadline = Instant::now() + HELLO_DEADLINE;
        let (bytes, encoding) = loop {
            let heard = tokio::select! {
                stopping = stopping(&mut self.stop) => return Err(stopping),
                heard = self.socket.next() => heard?,
                () = sleep_until(deadline) => {
                    let seconds = HELLO_DEADLINE.as_secs();
                    return Err(Refusal::policy(format!("no hello within {seconds} s")).into());
                }
            };
            match heard {
                Heard::Announced(_) => self.socket.admit(),
                Heard::Message { bytes, encoding } => break (bytes, encoding),
                Heard::Alive(pong) => self.answer(pong).await?,
                Heard::Close(frame) => return Err(Ending::Closed(frame)),
            }
        };
        self.encoding = encoding;
        let RawMessage::Hello(hello) = wire::decode(&bytes, encoding)? else {
            return Err(Refusal::protocol("the first message must be a hello").into());
        };
        bounds::hello(&hello)?;
        if let Some(node) = &admission.node
            && *node != hello.node
        {
            let reason = format!(
                "the token is of a pod on node {node}, not on {}",
                hello.node
            );
            return Err(Refusal::policy(reason).into());
        }
        self.socket.set_limit(MAX_MESSAGE_BYTES);
        let is_node_proven = admission.node.is_some();
        let now = Timestamp::from(SystemTime::now());
        Ok(Session::new(hello, is_node_proven, now))
    }

    /// Passes batches to the keeper, and its feedback to the peer.
    async fn attend(
        &mut self,
        peer: SocketAddr,
        session: &Arc<Session>,
        feedback: watch::Receiver<Feedback>,
        queue: &Sender,
    ) -> Ending {
        let hello = &session.hello;
        info!(
            %peer, node = hello.node, instance = hello.instance, version = hello.version,
            "agent connected"
        );
        let Err(ending) = self.exchange(session, feedback, queue).await;
        match &ending {
            Ending::Gone(reason) => {
                info!(%peer, node = hello.node, instance = hello.instance, reason, "agent disconnected");
            }
            Ending::Closed(frame) => {
                let code = frame.as_ref().map(|frame| u16::from(frame.code));
                let reason = frame.as_ref().map(|frame| frame.reason.escape_default());
                let reason = reason.map(|reason| reason.to_string()).unwrap_or_default();
                info!(
                    %peer, node = hello.node, instance = hello.instance, code, reason,
                    "agent closed the connection"
                );
            }
            Ending::Refused(refusal) => {
                warn!(%peer, node = hello.node, instance = hello.instance, reason = %refusal, "agent refused");
            }
            Ending::Stopping => {
                info!(%peer, node = hello.node, instance = hello.instance, "agent sent away, stopping");
            }
        }
        ending
    }

    async fn exchange(
        &mut self,
        session: &Arc<Session>,
        mut feedback: watch::Receiver<Feedback>,
        queue: &Sender,
    ) -> Result<Infallible, Ending> {
        let room = tokio::select! {
            stopping = stopping(&mut self.stop) => return Err(stopping),
            room = timeout(JOIN_DEADLINE, queue.reserve(0)) => room.map_err(|_elapsed| {
                let seconds = JOIN_DEADLINE.as_secs();
                Refusal::failure(format!("no room for one more agent within {seconds} s"))
            })??,
        };
        queue.send(session, Ask::Join, room).await?;
        let mut welcomed = false;
        let mut arrival = Arrival::new(queue, &session.hello.node);
        let mut heard = Instant::now();
        let mut pinged = heard;
        loop {
            if arrival.has_room() {
                self.socket.admit();
            }
            let next_ping = heard.max(pinged) + PING_AFTER;
            let silent_at = heard + SILENCE_DEADLINE;
            tokio::select! {
                stopping = stopping(&mut self.stop) => return Err(stopping),
                changed = feedback.changed() => {
                    changed.or(Err(Ending::Stopping))?;
                    let Feedback { stored, refusal } = feedback.borrow_and_update().clone();
                    if let Some(sequence) = stored {
                        arrival.during(self.report(sequence, &mut welcomed)).await?;
                    }
                    if let Some(refusal) = refusal {
                        return Err(refusal.into());
                    }
                }
                proceeded = arrival.proceed() => {
                    proceeded?;
                    heard = Instant::now();
                }
                // A message is read when there is room for it; while it waits for that, nothing is.
                next = self.socket.next(), if !arrival.waits() => match next? {
                    Heard::Announced(length) => arrival.announce(length),
                    Heard::Message { bytes, encoding } => {
                        if let Some(room) = arrival.complete() {
                            self.pass_on(session, &bytes, encoding, queue, room).await?;
                        }
                        heard = Instant::now();
                    }
                    Heard::Alive(pong) => {
                        arrival.during(self.answer(pong)).await?;
                        heard = Instant::now();
                    }
                    Heard::Close(frame) => return Err(Ending::Closed(frame)),
                },
                // A message that arrives has a deadline of its own.
                () = sleep_until(silent_at), if arrival.is_idle() => {
                    let seconds = SILENCE_DEADLINE.as_secs();
                    return Err(Refusal::policy(format!("nothing heard for {seconds} s")).into());
                }
                () = sleep_until(next_ping), if !arrival.waits() => {
                    pinged = Instant::now();
                    arrival.during(self.send(Frame::ping(Bytes::new()))).await?;
                }
            }
        }
    }

    /// Decodes a batch and passes it to the keeper.
    async fn pass_on(
        &mut self,
        session: &Arc<Session>,
        bytes: &[u8],
        encoding: Encoding,
        queue: &Sender,
        mut room: Room,
    ) -> Result<(), Ending> {
        self.encoding = encoding;
        // What it becomes is known only when it is decoded, so there must be room for the most beforehand.
        tokio::select! {
            stopping = stopping(&mut self.stop) => return Err(stopping),
            reserved = queue.reserve_decoded(&mut room) => reserved?,
        }
        let RawMessage::Batch(batch) = wire::decode(bytes, encoding)? else {
            return Err(Refusal::protocol("hello was said before").into());
        };
        bounds::batch(&batch)?;
        let (batch, weight) = self.ends.decode(batch, encoding)?;
        room.is_of(weight + size_of_val(&*batch.flows) + size_of_val(&*batch.ends));
        queue
            .send(session, Ask::Store(Box::new(batch)), room)
            .await?;
        Ok(())
    }

    /// Tells the peer up to where its batches are stored.
    async fn report(&mut self, sequence: u64, welcomed: &mut bool) -> Result<(), Ending> {
        let message = if *welcomed {
            GeneratorMessage::Ack { sequence }
        } else {
            *welcomed = true;
            GeneratorMessage::Welcome {
                last_sequence: sequence,
            }
        };
        self.say(&message).await
    }

    async fn say(&mut self, message: &GeneratorMessage) -> Result<(), Ending> {
        let bytes = wire::encode(message, self.encoding)?;
        let code = match self.encoding {
            Encoding::MessagePack => Data::Binary,
            Encoding::Json => Data::Text,
        };
        self.send(Frame::message(bytes, OpCode::Data(code), true))
            .await
    }

    /// Answers a ping, if there was one.
    async fn answer(&mut self, pong: Option<Frame>) -> Result<(), Ending> {
        match pong {
            Some(pong) => self.send(pong).await,
            None => Ok(()),
        }
    }

    async fn send(&mut self, frame: Frame) -> Result<(), Ending> {
        match timeout(WRITE_DEADLINE, self.socket.send(frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Ending::Gone(error.to_string())),
            Err(_) => Err(Ending::unread()),
        }
    }

    /// Says why, closes, and waits for the peer to have read it.
    async fn close(&mut self, ending: Ending) {
        let frame = match ending {
            Ending::Gone(_) => return,
            // The peer's own code says that it was understood (RFC 6455, section 5.5.1).
            Ending::Closed(frame) => frame.map(|frame| CloseFrame {
                code: if frame.code.is_allowed() {
                    frame.code
                } else {
                    CloseCode::Protocol
                },
                reason: "".into(),
            }),
            Ending::Stopping => Some(CloseFrame {
                code: CloseCode::Away,
                reason: "the generator is stopping".into(),
            }),
            Ending::Refused(refusal) => {
                let frame = refusal.close_frame();
                let malformed = refusal.is_of_the_message();
                let reason = refusal.reason;
                if self
                    .say(&GeneratorMessage::Refuse { reason, malformed })
                    .await
                    .is_err()
                {
                    return;
                }
                Some(frame)
            }
        };
        if self.send(Frame::close(frame)).await.is_ok() {
            self.socket.drain().await;
        }
    }
}

/// The message that arrives, and the room that it takes.
struct Arrival<'a> {
    queue: &'a Sender,
    node: &'a str,
    stage: Stage<'a>,
}

/// How far a message is.
enum Stage<'a> {
    /// There is none.
    Idle,
    /// It has been announced. Its place in the line for room outlives the turns of the loop.
    Waiting {
        length: usize,
        reserving: BoxFuture<'a, Result<Room, Ended>>,
    },
    /// It is read.
    Admitted {
        length: usize,
        room: Room,
        /// Until when it may have the room that others wait for, if it is in that.
        hurry_until: Option<Instant>,
        /// When it must be complete.
        due: Instant,
    },
}

impl<'a> Arrival<'a> {
    fn new(queue: &'a Sender, node: &'a str) -> Self {
        let stage = Stage::Idle;
        Self { queue, node, stage }
    }

    fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle)
    }

    fn waits(&self) -> bool {
        matches!(self.stage, Stage::Waiting { .. })
    }

    fn has_room(&self) -> bool {
        matches!(self.stage, Stage::Admitted { .. })
    }

    /// A message of this length is to come.
    fn announce(&mut self, length: usize) {
        let queue = self.queue;
        self.stage = Stage::Waiting {
            length,
            reserving: Box::pin(queue.reserve(length)),
        };
    }

    /// It has come. Its room, if it had any.
    fn complete(&mut self) -> Option<Room> {
        match std::mem::replace(&mut self.stage, Stage::Idle) {
            Stage::Admitted { room, .. } => Some(room),
            Stage::Idle | Stage::Waiting { .. } => None,
        }
    }

    /// Ready when it has got room, or was set aside. Nothing is lost if it is not waited for to the end.
    async fn proceed(&mut self) -> Result<(), Ending> {
        match &mut self.stage {
            Stage::Idle => pending().await,
            Stage::Waiting { length, reserving } => {
                let room = reserving.await?;
                let now = Instant::now();
                self.stage = Stage::Admitted {
                    length: *length,
                    room,
                    hurry_until: Some(now + PATIENCE),
                    due: now + ARRIVAL_DEADLINE,
                };
                Ok(())
            }
            Stage::Admitted {
                length,
                room,
                hurry_until,
                due,
            } => {
                let Some(until) = *hurry_until else {
                    sleep_until(*due).await;
                    let seconds = ARRIVAL_DEADLINE.as_secs();
                    let reason = format!("a message took more than {seconds} s to arrive");
                    return Err(Refusal::policy(reason).into());
                };
                sleep_until(until).await;
                *room = self.queue.set_aside(self.node, *length).ok_or_else(|| {
                    Refusal::failure("too many messages arrive as slowly as this one")
                })?;
                *hurry_until = None;
                Ok(())
            }
        }
    }

    /// Writes while the message's room is seen to: a peer that does not read would hold it otherwise, also room that it
    /// is given meanwhile.
    async fn during(
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

/// Ready when the generator stops, or when nobody is left who could say so.
async fn stopping(stop: &mut watch::Receiver<bool>) -> Ending {
    match stop.wait_for(|stop| *stop).await {
        Ok(_) | Err(_) => Ending::Stopping,
    }
}

#[cfg(test)]
mod tests;
