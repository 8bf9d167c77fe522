//! A service as the index keeps it: its versions, and where its ports lead.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use smallvec::SmallVec;

use super::{
    objects::{ContainerPort, Service, TargetPort},
    slices::Backends,
    store::Id,
};
use crate::{endpoint, record::Protocol, time::Timestamp};

/// Number of a service in the index's store; stays the same while a service of that name comes and goes.
pub(super) type ServiceId = Id;

/// A service and its past.
#[derive(Debug)]
pub(super) struct ServiceEntry {
    /// The service as it was learnt last.
    pub(super) spec: Service,
    /// When it was deleted.
    pub(super) ended: Option<Timestamp>,
    latest: Version,
    /// Oldest first. A flow to port 80 of a moment ago went where port 80 led then.
    past: Vec<Version>,
    named_ports: NamedPorts,
}

#[derive(Debug)]
struct Version {
    from: Timestamp,
    service: Arc<endpoint::Service>,
    declared: Vec<Declared>,
    /// The same ports with the numbers of today's pods, for the lookups.
    ports: SmallVec<[Port; 4]>,
}

/// A service's port, and where it leads.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Declared {
    protocol: Protocol,
    port: u16,
    node_port: Option<u16>,
    target: Target,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Number(u16),
    /// The container port of this name; `otherwise` where no pod has one.
    Name {
        name: String,
        otherwise: u16,
    },
}

#[derive(Clone, Copy, Debug)]
struct Port {
    protocol: Protocol,
    port: u16,
    node_port: Option<u16>,
    target: u16,
}

/// How many of the selected living pods have which number for a container port of this protocol and name.
type NamedPorts = HashMap<(Protocol, String), BTreeMap<u16, usize>>;

/// How a service is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Called {
    /// At one of its own addresses, on this port.
    Port(u16),
    /// At a node's address, on this port.
    NodePort(u16),
}

impl ServiceEntry {
    pub(super) fn new(spec: Service, backends: Backends, now: Timestamp) -> Self {
        let named_ports = NamedPorts::new();
        Self {
            latest: Version::new(&spec, backends, &named_ports, now),
            past: Vec::new(),
            spec,
            ended: None,
            named_ports,
        }
    }

    /// What records say of the service.
    pub(super) fn service(&self, at: Timestamp) -> &Arc<endpoint::Service> {
        &self.version(at).service
    }

    /// What records say of the service today.
    pub(super) fn latest(&self) -> &Arc<endpoint::Service> {
        &self.latest.service
    }

    /// Makes a new version if `spec` or the endpoint slices have moved a port, else brings the last one up to date.
    /// Says whether there is a new version.
    pub(super) fn refresh(&mut self, backends: Backends, now: Timestamp) -> bool {
        let new = Version::new(&self.spec, backends, &self.named_ports, now);
        let moved = new.declared != self.latest.declared;
        if moved {
            self.past.push(std::mem::replace(&mut self.latest, new));
        } else {
            self.latest.service = new.service;
        }
        moved
    }

    /// Forgets the oldest version, if there is a newer one.
    pub(super) fn forget_version(&mut self) {
        if !self.past.is_empty() {
            self.past.remove(0);
        }
    }

    /// The pods' port that a call led to at `at`; `None` if the service has no such port.
    ///
    /// Where the pods' numbers for a named port differ it is the one that most pods have, of several such the lowest. A
    /// name that no pod has leads where the endpoint slices say, else to the service's own port.
    pub(super) fn target(&self, protocol: Protocol, called: Called, at: Timestamp) -> Option<u16> {
        let mut ports = self.version(at).ports.iter();
        let port = ports.find(|port| port.protocol == protocol && port.is(called))?;
        Some(port.target)
    }

    /// Whether one of the service's ports leads to this port of a pod that has these container ports.
    pub(super) fn leads_to(
        &self,
        containers: &[ContainerPort],
        protocol: Protocol,
        number: u16,
    ) -> bool {
        self.latest
            .declared
            .iter()
            .filter(|port| port.protocol == protocol)
            .any(|port| match &port.target {
                Target::Number(target) => *target == number,
                Target::Name { name, .. } => containers.iter().any(|container| {
                    container.port == number
                        && container.protocol == protocol
                        && container.name == *name
                }),
            })
    }

