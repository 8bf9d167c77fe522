//! One WebSocket connection.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use flow::{
    transport::{ClientFiles, TlsError, TokenError, TokenFile, dial},
    wire::{
        self, AgentMessage, Encoding, GeneratorMessage, Hello, MAX_MESSAGE_BYTES, SUBPROTOCOL,
        WireError,
    },
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tokio_tungstenite::{
    WebSocketStream, client_async_with_config,
    tungstenite::{
        ClientRequestBuilder, Error as WsError, Message,
        http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL},
        protocol::{WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::GeneratorUrl;

/// How long a goodbye may take to be written.
const GOODBYE: Duration = Duration::from_secs(1);

/// The most of a refusal's text that is repeated, in bytes.
const MAX_REASON: usize = 300;

/// What the generator is shown, and must show.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// The bearer token.
    pub token: Option<TokenFile>,
    /// Authorities, and our own certificate.
    pub tls: ClientFiles,
}

/// Encrypted or not.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// An open connection that has been welcomed.
pub(super) struct Connection {
    socket: WebSocketStream<Box<dyn Stream>>,
    encoding: Encoding,
}

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    /// The network, or the other side's HTTP or WebSocket layer.
    #[error("{0}")]
    WebSocket(#[from] Box<WsError>),
    /// The generator cannot be reached.
    #[error("{0}")]
    Unreachable(#[from] io::Error),
    /// The generator did not let us in.
    #[error("the generator answered {status}: {reason}")]
    Denied {
        /// The HTTP status.
        status: u16,
        /// What it said.
        reason: String,
    },
    /// There is no token to show.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Certificates cannot be read.
    #[error(transparent)]
    Tls(#[from] TlsError),
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
    /// The generator ends, or the connection is old enough to be made anew.
    #[error("the generator ended the connection{0}")]
    Away(String),
    /// The generator's ledger is not the one that our numbers were given for.
    #[error("starting anew with this ledger")]
    Anew,
    /// Nothing was heard for too long.
    #[error("no answer in time")]
    Silent,
}

impl Connection {
    /// Connects and greets. Returns the last sequence number that the generator has stored of this instance.
    pub(super) async fn open(
        url: &GeneratorUrl,
        hello: &Hello,
        encoding: Encoding,
        credentials: &Credentials,
    ) -> Result<(Self, u64), ConnectionError> {
        let mut request =
            ClientRequestBuilder::new(url.uri().clone()).with_sub_protocol(SUBPROTOCOL);
        if let Some(file) = &credentials.token {
            let token = file.first()?;
            request =
                request.with_header(AUTHORIZATION.as_str(), format!("Bearer {}", token.expose()));
        }
        let limits = WebSocketConfig::default()
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let stream = connect(url, &credentials.tls).await?;
        let (socket, response) = client_async_with_config(request, stream, Some(limits))
            .await
            .map_err(refused)?;
        let chosen = response.headers().get(SEC_WEBSOCKET_PROTOCOL);
        if chosen.is_none_or(|name| name != SUBPROTOCOL) {
            return Err(ConnectionError::Subprotocol);
        }
        let mut connection = Self { socket, encoding };
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

    /// Sends a message that is encoded in MessagePack, which is how it goes out also where JSON is asked for and it would
    /// be too long in that: JSON is the longer of the two.
    pub(super) async fn send(&mut self, message: Bytes) -> Result<(), ConnectionError> {
        let text = match self.encoding {
            Encoding::MessagePack => None,
            Encoding::Json => {
                let message: AgentMessage = wire::decode(&message, Encoding::MessagePack)?;
                match wire::encode(&message, Encoding::Json) {
                    Err(WireError::TooLong(_)) => None,
                    text => Some(text?),
                }
            }
        };
        let message = match text {
            Some(text) => Message::text(String::from_utf8_lossy(&text).into_owned()),
            None => Message::Binary(message),
        };
        Ok(self.socket.send(message).await.map_err(Box::new)?)
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
                let is_away = frame
                    .as_ref()
                    .is_some_and(|frame| frame.code == CloseCode::Away);
                let reason = frame.map_or_else(String::new, |frame| format!(": {}", frame.reason));
                return Err(if is_away {
                    ConnectionError::Away(reason)
                } else {
                    ConnectionError::Closed(reason)
                });
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

/// Connects to the host: its name is resolved each time.
async fn connect(
    url: &GeneratorUrl,
    tls: &ClientFiles,
) -> Result<Box<dyn Stream>, ConnectionError> {
    let stream = dial(url.host(), url.port()).await?;
    // Batches are whole when they are written.
    stream.set_nodelay(true)?;
    if !url.is_encrypted() {
        return Ok(Box::new(stream));
    }
    let connector = TlsConnector::from(Arc::new(tls.config()?));
    let name = ServerName::try_from(url.host().to_owned()).map_err(io::Error::other)?;
    Ok(Box::new(connector.connect(name, stream).await?))
}

/// The answer to our request, with what it says rather than with its number alone.
fn refused(error: WsError) -> ConnectionError {
    let WsError::Http(response) = error else {
        return Box::new(error).into();
    };
    let body = response.body().as_deref().unwrap_or_default();
    let mut reason = String::from_utf8_lossy(body)
        .trim()
        .replace(char::is_control, " ");
    reason.truncate(reason.floor_char_boundary(MAX_REASON));
    ConnectionError::Denied {
        status: response.status().as_u16(),
        reason,
    }
}
