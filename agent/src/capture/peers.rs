//! Forgetting the peers of UDP sockets that have long been silent.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};

use agent_common::types::{PeerKey, UDP_SILENCE_NS};

use super::batch;

/// After this silence whoever speaks first opens a conversation anew.
const SILENCE: Duration = Duration::from_nanos(UDP_SILENCE_NS);

/// The same while the map is more than half full.
const SILENCE_IN_A_CROWD: Duration = Duration::from_secs(5);

/// From one look through the map to the next, in drains, as long as it is nearly empty.
const ROUNDS: u32 = 4;

/// The map of peers, which the kernel's programs fill and this empties.
#[derive(Debug)]
pub(super) struct Peers {
    map: OwnedFd,
    capacity: usize,
    /// As of the last look.
    present: usize,
    round: u32,
}

impl Peers {
    /// `capacity` is the size of the map.
    pub(super) fn new(map: OwnedFd, capacity: u32) -> Self {
        Self {
            map,
            capacity: capacity as usize,
            present: 0,
            round: 0,
        }
    }

    /// To be called once a drain. `now_ns` is the time by the clock that the programs stamp with.
    ///
    /// # Errors
    /// What the kernel says. Who was not forgotten stays known.
    pub(super) fn forget_silent(&mut self, now_ns: u64) -> io::Result<()> {
        self.round = self.round.wrapping_add(1);
        if self.present < self.capacity / 4 && !self.round.is_multiple_of(ROUNDS) {
            return Ok(());
        }
        let (mut present, mut silent) = (0, Vec::new());
        batch::look_through(self.map.as_fd(), |peer: PeerKey, last_ns: u64| {
            present += 1;
            let silence = Duration::from_nanos(now_ns.saturating_sub(last_ns));
            if silence > SILENCE_IN_A_CROWD {
                silent.push((peer, silence));
            }
        })?;
        let limit = if present > self.capacity / 2 {
            SILENCE_IN_A_CROWD
        } else {
            SILENCE
        };
        let forgotten: Vec<PeerKey> = silent
            .into_iter()
            .filter(|(_, silence)| *silence > limit)
            .map(|(peer, _)| peer)
            .collect();
        batch::delete(self.map.as_fd(), &forgotten)?;
        self.present = present - forgotten.len();
        Ok(())
    }
}
