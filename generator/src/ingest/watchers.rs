//! A second address, for those who watch the process: kubelet and Prometheus.
//!
//! They show no token and no certificate (kubelet has none to show), so they hear nothing here but whether the generator is
//! alive and ready, and its metrics.

use std::{io, net::SocketAddr, sync::Arc};

use flow::transport::answer_watchers;
use tokio::{net::TcpListener, sync::watch};

use super::{Desk, http};

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
        let answer = move |request| {
            let desk = Arc::clone(&desk);
            async move { http::watched(&request, &desk).await }
        };
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            never = answer_watchers(self.listener, answer) => match never {}
        }
    }
}
