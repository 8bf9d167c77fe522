//! The flow record: what one observer saw of the connections between two endpoints.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use crate::{
    endpoint::{Endpoint, EndpointJson},
    time::Timestamp,
};

/// What one observer saw of the connections between one client, one server and one port in one span of time.
///
/// The JSON form is a superset of what MicroShield's `linker.py` writes, so its `generator.py` reads it; records of
/// MicroShield are read too, the fields that they lack take the defaults given here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RecordJson", into = "RecordJson")]
pub struct FlowRecord {
    /// When the last of the connections was seen.
    pub timestamp: Timestamp,
    /// The node of the observer.
    pub hostname: String,
    /// Addresses and ports.
    pub tuple: Tuple,
    /// The client: the end that opened the connection.
    pub src: Endpoint,
    /// The server.
    pub dst: Endpoint,
    /// The transport protocol; default TCP.
    pub protocol: Protocol,
    /// Which end's socket was observed; default [`Direction::Ingress`], and [`Direction::Egress`] where the server alone is
    /// outside of the cluster, where nobody observes.
    pub direction: Direction,
    /// Whether the connections came about; default [`Outcome::Established`].
    pub outcome: Outcome,
    /// How many connections; default 1.
    pub count: u64,
    /// When the first of them was seen; default `timestamp`.
    pub first_seen: Timestamp,
    /// When the last of them was seen; default `timestamp`.
    pub last_seen: Timestamp,
    /// The process at the observed end, if known.
    pub process: Option<Process>,
    /// Who saw it; default empty.
    pub sources: BTreeSet<Source>,
    /// The virtual address and port that the client called, where that is not the server's own.
    pub via: Option<SocketAddr>,
    /// What happened to a single connection, where the observer tells each apart; then `tuple` has the client's port too.
    pub connection: Option<Connection>,
}

/// Addresses and ports of a flow, client first. Ports are in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tuple {
    /// The client's address.
    pub src_addr: IpAddr,
    /// The client's port; 0 where connections from many ports are one record.
    pub src_port: u16,
    /// The address that the observer's socket had for the server: for a client that called a service, the service's.
    pub dst_addr: IpAddr,
    /// The server's own port: the target port where a service was called, because policies are judged after
    /// translation.
    pub dst_port: u16,
}

/// A transport protocol that NetworkPolicies know.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Transmission Control Protocol.
    #[default]
    Tcp,
    /// User Datagram Protocol.
    Udp,
    /// Stream Control Transmission Protocol.
    Sctp,
}

impl Protocol {
    /// The name as NetworkPolicies and services write it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Which end's socket was observed.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The client's: the observer saw a connection leave.
    Egress,
    /// The server's: the observer saw a connection arrive.
    #[default]
    Ingress,
}

impl Direction {
    /// The name of the field of a NetworkPolicy's `spec` that holds the rules for what is seen at this end.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// Whether a connection came about.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The handshake was completed, or data was exchanged.
    #[default]
    Established,
    /// The attempt was refused, filtered or reset. It is no reason for a rule that allows it.
    Failed,
}

/// What happened to a single connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// What happened.
    pub event: ConnectionEvent,
    /// Nanoseconds from the beginning of the handshake at the client, or from its end at the server, until this happened.
    pub duration_ns: u64,
    /// Bytes that the observed end has sent, each counted once.
    pub bytes_sent: u64,
    /// Bytes that the observed end has received. The other end's FIN counts as one, as it does in the kernel.
    pub bytes_received: u64,
}

/// Something that happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectionEvent {
    /// A connect succeeded or failed.
    Connect,
    /// The connection was accepted.
    Accept,
    /// It ended. The record's count is 0, because it was counted when it began.
    Close,
}

/// The process at the observed end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the node's own pid namespace.
    pub pid: u32,
    /// The thread's name, at most 15 bytes.
    pub comm: String,
    /// The container's id, without the runtime's prefix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The socket's file descriptor, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<u32>,
}

/// Where an observation comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// MicroShield's own kernel programs.
    Ebpf,
    /// The Weave Scope probe.
    Scope,
}

/// The JSON form. Its ends may be left as they stand there.
#[derive(Serialize, Deserialize)]
pub(crate) struct RecordJson<E = EndpointJson> {
    timestamp: Timestamp,
    hostname: String,
    tuple: Tuple,
    src: E,
    dst: E,
    #[serde(default)]
    protocol: Protocol,
    #[serde(default)]
    direction: Option<Direction>,
    #[serde(default)]
    outcome: Outcome,
    #[serde(default = "one")]
    count: u64,
    #[serde(default)]
    first_seen: Option<Timestamp>,
    #[serde(default)]
    last_seen: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    process: Option<Process>,
    #[serde(default)]
    sources: BTreeSet<Source>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    via: Option<SocketAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    connection: Option<Connection>,
}

const fn one() -> u64 {
    1
}

impl From<FlowRecord> for RecordJson {
    fn from(record: FlowRecord) -> Self {
        Self {
            timestamp: record.timestamp,
            hostname: record.hostname,
            tuple: record.tuple,
            src: record.src.into(),
            dst: record.dst.into(),
            protocol: record.protocol,
            direction: Some(record.direction),
            outcome: record.outcome,
            count: record.count,
            first_seen: Some(record.first_seen),
            last_seen: Some(record.last_seen),
            process: record.process,
            sources: record.sources,
            via: record.via,
            connection: record.connection,
        }
    }
}

impl TryFrom<RecordJson> for FlowRecord {
    type Error = &'static str;

    fn try_from(json: RecordJson) -> Result<Self, Self::Error> {
        json.with_ends(|end, address| Ok(end.into_endpoint(address)))
    }
}

