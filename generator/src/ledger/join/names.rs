//! The newest details of every pod and service.
//!
//! A pod may be relabelled while it is observed. Its edges must not disagree on its labels, so each gets the newest of those
//! that the pod's own side said, and only where there are none the newest of all: nobody who calls a pod, or is called by it,
//! may say which labels it has as long as its own node's agent does.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Pod, Service},
    observations::PodId,
    record::Direction,
    time::Timestamp,
};

use super::Sighting;

/// Who said it, and when. What is greater counts.
type Word = (Side, Timestamp);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Other,
    /// The end that was observed.
    Own,
}

type Best<T> = (Word, Arc<T>);

pub(super) struct Names<'a> {
    pods: BTreeMap<PodId, Best<Pod>>,
    /// A service is on no node, so the side does not matter.
    services: BTreeMap<(&'a str, &'a str), Best<Service>>,
}

impl<'a> Names<'a> {
    /// The sightings must come in an order that does not depend on when they were observed: it decides between equally old
    /// details.
    pub(super) fn new(sightings: &[Sighting<'a>]) -> Self {
        let mut names = Self {
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
        };
        for sighting in sightings {
            let last_seen = sighting.observation.last_seen;
            let (client, server) = match sighting.observation.key.direction {
                Direction::Egress => (Side::Own, Side::Other),
                Direction::Ingress => (Side::Other, Side::Own),
            };
            for (endpoint, side) in [
                (&sighting.src.endpoint, client),
                (&sighting.dst.endpoint, server),
            ] {
                match endpoint {
                    Endpoint::Pod { pod, service } => {
                        keep(names.pods.entry(PodId::of(pod)), (side, last_seen), pod);
                        if let Some(service) = service {
                            names.add_service(last_seen, service);
                        }
                    }
                    Endpoint::Service(service) => names.add_service(last_seen, service),
                    Endpoint::Node(_) | Endpoint::External(_) => {}
                }
            }
        }
        names
    }

    /// The endpoint with the newest details of the pod and the service that it names.
    pub(super) fn newest(&self, endpoint: &Endpoint) -> Endpoint {
        match endpoint {
            Endpoint::Pod { pod, service } => Endpoint::Pod {
                pod: match self.pods.get(&PodId::of(pod)) {
                    Some((_, newest)) => Arc::clone(newest),
                    None => Arc::clone(pod),
                },
                service: service.as_ref().map(|service| self.newest_service(service)),
            },
            Endpoint::Service(service) => Endpoint::Service(self.newest_service(service)),
            Endpoint::Node(_) | Endpoint::External(_) => endpoint.clone(),
        }
    }

    fn newest_service(&self, service: &Arc<Service>) -> Arc<Service> {
        match self
            .services
            .get(&(service.namespace.as_str(), service.name.as_str()))
        {
            Some((_, newest)) => Arc::clone(newest),
            None => Arc::clone(service),
        }
    }

    fn add_service(&mut self, time: Timestamp, service: &'a Arc<Service>) {
        keep(
            self.services
                .entry((service.namespace.as_str(), service.name.as_str())),
            (Side::Other, time),
            service,
        );
    }
}

fn keep<K: Ord, T>(entry: Entry<'_, K, Best<T>>, word: Word, details: &Arc<T>) {
    let best = entry.or_insert_with(|| (word, Arc::clone(details)));
    if best.0 < word {
        *best = (word, Arc::clone(details));
    }
}
