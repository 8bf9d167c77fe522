//! From addresses and uids to names.

use std::{net::IpAddr, sync::Arc};

use super::{
    history::{Span, pick},
    index::{Index, NodeId, Owner},
    pod::PodEntry,
    service::{Called, ServiceEntry, ServiceId},
};
use crate::{
    endpoint::{self, Endpoint},
    record::Protocol,
    time::Timestamp,
};

/// What a client called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The server, or the service if the client called a virtual address: which backend answered, only that knows.
    pub endpoint: Endpoint,
    /// The server's own port: the one after translation.
    pub port: u16,
    /// Whether address or port were not the server's own, but those of a service or of a node that forwards them.
    pub virtual_address: bool,
}

impl Server {
    fn direct(endpoint: Endpoint, port: u16) -> Self {
        Self {
            endpoint,
            port,
            virtual_address: false,
        }
    }
}

impl Index {
    /// The pod with this uid, or the static pod to which kubelet gave this uid, if it lives or ended less than
    /// [`RETENTION`](super::RETENTION) ago.
    #[must_use]
    pub fn pod_by_uid(&self, uid: &str) -> Option<Arc<endpoint::Pod>> {
        let entry = self.pods.by_any_uid(uid)?;
        Some(Arc::clone(&entry.pod))
    }

    /// The end of a flow that is this pod's.
    ///
    /// `port` is the pod's own port if it is the server: of the services that select the pod the first by name that leads
    /// to this port is named, else, and for a client, the first by name.
    #[must_use]
    pub fn pod_endpoint(
        &self,
        pod: &Arc<endpoint::Pod>,
        protocol: Protocol,
        port: Option<u16>,
    ) -> Endpoint {
        let entry = self.pods.by_any_uid(&pod.uid);
        Endpoint::Pod {
            pod: Arc::clone(pod),
            service: entry.and_then(|entry| self.service_of(entry, protocol, port)),
        }
    }

    /// Whether this is the address of everybody in a node's range of pods: the last one, unless it is a pod's own at `at`. Not
    /// every network plugin keeps to these ranges, and those with ranges of their own may give that address to a pod.
    #[must_use]
    pub fn is_broadcast(&self, address: IpAddr, at: Timestamp) -> bool {
        self.pod_ranges.ends_at(address) && self.pod_at(self.addresses.of(&address), at).is_none()
    }

