//! From what the kernel counted to a flow record with its ends named.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Node},
    record::{Direction, FlowRecord, Outcome, Process, Protocol, Source, Tuple},
    time::Timestamp,
    topology::Index,
    wire::Resolve,
};

use crate::{
    capture::{Event, Observation},
    identity::Owner,
    scope::FromLog,
};

/// What the kernel counted, and whose socket that was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// What the kernel counted.
    pub observation: Observation,
    /// Looked up at once: later the cgroup may be gone.
    pub owner: Option<Owner>,
    /// What the log of the Scope probe tells of it.
    pub log: Option<Box<FromLog>>,
    /// The drain that it came with.
    pub round: u64,
}

/// A sighting with names.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// The record, or why there is none.
    pub record: Result<FlowRecord, Skipped>,
    /// Whether more may be known in a moment: the API tells of a pod some time after the pod has begun to speak.
    pub may_change: bool,
}

/// Why a sighting is no flow of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// Both ends are one host, or one end is everybody: nothing that a policy could judge.
    Loopback,
    /// The socket belongs to another node that shares this kernel.
    OtherNode,
    /// To port 0 nobody can connect, and no rule can name it: but anybody can try.
    NoPort,
}

/// Names the ends of sightings on one node.
#[derive(Debug)]
pub struct Resolver {
    node: String,
    resolve: Resolve,
    /// Whether every socket of this kernel is of this node.
    alone: bool,
}

impl Resolver {
    /// For the node of this name, which is `alone` on this kernel unless nodes were told apart by their cgroups. With
    /// [`Resolve::Local`] the index needs to know no more than this node and its pods, and the other end stays an address.
    #[must_use]
    pub fn new(node: String, resolve: Resolve, alone: bool) -> Self {
        Self {
            node,
            resolve,
            alone,
        }
    }

    /// Names a sighting by what is known now, at the time when it was seen.
    #[must_use]
    pub fn name(&self, sighting: &Sighting, index: &Index) -> Named {
        let skipped = |skipped, may_change| Named {
            record: Err(skipped),
            may_change,
        };
        let seen = &sighting.observation;
        if seen.port == 0 {
            return skipped(Skipped::NoPort, false);
        }
        if seen.local.is_loopback() || seen.remote.is_loopback() || seen.local == seen.remote {
            return skipped(Skipped::Loopback, false);
        }
        // A connection to everybody is refused; a datagram is not. A pod of that address may be one that is not known yet.
        if seen.protocol == Protocol::Udp && index.is_broadcast(seen.remote, seen.last_seen) {
            return skipped(Skipped::Loopback, true);
        }
        let log = sighting.log.as_deref();
        let owner = sure_owner(sighting, index);
        let local = match owner {
            // The node whose log it is has seen it, and says no more of whose it is.
            None if log.is_some_and(|log| log.is_alone) => {
                match index.resolve_client(seen.local, seen.last_seen) {
                    Endpoint::Pod { pod, .. } => Endpoint::Pod { pod, service: None },
                    Endpoint::Node(node) => Endpoint::Node(node),
                    _ => Endpoint::External(seen.local),
                }
            }
            Some(Owner::Container(container) | Owner::ContainerOfProcess(container)) => {
                match index.pod_by_uid(&container.pod_uid) {
                    Some(pod) => Endpoint::Pod { pod, service: None },
                    None => unknown_pod(seen, index),
                }
            }
            Some(Owner::Host | Owner::HostProcess) => self.this_node(seen.local),
            None => match index.resolve_client(seen.local, seen.last_seen) {
                Endpoint::Pod { pod, .. } if pod.node.as_deref() == Some(&self.node) => {
                    Endpoint::Pod { pod, service: None }
                }
                Endpoint::Node(node) if node.name == self.node => self.this_node(seen.local),
                // Nobody of another node, whoever had the address there.
                _ if self.alone => Endpoint::External(seen.local),
                Endpoint::External(_) => return skipped(Skipped::OtherNode, true),
                _ => return skipped(Skipped::OtherNode, false),
            },
        };
        let unknown = matches!(local, Endpoint::External(_));
        let mut record = self.record(sighting, owner, local);
        let is_old = log.is_some_and(|log| log.is_old);
        // What was accepted came to the server's own address, whatever was called.
        let is_translated =
            matches!(seen.event, Event::Connect(_)) && log.is_some_and(|log| log.backend.is_some());
        if is_translated {
            record.via = Some(SocketAddr::new(seen.remote, seen.port));
        }
        let may_change = match self.resolve {
            Resolve::Both => {
                index.name_ends(&mut record);
                let may_change = unknown || index.may_be_a_young_pod(&record);
                if is_translated {
                    record.tuple.dst_addr = seen.remote;
                }
                may_change && !is_old
            }
            // Whoever names the other end learns of pods no sooner than we do.
            Resolve::Local => !is_old,
        };
        Named {
            record: Ok(record),
            may_change,
        }
    }

