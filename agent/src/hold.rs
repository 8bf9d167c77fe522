//! Sightings that wait for names.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use flow::{
    record::{ConnectionEvent, FlowRecord},
    topology::Index,
    wire::Resolve,
};

use crate::resolve::{Resolver, Sighting, Skipped};

/// How long the API may take to tell of a pod that speaks already. kubelet reports a new pod's address within a second or
/// two of its first process, and the API passes that on at once.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long anything waits for an API that is away. Nothing new is scheduled meanwhile, so only pods that came shortly before
/// are missing, and a longer wait would keep everything else that is observed from the generator.
const LONGEST: Duration = Duration::from_secs(120);

/// Sightings that may wait for the first lists. Each takes a few hundred bytes; what comes when there are as many is
/// counted as lost, because names would be wrong then, not only missing.
const MAX_EARLY: usize = 65_536;

/// Sightings that may wait for better names. What comes when there are as many is named as well as can be. With
/// [`Resolve::Local`] all wait until the generator must have heard of young pods, and there may be as many as before the
/// first lists.
const MAX_DOUBTFUL: usize = 16_384;

/// The reason under which connections are counted that were seen before the cluster's objects were known and found no
/// place to wait, or for which they never came to be known.
pub const TOPOLOGY_UNKNOWN: &str = "topology_unknown";

/// Where sightings wait.
#[derive(Debug)]
pub struct Hold {
    patience: Duration,
    most: usize,
    is_in_order: bool,
    waiting: VecDeque<(Instant, Sighting)>,
}

/// What need not wait any longer.
#[derive(Debug, Default, PartialEq)]
pub struct Released {
    /// The records.
    pub records: Vec<FlowRecord>,
    /// Connections left out because both their ends were one host.
    pub loopback: u64,
    /// Connections left out because they belong to another node.
    pub other_node: u64,
    /// Attempts left out because their port was 0.
    pub no_port: u64,
    /// Connections lost as [`TOPOLOGY_UNKNOWN`].
    pub lost: u64,
    /// Ends of single connections lost with them; their beginnings are counted for themselves.
    pub lost_closes: u64,
}

impl Released {
    fn lose(&mut self, sighting: &Sighting) {
        let seen = &sighting.observation;
        let is_close = (seen.connection).is_some_and(|it| it.event == ConnectionEvent::Close);
        self.lost += seen.count;
        self.lost_closes += u64::from(is_close);
    }
}

impl Hold {
    /// What may change waits for as long as `patience`; with none, nothing does.
    #[must_use]
    pub fn new(patience: Duration, resolve: Resolve) -> Self {
        Self {
            patience,
            most: match resolve {
                Resolve::Both => MAX_DOUBTFUL,
                Resolve::Local => MAX_EARLY,
            },
            is_in_order: false,
            waiting: VecDeque::new(),
        }
    }

    /// Lets nothing pass what came with an earlier drain, as long as there is room to wait.
    #[must_use]
    pub fn in_order(self, is_in_order: bool) -> Self {
        Self {
            is_in_order,
            ..self
        }
    }

    /// The earliest drain of which something waits.
    #[must_use]
    pub fn oldest(&self) -> Option<u64> {
        self.waiting
            .iter()
            .map(|(_, sighting)| sighting.round)
            .min()
    }

    /// Takes in what was seen before the cluster's objects are known.
    pub fn keep(
        &mut self,
        sightings: impl IntoIterator<Item = Sighting>,
        now: Instant,
    ) -> Released {
        let mut released = Released::default();
        for sighting in sightings {
            if self.waiting.len() < MAX_EARLY {
                self.waiting.push_back((now, sighting));
            } else {
                released.lose(&sighting);
            }
        }
        released
    }

    /// Names what waits and what is new, and keeps what may yet get a better name.
    ///
    /// `heard` is when the API was last heard, `now` if it is. While the API is away names are waited for longer, though not
    /// for ever.
    pub fn release(
        &mut self,
        sightings: impl IntoIterator<Item = Sighting>,
        resolver: &Resolver,
        index: &Index,
        now: Instant,
        heard: Instant,
    ) -> Released {
        let patience = Some(self.patience);
        let waiting = std::mem::take(&mut self.waiting);
        self.name(waiting, sightings, resolver, index, (now, heard), patience)
    }

    /// Names what is new, as [`Self::release`] does, and leaves what waits as it is: for what comes many times a second, and in
    /// no order.
    pub fn release_new(
        &mut self,
        sightings: impl IntoIterator<Item = Sighting>,
        resolver: &Resolver,
        index: &Index,
        now: Instant,
        heard: Instant,
    ) -> Released {
        let patience = Some(self.patience);
        let nothing = VecDeque::new();
        self.name(nothing, sightings, resolver, index, (now, heard), patience)
    }

    /// Names everything that waits and what is new.
    pub fn release_all(
        &mut self,
        sightings: impl IntoIterator<Item = Sighting>,
        resolver: &Resolver,
        index: &Index,
    ) -> Released {
        let now = Instant::now();
        let waiting = std::mem::take(&mut self.waiting);
        self.name(waiting, sightings, resolver, index, (now, now), None)
    }

    /// Gives up what waits, and what is new: the cluster's objects never came to be known.
    pub fn lose_all(&mut self, sightings: impl IntoIterator<Item = Sighting>) -> Released {
        let waiting = self.waiting.drain(..).map(|(_, sighting)| sighting);
        let mut released = Released::default();
        for sighting in waiting.chain(sightings) {
            released.lose(&sighting);
        }
        released
    }

    fn name(
        &mut self,
        waiting: VecDeque<(Instant, Sighting)>,
        sightings: impl IntoIterator<Item = Sighting>,
        resolver: &Resolver,
        index: &Index,
        (now, heard): (Instant, Instant),
        patience: Option<Duration>,
    ) -> Released {
        let mut released = Released::default();
        let new = sightings.into_iter().map(|sighting| (now, sighting));
        let mut held = None;
        for (since, sighting) in waiting.into_iter().chain(new) {
            let is_behind = held.is_some_and(|round| round < sighting.round);
            if self.is_in_order && is_behind && self.waiting.len() < self.most {
                self.waiting.push_back((since, sighting));
                continue;
            }
            let named = resolver.name(&sighting, index);
            let waited = heard.saturating_duration_since(since);
            let is_long = now.saturating_duration_since(since) >= LONGEST;
            let may_wait = patience.is_some_and(|patience| waited < patience && !is_long);
            if named.may_change && may_wait && self.waiting.len() < self.most {
                held = held.or(Some(sighting.round));
                self.waiting.push_back((since, sighting));
                continue;
            }
            let count = sighting.observation.count;
            match named.record {
                Ok(record) => released.records.push(record),
                Err(Skipped::Loopback) => released.loopback += count,
                Err(Skipped::OtherNode) => released.other_node += count,
                Err(Skipped::NoPort) => released.no_port += count,
            }
        }
        released
    }
}

#[cfg(test)]
mod tests;
