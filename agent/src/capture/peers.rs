//! Forgetting the peers of UDP sockets that have long been silent, and SCTP calls that nobody has answered.
//!
//! As long as there is room a peer is known for two minutes of silence. In a crowd the times are those of connection tracking
//! (`nf_conntrack_proto_udp.c`), by which the network plugins see conversations too: two minutes for one that both ends have
//! led for a while, half a minute for others. Where that does not do, as under thousands of questions a second, what was
//! answered goes after seconds, if nothing that comes later can be taken for a conversation the other way round: the programs
//! know which sockets have been servers ([`Roles`](agent_common::types::Roles)), and a connected one hears nobody else.

use std::os::fd::{AsFd as _, OwnedFd};

use agent_common::{
    name,
    types::{Call, CallKey, Peer, PeerKey, UDP_SILENCE_NS, kind},
};
use aya::maps::{Array, MapData};

use super::{Error, batch, map_error};

/// Of what is no stream, in a crowd (`net.netfilter.nf_conntrack_udp_timeout`).
const NO_STREAM_NS: u64 = 30_000_000_000;

/// Of what was answered, in haste.
const ANSWERED_NS: u64 = 5_000_000_000;

/// SCTP sends again what was not answered after no more than a minute (RTO.Max, RFC 9260), so this is silence. Who had no answer
/// for as long as the first time lasts has been counted.
const CALL_SILENCE_NS: u64 = 180_000_000_000;

/// From one look through the map to the next, in drains, as long as half of it is free: what left no more than half after five
/// seconds cannot fill it in four.
const ROUNDS: u32 = 4;

/// Room for peers, in entries, beside so many for flows. A socket's flows with a thousand clients may be one entry, while each
/// client is a peer; a DNS server that is asked 5,000 times a second has 150,000 of them in half a minute.
pub(super) fn capacity(map_entries: u32) -> u32 {
    map_entries.saturating_mul(4)
}

/// The map of peers, which the kernel's programs fill and this empties, and that of SCTP calls, of which little is left.
pub(super) struct Peers {
    map: OwnedFd,
    calls: OwnedFd,
    /// 0 → until when a peer that is not in the map may be one that was forgotten in haste.
    lack: Array<MapData, u64>,
    capacity: usize,
    /// As of the last look.
    present: usize,
    round: u32,
}

/// How soon peers are forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    Usual,
    Crowd,
    Haste,
}

/// How many peers there are, and how many of them are to be forgotten at each pace.
#[derive(Debug, Default)]
struct Tally {
    present: usize,
    due: [usize; 3],
}

impl Peers {
    /// `map_entries` is the size of the map of flows.
    pub(super) fn new(
        map: OwnedFd,
        calls: OwnedFd,
        lack: Array<MapData, u64>,
        map_entries: u32,
    ) -> Self {
        Self {
            map,
            calls,
            lack,
            capacity: capacity(map_entries) as usize,
            present: 0,
            round: 0,
        }
    }

    /// To be called once a drain. `now_ns` is the time by the clock that the programs stamp with.
    ///
    /// # Errors
    /// What the kernel says. Who was not forgotten stays known.
    pub(super) fn forget_silent(&mut self, now_ns: u64) -> Result<(), Error> {
        self.round = self.round.wrapping_add(1);
        if self.round.is_multiple_of(ROUNDS) {
            let is_due = |call: &Call| now_ns.saturating_sub(call.last_ns) > CALL_SILENCE_NS;
            batch::delete_where::<CallKey, Call>(self.calls.as_fd(), is_due)
                .map_err(Error::Peers)?;
        }
        if self.present <= self.capacity / 2 && !self.round.is_multiple_of(ROUNDS) {
            return Ok(());
        }
        let mut tally = Tally::default();
        batch::look_through(self.map.as_fd(), |_: PeerKey, peer: Peer| {
            tally.add(&peer, now_ns);
        })
        .map_err(Error::Peers)?;
        self.present = tally.present;
        let pace = tally.pace(self.capacity);
        if tally.due(pace) == 0 {
            return Ok(());
        }
        if tally.due(pace) > tally.due(Pace::Crowd) {
            // Before anything is forgotten.
            self.lack
                .set(0, now_ns.saturating_add(UDP_SILENCE_NS), 0)
                .map_err(map_error(name::PEERS_LACK_ROOM))?;
        }
        let forgotten = batch::delete_where::<PeerKey, Peer>(self.map.as_fd(), |peer| {
            pace.is_due(peer, now_ns)
        })
        .map_err(Error::Peers)?;
        self.present = self.present.saturating_sub(forgotten);
        Ok(())
    }
}