impl<E> RecordJson<E> {
    /// The record, with ends that are made of their JSON form and their address in the tuple.
    pub(crate) fn with_ends<Error: From<&'static str>>(
        self,
        mut endpoint: impl FnMut(E, IpAddr) -> Result<Endpoint, Error>,
    ) -> Result<FlowRecord, Error> {
        let first_seen = self.first_seen.unwrap_or(self.timestamp);
        let last_seen = self.last_seen.unwrap_or(self.timestamp);
        if last_seen < first_seen {
            return Err("`last_seen` is before `first_seen`".into());
        }
        if self.tuple.dst_port == 0 {
            return Err("`tuple.dst_port` is 0: the server's port is missing".into());
        }
        let src = endpoint(self.src, self.tuple.src_addr)?;
        let dst = endpoint(self.dst, self.tuple.dst_addr)?;
        Ok(FlowRecord {
            direction: self.direction.unwrap_or_else(|| observable_end(&src, &dst)),
            src,
            dst,
            timestamp: self.timestamp,
            hostname: self.hostname,
            tuple: self.tuple,
            protocol: self.protocol,
            outcome: self.outcome,
            count: self.count,
            first_seen,
            last_seen,
            process: self.process,
            sources: self.sources,
            via: self.via,
            connection: self.connection,
        })
    }
}

/// The end that an observer who does not say which it was has seen: one in the cluster, and of two of them the server.
fn observable_end(src: &Endpoint, dst: &Endpoint) -> Direction {
    match (src, dst) {
        (Endpoint::External(_), _) => Direction::Ingress,
        (_, Endpoint::External(_)) => Direction::Egress,
        _ => Direction::Ingress,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Encoding, decode, encode};

    /// A record as MicroShield's `linker.py` writes it.
    const ORIGINAL: &str = r#"{"timestamp": 1660793051.696728, "hostname": "node-1",
        "tuple": {"src_addr": "10.0.1.224", "src_port": 59650, "dst_addr": "10.0.1.112", "dst_port": 80},
        "src": {"pod": {}, "service": {}},
        "dst": {"pod": {"id": "a7f1;<pod>", "labels": {"name": "catalogue"}, "namespace": "sock-shop", "name": "catalogue-1"},
                "service": {"id": "9d23;<service>", "labels": {"name": "catalogue"}, "namespace": "sock-shop",
                            "name": "catalogue", "selector": "name=catalogue,tier=web"}}}"#;

    #[test]
    fn a_record_of_microshield_is_read_with_defaults() {
        let record: FlowRecord = serde_json::from_str(ORIGINAL).unwrap();
        assert_eq!(record.src, Endpoint::External([10, 0, 1, 224].into()));
        assert_eq!(record.protocol, Protocol::Tcp);
        assert_eq!(record.direction, Direction::Ingress);
        assert_eq!(record.count, 1);
        assert_eq!(record.first_seen, record.timestamp);
        let Endpoint::Pod { pod, service } = &record.dst else {
            panic!("{:?}", record.dst);
        };
        assert_eq!(pod.uid, "a7f1");
        let selector = &service.as_ref().unwrap().selector;
        assert_eq!(selector["name"], "catalogue");
        assert_eq!(selector["tier"], "web");
    }

    #[test]
    fn a_record_without_direction_was_seen_at_the_end_in_the_cluster() {
        let pod = r#"{"pod": {"id": "1", "labels": {}, "namespace": "shop", "name": "web"}, "service": {}}"#;
        let nobody = r#"{"pod": {}, "service": {}}"#;
        for (src, dst, expected) in [
            (pod, nobody, Direction::Egress),
            (nobody, pod, Direction::Ingress),
            (pod, pod, Direction::Ingress),
            (nobody, nobody, Direction::Ingress),
        ] {
            let text = format!(
                r#"{{"timestamp": 1, "hostname": "node-1", "src": {src}, "dst": {dst}, "tuple":
                {{"src_addr": "10.0.0.1", "src_port": 1, "dst_addr": "10.0.0.2", "dst_port": 80}}}}"#
            );
            let record: FlowRecord = serde_json::from_str(&text).unwrap();
            assert_eq!(record.direction, expected, "{src} -> {dst}");
            let said = text.replacen('{', r#"{"direction": "ingress","#, 1);
            let record: FlowRecord = serde_json::from_str(&said).unwrap();
            assert_eq!(record.direction, Direction::Ingress);
        }
    }

    #[test]
    fn a_record_survives_both_encodings() {
        let record: FlowRecord = serde_json::from_str(ORIGINAL).unwrap();
        for encoding in [Encoding::MessagePack, Encoding::Json] {
            let bytes = encode(&record, encoding).unwrap();
            assert_eq!(decode::<FlowRecord>(&bytes, encoding).unwrap(), record);
        }
    }

    #[test]
    fn a_missing_field_is_named() {
        for (field, text) in [
            (
                "namespace",
                r#""namespace": "sock-shop", "name": "catalogue-1""#,
            ),
            ("dst_addr", r#""dst_addr": "10.0.1.112", "#),
            ("hostname", r#""hostname": "node-1","#),
        ] {
            let broken = ORIGINAL.replace(text, r#""name": "x""#);
            let broken = if field == "namespace" {
                broken
            } else {
                ORIGINAL.replace(text, "")
            };
            let error = serde_json::from_str::<FlowRecord>(&broken).unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains(&format!("missing field `{field}`")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_server_without_port_is_refused() {
        let broken = ORIGINAL.replace(r#""dst_port": 80"#, r#""dst_port": 0"#);
        assert!(serde_json::from_str::<FlowRecord>(&broken).is_err());
    }
}