    /// A pod with these ports is now among those selected.
    pub(super) fn add_backend(&mut self, ports: &[ContainerPort]) {
        for (key, number) in names(ports) {
            let numbers = self.named_ports.entry(key).or_default();
            *numbers.entry(number).or_default() += 1;
        }
        self.renumber();
    }

    /// A pod with these ports is no longer among those selected.
    pub(super) fn remove_backend(&mut self, ports: &[ContainerPort]) {
        for (key, number) in names(ports) {
            let Some(numbers) = self.named_ports.get_mut(&key) else {
                continue;
            };
            if let Some(count) = numbers.get_mut(&number) {
                *count -= 1;
                if *count == 0 {
                    numbers.remove(&number);
                }
            }
            if numbers.is_empty() {
                self.named_ports.remove(&key);
            }
        }
        self.renumber();
    }

    fn renumber(&mut self) {
        for version in self.past.iter_mut().chain([&mut self.latest]) {
            version.ports = numbered(&version.declared, &self.named_ports);
        }
    }

    fn version(&self, at: Timestamp) -> &Version {
        let newest_first = [&self.latest].into_iter().chain(self.past.iter().rev());
        let then = newest_first.clone().find(|version| version.from <= at);
        then.or(self.past.first()).unwrap_or(&self.latest)
    }
}

impl Version {
    fn new(spec: &Service, backends: Backends, named_ports: &NamedPorts, from: Timestamp) -> Self {
        let declared = declared_ports(spec, &backends);
        let identity = &spec.identity;
        let has_own = identity.selector.is_empty() && !backends.addresses.is_empty();
        Self {
            from,
            service: if has_own {
                Arc::new(endpoint::Service {
                    backends: backends.addresses,
                    ..endpoint::Service::clone(identity)
                })
            } else {
                Arc::clone(identity)
            },
            ports: numbered(&declared, named_ports),
            declared,
        }
    }
}

impl Port {
    fn is(&self, called: Called) -> bool {
        match called {
            Called::Port(port) => self.port == port,
            Called::NodePort(port) => self.node_port == Some(port),
        }
    }
}

/// Without a selector only the endpoint slices tell where a port leads: kube-proxy does not look at `targetPort`.
fn declared_ports(spec: &Service, backends: &Backends) -> Vec<Declared> {
    let by_hand = spec.identity.selector.is_empty();
    spec.ports
        .iter()
        .map(|port| {
            let listed = backends.port(&port.name, port.protocol);
            let target = match &port.target {
                TargetPort::Number(number) if by_hand => Target::Number(listed.unwrap_or(*number)),
                TargetPort::Name(_) if by_hand => Target::Number(listed.unwrap_or(port.port)),
                TargetPort::Number(number) => Target::Number(*number),
                TargetPort::Name(name) => Target::Name {
                    name: name.clone(),
                    otherwise: listed.unwrap_or(port.port),
                },
            };
            Declared {
                protocol: port.protocol,
                port: port.port,
                node_port: port.node_port,
                target,
            }
        })
        .collect()
}

fn numbered(declared: &[Declared], named_ports: &NamedPorts) -> SmallVec<[Port; 4]> {
    declared
        .iter()
        .map(|port| Port {
            protocol: port.protocol,
            port: port.port,
            node_port: port.node_port,
            target: match &port.target {
                Target::Number(number) => *number,
                Target::Name { name, otherwise } => named_ports
                    .get(&(port.protocol, name.clone()))
                    .and_then(most_common)
                    .unwrap_or(*otherwise),
            },
        })
        .collect()
}

/// The number with the highest count, of several such the lowest.
pub(super) fn most_common(counts: &BTreeMap<u16, usize>) -> Option<u16> {
    let descending = counts.iter().rev();
    descending
        .max_by_key(|(_, count)| **count)
        .map(|(number, _)| *number)
}

fn names(ports: &[ContainerPort]) -> impl Iterator<Item = ((Protocol, String), u16)> {
    ports
        .iter()
        .filter(|port| !port.name.is_empty())
        .map(|port| ((port.protocol, port.name.clone()), port.port))
}
