//! What takes more than reading: forwarded ports, service accounts' tokens, and reviews of those.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use hyper::{
    Method, Request, Response,
    body::Incoming,
    header::{HeaderValue, SEC_WEBSOCKET_PROTOCOL},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::server::create_response_with_body, protocol::Role},
};

use super::{
    Shared,
    answer::{Body, reply, status},
};

/// The subprotocol of forwarded ports over a WebSocket: each message begins with the number of its channel, two for each port,
/// data and error; the first message of each has the port.
const SUBPROTOCOL: &str = "v4.channel.k8s.io";

/// Ports that are forwarded, and tokens that were given out.
#[derive(Debug, Default)]
pub(super) struct Doors {
    /// By pod and port, where the process is that listens there.
    pub(super) ports: BTreeMap<(String, u16), SocketAddr>,
    tokens: BTreeMap<String, Identity>,
    issued: AtomicU64,
}

/// Whose a token is, and what for.
#[derive(Clone, Debug)]
struct Identity {
    username: String,
    audiences: Vec<String>,
    extra: Value,
}

impl Doors {
    /// A token of a service account, for one audience; bound to a pod on a node if one is named.
    pub(super) fn token(&mut self, account: &str, audience: &str, node: Option<&str>) -> String {
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let token = format!("token-{number}");
        let extra = node.map_or_else(
            || json!({}),
            |node| json!({"authentication.kubernetes.io/node-name": [node]}),
        );
        let identity = Identity {
            username: format!("system:serviceaccount:{}", account.replace('/', ":")),
            audiences: vec![audience.to_owned()],
            extra,
        };
        self.tokens.insert(token.clone(), identity);
        token
    }
}

/// Who is asked for what by this path, if it is one of these.
enum Wanted {
    Token { account: String },
    Review,
    Port { pod: String },
}

impl Wanted {
    fn of(request: &Request<Incoming>) -> Option<Self> {
        let path = request.uri().path();
        if path == "/apis/authentication.k8s.io/v1/tokenreviews" {
            return Some(Self::Review);
        }
        let rest = path.strip_prefix("/api/v1/namespaces/")?;
        match rest.split('/').collect::<Vec<_>>().as_slice() {
            [namespace, "serviceaccounts", name, "token"] => Some(Self::Token {
                account: format!("{namespace}/{name}"),
            }),
            [_, "pods", name, "portforward"] => Some(Self::Port {
                pod: (*name).to_owned(),
            }),
            _ => None,
        }
    }
}

/// The answer, if the request is for one of these. `Err` gives the request back.
pub(super) async fn answer(
    shared: &Shared,
    request: Request<Incoming>,
) -> Result<Response<Body>, Request<Incoming>> {
    let Some(wanted) = Wanted::of(&request) else {
        return Err(request);
    };
    let forbidden = {
        let state = shared.state();
        let path = request.uri().path();
        state.closed.iter().any(|closed| path.ends_with(closed))
    };
    if forbidden {
        let message = format!(
            "{} is forbidden: User \"viewer\" may not",
            request.uri().path()
        );
        return Ok(status(403, "Forbidden", &message));
    }
    Ok(match wanted {
        Wanted::Port { pod } => forward(shared, request, &pod),
        Wanted::Token { account } => {
            let asked = body(request).await;
            let audience = asked["spec"]["audiences"][0].as_str().unwrap_or_default();
            let token = shared.state().doors.token(&account, audience, None);
            let mut answer = asked.clone();
            answer["status"] =
                json!({"token": token, "expirationTimestamp": "2099-01-01T00:00:00Z"});
            reply(201, answer.to_string())
        }
        Wanted::Review => {
            let mut asked = body(request).await;
            asked["status"] = shared.state().doors.review(&asked["spec"]);
            reply(201, asked.to_string())
        }
    })
}

