//! The conversation with one agent.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use flow::{
    time::Timestamp,
    wire::{self, Encoding, GeneratorMessage, RawMessage},
};
use futures_util::{
    SinkExt as _, StreamExt as _,
    future::{Fuse, FutureExt as _},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Bytes, Message,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};
use tracing::{debug, info, warn};

use super::{
    Refusal,
    door::Stranger,
    ends::Ends,
    session::{Ask, Ended, Feedback, Sender, Session},
    validate,
};
use crate::{auth::Admission, metrics::Meter};

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

/// How a conversation ends.
#[derive(Debug)]
enum Ending {
    /// The peer closed the connection, or it broke.
    Gone(String),
    /// The peer does what it must not.
    Refused(Refusal),
    /// The generator is stopping.
    Stopping,
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

impl From<validate::Invalid> for Ending {
    fn from(invalid: validate::Invalid) -> Self {
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
pub(super) async fn converse<S>(
    socket: WebSocketStream<S>,
    call: Call,
    queue: Sender,
    stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let peer = call.peer;
    let mut connection = Connection {
        socket,
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
    socket: WebSocketStream<S>,
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
        let data = loop {
            let received = tokio::select! {
                stopping = stopping(&mut self.stop) => return Err(stopping),
                message = self.socket.next() => received(message)?,
                () = sleep_until(deadline) => {
                    let seconds = HELLO_DEADLINE.as_secs();
                    return Err(Refusal::policy(format!("no hello within {seconds} s")).into());
                }
            };
            if let Some(data) = received {
                break data;
            }
        };
        self.encoding = data.encoding;
        let RawMessage::Hello(hello) = data.decode()? else {
            return Err(Refusal::protocol("the first message must be a hello").into());
        };
        validate::hello(&hello)?;
        if let Some(node) = &admission.node
            && *node != hello.node
        {
            let reason = format!(
                "the token is of a pod on node {node}, not on {}",
                hello.node
            );
            return Err(Refusal::policy(reason).into());
        }
        Ok(Session::new(hello, Timestamp::from(SystemTime::now())))
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
        let room = queue.reserve(0).await?;
        queue.send(session, Ask::Join, room).await?;
        let mut welcomed = false;
        // One message at most is held while there is no room for it at the keeper's; nothing more is read then.
        let mut waiting: Option<Data> = None;
        // Its place in the line for room must outlive the turns of the loop.
        let mut room = pin!(Fuse::terminated());
        let mut heard = Instant::now();
        let mut pinged = heard;
        loop {
            let next_ping = heard.max(pinged) + PING_AFTER;
            let silent_at = heard + SILENCE_DEADLINE;
            tokio::select! {
                stopping = stopping(&mut self.stop) => return Err(stopping),
                changed = feedback.changed() => {
                    changed.or(Err(Ending::Stopping))?;
                    let Feedback { stored, refusal } = feedback.borrow_and_update().clone();
                    if let Some(sequence) = stored {
                        self.report(sequence, &mut welcomed).await?;
                    }
                    if let Some(refusal) = refusal {
                        return Err(refusal.into());
                    }
                }
                reserved = &mut room => {
                    let reserved = reserved?;
                    if let Some(data) = waiting.take() {
                        self.encoding = data.encoding;
                        let RawMessage::Batch(batch) = data.decode()? else {
                            return Err(Refusal::protocol("hello was said before").into());
                        };
                        validate::batch(&batch)?;
                        let batch = self.ends.decode(batch, data.encoding)?;
                        queue.send(session, Ask::Store(Box::new(batch)), reserved).await?;
                    }
                    heard = Instant::now();
                }
                message = self.socket.next(), if waiting.is_none() => {
                    waiting = received(message)?;
                    if let Some(data) = &waiting {
                        room.set(queue.reserve(data.len()).fuse());
                    }
                    heard = Instant::now();
                }
                () = sleep_until(silent_at), if waiting.is_none() => {
                    let seconds = SILENCE_DEADLINE.as_secs();
                    return Err(Refusal::policy(format!("nothing heard for {seconds} s")).into());
                }
                () = sleep_until(next_ping), if waiting.is_none() => {
                    pinged = Instant::now();
                    self.send(Message::Ping(Bytes::new())).await?;
                }
            }
        }
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
        let message = match self.encoding {
            Encoding::MessagePack => Message::binary(bytes),
            Encoding::Json => Message::text(String::from_utf8_lossy(&bytes).into_owned()),
        };
        self.send(message).await
    }

    async fn send(&mut self, message: Message) -> Result<(), Ending> {
        match timeout(WRITE_DEADLINE, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Ending::Gone(error.to_string())),
            Err(_) => Err(Ending::Gone("the peer does not read".to_owned())),
        }
    }

    /// Says why, closes, and waits for the peer to have read it: were the connection dropped with anything unread, TCP
    /// would reset it and throw away what is on its way to the peer.
    async fn close(&mut self, ending: Ending) {
        let frame = match ending {
            Ending::Gone(_) => return,
            Ending::Stopping => CloseFrame {
                code: CloseCode::Away,
                reason: "the generator is stopping".into(),
            },
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
                frame
            }
        };
        if self.socket.close(Some(frame)).await.is_err() {
            return;
        }
        let stream = self.socket.get_mut();
        if stream.shutdown().await.is_err() {
            return;
        }
        let mut discarded = [0; 4_096];
        while matches!(stream.read(&mut discarded).await, Ok(1..)) {}
    }
}

/// What a peer sent: one message, not decoded yet.
struct Data {
    bytes: Bytes,
    encoding: Encoding,
}

impl Data {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn decode(&self) -> Result<RawMessage<'_>, wire::WireError> {
        wire::decode(&self.bytes, self.encoding)
    }
}

/// What the socket gave; nothing if it was a ping or pong, which tungstenite answers by itself.
fn received(message: Option<Result<Message, tungstenite::Error>>) -> Result<Option<Data>, Ending> {
    match message {
        Some(Ok(Message::Binary(bytes))) => Ok(Some(Data {
            bytes,
            encoding: Encoding::MessagePack,
        })),
        Some(Ok(Message::Text(text))) => Ok(Some(Data {
            bytes: text.into(),
            encoding: Encoding::Json,
        })),
        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Ok(None),
        Some(Ok(Message::Close(None))) => Err(Ending::Gone("closed".to_owned())),
        Some(Ok(Message::Close(Some(frame)))) => Err(Ending::Gone(format!(
            "closed ({}): {}",
            u16::from(frame.code),
            frame.reason.escape_default()
        ))),
        Some(Err(error)) => Err(Refusal::from_socket(&error)
            .map_or_else(|| Ending::Gone(error.to_string()), Ending::Refused)),
        None => Err(Ending::Gone("connection lost".to_owned())),
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
