//! The ingest: agents connect over WebSocket and bring batches; here they are admitted, checked and passed on.
//!
//! A connection is a task of its own. Nothing that a peer sends reaches further than its own connection before it is
//! decoded and validated; what a peer does wrong ends its connection, and no other. Who keeps the ledger is not known
//! here: requests go into a bounded queue, answers come back as the session's feedback.

mod arrival;
mod connection;
mod door;
mod ends;
mod export;
mod http;
mod nodes;
mod queue;
mod refusal;
mod session;
mod socket;
mod watchers;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use flow::transport::ServerTls;
use futures_util::future::{AbortHandle, Abortable};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use self::{
    door::{Crowd, Door, Stranger},
    ends::Ends,
    nodes::Nodes,
};
pub use self::{
    export::{Exports, Page, PageEnd, PageRequest},
    http::{Desk, StatusRequest},
    queue::{Ask, Ended, Receiver, Request, Room, Sender, queue},
    refusal::Refusal,
    session::{Feedback, Session},
    watchers::Watchers,
};

/// The most connections at a time, which is more than the 5,000 nodes of the largest cluster that Kubernetes is made for. More
/// are told to come back later.
pub const MAX_CONNECTIONS: usize = 8_192;

/// How long the TLS handshake may take.
const TLS_DEADLINE: Duration = Duration::from_secs(10);

/// How long connections have to say goodbye when the generator stops.
const GOODBYE: Duration = Duration::from_secs(2);

/// How long to wait when the system has no more file descriptors or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// The socket on which agents connect.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
}

impl Server {
    /// Listens.
    ///
    /// # Errors
    /// If the address is not this machine's, is taken, or not for this process.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address })
    }

    /// Where it listens: the real port where 0 was asked for.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves agents until `stop` turns true; returns when all connections have ended, which takes a bounded time.
    pub async fn run(self, desk: Arc<Desk>, stop: watch::Receiver<bool>) {
        let door = Door::default();
        let ends = Ends::default();
        let nodes = Nodes::default();
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        let mut crowd = Crowd::default();
        let mut stopped = stop.clone();
        loop {
            let accepted = tokio::select! {
                _ = stopped.wait_for(|stop| *stop) => break,
                Some(ended) = connections.join_next() => {
                    if let Err(error) = ended {
                        warn!(%error, "connection ended by a defect");
                    }
                    continue;
                }
                accepted = self.listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(connection) => connection,
                Err(error) => {
                    warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (handle, registration) = AbortHandle::new_pair();
            let stranger = door.enter(peer.ip(), handle);
            let place = Arc::clone(&places).try_acquire_owned();
            let (Some(stranger), Ok(place)) = (stranger, place) else {
                if crowd.is_news() {
                    warn!(
                        %peer,
                        open = MAX_CONNECTIONS - places.available_permits(),
                        "too many connections: more are sent away"
                    );
                }
                // Who expects TLS would take the answer for a part of it.
                if desk.gate.tls().is_none() {
                    send_away(&stream);
                }
                continue;
            };
            crowd.let_in(door.is_half_full() || places.available_permits() < MAX_CONNECTIONS / 2);
            let visit = Visit {
                peer,
                stranger,
                ends: ends.clone(),
                nodes: nodes.clone(),
                _place: place,
            };
            let serving = serve(stream, visit, Arc::clone(&desk), stop.clone());
            connections.spawn(Abortable::new(serving, registration));
        }
        drop(self.listener);
        let all_ended = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(GOODBYE, all_ended).await.is_err() {
            info!(connections = connections.len(), "connections cut");
        }
        connections.shutdown().await;
    }
}

/// A connection, from its first byte to its last.
#[derive(Debug)]
struct Visit {
    peer: SocketAddr,
    /// Until it has said who it is.
    stranger: Stranger,
    ends: Ends,
    nodes: Nodes,
    _place: OwnedSemaphorePermit,
}

async fn serve(stream: TcpStream, visit: Visit, desk: Arc<Desk>, mut stop: watch::Receiver<bool>) {
    let peer = visit.peer;
    // Acknowledgements are small, and waited for.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%peer, %error, "connection lost");
        return;
    }
    let config = desk.gate.tls().map(ServerTls::config);
    // In a place of its own, which is given back: what answering takes is many times what a conversation does.
    let asked = Box::pin(async {
        match config {
            None => http::serve(stream, peer.ip(), &desk).await,
            Some(config) => {
                let handshake = TlsAcceptor::from(config).accept(stream);
                match tokio::time::timeout(TLS_DEADLINE, handshake).await {
                    Ok(Ok(stream)) => http::serve(stream, peer.ip(), &desk).await,
                    Ok(Err(error)) => {
                        debug!(%peer, %error, "TLS handshake failed");
                        desk.meter.denied.inc();
                        None
                    }
                    Err(_elapsed) => None,
                }
            }
        }
    });
    let agent = tokio::select! {
        _ = stop.wait_for(|stop| *stop) => return,
        agent = asked => agent,
    };
    if let Some((stream, admission)) = agent {
        let call = connection::Call {
            peer,
            admission,
            stranger: visit.stranger,
            ends: visit.ends,
            nodes: visit.nodes,
            meter: desk.meter.clone(),
        };
        connection::converse(stream, call, desk.queue.clone(), stop).await;
    }
}

/// Says that there is no room, if that fits into the socket's buffer; nobody waits for it, nor for the request, so that the
/// peer may hear nothing but that the connection was reset.
fn send_away(stream: &TcpStream) {
    const RESPONSE: &[u8] =
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain\r\nConnection: close\r\n\
        Retry-After: 30\r\nContent-Length: 22\r\n\r\nToo many connections.\n";
    if let Err(error) = stream.try_write(RESPONSE) {
        debug!(%error, "connection lost");
    }
}
