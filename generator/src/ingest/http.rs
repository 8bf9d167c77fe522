//! The HTTP part: who asks for what, and whether they may.
//!
//! | path | for | permission |
//! |---|---|---|
//! | `/agents` | agents, who switch to a WebSocket | reporting |
//! | `/healthz`, `/readyz` | whoever watches the process | none |
//! | `/metrics`, `/v1/status` | Prometheus, `microshield status` | reading |
//! | `/v1/export` | `microshield generate --url` and its like | reading |

use std::{convert::Infallible, net::IpAddr, sync::OnceLock, time::Duration};

use flow::{
    source::View,
    transport::Secret,
    wire::{AGENTS_PATH, SUBPROTOCOL},
};
use http_body_util::{Either, Full, StreamBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Incoming},
    header::{
        AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderValue, SEC_WEBSOCKET_PROTOCOL,
        WWW_AUTHENTICATE,
    },
    server::conn::http1,
    service::service_fn,
    upgrade::{OnUpgrade, Upgraded},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, oneshot},
};
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use tracing::debug;

use super::{Exports, Sender, export::Progress};
use crate::{
    auth::{Admission, Denied, Gate},
    metrics::{self, Meter},
    status::{EXPORT_PATH, STATUS_PATH, Status},
};

/// How long a peer may take for its HTTP requests, all together; an export may take as long for each page.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// The largest head of an HTTP request, in bytes: a service-account token has its place in it.
const MAX_HEAD: usize = 16 << 10;

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const JSON: &str = "application/json";
const JSON_LINES: &str = "application/x-ndjson";

/// What a body can fail with: that the keeper has ended.
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Asks the keeper how things are.
pub type StatusRequest = oneshot::Sender<Status>;

/// What requests are answered with.
#[derive(Debug)]
pub struct Desk {
    /// Who is let in.
    pub gate: Gate,
    /// What is counted.
    pub meter: Meter,
    /// Who knows how things are.
    pub status: mpsc::Sender<StatusRequest>,
    /// What is known of the cluster, if anything.
    pub topology: Option<View>,
    /// Who hands out the ledger.
    pub exports: Exports,
    /// The way to the keeper of the ledger.
    pub queue: Sender,
}

/// Answers the peer's HTTP requests. Returns the connection if the peer asked for a WebSocket, and may; else it has been told
/// what is to be told, and the connection is closed.
pub(super) async fn serve<S>(
    stream: S,
    peer: IpAddr,
    desk: &Desk,
) -> Option<(TokioIo<Upgraded>, Admission)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let accepted = OnceLock::new();
    let progress = Progress::new();
    let service = service_fn(|request| {
        let (accepted, progress) = (&accepted, &progress);
        async move { Ok::<_, Infallible>(route(request, peer, accepted, progress, desk).await) }
    });
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        result = exchange => {
            if let Err(error) = result {
                debug!(%error, "HTTP request failed");
            }
        }
        () = progress.ceased() => debug!("no HTTP request in time"),
    }
    let (upgrade, admission): (OnUpgrade, Admission) = accepted.into_inner()?;
    Some((TokioIo::new(upgrade.await.ok()?), admission))
}

/// Everything but an export is answered at once.
async fn route(
    request: Request<Incoming>,
    peer: IpAddr,
    accepted: &OnceLock<(OnUpgrade, Admission)>,
    progress: &Progress,
    desk: &Desk,
) -> Response<impl Body<Data = Bytes, Error = BoxError> + use<>> {
    if (request.uri().path(), request.method()) == (EXPORT_PATH, &Method::GET) {
        let refusal = match desk.gate.reader(bearer(&request).as_ref(), peer).await {
            Ok(()) => match desk.exports.begin(progress.clone()) {
                Some(pages) => {
                    let body = Either::Left(StreamBody::new(pages));
                    return with_type(Response::new(body), JSON_LINES);
                }
                None => refuse(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "Others are reading everything. Come back later.".to_owned(),
                ),
            },
            Err(denied) => deny(denied, desk),
        };
        return refusal.map(|reason| Either::Right(Full::from(reason)));
    }
    let answer = answer(request, peer, accepted, desk).await;
    answer.map(|text| Either::Right(Full::from(text)))
}

async fn answer(
    request: Request<Incoming>,
    peer: IpAddr,
    accepted: &OnceLock<(OnUpgrade, Admission)>,
    desk: &Desk,
) -> Response<String> {
    match (request.uri().path(), request.method()) {
        (AGENTS_PATH, _) => agents(request, peer, accepted, desk).await,
        ("/healthz", &Method::GET) => alive(),
        ("/readyz", &Method::GET) => ready(desk),
        ("/metrics", &Method::GET) => match read(&request, peer, desk).await {
            Ok(status) => counted(desk, &status),
            Err(response) => *response,
        },
        (STATUS_PATH, &Method::GET) => match read(&request, peer, desk).await {
            Ok(status) => match serde_json::to_string(&status) {
                Ok(text) => respond(StatusCode::OK, JSON, text),
                Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            },
            Err(response) => *response,
        },
        _ => refuse(
            StatusCode::NOT_FOUND,
            format!("There is nothing at this path. Agents connect to {AGENTS_PATH}."),
        ),
    }
}

