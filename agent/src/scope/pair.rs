//! What the node tracked, and the sockets that it belongs to.

use std::{collections::HashMap, net::SocketAddr};

use flow::record::Direction;

use super::{
    account::Key,
    told::{Socket, Told, Tracked},
};

/// Connections that may wait for a line about their socket. What comes when there are as many is left out, and counted: unless
/// such a line comes, or the kernel programs were there, nobody else tells of it.
const MAX_TRACKED: usize = 65_536;

/// Clients that are remembered twice over, to know what was tracked for one whose own line was read.
const MAX_CLIENTS: usize = 16_384;

/// Brings together what was tracked and the lines about sockets. One comes shortly before the other, in either order, and a
/// drain may lie between them.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    /// By client.
    tracked: HashMap<SocketAddr, Waiting>,
    /// Those whose client has called another server since.
    displaced: Vec<Waiting>,
    /// Sockets of clients that have come with the last drain, which is named. Who is behind the address that they called may
    /// be told until the next one.
    callers: (u64, Vec<Socket>),
    /// Of lines about sockets.
    sockets: Lately<SocketAddr>,
    /// Of what was tracked and placed without such a line.
    placed: Lately<[SocketAddr; 2]>,
    /// What there was no room for, and is not told yet.
    left_out: u64,
}

/// A line about a socket.
#[derive(Debug)]
pub(super) struct Paired {
    pub(super) socket: Socket,
    /// The server behind the address that it has called.
    pub(super) backend: Option<SocketAddr>,
}

/// What was tracked.
#[derive(Debug)]
struct Waiting {
    /// The drain that it came with.
    round: u64,
    tracked: Tracked,
    /// Whether there is a line about a socket, which counts instead.
    has_socket: bool,
}

/// Whom clients have called, lately and before.
#[derive(Debug)]
struct Lately<T>([HashMap<SocketAddr, T>; 2]);

impl Pairs {
    /// Keeps what was only tracked; of the sockets those are returned that need not wait any longer, with the drain that they came
    /// with, and those of clients with the server behind the address that they called, where the node translated it.
    pub(super) fn pair(
        &mut self,
        round: u64,
        told: Vec<Told>,
        is_last: bool,
    ) -> [(u64, Vec<Paired>); 2] {
        let mut sockets = Vec::with_capacity(told.len());
        for told in told {
            match told {
                Told::Socket(socket) => {
                    self.note(&socket.key);
                    sockets.push(socket);
                }
                Told::Tracked(tracked) => self.keep(round, tracked),
            }
        }
        let (before, callers) = std::mem::replace(&mut self.callers, (round, Vec::new()));
        let earlier = callers.into_iter().map(|socket| Paired {
            backend: self.behind(&socket.key),
            socket,
        });
        let earlier = earlier.collect();
        let mut paired = Vec::with_capacity(sockets.len());
        for socket in sockets {
            let backend = self.behind(&socket.key);
            let is_caller = socket.key.direction == Direction::Egress;
            if is_caller && backend.is_none() && !is_last {
                self.callers.1.push(socket);
            } else {
                paired.push(Paired { socket, backend });
            }
        }
        [(before, earlier), (round, paired)]
    }

    /// Takes out those that came with drains of which this is true and of which no socket is known, in the order of their
    /// times.
    pub(super) fn take(&mut self, is_due: impl Fn(u64) -> bool) -> Vec<(u64, Tracked)> {
        let due = (self.tracked).extract_if(|_, waiting| is_due(waiting.round));
        let mut due: Vec<Waiting> = due.map(|(_, waiting)| waiting).collect();
        due.extend((self.displaced).extract_if(.., |waiting| is_due(waiting.round)));
        due.retain(|waiting| !waiting.has_socket && !self.has_socket(&waiting.tracked));
        due.sort_by_key(|waiting| (waiting.round, waiting.tracked.at.time));
        for Waiting { tracked, .. } in &due {
            for client in [tracked.client, tracked.masked] {
                (self.placed).remember(client, [tracked.called, tracked.server]);
            }
        }
        let due = due.into_iter();
        due.map(|waiting| (waiting.round, waiting.tracked))
            .collect()
    }

