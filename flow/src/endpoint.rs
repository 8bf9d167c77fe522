//! The named ends of a flow.

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Kubernetes labels, or a selector's `matchLabels`.
pub type Labels = BTreeMap<String, String>;

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A pod, and the service through which its port is meant to be reached, if any.
    Pod {
        /// The pod.
        pod: Arc<Pod>,
        /// Of the services that select the pod, the one whose target port is the flow's, else the first by name.
        service: Option<Arc<Service>>,
    },
    /// A service's virtual address: the backend that answered is not known to the observer.
    Service(Arc<Service>),
    /// A node itself: its host processes, its own addresses, its CNI's interface in the pod network.
    Node(Arc<Node>),
    /// Any other address.
    External(IpAddr),
}

/// A pod, cut to what naming and policies need. In JSON the fields of MicroShield's records come first, in its order.
///
/// What pods have in common is shared where many are held at once: a cluster's pods are made from few templates.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pod {
    /// `metadata.uid`. On the wire it carries Scope's suffix `;<pod>`, as MicroShield's records do.
    #[serde(rename = "id", with = "pod_id")]
    pub uid: String,
    /// `metadata.labels`.
    #[serde(default)]
    pub labels: Arc<Labels>,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// The controller that made the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Arc<Workload>>,
    /// `spec.nodeName`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<Arc<str>>,
    /// `spec.hostNetwork`: the pod uses its node's addresses.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub host_network: bool,
    /// `status.podIPs`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Names of all services of its namespace that select the pod, sorted.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub services: Arc<[String]>,
}

/// A service, cut likewise.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Service {
    /// `metadata.uid`, on the wire with Scope's suffix `;<service>`.
    #[serde(rename = "id", with = "service_id")]
    pub uid: String,
    /// `metadata.labels`.
    #[serde(default)]
    pub labels: Labels,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `spec.selector`; empty for a service whose endpoints are set by hand. On the wire `key=value,key=value`, and absent
    /// rather than empty: MicroShield's `generator.py` takes the empty text for a pair without `=`.
    #[serde(
        default,
        with = "selector_text",
        skip_serializing_if = "Labels::is_empty"
    )]
    pub selector: Labels,
    /// The endpoint addresses of a service without a selector.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backends: Vec<IpAddr>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// The addresses that traffic from the node's own processes can carry: `status.addresses` of type `InternalIP` and
    /// `ExternalIP`, and the address seen in the flow.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
}

/// The controller at the top of a pod's owner references.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// `Deployment`, `StatefulSet`, `DaemonSet`, `CronJob`, `Job`, or any other owner's kind.
    pub kind: String,
    /// The controller's name.
    pub name: String,
}

impl Endpoint {
    /// The namespace of a pod or service.
    #[must_use]
    pub fn namespace(&self) -> Option<&str> {
        match self {
            Self::Pod { pod, .. } => Some(&pod.namespace),
            Self::Service(service) => Some(&service.namespace),
            Self::Node(_) | Self::External(_) => None,
        }
    }
}

/// `namespace/name` of a pod or service, `node NAME`, or the bare address.
impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { pod, .. } => write!(f, "{}/{}", pod.namespace, pod.name),
            Self::Service(service) => {
                write!(f, "service {}/{}", service.namespace, service.name)
            }
            Self::Node(node) => write!(f, "node {}", node.name),
            Self::External(address) => address.fmt(f),
        }
    }
}

/// As in a record.
impl Serialize for Endpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        EndpointJson::from(self.clone()).serialize(serializer)
    }
}

/// The JSON form of an endpoint. An external end is `{"pod": {}, "service": {}}`: its address stands in the tuple.
#[derive(Serialize, Deserialize)]
pub(crate) struct EndpointJson {
    #[serde(default, with = "object_or_empty")]
    pod: Option<Arc<Pod>>,
    #[serde(default, with = "object_or_empty")]
    service: Option<Arc<Service>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Arc<Node>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    external: bool,
}

impl From<Endpoint> for EndpointJson {
    fn from(endpoint: Endpoint) -> Self {
        let mut json = Self {
            pod: None,
            service: None,
            node: None,
            external: false,
        };
        match endpoint {
            Endpoint::Pod { pod, service } => {
                json.pod = Some(pod);
                json.service = service;
            }
            Endpoint::Service(service) => json.service = Some(service),
            Endpoint::Node(node) => json.node = Some(node),
            Endpoint::External(_) => json.external = true,
        }
        json
    }
}

