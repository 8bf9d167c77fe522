//! The newest details of every pod and service.
//!
//! A pod may be relabelled while it is observed. Its edges must not disagree on its labels, so each gets the newest.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Pod, Service},
    observations::PodId,
    time::Timestamp,
};

use super::Sighting;

type Newest<T> = (Timestamp, Arc<T>);

pub(super) struct Names<'a> {
    pods: BTreeMap<PodId, Newest<Pod>>,
    services: BTreeMap<(&'a str, &'a str), Newest<Service>>,
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
            for endpoint in [&sighting.src.endpoint, &sighting.dst.endpoint] {
                match endpoint {
                    Endpoint::Pod { pod, service } => {
                        keep(names.pods.entry(PodId::of(pod)), last_seen, pod);
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
            time,
            service,
        );
    }
}

fn keep<K: Ord, T>(entry: Entry<'_, K, Newest<T>>, time: Timestamp, details: &Arc<T>) {
    let newest = entry.or_insert_with(|| (time, Arc::clone(details)));
    if newest.0 < time {
        *newest = (time, Arc::clone(details));
    }
}
