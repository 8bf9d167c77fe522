//! A report's form, down to its nodes: which of its topologies are read. What a node is stands in [`node`](super::node).

use std::fmt;

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{
    draft::Draft,
    node::{Extension, Node, NodeSeed, Text},
};
use crate::metered::Allowance;

/// A topology that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Endpoint,
    Container,
    Pod,
    Service,
    Deployment,
    StatefulSet,
    DaemonSet,
    CronJob,
    Job,
    Namespace,
    Host,
}

impl Kind {
    /// By its name in a report.
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "Endpoint" => Self::Endpoint,
            "Container" => Self::Container,
            "Pod" => Self::Pod,
            "Service" => Self::Service,
            "Deployment" => Self::Deployment,
            "StatefulSet" => Self::StatefulSet,
            "DaemonSet" => Self::DaemonSet,
            "CronJob" => Self::CronJob,
            "Job" => Self::Job,
            "Namespace" => Self::Namespace,
            "Host" => Self::Host,
            _ => return None,
        })
    }
}

/// The whole report.
pub(super) struct ReportSeed<'a> {
    pub(super) draft: &'a mut Draft,
    pub(super) allowance: Allowance,
}

impl<'de> DeserializeSeed<'de> for ReportSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ReportSeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a report of Weave Scope")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut name = String::new();
        let mut node = Node::default();
        let mut has_pods = false;
        while map.next_key_seed(Text(&mut name))?.is_some() {
            self.allowance.renew();
            let Some(kind) = Kind::of(&name) else {
                Skip(&self.allowance).value(&mut map)?;
                continue;
            };
            has_pods |= kind == Kind::Pod;
            map.next_value_seed(TopologySeed {
                kind,
                report: &mut *self.draft,
                allowance: &self.allowance,
                node: &mut node,
            })?;
        }
        if has_pods {
            Ok(())
        } else {
            Err(Error::missing_field("Pod"))
        }
    }
}

/// Something that is not read, of any size: a topology of another kind.
struct Skip<'a>(&'a Allowance);

impl Skip<'_> {
    fn value<'de, A: MapAccess<'de>>(self, map: &mut A) -> Result<(), A::Error> {
        map.next_value_seed(self)
    }
}

impl<'de> DeserializeSeed<'de> for Skip<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Every value is as much as a node may be.
impl<'de> Visitor<'de> for Skip<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key::<IgnoredAny>()?.is_some() {
            self.0.renew();
            map.next_value_seed(Skip(self.0))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Skip(self.0))?.is_some() {
            self.0.renew();
        }
        Ok(())
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, extension: D) -> Result<(), D::Error> {
        extension.deserialize_any(Extension)
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_bytes<E>(self, _: &[u8]) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }
}

/// One topology.
struct TopologySeed<'a> {
    kind: Kind,
    report: &'a mut Draft,
    allowance: &'a Allowance,
    /// A node to be used again and again.
    node: &'a mut Node,
}

impl<'de> DeserializeSeed<'de> for TopologySeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TopologySeed<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a topology")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let mut name = String::new();
        while map.next_key_seed(Text(&mut name))?.is_some() {
            self.allowance.renew();
            match name.as_str() {
                "nodes" => map.next_value_seed(Nodes(&mut self))?,
                _ => Skip(self.allowance).value(&mut map)?,
            }
        }
        Ok(())
    }
}

/// The nodes of a topology, by id.
struct Nodes<'a, 'b>(&'a mut TopologySeed<'b>);

impl<'de> DeserializeSeed<'de> for Nodes<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Nodes<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nodes by id")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let TopologySeed {
            kind,
            report,
            allowance,
            node,
        } = self.0;
        let mut id = String::new();
        loop {
            allowance.renew();
            let Some(is_text) = map.next_key_seed(Text(&mut id))? else {
                return Ok(());
            };
            node.clear();
            map.next_value_seed(NodeSeed(node))?;
            if !is_text {
                node.is_wrong(|| "its id is no text".to_owned());
            }
            let read = match node.take_problem() {
                Some(problem) => Err(problem),
                None => Ok(&**node),
            };
            report.take(*kind, &id, read).map_err(Error::custom)?;
        }
    }
}