impl Doors {
    fn review(&self, spec: &Value) -> Value {
        let token = spec["token"].as_str().unwrap_or_default();
        let known = self.tokens.get(token).filter(|identity| {
            let wanted = spec["audiences"].as_array().into_iter().flatten();
            wanted
                .filter_map(Value::as_str)
                .any(|wanted| identity.audiences.iter().any(|one| one == wanted))
        });
        match known {
            Some(identity) => json!({
                "authenticated": true, "audiences": identity.audiences,
                "user": {"username": identity.username, "extra": identity.extra},
            }),
            None => json!({"authenticated": false, "error": "no such token"}),
        }
    }
}

async fn body(request: Request<Incoming>) -> Value {
    let bytes = request.into_body().collect().await;
    let bytes = bytes.map(|body| body.to_bytes()).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

fn forward(shared: &Shared, mut request: Request<Incoming>, pod: &str) -> Response<Body> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let port = pairs
        .find(|(key, _)| *key == "ports")
        .and_then(|(_, port)| port.parse::<u16>().ok());
    let Some(port) = port else {
        return status(400, "BadRequest", "you must specify at least 1 port");
    };
    let address = shared
        .state()
        .doors
        .ports
        .get(&(pod.to_owned(), port))
        .copied();
    match create_response_with_body(&request, || ()) {
        Ok(response) => {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                // How it ends is the client's business.
                drop(carry(upgrade, port, address).await);
            });
            let mut response = response.map(|()| {
                http_body_util::Empty::new()
                    .map_err(|never: Infallible| match never {})
                    .boxed()
            });
            response.headers_mut().insert(
                SEC_WEBSOCKET_PROTOCOL,
                HeaderValue::from_static(SUBPROTOCOL),
            );
            response
        }
        Err(_) if request.method() == Method::GET => {
            status(400, "BadRequest", "Upgrade request required")
        }
        Err(error) => status(400, "BadRequest", &error.to_string()),
    }
}

/// Carries bytes between a WebSocket and the process, as kubelet does.
async fn carry(upgrade: OnUpgrade, port: u16, address: Option<SocketAddr>) -> anyhow::Result<()> {
    let upgraded = TokioIo::new(upgrade.await?);
    let socket = WebSocketStream::from_raw_socket(upgraded, Role::Server, None).await;
    let (mut near, mut from_client) = socket.split();
    let [low, high] = port.to_le_bytes();
    for channel in [0, 1] {
        near.send(Message::binary(vec![channel, low, high])).await?;
    }
    let stream = match address {
        Some(address) => TcpStream::connect(address).await,
        None => Err(std::io::ErrorKind::ConnectionRefused.into()),
    };
    let stream = match stream {
        Ok(stream) => stream,
        Err(error) => {
            let mut message = vec![1];
            message.extend(
                format!("error forwarding port {port} to pod: failed to connect to localhost:{port}: {error}")
                    .as_bytes(),
            );
            near.send(Message::binary(message)).await?;
            near.close().await?;
            return Ok(());
        }
    };
    let (mut read, mut write) = stream.into_split();
    let up = async {
        while let Some(message) = from_client.next().await {
            match message? {
                Message::Binary(bytes) if bytes.first() == Some(&0) => {
                    write.write_all(bytes.get(1..).unwrap_or_default()).await?;
                }
                Message::Close(_) => break,
                _ => {}
            }
        }
        write.shutdown().await?;
        anyhow::Ok(())
    };
    let down = async {
        let mut piece = vec![0; 32 << 10];
        loop {
            let length = read.read(&mut piece).await?;
            if length == 0 {
                break;
            }
            let mut message = Vec::with_capacity(length + 1);
            message.push(0);
            message.extend(piece.get(..length).unwrap_or_default());
            near.send(Message::binary(Bytes::from(message))).await?;
        }
        near.close().await?;
        anyhow::Ok(())
    };
    tokio::try_join!(up, down)?;
    Ok(())
}
