//! One WebSocket connection.

use std::time::Duration;

use bytes::Bytes;
use flow::wire::{
    self, AgentMessage, Encoding, GeneratorMessage, Hello, MAX_MESSAGE_BYTES, SUBPROTOCOL,
    WireError,
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        ClientRequestBuilder, Error as WsError, Message, http::header::SEC_WEBSOCKET_PROTOCOL,
        protocol::WebSocketConfig,
    },
};

use super::GeneratorUrl;

/// How long a goodbye may take to be written.
const GOODBYE: Duration = Duration::from_secs(1);

/// An open connection that has been welcomed.
pub(super) struct Connection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// The network, or the other side's HTTP or WebSocket layer.
    #[error("{0}")]
    WebSocket(#[from] Box<WsError>),
    /// The other side is no generator that speaks our protocol.
    #[error("the server does not speak {SUBPROTOCOL}")]
    Subprotocol,
    /// The generator refused, for this reason.
    #[error("the generator refused: {0}")]
    Refused(String),
    /// The generator says that what was sent can never be accepted.
    #[error("the generator refused a message for good: {0}")]
    Malformed(String),
    /// The generator said something else than the protocol allows.
    #[error("unexpected message from the generator: {0}")]
    Unexpected(&'static str),
    /// A message could not be encoded or decoded.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The generator closed the connection.
    #[error("the generator closed the connection{0}")]
    Closed(String),
    /// The generator's ledger is not the one that acknowledged earlier batches.
    #[error("starting anew with this ledger")]
    Forgotten,
    /// Nothing was heard for too long.
    #[error("no answer in time")]
    Silent,
}

impl Connection {
    /// Connects and greets. Returns the last sequence number that the generator has stored of this instance.
    pub(super) async fn open(
        url: &GeneratorUrl,
        hello: &Hello,
    ) -> Result<(Self, u64), ConnectionError> {
        let request = ClientRequestBuilder::new(url.uri().clone()).with_sub_protocol(SUBPROTOCOL);
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let (socket, response) = connect_async_with_config(request, Some(limits), true)
            .await
            .map_err(Box::new)?;
        let chosen = response.headers().get(SEC_WEBSOCKET_PROTOCOL);
        if chosen.is_none_or(|name| name != SUBPROTOCOL) {
            return Err(ConnectionError::Subprotocol);
        }
        let mut connection = Self { socket };
        let greeting = wire::encode(&AgentMessage::Hello(hello.clone()), Encoding::MessagePack)?;
        connection.send(greeting.into()).await?;
        loop {
            match connection.next().await? {
                Some(GeneratorMessage::Welcome { last_sequence }) => {
                    return Ok((connection, last_sequence));
                }
                Some(_) => return Err(ConnectionError::Unexpected("expected a welcome")),
                None => {}
            }
        }
    }

    /// Sends an encoded message.
    pub(super) async fn send(&mut self, message: Bytes) -> Result<(), ConnectionError> {
        Ok(self
            .socket
            .send(Message::Binary(message))
            .await
            .map_err(Box::new)?)
    }

    /// Asks for a sign of life.
    pub(super) async fn ask(&mut self) -> Result<(), ConnectionError> {
        Ok(self
            .socket
            .send(Message::Ping(Bytes::new()))
            .await
            .map_err(Box::new)?)
    }

    /// Waits for anything from the generator; `Some` is the number up to which it has stored all batches.
    ///
    /// It may be cancelled without losing a message.
    pub(super) async fn receive(&mut self) -> Result<Option<u64>, ConnectionError> {
        match self.next().await? {
            Some(GeneratorMessage::Ack { sequence }) => Ok(Some(sequence)),
            Some(_) => Err(ConnectionError::Unexpected("expected an acknowledgement")),
            None => Ok(None),
        }
    }

    /// Says goodbye; the other side's answer is not waited for.
    pub(super) async fn close(mut self) {
        if let Ok(Err(error)) = timeout(GOODBYE, self.socket.close(None)).await {
            tracing::debug!(%error, "closing");
        }
    }

    /// The next message; `None` for a control frame.
    async fn next(&mut self) -> Result<Option<GeneratorMessage>, ConnectionError> {
        let frame = match self.socket.next().await {
            Some(frame) => frame.map_err(Box::new)?,
            None => return Err(ConnectionError::Closed(String::new())),
        };
        let message = match frame {
            Message::Binary(bytes) => wire::decode(&bytes, Encoding::MessagePack)?,
            Message::Text(text) => wire::decode(text.as_bytes(), Encoding::Json)?,
            Message::Close(frame) => {
                let reason = frame.map_or_else(String::new, |frame| format!(": {}", frame.reason));
                return Err(ConnectionError::Closed(reason));
            }
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => return Ok(None),
        };
        match message {
            GeneratorMessage::Refuse { reason, malformed } if malformed => {
                Err(ConnectionError::Malformed(reason))
            }
            GeneratorMessage::Refuse { reason, .. } => Err(ConnectionError::Refused(reason)),
            message => Ok(Some(message)),
        }
    }
}
