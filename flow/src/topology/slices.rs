//! The endpoint slices of a namespace.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use super::{objects::EndpointSlice, service::most_common};
use crate::record::Protocol;

/// Endpoint slices by name, and which belong to which service.
#[derive(Debug, Default)]
pub(super) struct Slices {
    by_name: HashMap<String, EndpointSlice>,
    by_service: HashMap<String, Vec<String>>,
}

/// What the slices of one service say together.
#[derive(Debug, Default)]
pub(super) struct Backends {
    /// The endpoints' addresses, sorted.
    pub(super) addresses: Vec<IpAddr>,
    /// By the service port's name and protocol: how many endpoints have which port.
    ports: HashMap<(String, Protocol), BTreeMap<u16, usize>>,
}

impl Backends {
    /// The endpoints' port behind a port of the service: the one that most endpoints have, of several such the lowest.
    pub(super) fn port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.ports
            .get(&(name.to_owned(), protocol))
            .and_then(most_common)
    }
}

impl Slices {
    pub(super) fn len(&self) -> usize {
        self.by_name.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Returns the services whose backends may have changed.
    pub(super) fn upsert(&mut self, slice: EndpointSlice) -> Vec<String> {
        if self.by_name.get(&slice.name) == Some(&slice) {
            return Vec::new();
        }
        let mut touched = self.remove(&slice.name);
        if let Some(service) = &slice.service {
            let names = self.by_service.entry(service.clone()).or_default();
            names.push(slice.name.clone());
            if !touched.contains(service) {
                touched.push(service.clone());
            }
        }
        self.by_name.insert(slice.name.clone(), slice);
        touched
    }

    /// Returns the services whose backends may have changed.
    pub(super) fn remove(&mut self, name: &str) -> Vec<String> {
        let Some(service) = self.by_name.remove(name).and_then(|slice| slice.service) else {
            return Vec::new();
        };
        if let Some(names) = self.by_service.get_mut(&service) {
            names.retain(|other| other != name);
            if names.is_empty() {
                self.by_service.remove(&service);
            }
        }
        vec![service]
    }

    /// The backends of a service.
    pub(super) fn backends(&self, service: &str) -> Backends {
        let mut backends = Backends::default();
        let names = self.by_service.get(service).into_iter().flatten();
        for slice in names.filter_map(|name| self.by_name.get(name)) {
            backends.addresses.extend(&slice.addresses);
            for port in &slice.ports {
                let numbers = backends
                    .ports
                    .entry((port.name.clone(), port.protocol))
                    .or_default();
                *numbers.entry(port.port).or_default() += slice.endpoints as usize;
            }
        }
        backends.addresses.sort_unstable();
        backends.addresses.dedup();
        backends
    }
}
