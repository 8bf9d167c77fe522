//! From the addresses in a log to the ends of records, ready to be written.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use flow::{
    endpoint::Endpoint,
    record::Protocol,
    time::Timestamp,
    topology::{GRACE, Index, Objects},
};

/// Ends that are kept ready. A cluster has some thousand addresses; of strangers there may be any number.
const MAX_KEPT: usize = 8_192;

/// The cluster whose connections are linked.
#[derive(Debug)]
pub struct Topology {
    index: Index,
    /// Sorted: when an address may become somebody else's.
    changes: Vec<Timestamp>,
}

impl Topology {
    /// `now` is when the objects were listed.
    #[must_use]
    pub fn new(objects: Objects, now: Timestamp) -> Self {
        let starts = (objects.pods.iter().map(|pod| pod.started))
            .chain(objects.services.iter().map(|service| service.created))
            .chain(objects.nodes.iter().map(|node| node.created));
        let mut changes: Vec<Timestamp> = starts
            .flatten()
            .chain([now])
            .flat_map(|start| {
                [
                    start.saturating_sub(GRACE),
                    start,
                    start.saturating_add(GRACE),
                ]
            })
            .collect();
        changes.sort_unstable();
        changes.dedup();
        let mut index = Index::default();
        index.replace(objects, now);
        Self { index, changes }
    }

    /// The span around a time in which every address is whose it is at that time.
    fn span(&self, time: Timestamp) -> Range<Timestamp> {
        let after = self.changes.partition_point(|change| *change <= time);
        let from = after.checked_sub(1).map(|last| self.changes[last]);
        let to = self.changes.get(after).copied();
        from.unwrap_or_default()..to.unwrap_or(Timestamp::from_nanos(u64::MAX))
    }

    /// The end of a connection. The port is the server's own, and given for the server.
    fn resolve(&self, address: IpAddr, port: Option<u16>, time: Timestamp) -> Endpoint {
        match self.index.resolve_client(address, time) {
            Endpoint::Pod { pod, .. } => self.index.pod_endpoint(&pod, Protocol::Tcp, port),
            other => other,
        }
    }
}

/// An end of a record.
#[derive(Debug)]
pub(super) struct Name {
    /// `src` or `dst` of the record, in JSON.
    pub(super) json: String,
    /// The address as the record has it.
    pub(super) address: String,
    /// Whether the topology knows whose the address is.
    pub(super) is_known: bool,
    /// Where it is, if it is a pod's.
    pub(super) node: Option<String>,
}

/// The ends that were asked for lately.
#[derive(Debug)]
pub(super) struct Names<'a> {
    topology: &'a Topology,
    /// When what is kept is true.
    span: Range<Timestamp>,
    kept: HashMap<(IpAddr, Option<u16>), Name>,
}

impl<'a> Names<'a> {
    pub(super) fn new(topology: &'a Topology) -> Self {
        Self {
            topology,
            span: topology.span(Timestamp::default()),
            kept: HashMap::new(),
        }
    }

    /// Whether a client finds a service there, and not the server itself.
    pub(super) fn is_virtual(&self, server: SocketAddr, time: Timestamp) -> bool {
        let index = &self.topology.index;
        index
            .resolve(server.ip(), Protocol::Tcp, server.port(), time)
            .virtual_address
    }

    /// The ends of a connection: an address, and for the server its port.
    pub(super) fn both(
        &mut self,
        client: IpAddr,
        server: (IpAddr, u16),
        time: Timestamp,
    ) -> serde_json::Result<(&Name, &Name)> {
        if !self.span.contains(&time) {
            self.span = self.topology.span(time);
            self.kept.clear();
        }
        if self.kept.len() >= MAX_KEPT {
            self.kept.clear();
        }
        let (client, server) = ((client, None), (server.0, Some(server.1)));
        for key in [client, server] {
            if !self.kept.contains_key(&key) {
                let name = Name::new(self.topology.resolve(key.0, key.1, time), key.0)?;
                self.kept.insert(key, name);
            }
        }
        Ok((&self.kept[&client], &self.kept[&server]))
    }
}

impl Name {
    fn new(endpoint: Endpoint, address: IpAddr) -> serde_json::Result<Self> {
        Ok(Self {
            json: serde_json::to_string(&endpoint)?,
            address: address.to_string(),
            is_known: !matches!(endpoint, Endpoint::External(_)),
            node: match endpoint {
                Endpoint::Pod { pod, .. } => pod.node.as_deref().map(str::to_owned),
                _ => None,
            },
        })
    }
}
