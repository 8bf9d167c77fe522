//! The details of every pod and service on which all edges agree.
//!
//! A pod may be relabelled while it is observed. Its edges must not disagree on its labels, so each gets the newest of those
//! that the pod's own side said, and only where there are none the newest of all: nobody who calls a pod, or is called by it,
//! may say which labels it has as long as its own node's agent does.
//!
//! A service is on no node, so everybody who speaks of it is heard, each with its newest word, and what it selects is what most
//! nodes say: one of them cannot have all others' policies select what it likes. Where as many say one thing as another it is
//! the newest of both. Nodes come and go: one of which nothing was seen for long has no voice where others have. A change is followed as soon as most of those have spoken that speak of the service; until then an edge
//! whose own word is newer than the one that stands is [disputed](crate::ledger::Edge::is_disputed).

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use flow::{
    endpoint::{Endpoint, Labels, Pod, Service},
    observations::PodId,
    record::Direction,
    time::Timestamp,
};

use super::Sighting;

/// Who said it of a pod, and when. What is greater counts.
type Word = (Side, Timestamp);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Other,
    /// The end that was observed.
    Own,
}

pub(super) struct Names<'a> {
    pods: BTreeMap<PodId, (Word, Arc<Pod>)>,
    services: BTreeMap<(&'a str, &'a str), Told<'a>>,
}

/// What was said of a service, and when.
type Told<'a> = (Timestamp, &'a Arc<Service>);

/// Of each service what each node said last.
type Hearing<'a> = BTreeMap<(&'a str, &'a str), BTreeMap<&'a str, Told<'a>>>;

/// A node is gone of which nothing was seen for so long before the newest of all: a week, in which all that is regular
/// happens, and a day.
const GONE: Duration = Duration::from_secs(8 * 24 * 60 * 60);

impl<'a> Names<'a> {
    /// The sightings must come in an order that does not depend on when they were observed: it decides between equally old
    /// details.
    pub(super) fn new(sightings: &[Sighting<'a>]) -> Self {
        let mut pods = BTreeMap::new();
        let mut hearing = Hearing::new();
        let mut heard = BTreeMap::<&str, Timestamp>::new();
        for sighting in sightings {
            let last_seen = sighting.observation.last_seen;
            let node = &*sighting.observation.names.hostname;
            let newest = heard.entry(node).or_default();
            *newest = last_seen.max(*newest);
            let (client, server) = match sighting.observation.key.direction {
                Direction::Egress => (Side::Own, Side::Other),
                Direction::Ingress => (Side::Other, Side::Own),
            };
            for (endpoint, side) in [
                (&sighting.src.endpoint, client),
                (&sighting.dst.endpoint, server),
            ] {
                if let Endpoint::Pod { pod, .. } = endpoint {
                    keep(
                        pods.entry(PodId::of(pod)),
                        (side, last_seen),
                        Arc::clone(pod),
                    );
                }
                if let Some(service) = named_service(endpoint) {
                    let of_service = hearing
                        .entry((service.namespace.as_str(), service.name.as_str()))
                        .or_default();
                    keep(of_service.entry(node), last_seen, service);
                }
            }
        }
        let newest = heard.values().max().copied().unwrap_or_default();
        let since = newest.saturating_sub(GONE);
        let services = hearing.into_iter().filter_map(|(name, mut words)| {
            let is_there = |node: &&str| heard[*node] >= since;
            if words.keys().any(is_there) {
                words.retain(|node, _| is_there(node));
            }
            Some((name, prevailing(words.into_values())?))
        });
        Self {
            pods,
            services: services.collect(),
        }
    }

    /// The endpoint with the details of the pod and the service that it names on which all agree.
    pub(super) fn agreed(&self, endpoint: &Endpoint) -> Endpoint {
        match endpoint {
            Endpoint::Pod { pod, service } => Endpoint::Pod {
                pod: match self.pods.get(&PodId::of(pod)) {
                    Some((_, newest)) => Arc::clone(newest),
                    None => Arc::clone(pod),
                },
                service: service.as_ref().map(|service| self.agreed_service(service)),
            },
            Endpoint::Service(service) => Endpoint::Service(self.agreed_service(service)),
            Endpoint::Node(_) | Endpoint::External(_) => endpoint.clone(),
        }
    }

    /// Whether the service that this endpoint names, at this time, was said to select something else than what stands, and
    /// later than that.
    pub(super) fn is_disputed(&self, endpoint: &Endpoint, time: Timestamp) -> bool {
        named_service(endpoint).is_some_and(|said| {
            self.told_of(said).is_some_and(|(told, stands)| {
                !Arc::ptr_eq(stands, said) && stands.selector != said.selector && time > told
            })
        })
    }

    fn agreed_service(&self, service: &Arc<Service>) -> Arc<Service> {
        let told = self.told_of(service);
        Arc::clone(told.map_or(service, |(_, stands)| stands))
    }

    fn told_of(&self, service: &Service) -> Option<Told<'a>> {
        let name = (service.namespace.as_str(), service.name.as_str());
        self.services.get(&name).copied()
    }
}

fn named_service(endpoint: &Endpoint) -> Option<&Arc<Service>> {
    match endpoint {
        Endpoint::Pod { service, .. } => service.as_ref(),
        Endpoint::Service(service) => Some(service),
        Endpoint::Node(_) | Endpoint::External(_) => None,
    }
}

/// Of the nodes' words on one service the newest of those that name the selector which most of them name.
fn prevailing<'a>(words: impl Iterator<Item = Told<'a>>) -> Option<Told<'a>> {
    let mut by_selector = BTreeMap::<&Labels, (usize, Told<'a>)>::new();
    for word in words {
        let (nodes, newest) = by_selector.entry(&word.1.selector).or_insert((0, word));
        *nodes += 1;
        if newest.0 < word.0 {
            *newest = word;
        }
    }
    let most = by_selector
        .into_values()
        .max_by_key(|(nodes, (time, _))| (*nodes, *time));
    most.map(|(_, newest)| newest)
}

/// Keeps what is greater, of equals the first.
fn keep<K: Ord, W: Ord, T>(entry: Entry<'_, K, (W, T)>, word: W, details: T) {
    match entry {
        Entry::Vacant(entry) => {
            entry.insert((word, details));
        }
        Entry::Occupied(mut entry) => {
            if entry.get().0 < word {
                entry.insert((word, details));
            }
        }
    }
}
