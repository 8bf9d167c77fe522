//! An agent that does as it is told.

use std::{collections::BTreeMap, net::SocketAddr};

use flow::{
    record::FlowRecord,
    time::Timestamp,
    wire::{self, AgentMessage, Batch, Encoding, GeneratorMessage, Hello, SUBPROTOCOL, Window},
};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::json;
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        self, Message,
        client::IntoClientRequest as _,
        http::HeaderValue,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use crate::generator::PATIENCE;

pub(crate) struct Client {
    pub(crate) socket: WebSocketStream<TcpStream>,
    pub(crate) encoding: Encoding,
}

/// How a connection ended: what the generator said, if anything, and the code and reason of its close frame.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) refusal: Option<String>,
    pub(crate) code: Option<CloseCode>,
    pub(crate) close_reason: String,
}

impl Client {
    /// Opens a WebSocket, and says nothing.
    pub(crate) async fn connect(address: SocketAddr, encoding: Encoding) -> Self {
        let socket = request(address, "/agents", Some(SUBPROTOCOL))
            .await
            .unwrap();
        Self { socket, encoding }
    }

    /// Connects as an instance and says hello. Returns the last sequence that is stored.
    pub(crate) async fn join(address: SocketAddr, instance: &str) -> (Self, u64) {
        Self::join_in(address, instance, Encoding::MessagePack).await
    }

    pub(crate) async fn join_in(
        address: SocketAddr,
        instance: &str,
        encoding: Encoding,
    ) -> (Self, u64) {
        let mut client = Self::connect(address, encoding).await;
        client.say(&hello(instance)).await;
        match client.hear().await {
            Ok(GeneratorMessage::Welcome { last_sequence }) => (client, last_sequence),
            other => panic!("no welcome: {other:?}"),
        }
    }

    pub(crate) async fn say(&mut self, message: &AgentMessage) {
        let bytes = wire::encode(message, self.encoding).unwrap();
        let message = match self.encoding {
            Encoding::Json => Message::text(String::from_utf8(bytes).unwrap()),
            Encoding::MessagePack => Message::binary(bytes),
        };
        // That the generator has closed meanwhile is heard next.
        drop(self.socket.send(message).await);
    }

    /// Sends a batch and waits until it is acknowledged.
    pub(crate) async fn deliver(&mut self, sequence: u64, flows: Vec<FlowRecord>) {
        self.say(&batch(sequence, flows)).await;
        let acknowledged = GeneratorMessage::Ack { sequence };
        assert_eq!(self.hear().await.unwrap(), acknowledged);
    }

    /// The next message, or the end.
    pub(crate) async fn hear(&mut self) -> Result<GeneratorMessage, End> {
        let mut end = End {
            refusal: None,
            code: None,
            close_reason: String::new(),
        };
        let next = async {
            loop {
                let message = match self.socket.next().await {
                    None | Some(Err(_)) => return Err(()),
                    Some(Ok(message)) => message,
                };
                let (bytes, encoding) = match &message {
                    Message::Text(text) => (text.as_bytes(), Encoding::Json),
                    Message::Binary(bytes) => (bytes.as_ref(), Encoding::MessagePack),
                    Message::Close(Some(CloseFrame { code, reason })) => {
                        end.code = Some(*code);
                        end.close_reason = reason.to_string();
                        continue;
                    }
                    _ => continue,
                };
                assert_eq!(encoding, self.encoding, "answered in another form");
                match wire::decode(bytes, encoding).unwrap() {
                    GeneratorMessage::Refuse { reason, .. } => end.refusal = Some(reason),
                    message => return Ok(message),
                }
            }
        };
        let next = timeout(PATIENCE, next).await.expect("nothing heard");
        next.map_err(|()| end)
    }

    /// Waits for the end, ignoring acknowledgements.
    pub(crate) async fn end(&mut self) -> End {
        loop {
            if let Err(end) = self.hear().await {
                return end;
            }
        }
    }
}

/// Asks for a WebSocket.
pub(crate) async fn request(
    address: SocketAddr,
    path: &str,
    subprotocol: Option<&'static str>,
) -> Result<WebSocketStream<TcpStream>, tungstenite::Error> {
    let mut request = format!("ws://{address}{path}").into_client_request()?;
    if let Some(subprotocol) = subprotocol {
        let value = HeaderValue::from_static(subprotocol);
        request
            .headers_mut()
            .insert("sec-websocket-protocol", value);
    }
    let stream = TcpStream::connect(address).await?;
    Ok(client_async(request, stream).await?.0)
}

pub(crate) fn hello(instance: &str) -> AgentMessage {
    AgentMessage::Hello(Hello {
        instance: instance.to_owned(),
        node: "node-1".to_owned(),
        version: "1".to_owned(),
        resolve: flow::wire::Resolve::Both,
        capabilities: Vec::new(),
        clock: None,
    })
}

pub(crate) fn batch(sequence: u64, flows: Vec<FlowRecord>) -> AgentMessage {
    batch_with_losses(sequence, flows, &[])
}

pub(crate) fn batch_with_losses(
    sequence: u64,
    flows: Vec<FlowRecord>,
    losses: &[(&str, u64)],
) -> AgentMessage {
    let moment = Timestamp::from_nanos(1_000_000_000_000);
    AgentMessage::Batch(Batch {
        sequence,
        window: Window {
            from: moment,
            to: moment,
        },
        flows,
        losses: losses
            .iter()
            .map(|(reason, count)| ((*reason).to_owned(), *count))
            .collect(),
        health: None,
    })
}

/// So many connections from `client` to `server`, both of the namespace `shop`, as the server's node sees them.
pub(crate) fn flow(client: &str, server: &str, port: u16, count: u64) -> FlowRecord {
    let end = |name: &str| {
        json!({
            "pod": {"id": format!("{name};<pod>"), "namespace": "shop", "name": name, "labels": {"app": name}},
            "service": {
                "id": format!("{name};<service>"), "namespace": "shop", "name": name,
                "selector": format!("app={name}"),
            },
        })
    };
    serde_json::from_value(json!({
        "timestamp": 1000.5,
        "hostname": "node-1",
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
        "src": end(client),
        "dst": end(server),
        "count": count,
    }))
    .unwrap()
}

/// Connections by server port.
pub(crate) fn counts(records: &[FlowRecord]) -> BTreeMap<u16, u64> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(record.tuple.dst_port).or_default() += record.count;
    }
    counts
}