    /// The node of this name, if it lives or ended less than [`RETENTION`](super::RETENTION) ago.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<Arc<endpoint::Node>> {
        let node = self.nodes.get(*self.node_ids.get(name)?)?;
        Some(Arc::clone(&node.node))
    }

    /// Whether an address is this node's, or at least in its ranges of pods; `None` if the node is not known.
    #[must_use]
    pub fn is_of_node(&self, name: &str, address: IpAddr) -> Option<bool> {
        let id = *self.node_ids.get(name)?;
        let address = address.to_canonical();
        let mut spans = self.addresses.of(&address).iter();
        let is_own = spans.any(|span| span.owner == Owner::Node(id));
        Some(is_own || self.pod_ranges.owner(address) == Some(id))
    }

    /// The service of this name, if it lives or ended less than [`RETENTION`](super::RETENTION) ago.
    #[must_use]
    pub fn service(&self, namespace: &str, name: &str) -> Option<&Arc<endpoint::Service>> {
        let id = *self.namespaces.get(namespace)?.services.get(name)?;
        Some(self.services.get(id)?.latest())
    }

    /// What a client called at `at` on this address and port:
    ///
    /// 1. a service's cluster, external or load-balancer address and a port of the service: the service and its target
    ///    port;
    /// 2. a pod's address: the pod;
    /// 3. a cluster address and a port that the service does not have: the service and that port;
    /// 4. a node's address, or one in its pod ranges that is no pod's: the service whose node port it is, else the pod to
    ///    which the node forwards the port, else the node, with that address among its own;
    /// 5. an endpoint of `default/kubernetes` and its port: that service, which is the API server where it is on no node;
    /// 6. any other address: external.
    #[must_use]
    pub fn resolve(&self, address: IpAddr, protocol: Protocol, port: u16, at: Timestamp) -> Server {
        let address = address.to_canonical();
        let spans = self.addresses.of(&address);
        if let Some(server) = self.called_service(spans, protocol, port, at) {
            return server;
        }
        if let Some(entry) = self.pod_at(spans, at) {
            let endpoint = self.endpoint_of(entry, protocol, Some(port));
            return Server::direct(endpoint, port);
        }
        let clusters = spans.iter().copied().filter_map(|span| {
            let Owner::ClusterAddress(id) = span.owner else {
                return None;
            };
            Some(owned_by(span, id))
        });
        if let Some(service) = pick(clusters, at).and_then(|span| self.services.get(span.owner)) {
            return Server {
                endpoint: Endpoint::Service(Arc::clone(service.service(at))),
                port,
                virtual_address: true,
            };
        }
        if let Some(id) = self.node_at(spans, address, at) {
            return self.called_node(id, address, protocol, port, at);
        }
        Server::direct(self.outside(address, Some((protocol, port)), at), port)
    }

    /// Whom a server saw at `at` at the other end: a pod, a node (also for an address in its pod ranges that is no pod's,
    /// which then stands among its addresses), the API server on no node (as the service `default/kubernetes`) or an
    /// external address.
    #[must_use]
    pub fn resolve_client(&self, address: IpAddr, at: Timestamp) -> Endpoint {
        let address = address.to_canonical();
        let spans = self.addresses.of(&address);
        if let Some(entry) = self.pod_at(spans, at) {
            // The protocol matters only with a port.
            return self.endpoint_of(entry, Protocol::Tcp, None);
        }
        match self.node_at(spans, address, at) {
            Some(id) => self.node_endpoint(id, address),
            None => self.outside(address, None, at),
        }
    }

    /// An address that is no pod's and no node's; `called` is the port if it is the server's.
    fn outside(&self, address: IpAddr, called: Option<(Protocol, u16)>, at: Timestamp) -> Endpoint {
        let api_server = self.api_server().filter(|service| {
            service.service(at).backends.contains(&address)
                && called.is_none_or(|(protocol, port)| service.leads_to(&[], protocol, port))
        });
        match api_server {
            Some(service) => Endpoint::Service(Arc::clone(service.service(at))),
            None => Endpoint::External(address),
        }
    }

    /// The service that every API server makes and keeps the endpoints of: its own addresses and those of its peers.
    fn api_server(&self) -> Option<&ServiceEntry> {
        let id = self.namespaces.get("default")?.services.get("kubernetes")?;
        self.services.get(*id)
    }

    fn endpoint_of(&self, entry: &PodEntry, protocol: Protocol, port: Option<u16>) -> Endpoint {
        Endpoint::Pod {
            pod: Arc::clone(&entry.pod),
            service: self.service_of(entry, protocol, port),
        }
    }

    fn service_of(
        &self,
        entry: &PodEntry,
        protocol: Protocol,
        port: Option<u16>,
    ) -> Option<Arc<endpoint::Service>> {
        let mut services = entry
            .services
            .iter()
            .filter_map(|id| self.services.get(*id));
        let leads_here = |service: &&ServiceEntry| {
            port.is_some_and(|port| service.leads_to(&entry.ports, protocol, port))
        };
        let service = match entry.services.as_slice() {
            // Nearly always: there is no choice.
            [id] => self.services.get(*id),
            _ => services
                .clone()
                .find(leads_here)
                .or_else(|| services.next()),
        };
        Some(Arc::clone(service?.latest()))
    }

    fn pod_at(&self, spans: &[Span<Owner>], at: Timestamp) -> Option<&PodEntry> {
        let pods = spans.iter().copied().filter_map(|span| {
            let Owner::Pod(id) = span.owner else {
                return None;
            };
            Some(owned_by(span, id))
        });
        self.pods.get(pick(pods, at)?.owner)
    }

    fn node_at(&self, spans: &[Span<Owner>], address: IpAddr, at: Timestamp) -> Option<NodeId> {
        let nodes = spans.iter().copied().filter_map(|span| {
            let Owner::Node(id) = span.owner else {
                return None;
            };
            Some(owned_by(span, id))
        });
        let span = pick(nodes, at);
        span.map(|span| span.owner)
            .or_else(|| self.pod_ranges.owner(address))
    }

    fn node_endpoint(&self, id: NodeId, address: IpAddr) -> Endpoint {
        let Some(entry) = self.nodes.get(id) else {
            return Endpoint::External(address);
        };
        if entry.node.addresses.contains(&address) {
            return Endpoint::Node(Arc::clone(&entry.node));
        }
        let mut node = endpoint::Node::clone(&entry.node);
        node.addresses.push(address);
        Endpoint::Node(Arc::new(node))
    }

    /// The service that has this port at an address with these spans.
    fn called_service(
        &self,
        spans: &[Span<Owner>],
        protocol: Protocol,
        port: u16,
        at: Timestamp,
    ) -> Option<Server> {
        let services = spans.iter().copied().filter_map(|span| {
            let (Owner::ClusterAddress(id) | Owner::ExternalAddress(id)) = span.owner else {
                return None;
            };
            Some(owned_by(span, id))
        });
        self.called_among(services, protocol, Called::Port(port), at)
    }

    fn called_node(
        &self,
        id: NodeId,
        address: IpAddr,
        protocol: Protocol,
        port: u16,
        at: Timestamp,
    ) -> Server {
        let services = self.node_ports.of(&(protocol, port)).iter().copied();
        let called = Called::NodePort(port);
        if let Some(server) = self.called_among(services, protocol, called, at) {
            return server;
        }
        self.forwarded(id, protocol, port, at)
            .unwrap_or_else(|| Server::direct(self.node_endpoint(id, address), port))
    }

    fn called_among(
        &self,
        spans: impl Iterator<Item = Span<ServiceId>> + Clone,
        protocol: Protocol,
        called: Called,
        at: Timestamp,
    ) -> Option<Server> {
        let leading = spans.filter_map(|span| {
            let service = self.services.get(span.owner)?;
            let target = service.target(protocol, called, at)?;
            Some(Span {
                owner: (service, target),
                from: span.from,
                to: span.to,
                surely_to: span.surely_to,
            })
        });
        let (service, port) = pick(leading, at)?.owner;
        Some(Server {
            endpoint: Endpoint::Service(Arc::clone(service.service(at))),
            port,
            virtual_address: true,
        })
    }

    /// The pod to which the node's CNI forwards a port.
    fn forwarded(
        &self,
        id: NodeId,
        protocol: Protocol,
        port: u16,
        at: Timestamp,
    ) -> Option<Server> {
        let name = self.nodes.get(id)?.node.name.as_str().into();
        let spans = self.host_ports.of(&(name, protocol, port)).iter().copied();
        let entry = self.pods.get(pick(spans, at)?.owner)?;
        let forwarded = entry
            .ports
            .iter()
            .find(|known| known.protocol == protocol && known.host_port == Some(port))?;
        Some(Server {
            endpoint: self.endpoint_of(entry, protocol, Some(forwarded.port)),
            port: forwarded.port,
            virtual_address: true,
        })
    }
}

fn owned_by<O>(span: Span<Owner>, owner: O) -> Span<O> {
    Span {
        owner,
        from: span.from,
        to: span.to,
        surely_to: span.surely_to,
    }
}