/// The response to one who watches the process, and shows nothing.
pub(super) async fn watched(request: &Request<Incoming>, desk: &Desk) -> Response<String> {
    match (request.uri().path(), request.method()) {
        ("/healthz", &Method::GET) => alive(),
        ("/readyz", &Method::GET) => ready(desk),
        ("/metrics", &Method::GET) => match status(desk).await {
            Some(status) => counted(desk, &status),
            None => stopping(),
        },
        _ => refuse(
            StatusCode::NOT_FOUND,
            "There is nothing at this path but /healthz, /readyz and /metrics.".to_owned(),
        ),
    }
}

fn alive() -> Response<String> {
    respond(StatusCode::OK, TEXT, "ok\n".to_owned())
}

/// The keeper is not asked: it may be at work for longer than kubelet waits.
fn ready(desk: &Desk) -> Response<String> {
    if desk.status.is_closed() {
        return stopping();
    }
    match &desk.topology {
        Some(view) if !view.is_ready() => refuse(
            StatusCode::SERVICE_UNAVAILABLE,
            "The cluster's objects are not known yet.".to_owned(),
        ),
        Some(_) | None => respond(StatusCode::OK, TEXT, "ready\n".to_owned()),
    }
}

fn counted(desk: &Desk, status: &Status) -> Response<String> {
    match metrics::text(&desk.meter, status) {
        Ok(text) => respond(StatusCode::OK, METRICS, text),
        Err(error) => refuse(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// The response to an agent; `accepted` is filled if it is the switch to a WebSocket.
async fn agents(
    mut request: Request<Incoming>,
    peer: IpAddr,
    accepted: &OnceLock<(OnUpgrade, Admission)>,
    desk: &Desk,
) -> Response<String> {
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
    let admission = match desk.gate.agent(bearer(&request).as_ref(), peer).await {
        Ok(admission) => admission,
        Err(denied) => return deny(denied, desk),
    };
    response.headers_mut().insert(
        SEC_WEBSOCKET_PROTOCOL,
        HeaderValue::from_static(SUBPROTOCOL),
    );
    let upgrade = hyper::upgrade::on(&mut request);
    if accepted.set((upgrade, admission)).is_err() {
        return refuse(
            StatusCode::BAD_REQUEST,
            "This connection has asked for a WebSocket before.".to_owned(),
        );
    }
    response
}

/// The status, for who may read it.
async fn read(
    request: &Request<Incoming>,
    peer: IpAddr,
    desk: &Desk,
) -> Result<Status, Box<Response<String>>> {
    desk.gate
        .reader(bearer(request).as_ref(), peer)
        .await
        .map_err(|denied| Box::new(deny(denied, desk)))?;
    status(desk).await.ok_or_else(|| Box::new(stopping()))
}

/// `None` if there is nobody left to ask.
async fn status(desk: &Desk) -> Option<Status> {
    let (wanted, status) = oneshot::channel();
    desk.status.send(wanted).await.ok()?;
    let mut status = status.await.ok()?;
    status.queue = desk.queue.load();
    Some(status)
}

fn stopping() -> Response<String> {
    refuse(
        StatusCode::SERVICE_UNAVAILABLE,
        "The generator is stopping.".to_owned(),
    )
}

/// The token that is shown (RFC 6750, section 2.1).
fn bearer(request: &Request<Incoming>) -> Option<Secret> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| Secret::new(token.trim().to_owned()))
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

fn deny(denied: Denied, desk: &Desk) -> Response<String> {
    desk.meter.denied.inc();
    let status = match denied {
        Denied::NoToken | Denied::WrongToken => StatusCode::UNAUTHORIZED,
        Denied::NoReading => StatusCode::FORBIDDEN,
        Denied::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut response = refuse(status, denied.to_string());
    if status == StatusCode::UNAUTHORIZED {
        response
            .headers_mut()
            .insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

fn refuse(status: StatusCode, mut reason: String) -> Response<String> {
    debug!(%status, reason, "HTTP request refused");
    reason.push('\n');
    let mut response = respond(status, TEXT, reason);
    response
        .headers_mut()
        .insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response<String> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    with_type(response, content_type)
}

fn with_type<B>(mut response: Response<B>, content_type: &'static str) -> Response<B> {
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests;
