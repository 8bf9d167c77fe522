//! From what the kernel counted to a flow record with both ends named.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Node},
    record::{Direction, FlowRecord, Outcome, Process, Source, Tuple},
    topology::Index,
};

use crate::{
    capture::{Event, Observation},
    identity::{Identity, Owner},
};

/// Why an observation is no flow of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skipped {
    /// Both ends are one host: nothing that a policy could judge.
    Loopback,
    /// The socket belongs to another node that shares this kernel.
    OtherNode,
}

/// Names the ends of observations on one node.
#[derive(Debug)]
pub struct Resolver {
    node: String,
    identity: Identity,
    /// Whether every socket of this kernel is of this node.
    alone: bool,
}

impl Resolver {
    /// For the node of this name, which is `alone` on this kernel unless nodes were told apart by their cgroups.
    #[must_use]
    pub fn new(node: String, identity: Identity, alone: bool) -> Self {
        Self {
            node,
            identity,
            alone,
        }
    }

    /// Names both ends of all observations of one drain.
    pub fn resolve_all(
        &mut self,
        observations: &[Observation],
        index: &Index,
    ) -> Vec<Result<FlowRecord, Skipped>> {
        self.identity.next_round();
        observations
            .iter()
            .map(|observation| self.resolve(observation, index))
            .collect()
    }

    fn resolve(&mut self, seen: &Observation, index: &Index) -> Result<FlowRecord, Skipped> {
        if seen.local.is_loopback() || seen.remote.is_loopback() || seen.local == seen.remote {
            return Err(Skipped::Loopback);
        }
        let owner = self.identity.owner(seen.cgroup, seen.pid);
        let (src, dst, tuple, direction, outcome, via);
        match seen.event {
            Event::Connect(result) => {
                let server = index.resolve(seen.remote, seen.protocol, seen.port, seen.last_seen);
                src = self.local_end(seen, owner.as_ref(), None, index)?;
                dst = server.endpoint;
                tuple = Tuple {
                    src_addr: seen.local,
                    src_port: 0,
                    dst_addr: seen.remote,
                    dst_port: server.port,
                };
                via = server
                    .virtual_address
                    .then_some(SocketAddr::new(seen.remote, seen.port));
                direction = Direction::Egress;
                outcome = result;
            }
            Event::Accept => {
                src = index.resolve_client(seen.remote, seen.last_seen);
                dst = self.local_end(seen, owner.as_ref(), Some(seen.port), index)?;
                tuple = Tuple {
                    src_addr: seen.remote,
                    src_port: 0,
                    dst_addr: seen.local,
                    dst_port: seen.port,
                };
                via = None;
                direction = Direction::Ingress;
                outcome = Outcome::Established;
            }
        }
        Ok(FlowRecord {
            timestamp: seen.last_seen,
            hostname: self.node.clone(),
            tuple,
            src,
            dst,
            protocol: seen.protocol,
            direction,
            outcome,
            count: seen.count,
            first_seen: seen.first_seen,
            last_seen: seen.last_seen,
            process: process(seen, owner),
            sources: BTreeSet::from([Source::Ebpf]),
            via,
        })
    }

    /// The end whose socket was observed: by its cgroup where that tells, else by its address.
    fn local_end(
        &self,
        seen: &Observation,
        owner: Option<&Owner>,
        server_port: Option<u16>,
        index: &Index,
    ) -> Result<Endpoint, Skipped> {
        match owner {
            Some(Owner::Container(container)) => Ok(match index.pod_by_uid(&container.pod_uid) {
                Some(pod) => index.pod_endpoint(&pod, seen.protocol, server_port),
                None => self.unknown_pod(seen, index),
            }),
            Some(Owner::Host) => Ok(self.this_node(seen.local, index)),
            None => match index.resolve_client(seen.local, seen.last_seen) {
                Endpoint::Pod { pod, .. } if pod.node.as_deref() == Some(&self.node) => {
                    Ok(index.pod_endpoint(&pod, seen.protocol, server_port))
                }
                Endpoint::Node(node) if node.name == self.node => Ok(Endpoint::Node(node)),
                by_address if self.alone => Ok(by_address),
                _ => Err(Skipped::OtherNode),
            },
        }
    }

    /// A pod that the cluster's objects do not have: it is nobody else, neither the pod that had its address before nor the
    /// node in whose range the address is.
    fn unknown_pod(&self, seen: &Observation, index: &Index) -> Endpoint {
        match index.resolve_client(seen.local, seen.last_seen) {
            // Objects without uids are known by their names.
            Endpoint::Pod { pod, service }
                if pod.uid == format!("{}/{}", pod.namespace, pod.name) =>
            {
                Endpoint::Pod { pod, service }
            }
            _ => Endpoint::External(seen.local),
        }
    }

    /// This node, with the address that its process used among its own.
    fn this_node(&self, used: IpAddr, index: &Index) -> Endpoint {
        let mut addresses = index
            .node(&self.node)
            .map_or_else(Vec::new, |node| node.addresses.clone());
        if !addresses.contains(&used) {
            addresses.push(used);
        }
        Endpoint::Node(Arc::new(Node {
            name: self.node.clone(),
            addresses,
        }))
    }
}

fn process(seen: &Observation, owner: Option<Owner>) -> Option<Process> {
    let container = match owner {
        Some(Owner::Container(container)) => container.container,
        _ => None,
    };
    (seen.pid != 0 || container.is_some()).then(|| Process {
        pid: seen.pid,
        comm: seen.comm.clone(),
        container,
    })
}
