//! The form that a batch has on its way.
//!
//! A node's pods talk to the same few others again and again, and what a pod is takes half a KiB to say. So a batch says each
//! end once, in a table, and its flows refer to the places there; processes likewise. In MessagePack an end is an encoded
//! message of its own, as binary data: equal bytes are equal ends, and who has met an end before need not decode it again.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use serde_json::value::RawValue;

use super::{Batch, Encoding, Health, Window, WireError, from_slice, to_vec};
use crate::{
    endpoint::{Endpoint, Node, Pod, Service},
    record::{Direction, FlowRecord, Outcome, Process, Protocol, Source, Tuple},
    time::Timestamp,
};

/// A batch, with its ends in a table. `E` is what an end is: decoded or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound(deserialize = "E: Deserialize<'de>"))]
pub struct Packed<E> {
    /// As in [`Batch`]. It comes first: [`super::with_sequence`] relies on that.
    pub sequence: u64,
    /// As in [`Batch`].
    pub window: Window,
    /// The node of the observer, and for flows that name none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hostname: String,
    /// Who saw the flows that do not say it themselves.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub sources: BTreeSet<Source>,
    /// The ends of the flows.
    #[serde(default = "Vec::new")]
    pub ends: Vec<E>,
    /// The processes of the flows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub processes: Vec<Arc<Process>>,
    /// The flows.
    pub flows: Vec<Flow>,
    /// As in [`Batch`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub losses: BTreeMap<String, u64>,
    /// As in [`Batch`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
}

/// A flow of a batch: a [`FlowRecord`] without what many have in common. It has no port of the client and tells no single
/// connections apart.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// The client's place in the table of ends.
    pub src: u32,
    /// The server's.
    pub dst: u32,
    /// The server's own port.
    pub port: u16,
    /// As in a record; default TCP.
    #[serde(default, skip_serializing_if = "is_default")]
    pub protocol: Protocol,
    /// As in a record; default [`Direction::Ingress`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub direction: Direction,
    /// As in a record; default [`Outcome::Established`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub outcome: Outcome,
    /// How many connections; default 1.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub count: u64,
    /// When the first of them was seen; default `last_seen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_seen: Option<Timestamp>,
    /// When the last of them was seen.
    pub last_seen: Timestamp,
    /// The record's own time; default `last_seen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<Timestamp>,
    /// The place in the table of processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<u32>,
    /// The address and port that the client called, where these are not the server's own.
    #[serde(default, with = "text", skip_serializing_if = "Option::is_none")]
    pub via: Option<SocketAddr>,
    /// The observer's node, where it is not the batch's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Box<str>>,
    /// Who saw it, where these are not the batch's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sources: Option<BTreeSet<Source>>,
}

/// One end of flows: who it is, and the address at which it was seen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    /// The address in the record's tuple.
    pub address: IpAddr,
    /// Who that is.
    pub endpoint: Endpoint,
}

/// An end that is not decoded: JSON text or MessagePack, as the message that it is a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawEnd<'a>(pub &'a [u8]);

/// What does not fit together in a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}", self.field(), self.problem())]
pub enum Misfit {
    /// A flow refers to what is not there.
    NoSuchPlace {
        /// The flow's place.
        index: usize,
        /// Which of its fields.
        field: &'static str,
        /// What it says.
        place: u32,
    },
    /// No flow refers to an end.
    Unused {
        /// The end's place.
        index: usize,
    },
}

impl Misfit {
    /// The field.
    #[must_use]
    pub fn field(&self) -> String {
        match self {
            Self::NoSuchPlace { index, field, .. } => format!("flows[{index}].{field}"),
            Self::Unused { index } => format!("ends[{index}]"),
        }
    }

    /// What about it.
    #[must_use]
    pub fn problem(&self) -> String {
        match self {
            Self::NoSuchPlace { place, .. } => {
                format!("there is no {place} in the batch's table")
            }
            Self::Unused { .. } => "is that of no flow".to_owned(),
        }
    }
}

/// The form of an end. Without `pod`, `service` and `node` it is external.
#[derive(Serialize, Deserialize)]
struct EndForm<'a> {
    address: IpAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<Cow<'a, Arc<Pod>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    service: Option<Cow<'a, Arc<Service>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Cow<'a, Arc<Node>>>,
}

