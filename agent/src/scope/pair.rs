//! What the node tracked, and the sockets that it belongs to.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use flow::record::Direction;

use super::{
    account::Key,
    told::{Socket, Told, Tracked},
};

/// Connections that may wait for a line about their socket; what comes when there are as many is left out: it says nothing that
/// such a line, or the kernel programs, do not say.
const MAX_TRACKED: usize = 65_536;

/// Clients that are remembered twice over, to know what was tracked for one whose own line was read.
const MAX_CLIENTS: usize = 16_384;

/// Brings together what was tracked and the lines about sockets. One comes shortly before the other, in either order.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// By client, with the drain that it came with.
    tracked: HashMap<SocketAddr, (u64, Tracked)>,
    /// The clients of lines about sockets, lately and before.
    clients: [HashSet<SocketAddr>; 2],
}

impl Pairs {
    /// Keeps what was only tracked; the sockets are returned, those of clients with the server behind the address that they
    /// called, where the node translated it.
    pub(super) fn pair(
        &mut self,
        round: u64,
        told: Vec<Told>,
    ) -> Vec<(Socket, Option<SocketAddr>)> {
        let mut sockets = Vec::with_capacity(told.len());
        for told in told {
            match told {
                Told::Socket(socket) => sockets.push((socket, None)),
                Told::Tracked(tracked) if self.knows(tracked.client) => {}
                Told::Tracked(tracked) => {
                    if self.tracked.len() < MAX_TRACKED {
                        self.tracked.insert(tracked.client, (round, tracked));
                    }
                }
            }
        }
        for (socket, backend) in &mut sockets {
            let client = client(&socket.key);
            self.remember(client);
            if let Some((_, tracked)) = self.tracked.get(&client) {
                *backend = behind(&socket.key, tracked);
            }
        }
        // Only now: both ends of one connection may be here.
        for (socket, _) in &sockets {
            self.tracked.remove(&client(&socket.key));
        }
        sockets
    }

    /// Takes out those that came with drains of which this is true, in the order of their times.
    pub(super) fn take(&mut self, is_due: impl Fn(u64) -> bool) -> Vec<(u64, Tracked)> {
        let due = self.tracked.extract_if(|_, (round, _)| is_due(*round));
        let mut due: Vec<(u64, Tracked)> = due.map(|(_, tracked)| tracked).collect();
        due.sort_by_key(|(round, tracked)| (*round, tracked.at.time));
        due
    }

    /// The earliest drain of which something waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        self.tracked.values().map(|(round, _)| *round).min()
    }

    fn knows(&self, client: SocketAddr) -> bool {
        self.clients.iter().any(|known| known.contains(&client))
    }

    fn remember(&mut self, client: SocketAddr) {
        if self.clients[0].len() >= MAX_CLIENTS {
            self.clients.swap(0, 1);
            self.clients[0].clear();
        }
        self.clients[0].insert(client);
    }
}

fn client(key: &Key) -> SocketAddr {
    let address = match key.direction {
        Direction::Egress => key.local,
        Direction::Ingress => key.remote,
    };
    SocketAddr::new(address, key.client_port)
}

/// The server behind the address that a client's socket has.
fn behind(key: &Key, tracked: &Tracked) -> Option<SocketAddr> {
    let called = SocketAddr::new(key.remote, key.port);
    let is_it =
        key.direction == Direction::Egress && tracked.called == called && tracked.server != called;
    is_it.then_some(tracked.server)
}