impl EndpointJson {
    /// `address` is the end's address in the record's tuple.
    pub(crate) fn into_endpoint(self, address: IpAddr) -> Endpoint {
        self.into_known().unwrap_or(Endpoint::External(address))
    }

    /// `None` for an external end.
    pub(crate) fn into_known(self) -> Option<Endpoint> {
        match (self.pod, self.service, self.node) {
            (Some(pod), service, _) => Some(Endpoint::Pod { pod, service }),
            (None, Some(service), _) => Some(Endpoint::Service(service)),
            (None, None, Some(node)) => Some(Endpoint::Node(node)),
            (None, None, None) => None,
        }
    }
}

fn is_empty(list: &Arc<[String]>) -> bool {
    list.is_empty()
}

/// `{}` stands for an absent object, as in MicroShield's records.
mod object_or_empty {
    use std::{fmt, marker::PhantomData, sync::Arc};

    use serde::{
        Deserialize, Deserializer, Serialize, Serializer,
        de::{DeserializeSeed, IntoDeserializer, MapAccess, Visitor, value::MapAccessDeserializer},
    };

    #[derive(Serialize)]
    struct Empty {}

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &Option<Arc<T>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => value.serialize(serializer),
            None => Empty {}.serialize(serializer),
        }
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Arc<T>>, D::Error> {
        deserializer.deserialize_map(ObjectOrEmpty(PhantomData))
    }

    struct ObjectOrEmpty<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectOrEmpty<T> {
        type Value = Option<Arc<T>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object, `{}` where there is none")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let Some(first_key) = map.next_key::<String>()? else {
                return Ok(None);
            };
            let whole = FromFirstKey {
                first_key: Some(first_key),
                rest: map,
            };
            T::deserialize(MapAccessDeserializer::new(whole)).map(|value| Some(Arc::new(value)))
        }
    }

    /// A map whose first key was read already.
    struct FromFirstKey<A> {
        first_key: Option<String>,
        rest: A,
    }

    impl<'de, A: MapAccess<'de>> MapAccess<'de> for FromFirstKey<A> {
        type Error = A::Error;

        fn next_key_seed<K: DeserializeSeed<'de>>(
            &mut self,
            seed: K,
        ) -> Result<Option<K::Value>, A::Error> {
            match self.first_key.take() {
                Some(key) => seed.deserialize(key.into_deserializer()).map(Some),
                None => self.rest.next_key_seed(seed),
            }
        }

        fn next_value_seed<V: DeserializeSeed<'de>>(
            &mut self,
            seed: V,
        ) -> Result<V::Value, A::Error> {
            self.rest.next_value_seed(seed)
        }
    }
}

macro_rules! suffixed_id {
    ($module:ident, $suffix:literal) => {
        mod $module {
            use super::{Deserialize, Deserializer, Serializer};

            pub(super) fn serialize<S: Serializer>(
                uid: &str,
                serializer: S,
            ) -> Result<S::Ok, S::Error> {
                serializer.collect_str(&format_args!(concat!("{}", $suffix), uid))
            }

            pub(super) fn deserialize<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<String, D::Error> {
                let mut id = String::deserialize(deserializer)?;
                if let Some(uid) = id.strip_suffix($suffix) {
                    id.truncate(uid.len());
                }
                Ok(id)
            }
        }
    };
}

suffixed_id!(pod_id, ";<pod>");
suffixed_id!(service_id, ";<service>");

/// A selector as Scope prints it: `key=value,key=value`.
mod selector_text {
    use super::{Deserialize, Deserializer, Labels, Serializer, de};

    pub(super) fn serialize<S: Serializer>(
        selector: &Labels,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let pairs: Vec<String> = selector
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        serializer.serialize_str(&pairs.join(","))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Labels, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.split(',')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                pair.split_once('=')
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .ok_or_else(|| {
                        de::Error::custom(format_args!("selector `{text}`: `{pair}` has no `=`"))
                    })
            })
            .collect()
    }
}
