//! From a TCP connection to a WebSocket: the HTTP part.

use std::{convert::Infallible, sync::OnceLock, time::Duration};

use flow::wire::{AGENTS_PATH, MAX_MESSAGE_BYTES, SUBPROTOCOL};
use hyper::{
    Request, Response, StatusCode,
    body::Incoming,
    header::{CONNECTION, CONTENT_TYPE, HeaderValue, SEC_WEBSOCKET_PROTOCOL},
    server::conn::http1,
    service::service_fn,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::server::create_response_with_body,
        protocol::{Role, WebSocketConfig},
    },
};
use tracing::debug;

/// How long a peer may take for its HTTP request.
const DEADLINE: Duration = Duration::from_secs(10);

/// The largest head of an HTTP request, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// The buffer that every connection has for reading, and how much is written at once, in bytes. Batches are seldom and
/// connections are many, so it is small; a longer message gets its own space while it arrives.
const BUFFER: usize = 8 << 10;

/// A WebSocket over a connection that came in by HTTP.
pub(super) type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Answers the peer's HTTP request. Returns the WebSocket if that is what the peer asked for, and with all that belongs
/// to it; else the peer has been told what is wrong, and the connection is closed.
pub(super) async fn upgrade<S>(stream: S) -> Option<Socket>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let accepted = OnceLock::new();
    let service = service_fn(|request| {
        let response = answer(request, &accepted);
        async { Ok::<_, Infallible>(response) }
    });
    let exchange = http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    match tokio::time::timeout(DEADLINE, exchange).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "HTTP request failed"),
        Err(_) => debug!("no HTTP request in time"),
    }
    let upgraded = accepted.into_inner()?.await.ok()?;
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .write_buffer_size(BUFFER)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    let socket =
        WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config));
    Some(socket.await)
}

/// The response to a request; `accepted` is filled if it is the switch to a WebSocket.
fn answer(mut request: Request<Incoming>, accepted: &OnceLock<OnUpgrade>) -> Response<String> {
    if request.uri().path() != AGENTS_PATH {
        return refuse(
            StatusCode::NOT_FOUND,
            format!("There is nothing at this path. Agents connect to {AGENTS_PATH}."),
        );
    }
    let mut response = match create_response_with_body(&request, String::new) {
        Ok(response) => response,
        Err(error) => {
            return refuse(
                StatusCode::BAD_REQUEST,
                format!("This is the WebSocket endpoint for agents: {error}."),
            );
        }
    };
    if !offers_subprotocol(&request) {
        return refuse(
            StatusCode::BAD_REQUEST,
            format!(
                "This generator speaks the WebSocket subprotocol {SUBPROTOCOL}, which the request does not offer in \
                 Sec-WebSocket-Protocol."
            ),
        );
    }
    response.headers_mut().insert(
        SEC_WEBSOCKET_PROTOCOL,
        HeaderValue::from_static(SUBPROTOCOL),
    );
    if accepted.set(hyper::upgrade::on(&mut request)).is_err() {
        return refuse(
            StatusCode::BAD_REQUEST,
            "This connection has asked for a WebSocket before.".to_owned(),
        );
    }
    response
}

/// The header may be repeated, and each time list several, separated by commas (RFC 6455, section 11.3.4).
fn offers_subprotocol(request: &Request<Incoming>) -> bool {
    request
        .headers()
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|offers| offers.to_str().ok())
        .flat_map(|offers| offers.split(','))
        .any(|offer| offer.trim() == SUBPROTOCOL)
}

fn refuse(status: StatusCode, mut reason: String) -> Response<String> {
    debug!(%status, reason, "HTTP request refused");
    reason.push('\n');
    let mut response = Response::new(reason);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}
