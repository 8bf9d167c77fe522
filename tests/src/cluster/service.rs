//! Services.

use std::net::IpAddr;

use super::{Labels, Pod};
use crate::{names::uid, ranges::Ranges};

/// A service.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Which pods are behind it.
    pub selector: Labels,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Counts from 1 among the services.
    pub(super) number: u8,
    pub(super) ranges: Ranges,
}

/// A service's port.
#[derive(Clone, Debug)]
pub struct ServicePort {
    /// Its name.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: &'static str,
    /// The port at the service's address.
    pub port: u16,
    /// The port at the pod.
    pub target: TargetPort,
    /// The port at every node's address.
    pub node_port: Option<u16>,
}

/// A service's port at the pod.
#[derive(Clone, Debug)]
pub enum TargetPort {
    /// The same for every pod.
    Number(u16),
    /// The container port of this name, which may differ from pod to pod.
    Name(String),
}

impl From<u16> for TargetPort {
    fn from(port: u16) -> Self {
        Self::Number(port)
    }
}

impl From<&str> for TargetPort {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

impl Service {
    /// Adds a label that the pods behind it have.
    pub fn select(&mut self, key: &str, value: &str) -> &mut Self {
        self.selector.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds a TCP port.
    pub fn port(&mut self, name: &str, port: u16, target: impl Into<TargetPort>) -> &mut Self {
        self.ports.push(ServicePort {
            name: name.to_owned(),
            protocol: "TCP",
            port,
            target: target.into(),
            node_port: None,
        });
        self
    }

    /// Makes the port that was added last one of UDP.
    pub fn udp(&mut self) -> &mut Self {
        if let Some(last) = self.ports.last_mut() {
            last.protocol = "UDP";
        }
        self
    }

    /// Makes the port that was added last one of SCTP.
    pub fn sctp(&mut self) -> &mut Self {
        if let Some(last) = self.ports.last_mut() {
            last.protocol = "SCTP";
        }
        self
    }

    /// Opens the port that was added last at every node's address too.
    pub fn node_port(&mut self, port: u16) -> &mut Self {
        if let Some(last) = self.ports.last_mut() {
            last.node_port = Some(port);
        }
        self
    }

    /// Its virtual addresses, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.ranges.service(self.number.saturating_add(9))
    }

    /// `metadata.uid`.
    #[must_use]
    pub fn uid(&self) -> String {
        uid(&format!("service {}/{}", self.namespace, self.name))
    }

    pub(super) fn selects(&self, pod: &Pod) -> bool {
        !self.selector.is_empty()
            && self.namespace == pod.namespace
            && self
                .selector
                .iter()
                .all(|(key, value)| pod.labels.get(key) == Some(value))
    }
}

impl TargetPort {
    /// The number that it has at a pod; `None` if the pod has no port of that name.
    #[must_use]
    pub fn at(&self, pod: &Pod) -> Option<u16> {
        match self {
            Self::Number(port) => Some(*port),
            Self::Name(name) => pod.ports.get(name).copied(),
        }
    }
}