impl<'a> From<&'a End> for EndForm<'a> {
    fn from(end: &'a End) -> Self {
        let mut form = Self {
            address: end.address,
            pod: None,
            service: None,
            node: None,
        };
        match &end.endpoint {
            Endpoint::Pod { pod, service } => {
                form.pod = Some(Cow::Borrowed(pod));
                form.service = service.as_ref().map(Cow::Borrowed);
            }
            Endpoint::Service(service) => form.service = Some(Cow::Borrowed(service)),
            Endpoint::Node(node) => form.node = Some(Cow::Borrowed(node)),
            Endpoint::External(_) => {}
        }
        form
    }
}

impl From<EndForm<'_>> for End {
    fn from(form: EndForm<'_>) -> Self {
        let service = form.service.map(Cow::into_owned);
        let endpoint = match (form.pod, service, form.node) {
            (Some(pod), service, _) => Endpoint::Pod {
                pod: pod.into_owned(),
                service,
            },
            (None, Some(service), _) => Endpoint::Service(service),
            (None, None, Some(node)) => Endpoint::Node(node.into_owned()),
            (None, None, None) => Endpoint::External(form.address),
        };
        Self {
            address: form.address,
            endpoint,
        }
    }
}

impl RawEnd<'_> {
    /// What it says.
    ///
    /// # Errors
    /// If it is no end.
    pub fn decode(self, encoding: Encoding) -> Result<End, WireError> {
        from_slice::<EndForm<'_>>(self.0, encoding).map(End::from)
    }
}

/// In JSON, which is for people, an object; else the same in MessagePack, as binary data.
impl Serialize for End {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let form = EndForm::from(self);
        if serializer.is_human_readable() {
            return form.serialize(serializer);
        }
        let bytes = to_vec(&form, Encoding::MessagePack).map_err(ser::Error::custom)?;
        serializer.serialize_bytes(&bytes)
    }
}

impl<'de> Deserialize<'de> for End {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            return EndForm::deserialize(deserializer).map(Self::from);
        }
        let raw = RawEnd::deserialize(deserializer)?;
        raw.decode(Encoding::MessagePack).map_err(de::Error::custom)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for RawEnd<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = <&RawValue>::deserialize(deserializer)?;
            Ok(Self(text.get().as_bytes()))
        } else {
            Deserialize::deserialize(deserializer).map(Self)
        }
    }
}

impl<E> Packed<E> {
    /// Whether every flow refers to what there is, and some to each end: what nobody needs is not taken in.
    ///
    /// # Errors
    /// The first that does not, or that none does to.
    pub fn check(&self) -> Result<(), Misfit> {
        let mut is_used = vec![false; self.ends.len()];
        for (index, flow) in self.flows.iter().enumerate() {
            let missing = |field, place| Misfit::NoSuchPlace {
                index,
                field,
                place,
            };
            for (field, place) in [("src", flow.src), ("dst", flow.dst)] {
                let end = is_used.get_mut(place as usize);
                *end.ok_or_else(|| missing(field, place))? = true;
            }
            if let Some(place) = flow.process
                && place as usize >= self.processes.len()
            {
                return Err(missing("process", place));
            }
        }
        match is_used.iter().position(|is_used| !is_used) {
            Some(index) => Err(Misfit::Unused { index }),
            None => Ok(()),
        }
    }

    /// The same with ends that are made of these.
    ///
    /// # Errors
    /// As `make`.
    pub fn try_map<T, Error>(
        self,
        make: impl FnMut(E) -> Result<T, Error>,
    ) -> Result<Packed<T>, Error> {
        Ok(Packed {
            sequence: self.sequence,
            window: self.window,
            hostname: self.hostname,
            sources: self.sources,
            ends: self.ends.into_iter().map(make).collect::<Result<_, _>>()?,
            processes: self.processes,
            flows: self.flows,
            losses: self.losses,
            health: self.health,
        })
    }

    /// The record that a flow is, whose ends are these.
    pub fn record(&self, flow: &Flow, src: &End, dst: &End) -> FlowRecord {
        let process = flow
            .process
            .and_then(|place| self.processes.get(place as usize));
        FlowRecord {
            timestamp: flow.timestamp(),
            hostname: match &flow.hostname {
                Some(hostname) => hostname.to_string(),
                None => self.hostname.clone(),
            },
            tuple: Tuple {
                src_addr: src.address,
                src_port: 0,
                dst_addr: dst.address,
                dst_port: flow.port,
            },
            src: src.endpoint.clone(),
            dst: dst.endpoint.clone(),
            protocol: flow.protocol,
            direction: flow.direction,
            outcome: flow.outcome,
            count: flow.count,
            first_seen: flow.first_seen(),
            last_seen: flow.last_seen,
            process: process.map(|process| (**process).clone()),
            sources: flow.sources.as_ref().unwrap_or(&self.sources).clone(),
            via: flow.via,
            connection: None,
        }
    }
}

