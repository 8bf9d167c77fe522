//! A client of the stream, for tests that need no whole agent.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use flow::{
    record::FlowRecord,
    time::Timestamp,
    wire::{
        self, AgentMessage, Batch, Encoding, GeneratorMessage, Hello, Resolve, SUBPROTOCOL, Window,
    },
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest as _, http::HeaderValue},
};

/// How long the generator may take to answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A client that keeps to the protocol.
#[derive(Debug)]
pub struct StreamClient {
    socket: WebSocketStream<TcpStream>,
}

impl StreamClient {
    /// Connects and says hello. Returns the number of the last batch that is stored, too.
    ///
    /// # Errors
    /// If the generator does not welcome it.
    pub async fn join(address: SocketAddr, instance: &str, node: &str) -> Result<(Self, u64)> {
        let mut request = format!("ws://{address}/agents").into_client_request()?;
        let subprotocol = HeaderValue::from_static(SUBPROTOCOL);
        request
            .headers_mut()
            .insert("sec-websocket-protocol", subprotocol);
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (socket, _) = client_async(request, stream).await?;
        let mut client = Self { socket };
        let hello = AgentMessage::Hello(Hello {
            instance: instance.to_owned(),
            node: node.to_owned(),
            version: "1".to_owned(),
            resolve: Resolve::Both,
            capabilities: Vec::new(),
            clock: None,
        });
        let bytes = wire::encode(&hello, Encoding::MessagePack)?;
        client.send(bytes).await?;
        match client.hear().await? {
            GeneratorMessage::Welcome { last_sequence } => Ok((client, last_sequence)),
            other => bail!("{other:?}"),
        }
    }

    /// Sends a batch of these flows.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn report(&mut self, sequence: u64, flows: Vec<FlowRecord>) -> Result<()> {
        let moment = Timestamp::from_nanos(1_000_000_000_000 + sequence);
        let batch = AgentMessage::Batch(Batch {
            sequence,
            window: Window {
                from: moment,
                to: moment,
            },
            flows,
            losses: [].into(),
            health: None,
        });
        let bytes = wire::encode(&batch, Encoding::MessagePack)?;
        self.send(bytes).await
    }

    /// Sends a message that is encoded.
    ///
    /// # Errors
    /// If the connection has ended.
    pub async fn send(&mut self, message: Vec<u8>) -> Result<()> {
        Ok(self.socket.send(Message::binary(message)).await?)
    }

    /// Waits until a batch is acknowledged, and returns its number.
    ///
    /// # Errors
    /// If none is, or something else is said.
    pub async fn acknowledged(&mut self) -> Result<u64> {
        match self.hear().await? {
            GeneratorMessage::Ack { sequence } => Ok(sequence),
            other => bail!("{other:?}"),
        }
    }

    async fn hear(&mut self) -> Result<GeneratorMessage> {
        loop {
            let message = timeout(PATIENCE, self.socket.next()).await?;
            match message.context("the connection has ended")?? {
                Message::Binary(bytes) => return Ok(wire::decode(&bytes, Encoding::MessagePack)?),
                Message::Ping(_) | Message::Pong(_) => {}
                other => bail!("{other:?}"),
            }
        }
    }
}