impl Pace {
    const ALL: [Self; 3] = [Self::Usual, Self::Crowd, Self::Haste];

    fn is_due(self, peer: &Peer, now_ns: u64) -> bool {
        let cannot_turn = peer.kind == kind::ACCEPTED || peer.connected != 0;
        let limit_ns = match self {
            Self::Usual => UDP_SILENCE_NS,
            _ if peer.is_stream() => UDP_SILENCE_NS,
            Self::Haste if peer.answered != 0 && cannot_turn => ANSWERED_NS,
            _ => NO_STREAM_NS,
        };
        now_ns.saturating_sub(peer.last_ns) > limit_ns
    }
}

impl Tally {
    fn add(&mut self, peer: &Peer, now_ns: u64) {
        self.present += 1;
        for pace in Pace::ALL {
            self.due[pace as usize] += usize::from(pace.is_due(peer, now_ns));
        }
    }

    fn due(&self, pace: Pace) -> usize {
        self.due[pace as usize]
    }

    /// The slowest that leaves enough room.
    fn pace(&self, capacity: usize) -> Pace {
        let left = |pace| self.present - self.due(pace);
        if left(Pace::Usual) <= capacity / 2 {
            Pace::Usual
        } else if !is_crowded(left(Pace::Crowd), capacity) {
            Pace::Crowd
        } else {
            Pace::Haste
        }
    }
}

/// Whether so many are more than three quarters.
fn is_crowded(present: usize, capacity: usize) -> bool {
    present > capacity - capacity / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOW: u64 = 1_000 * SECOND;

    /// Silent for so many seconds.
    fn question(silence: u64) -> Peer {
        let at = NOW - silence * SECOND;
        Peer {
            first_ns: at,
            last_ns: at,
            kind: kind::ACCEPTED,
            answered: 0,
            connected: 0,
            padding: [0; 5],
        }
    }

    fn answered(silence: u64) -> Peer {
        Peer {
            answered: 1,
            ..question(silence)
        }
    }

    fn stream(silence: u64) -> Peer {
        let peer = answered(silence);
        Peer {
            first_ns: peer.last_ns - 15 * SECOND,
            ..peer
        }
    }

    fn call(peer: Peer, connected: u8) -> Peer {
        Peer {
            kind: kind::CONNECTED,
            connected,
            ..peer
        }
    }

    #[test]
    fn how_long_who_is_known() {
        // The longest silence, in seconds, at the usual pace, in a crowd and in haste.
        for (peer, seconds) in [
            (question as fn(u64) -> Peer, [120, 30, 30]),
            (answered, [120, 30, 5]),
            (stream, [120, 120, 120]),
            (|s| call(question(s), 1), [120, 30, 30]),
            (|s| call(answered(s), 1), [120, 30, 5]),
            // Its peer's next datagram would be a call.
            (|s| call(answered(s), 0), [120, 30, 30]),
            (|s| call(stream(s), 0), [120, 120, 120]),
        ] {
            for (pace, seconds) in Pace::ALL.into_iter().zip(seconds) {
                let [known, forgotten] = [seconds, seconds + 1].map(peer);
                assert!(!pace.is_due(&known, NOW), "{known:?}, {pace:?}");
                assert!(pace.is_due(&forgotten, NOW), "{forgotten:?}, {pace:?}");
            }
        }
    }

    /// The pace in a map of the default size, of a server that is asked so many questions a second and has not forgotten any for
    /// so many seconds.
    fn pace(questions: usize, seconds: u64) -> Pace {
        let mut tally = Tally::default();
        for silence in 0..seconds {
            for _ in 0..questions {
                tally.add(&answered(silence), NOW);
            }
        }
        tally.pace(capacity(65_536) as usize)
    }

    #[test]
    fn a_busy_server_s_peers_are_known_as_connection_tracking_knows_them() {
        assert_eq!(pace(273, 120), Pace::Usual);
        assert_eq!(pace(1_000, 120), Pace::Usual);
        assert_eq!(pace(5_000, 35), Pace::Crowd);
        assert_eq!(pace(20_000, 13), Pace::Haste);
    }

    #[test]
    fn whoever_is_to_be_forgotten_anyway_is_no_crowd() {
        let mut tally = Tally::default();
        for silence in [0, 0, 0, 0, 121, 121, 121, 121] {
            tally.add(&question(silence), NOW);
        }
        assert_eq!((tally.pace(8), tally.pace(4)), (Pace::Usual, Pace::Haste));
    }
}
