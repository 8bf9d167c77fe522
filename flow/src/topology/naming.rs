//! Names for both ends of a record.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::index::Index;
use crate::{
    endpoint::{Endpoint, Node},
    record::{Direction, FlowRecord, Protocol},
};

impl Index {
    /// Names both ends of a record of which only the observed end is named, and that in part: a pod by its uid, a node by
    /// its name. The other end is the address and port in the tuple, as the observer's socket had them; or the server itself, where
    /// the observer knows it, and `via` what its socket had.
    ///
    /// The index must be about the whole cluster. Whether the observer has it or who collects the records, the result is
    /// the same; but it is not to be done twice, because a service's port becomes its target port by it.
    pub fn name_ends(&self, record: &mut FlowRecord) {
        let (protocol, at) = (record.protocol, record.last_seen);
        let tuple = &mut record.tuple;
        match record.direction {
            Direction::Egress => {
                let server = self.resolve(tuple.dst_addr, protocol, tuple.dst_port, at);
                let called = SocketAddr::new(tuple.dst_addr, tuple.dst_port);
                if server.virtual_address {
                    record.via = Some(called);
                }
                tuple.dst_port = server.port;
                record.dst = server.endpoint;
                record.src = self.observed(&record.src, tuple.src_addr, protocol, None);
            }
            Direction::Ingress => {
                let port = Some(tuple.dst_port);
                record.src = self.resolve_client(tuple.src_addr, at);
                record.dst = self.observed(&record.dst, tuple.dst_addr, protocol, port);
            }
        }
    }

    /// Whether more will be known of the record's other end, named by [`Self::name_ends`], once the API has told of a pod
    /// that has just begun: such a pod's address looks like an external one, or like one that its node has for itself, or
    /// like that of the pod which had it before.
    #[must_use]
    pub fn may_be_a_young_pod(&self, record: &FlowRecord) -> bool {
        let at = record.last_seen;
        let (other, address) = match record.direction {
            Direction::Egress => (&record.dst, record.tuple.dst_addr),
            Direction::Ingress => (&record.src, record.tuple.src_addr),
        };
        match other {
            Endpoint::External(_) => true,
            Endpoint::Node(node) => {
                let known = self.node(&node.name);
                !known.is_some_and(|known| known.addresses.contains(&address))
            }
            Endpoint::Pod { .. } => {
                let spans = self.addresses.of(&address.to_canonical());
                !spans.iter().any(|span| span.contains(at))
            }
            Endpoint::Service(_) => false,
        }
    }

    fn observed(
        &self,
        end: &Endpoint,
        address: IpAddr,
        protocol: Protocol,
        server_port: Option<u16>,
    ) -> Endpoint {
        match end {
            Endpoint::Pod { pod, .. } => match self.pod_by_uid(&pod.uid) {
                Some(pod) => self.pod_endpoint(&pod, protocol, server_port),
                None => end.clone(),
            },
            Endpoint::Node(node) => {
                let known = self.node(&node.name);
                let mut addresses = known.map_or_else(Vec::new, |node| node.addresses.clone());
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
                Endpoint::Node(Arc::new(Node {
                    name: node.name.clone(),
                    addresses,
                }))
            }
            // Who was there knew no better.
            Endpoint::External(_) | Endpoint::Service(_) => end.clone(),
        }
    }
}
