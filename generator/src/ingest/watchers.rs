//! A second address, for those who watch the process: kubelet and Prometheus.
//!
//! They show no token and no certificate (kubelet has none to show), so they hear nothing here but whether the generator is
//! alive and ready, and its metrics.

use std::{
    collections::VecDeque, convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration,
};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tracing::{debug, warn};

use super::{ACCEPT_PAUSE, Desk, http};

/// The most connections at a time. One more ends the oldest, so that nobody who holds them all keeps kubelet out.
const MAX_WATCHERS: usize = 16;

/// How long a connection may last. Prometheus keeps its connection from one reading to the next, and makes another.
const DEADLINE: Duration = Duration::from_secs(60);

/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 8 << 10;

/// The socket on which they connect.
#[derive(Debug)]
pub struct Watchers {
    listener: TcpListener,
}

impl Watchers {
    /// Listens.
    ///
    /// # Errors
    /// If the address is not this machine's, is taken, or not for this process.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        Ok(Self {
            listener: TcpListener::bind(address).await?,
        })
    }

    /// Where it listens: the real port where 0 was asked for.
    ///
    /// # Errors
    /// If the system does not say it.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `stop` turns true.
    pub async fn run(self, desk: Arc<Desk>, mut stop: watch::Receiver<bool>) {
        let mut connections = JoinSet::new();
        let mut handles: VecDeque<AbortHandle> = VecDeque::new();
        loop {
            let accepted = tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return,
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended
                        && !error.is_cancelled()
                    {
                        warn!(%error, "connection ended by a defect");
                    }
                    continue;
                }
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    handles.retain(|handle| !handle.is_finished());
                    if handles.len() >= MAX_WATCHERS
                        && let Some(oldest) = handles.pop_front()
                    {
                        oldest.abort();
                    }
                    handles.push_back(connections.spawn(answer(stream, Arc::clone(&desk))));
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn answer(stream: TcpStream, desk: Arc<Desk>) {
    let service = service_fn(|request| {
        let desk = &desk;
        async move { Ok::<_, Infallible>(http::watched(&request, desk).await) }
    });
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(DEADLINE, exchange).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "HTTP request failed"),
        Err(_elapsed) => debug!("a watcher's connection has lasted long enough"),
    }
}