    /// How many there was no room for since this was last asked.
    pub(super) fn take_left_out(&mut self) -> u64 {
        std::mem::take(&mut self.left_out)
    }

    /// The earliest drain of which something waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        let waiting = self.tracked.values().chain(&self.displaced);
        let (round, callers) = &self.callers;
        let callers = (!callers.is_empty()).then_some(*round);
        waiting.map(|waiting| waiting.round).chain(callers).min()
    }

    /// Whether the connection of this socket was placed as it was tracked: its process may accept it a minute later.
    pub(super) fn was_placed(&self, key: &Key) -> bool {
        let ends = self.placed.get(client(key));
        ends.is_some_and(|ends| ends.contains(&server(key)))
    }

    /// Takes in that there is a line about this socket.
    fn note(&mut self, key: &Key) {
        let (client, server) = (client(key), server(key));
        self.sockets.remember(client, server);
        if let Some(waiting) = self.tracked.get_mut(&client)
            && [waiting.tracked.called, waiting.tracked.server].contains(&server)
        {
            waiting.has_socket = true;
        }
    }

    fn has_socket(&self, tracked: &Tracked) -> bool {
        let ends = [tracked.called, tracked.server];
        let mut servers = [tracked.client, tracked.masked]
            .into_iter()
            .filter_map(|client| self.sockets.get(client));
        servers.any(|server| ends.contains(server))
    }

    fn keep(&mut self, round: u64, tracked: Tracked) {
        if self.tracked.len() + self.displaced.len() >= MAX_TRACKED {
            // That of a known socket only confirms it.
            self.left_out += u64::from(!self.has_socket(&tracked));
            return;
        }
        let ends = (tracked.called, tracked.server);
        let waiting = Waiting {
            round,
            has_socket: self.has_socket(&tracked),
            tracked,
        };
        let before = self.tracked.insert(waiting.tracked.client, waiting);
        let other = before.filter(|before| {
            !before.has_socket && (before.tracked.called, before.tracked.server) != ends
        });
        self.displaced.extend(other);
    }

    /// The server behind the address that a client's socket has.
    fn behind(&self, key: &Key) -> Option<SocketAddr> {
        let called = SocketAddr::new(key.remote, key.port);
        let tracked = &self.tracked.get(&client(key))?.tracked;
        let is_it = key.direction == Direction::Egress
            && tracked.called == called
            && tracked.server != called;
        is_it.then_some(tracked.server)
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

#[cfg(test)]
mod tests {
    use flow::time::Timestamp;

    use super::*;
    use crate::scope::told::{Boot, Moment};

    /// Of the same client's port, whoever is called.
    fn tracked(client: usize, server: u8) -> Told {
        let [.., high, middle, low] = client.to_be_bytes();
        let server = SocketAddr::from(([10, 96, 0, server], 80));
        let client = SocketAddr::from(([10, high, middle, low], 40_000));
        Told::Tracked(Tracked {
            client,
            called: server,
            server,
            masked: client,
            at: Moment {
                host: None,
                time: Timestamp::default(),
                boot: Boot::Earlier(None),
            },
        })
    }

    #[test]
    fn no_more_wait_than_may() {
        let mut pairs = Pairs::default();
        // Each client calls one server, and then another.
        for server in [1, 2] {
            let told = (0..MAX_TRACKED * 3 / 4).map(|client| tracked(client, server));
            pairs.pair(1, told.collect(), false);
        }
        let due = pairs.take(|_| true);
        assert_eq!(due.len(), MAX_TRACKED);
        let left_out = (MAX_TRACKED * 3 / 4 * 2 - MAX_TRACKED) as u64;
        assert_eq!(
            (pairs.take_left_out(), pairs.take_left_out()),
            (left_out, 0)
        );
        let again = pairs.take(|_| true);
        assert_eq!((again.len(), pairs.oldest()), (0, None));
        // There is room again.
        pairs.pair(2, vec![tracked(7, 3)], false);
        assert_eq!(pairs.take(|_| true).len(), 1);
    }
}