    fn record(&self, sighting: &Sighting, owner: Option<&Owner>, local: Endpoint) -> FlowRecord {
        let seen = &sighting.observation;
        let remote = Endpoint::External(seen.remote);
        let ((src_addr, src), (dst_addr, dst), direction, outcome) = match seen.event {
            Event::Connect(outcome) => (
                (seen.local, local),
                (seen.remote, remote),
                Direction::Egress,
                outcome,
            ),
            Event::Accept => (
                (seen.remote, remote),
                (seen.local, local),
                Direction::Ingress,
                Outcome::Established,
            ),
        };
        let log = sighting.log.as_deref();
        let alone = log.filter(|log| log.is_alone);
        // Where the node says which server is behind the address, that server is named.
        let backend = log.and_then(|log| log.backend);
        let server = match direction {
            Direction::Egress => backend.unwrap_or(SocketAddr::new(dst_addr, seen.port)),
            Direction::Ingress => SocketAddr::new(dst_addr, seen.port),
        };
        FlowRecord {
            timestamp: seen.last_seen,
            hostname: (alone.and_then(|log| log.host.as_deref()))
                .unwrap_or(&self.node)
                .to_owned(),
            tuple: Tuple {
                src_addr,
                src_port: seen.client_port,
                dst_addr: server.ip(),
                dst_port: server.port(),
            },
            src,
            dst,
            protocol: seen.protocol,
            direction,
            outcome,
            count: seen.count,
            first_seen: seen.first_seen,
            last_seen: seen.last_seen,
            process: process(sighting, owner),
            sources: match (log, alone) {
                (None, _) => BTreeSet::from([Source::Ebpf]),
                (Some(_), None) => BTreeSet::from([Source::Ebpf, Source::Scope]),
                (_, Some(_)) => BTreeSet::from([Source::Scope]),
            },
            via: None,
            connection: seen.connection,
        }
    }

    /// Whether an address is this node's or one of its pods'.
    #[must_use]
    pub fn is_here(&self, address: IpAddr, at: Timestamp, index: &Index) -> bool {
        match index.resolve_client(address, at) {
            Endpoint::Pod { pod, .. } => pod.node.as_deref() == Some(&self.node),
            Endpoint::Node(node) => node.name == self.node,
            Endpoint::Service(_) | Endpoint::External(_) => false,
        }
    }

    /// This node, with the address that its process used.
    fn this_node(&self, used: IpAddr) -> Endpoint {
        Endpoint::Node(Arc::new(Node {
            name: self.node.clone(),
            addresses: vec![used],
        }))
    }
}

/// Whose the socket is. Where only a process's id tells, the address must not tell otherwise: the id may be another process's
/// by now.
fn sure_owner<'a>(sighting: &'a Sighting, index: &Index) -> Option<&'a Owner> {
    let owner = sighting.owner.as_ref()?;
    let by_address = || {
        let seen = &sighting.observation;
        match index.resolve_client(seen.local, seen.last_seen) {
            Endpoint::Pod { pod, .. } => Some(pod),
            _ => None,
        }
    };
    let is_sure = match owner {
        Owner::Container(_) | Owner::Host => true,
        Owner::HostProcess => by_address().is_none(),
        Owner::ContainerOfProcess(container) => {
            match (index.pod_by_uid(&container.pod_uid), by_address()) {
                (Some(pod), Some(by_address)) => pod.uid == by_address.uid,
                (Some(pod), None) => pod.host_network || pod.addresses.is_empty(),
                (None, by_address) => by_address.is_none(),
            }
        }
    };
    is_sure.then_some(owner)
}

/// A pod that the cluster's objects do not have: it is nobody else, neither the pod that had its address before nor the node
/// in whose range the address is.
fn unknown_pod(seen: &Observation, index: &Index) -> Endpoint {
    match index.resolve_client(seen.local, seen.last_seen) {
        // Objects without uids are known by their names.
        Endpoint::Pod { pod, .. } if pod.uid == format!("{}/{}", pod.namespace, pod.name) => {
            Endpoint::Pod { pod, service: None }
        }
        _ => Endpoint::External(seen.local),
    }
}

fn process(sighting: &Sighting, owner: Option<&Owner>) -> Option<Process> {
    let seen = &sighting.observation;
    let container = match owner {
        Some(Owner::Container(container) | Owner::ContainerOfProcess(container)) => {
            container.container.clone()
        }
        _ => None,
    };
    let told = sighting.log.as_deref().and_then(|log| log.process.as_ref());
    let (pid, comm) = match told {
        Some(told) if seen.pid == 0 => (told.pid, &told.comm),
        _ => (seen.pid, &seen.comm),
    };
    (pid != 0 || container.is_some()).then(|| Process {
        pid,
        comm: comm.clone(),
        container,
        fd: told.filter(|told| told.pid == pid).and_then(|told| told.fd),
    })
}

#[cfg(test)]
mod tests;