impl Flow {
    /// When the first of the connections was seen.
    #[must_use]
    pub fn first_seen(&self) -> Timestamp {
        self.first_seen.unwrap_or(self.last_seen)
    }

    /// The record's own time.
    #[must_use]
    pub fn timestamp(&self) -> Timestamp {
        self.timestamp.unwrap_or(self.last_seen)
    }
}

impl From<&Batch> for Packed<End> {
    fn from(batch: &Batch) -> Self {
        let first = batch.flows.first();
        let hostname = first.map_or("", |flow| &flow.hostname);
        let sources = first.map(|flow| &flow.sources).cloned().unwrap_or_default();
        let mut ends = Places::default();
        let mut processes = Places::default();
        let flows = batch.flows.iter().map(|record| Flow {
            src: ends.of(End {
                address: record.tuple.src_addr,
                endpoint: record.src.clone(),
            }),
            dst: ends.of(End {
                address: record.tuple.dst_addr,
                endpoint: record.dst.clone(),
            }),
            port: record.tuple.dst_port,
            protocol: record.protocol,
            direction: record.direction,
            outcome: record.outcome,
            count: record.count,
            first_seen: (record.first_seen != record.last_seen).then_some(record.first_seen),
            last_seen: record.last_seen,
            timestamp: (record.timestamp != record.last_seen).then_some(record.timestamp),
            process: record.process.as_ref().map(|process| processes.of(process)),
            via: record.via,
            hostname: (record.hostname != *hostname).then(|| record.hostname.as_str().into()),
            sources: (record.sources != sources).then(|| record.sources.clone()),
        });
        let flows = flows.collect();
        Self {
            sequence: batch.sequence,
            window: batch.window,
            hostname: hostname.to_owned(),
            ends: ends.list,
            processes: processes.list.into_iter().cloned().map(Arc::new).collect(),
            flows,
            losses: batch.losses.clone(),
            health: batch.health,
            sources,
        }
    }
}

impl TryFrom<Packed<End>> for Batch {
    type Error = Misfit;

    fn try_from(packed: Packed<End>) -> Result<Self, Misfit> {
        packed.check()?;
        let end = |place: u32| &packed.ends[place as usize];
        let records = packed
            .flows
            .iter()
            .map(|flow| packed.record(flow, end(flow.src), end(flow.dst)));
        Ok(Self {
            sequence: packed.sequence,
            window: packed.window,
            flows: records.collect(),
            losses: packed.losses.clone(),
            health: packed.health,
        })
    }
}

impl Serialize for Batch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Packed::from(self).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Batch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let packed = Packed::<End>::deserialize(deserializer)?;
        Self::try_from(packed).map_err(de::Error::custom)
    }
}

/// A table, and the place of everything in it.
struct Places<T> {
    list: Vec<T>,
    places: HashMap<T, u32>,
}

impl<T: Clone + Eq + Hash> Places<T> {
    fn of(&mut self, value: T) -> u32 {
        if let Some(&place) = self.places.get(&value) {
            return place;
        }
        // A batch has at most a thousand flows.
        let place = self.list.len() as u32;
        self.list.push(value.clone());
        self.places.insert(value, place);
        place
    }
}

impl<T> Default for Places<T> {
    fn default() -> Self {
        Self {
            list: Vec::new(),
            places: HashMap::new(),
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

const fn one() -> u64 {
    1
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes fields by reference"
)]
const fn is_one(count: &u64) -> bool {
    *count == 1
}

/// An address and port as text, also where the rest is not for people.
mod text {
    use std::{borrow::Cow, net::SocketAddr};

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(
        address: &Option<SocketAddr>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => serializer.collect_str(address),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<SocketAddr>, D::Error> {
        let text = Option::<Cow<'de, str>>::deserialize(deserializer)?;
        text.map(|text| text.parse().map_err(de::Error::custom))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_null_is_as_what_is_left_out() {
        let absent = json!({"src": 0, "dst": 1, "port": 80, "last_seen": 1.0});
        let mut null = absent.clone();
        null["via"] = json!(null);
        let from_json = |flow| serde_json::from_value::<Flow>(flow).unwrap();
        assert_eq!(from_json(null.clone()), from_json(absent.clone()));
        let from_binary =
            |flow| rmp_serde::from_slice::<Flow>(&rmp_serde::to_vec(flow).unwrap()).unwrap();
        assert_eq!(from_binary(&null), from_binary(&absent));
        assert_eq!(from_binary(&null).via, None);
    }
}
