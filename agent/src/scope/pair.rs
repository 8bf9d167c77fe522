//! What the node tracked, and the sockets that it belongs to.

use std::{collections::HashMap, net::SocketAddr};

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
    /// Those whose client has called another server since.
    displaced: Vec<(u64, Tracked)>,
    /// Of lines about sockets.
    sockets: Lately<SocketAddr>,
    /// Of what was tracked and placed without such a line.
    placed: Lately<[SocketAddr; 2]>,
}

/// Whom clients have called, lately and before.
#[derive(Debug)]
struct Lately<T>([HashMap<SocketAddr, T>; 2]);

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
                Told::Tracked(tracked) if self.has_socket(&tracked) => {}
                Told::Tracked(tracked) => self.keep(round, tracked),
            }
        }
        for (socket, backend) in &mut sockets {
            let client = client(&socket.key);
            self.sockets.remember(client, server(&socket.key));
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
        due.extend(self.displaced.extract_if(.., |(round, _)| is_due(*round)));
        due.sort_by_key(|(round, tracked)| (*round, tracked.at.time));
        for (_, tracked) in &due {
            (self.placed).remember(tracked.client, [tracked.called, tracked.server]);
        }
        due
    }

    /// The earliest drain of which something waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        let waiting = self.tracked.values().chain(&self.displaced);
        waiting.map(|(round, _)| *round).min()
    }

    /// Whether the connection of this socket was placed as it was tracked: its process may accept it a minute later.
    pub(super) fn was_placed(&self, key: &Key) -> bool {
        let ends = self.placed.get(client(key));
        ends.is_some_and(|ends| ends.contains(&server(key)))
    }

    fn has_socket(&self, tracked: &Tracked) -> bool {
        let server = self.sockets.get(tracked.client);
        server.is_some_and(|server| [tracked.called, tracked.server].contains(server))
    }

    fn keep(&mut self, round: u64, tracked: Tracked) {
        if self.tracked.len() + self.displaced.len() >= MAX_TRACKED {
            return;
        }
        let ends = (tracked.called, tracked.server);
        let before = self.tracked.insert(tracked.client, (round, tracked));
        let other = before.filter(|(_, before)| (before.called, before.server) != ends);
        self.displaced.extend(other);
    }
}

impl<T> Lately<T> {
    fn get(&self, client: SocketAddr) -> Option<&T> {
        self.0.iter().find_map(|known| known.get(&client))
    }

    fn remember(&mut self, client: SocketAddr, called: T) {
        let [lately, before] = &mut self.0;
        if lately.len() >= MAX_CLIENTS {
            std::mem::swap(lately, before);
            lately.clear();
        }
        lately.insert(client, called);
    }
}

impl<T> Default for Lately<T> {
    fn default() -> Self {
        Self([HashMap::new(), HashMap::new()])
    }
}

fn client(key: &Key) -> SocketAddr {
    let address = match key.direction {
        Direction::Egress => key.local,
        Direction::Ingress => key.remote,
    };
    SocketAddr::new(address, key.client_port)
}

/// Whom the client has called, as this end knows it.
fn server(key: &Key) -> SocketAddr {
    let address = match key.direction {
        Direction::Egress => key.remote,
        Direction::Ingress => key.local,
    };
    SocketAddr::new(address, key.port)
}

/// The server behind the address that a client's socket has.
fn behind(key: &Key, tracked: &Tracked) -> Option<SocketAddr> {
    let called = SocketAddr::new(key.remote, key.port);
    let is_it =
        key.direction == Direction::Egress && tracked.called == called && tracked.server != called;
    is_it.then_some(tracked.server)
}
