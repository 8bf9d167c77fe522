//! The plugin's end of the protocol: HTTP over a Unix socket.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use flow::time::Timestamp;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::UnixStream, sync::Semaphore, task::JoinSet, time::timeout};

use super::{
    PluginSocket,
    answer::{self, API_VERSION, Who},
    recent::Recent,
    socket::{Listener, SocketError},
};

/// How long a connection may last. The probe waits for half a second.
const DEADLINE: Duration = Duration::from_secs(5);

/// The most connections at a time; more wait. There is one probe.
const MAX_CONNECTIONS: usize = 4;

/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// How long to wait when the system has no more file descriptors or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The plugin, listening.
#[derive(Debug)]
pub struct Plugin {
    listener: Listener,
    who: Arc<Who>,
    recent: Arc<Recent>,
}

impl Plugin {
    /// Listens.
    ///
    /// # Errors
    /// If the socket cannot be had.
    pub fn open(
        socket: &PluginSocket,
        host: String,
        recent: Arc<Recent>,
    ) -> Result<Self, SocketError> {
        let listener = Listener::open(socket)?;
        let id = socket.id().to_owned();
        tracing::info!(%socket, id, host, "serving Scope as a plugin");
        Ok(Self {
            listener,
            who: Arc::new(Who { id, host }),
            recent,
        })
    }

    /// Answers until it is dropped; then the socket is removed.
    pub async fn run(self) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        // They end with this.
        let mut connections = JoinSet::new();
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            while connections.try_join_next().is_some() {}
            let stream = match self.listener.accept().await {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection of Scope's probe");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (who, recent) = (Arc::clone(&self.who), Arc::clone(&self.recent));
            connections.spawn(async move {
                serve(stream, who, recent).await;
                drop(place);
            });
        }
    }
}

async fn serve(stream: UnixStream, who: Arc<Who>, recent: Arc<Recent>) {
    let service = service_fn(|request| {
        let (who, recent) = (Arc::clone(&who), Arc::clone(&recent));
        async move { Ok::<_, Infallible>(respond(&request, who, recent).await) }
    });
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(MAX_HEAD)
        // So that a connection lasts for one question, however slow who asks is.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = timeout(DEADLINE, exchange).await {
        tracing::debug!(%error, "a request of Scope's probe failed");
    }
}

async fn respond(
    request: &Request<Incoming>,
    who: Arc<Who>,
    recent: Arc<Recent>,
) -> Response<Full<Bytes>> {
    if request.uri().path() != "/report" {
        return refusal(StatusCode::NOT_FOUND, "there is /report");
    }
    if request.method() != Method::GET {
        let mut response = refusal(StatusCode::METHOD_NOT_ALLOWED, "GET it");
        let allowed = HeaderValue::from_static("GET");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    let query = request.uri().query().unwrap_or_default();
    let version = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("api_version="));
    if version != Some(API_VERSION) {
        return refusal(
            StatusCode::BAD_REQUEST,
            "api_version=1 is what is spoken here",
        );
    }
    let now = Timestamp::from(std::time::SystemTime::now());
    // Of some thousand flows it takes longer than what else runs on this thread should wait.
    let rendered = tokio::task::spawn_blocking(move || answer::render(&recent.seen(), &who, now));
    match rendered.await {
        Ok(body) => {
            let mut response = Response::new(Full::from(body));
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        Err(error) => {
            tracing::error!(%error, "a defect: Scope gets no answer");
            refusal(StatusCode::INTERNAL_SERVER_ERROR, "a defect")
        }
    }
}

fn refusal(status: StatusCode, why: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{why}\n")));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests;
