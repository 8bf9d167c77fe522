//! The conversation with one agent.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use flow::{
    time::Timestamp,
    wire::{self, Encoding, GeneratorMessage, MAX_MESSAGE_BYTES, RawMessage, bounds},
};
use futures_util::FutureExt as _;
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
    Ask, Ended, Feedback, Refusal, Room, Sender, Session,
    arrival::Arrival,
    door::Stranger,
    ends::Ends,
    nodes::Nodes,
    socket::{Heard, Socket},
};
use crate::{auth::Admission, metrics::Meter};

/// The longest hello, in bytes. There is always room for it.
const MAX_HELLO_BYTES: usize = 16 << 10;

/// How long a peer may take to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// How long a peer may be silent before it is pinged.
const PING_AFTER: Duration = Duration::from_secs(20);

/// How long a peer may be silent, and not answer pings. A message counts when it is complete.
const SILENCE_DEADLINE: Duration = Duration::from_secs(60);

/// How long a peer may take to read what it is sent.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);

/// How long a peer may take to read why it is refused.
const CLOSE_DEADLINE: Duration = Duration::from_secs(1);

/// How long a connection lasts at most, and at least if its peer does not end it: so long a token is good here after it has
/// expired or was revoked. They do not all end at once.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
const MIN_AGE: Duration = Duration::from_secs(30 * 60);

/// How a conversation ends.
#[derive(Debug)]
pub(super) enum Ending {
    /// The connection broke.
    Gone(String),
    /// The peer has said goodbye.
    Closed(Option<CloseFrame>),
    /// The peer does what it must not.
    Refused(Refusal),
    /// It is to come back, for this reason.
    Away(&'static str),
}

impl Ending {
    const STOPPING: Self = Self::Away("the generator is stopping");

    /// It cannot be told to the peer: what follows an unfinished frame would be taken for the rest of it.
    pub(super) fn unread() -> Self {
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
        Self::STOPPING
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
    /// Where those are counted whose node is proven.
    pub(super) nodes: Nodes,
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
    let greeted = connection.greet(&call.admission).await;
    let entered = greeted.and_then(|greeted| {
        let node = call.admission.node.as_deref();
        let resident = node.map(|node| call.nodes.enter(node)).transpose()?;
        Ok((greeted, resident))
    });
    let ending = match entered {
        Ok(((session, feedback), _resident)) => {
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
            Ending::Away(reason) => {
                info!(%peer, node = hello.node, instance = hello.instance, reason, "agent sent away");
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
        self.join(session, &mut feedback, queue).await?;
        let ends_at = Instant::now() + rand::random_range(MIN_AGE..MAX_AGE);
        let mut arrival = Arrival::new(queue, &session.hello.node);
        let mut heard = Instant::now();
        let mut pinged = heard;
        loop {
            if arrival.has_room() {
                self.socket.admit();
            }
            let next_ping = heard.max(pinged) + PING_AFTER;
            let silent_at = heard + SILENCE_DEADLINE;
            // In this order: what has come has come in time, also when this task is late.
            tokio::select! {
                biased;
                stopping = stopping(&mut self.stop) => return Err(stopping),
                // What is under way comes again over the next connection.
                () = sleep_until(ends_at) => {
                    return Err(Ending::Away("who you are is to be shown again, come back"));
                }
                changed = feedback.changed() => {
                    changed.or(Err(Ending::STOPPING))?;
                    let Feedback { stored, refusal } = feedback.borrow_and_update().clone();
                    if let Some(sequence) = stored {
                        arrival.during(self.say(&GeneratorMessage::Ack { sequence })).await?;
                    }
                    if let Some(refusal) = refusal {
                        return Err(refusal.into());
                    }
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
                        // However many they are, a message between whose pieces they come has no more time for them.
                        arrival.proceed().now_or_never().transpose()?;
                        arrival.during(self.answer(pong)).await?;
                        heard = Instant::now();
                    }
                    Heard::Close(frame) => return Err(Ending::Closed(frame)),
                },
                proceeded = arrival.proceed() => {
                    proceeded?;
                    heard = Instant::now();
                }
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

    /// Waits until the keeper lets the agent in, and welcomes it. Nothing is heard of the peer before: an agent that is not let
    /// in takes no room, and no connection has a second join in the queue.
    async fn join(
        &mut self,
        session: &Arc<Session>,
        feedback: &mut watch::Receiver<Feedback>,
        queue: &Sender,
    ) -> Result<(), Ending> {
        let asked = async {
            queue.send(session, Ask::Join, None).await?;
            let said = |feedback: &Feedback| *feedback != Feedback::default();
            let answer = feedback.wait_for(said).await.or(Err(Ended))?;
            Ok::<_, Ended>(answer.clone())
        };
        let answer = tokio::select! {
            stopping = stopping(&mut self.stop) => return Err(stopping),
            answer = asked => answer?,
        };
        if let Some(refusal) = answer.refusal {
            return Err(refusal.into());
        }
        let last_sequence = answer.stored.unwrap_or(0);
        self.say(&GeneratorMessage::Welcome { last_sequence }).await
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
            .send(session, Ask::Store(Box::new(batch)), Some(room))
            .await?;
        Ok(())
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
            Ending::Away(reason) => Some(CloseFrame {
                code: CloseCode::Away,
                reason: reason.into(),
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

/// Ready when the generator stops, or when nobody is left who could say so.
async fn stopping(stop: &mut watch::Receiver<bool>) -> Ending {
    match stop.wait_for(|stop| *stop).await {
        Ok(_) | Err(_) => Ending::STOPPING,
    }
}

#[cfg(test)]
mod tests;
