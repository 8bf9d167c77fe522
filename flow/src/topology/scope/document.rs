//! A report's form: which parts of it are read, and how.
//!
//! Everything below a topology's `nodes` is read with patience: whatever has another form than it should costs the node in which
//! it stands, not the report. The app writes `null` for what is empty.

use std::fmt;

use serde::{
    Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{draft::Draft, metered::Allowance};

/// The longest text that is kept, in bytes. Names and labels have at most 317 (a prefixed label's key); a list of a service's
/// ports may be longer.
const MAX_TEXT: usize = 16 << 10;

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

/// What is read of a node.
#[derive(Debug, Default)]
pub(super) struct Node {
    latest: Vec<(String, String)>,
    parents: Vec<(String, Vec<String>)>,
    networks: Vec<String>,
    /// The first thing that has not the form that it should have.
    problem: Option<String>,
}

impl Node {
    /// The latest value of a key.
    pub(super) fn latest(&self, key: &str) -> Option<&str> {
        let mut latest = self.all_latest();
        latest.find(|(own, _)| *own == key).map(|(_, value)| value)
    }

    /// The latest value of a key without which the node says nothing.
    pub(super) fn required(&self, key: &str) -> Result<&str, String> {
        self.latest(key)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| format!("{key} is missing"))
    }

    /// All latest values that are read, with their keys.
    pub(super) fn all_latest(&self) -> impl Iterator<Item = (&str, &str)> {
        let latest = self.latest.iter();
        latest.map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The ids of the parents in a topology.
    pub(super) fn parents(&self, topology: &str) -> &[String] {
        let mut all = self.parents.iter();
        all.find(|(own, _)| own == topology)
            .map_or(&[], |(_, ids)| ids)
    }

    /// The id of the first parent in a topology.
    pub(super) fn parent(&self, topology: &str) -> Option<&str> {
        self.parents(topology).first().map(String::as_str)
    }

    /// A host's addresses, each with the length of its network's prefix.
    pub(super) fn networks(&self) -> impl Iterator<Item = &str> {
        self.networks.iter().map(String::as_str)
    }

    fn clear(&mut self) {
        self.latest.clear();
        self.parents.clear();
        self.networks.clear();
        self.problem = None;
    }

    fn is_wrong(&mut self, problem: impl FnOnce() -> String) {
        self.problem.get_or_insert_with(problem);
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

/// MessagePack's own types: a number and bytes.
struct Extension;

impl<'de> Visitor<'de> for Extension {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an extension type")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
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
            let read = match node.problem.take() {
                Some(problem) => Err(problem),
                None => Ok(&**node),
            };
            report.take(*kind, &id, read).map_err(Error::custom)?;
        }
    }
}

/// A text, put where it says. Tells whether it was one, and not too long; what is no text leaves it empty.
struct Text<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        self.0.clear();
        deserializer.deserialize_any(self)
    }
}

impl Text<'_> {
    fn take(self, text: &str) -> bool {
        let fits = text.len() <= MAX_TEXT;
        if fits {
            self.0.push_str(text);
        }
        fits
    }
}

/// Everything but what is wanted is passed over.
macro_rules! nothing_else {
    ($value:ty, $instead:expr, $($visit:ident($type:ty)),*) => {
        $(fn $visit<E>(self, _: $type) -> Result<$value, E> {
            Ok($instead(self))
        })*

        fn visit_newtype_struct<D: Deserializer<'de>>(self, extension: D) -> Result<$value, D::Error> {
            extension.deserialize_any(Extension)?;
            Ok($instead(self))
        }
    };
}

impl<'de> Visitor<'de> for Text<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E>(self, text: &str) -> Result<bool, E> {
        Ok(self.take(text))
    }

    /// Texts were bytes in the first MessagePack.
    fn visit_bytes<E>(self, text: &[u8]) -> Result<bool, E> {
        Ok(std::str::from_utf8(text).is_ok_and(|text| self.take(text)))
    }

    fn visit_unit<E>(self) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<bool, A::Error> {
        IgnoredAny.visit_map(map).map(|_| false)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<bool, A::Error> {
        IgnoredAny.visit_seq(seq).map(|_| false)
    }

    nothing_else!(
        bool,
        |_| false,
        visit_bool(bool),
        visit_i64(i64),
        visit_u64(u64),
        visit_f64(f64)
    );
}

/// What is done with the entries of a map in a node.
trait Entries {
    /// As messages call the map.
    const NAME: &'static str;

    /// Reads the value of `key`.
    fn entry<'de, A: MapAccess<'de>>(
        node: &mut Node,
        key: &str,
        map: &mut A,
    ) -> Result<(), A::Error>;
}

/// A map of a node, or `null`; anything else is wrong with the node.
struct Lenient<'a, T> {
    node: &'a mut Node,
    entries: std::marker::PhantomData<T>,
}

impl<'a, T: Entries> Lenient<'a, T> {
    fn new(node: &'a mut Node) -> Self {
        Self {
            node,
            entries: std::marker::PhantomData,
        }
    }

    fn no_map(self) {
        self.node.is_wrong(|| format!("{} is no map", T::NAME));
    }
}

impl<'de, T: Entries> DeserializeSeed<'de> for Lenient<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Entries> Visitor<'de> for Lenient<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut key = String::new();
        while map.next_key_seed(Text(&mut key))?.is_some() {
            T::entry(self.node, &key, &mut map)?;
        }
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<(), A::Error> {
        self.no_map();
        IgnoredAny.visit_seq(seq).map(|_| ())
    }

    nothing_else!(
        (),
        Self::no_map,
        visit_bool(bool),
        visit_i64(i64),
        visit_u64(u64),
        visit_f64(f64),
        visit_str(&str),
        visit_bytes(&[u8])
    );
}

/// A node.
struct NodeSeed<'a>(&'a mut Node);

impl<'de> DeserializeSeed<'de> for NodeSeed<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        Lenient::<Parts>::new(self.0).deserialize(deserializer)
    }
}

/// The parts of a node.
struct Parts;

impl Entries for Parts {
    const NAME: &'static str = "it";

    fn entry<'de, A: MapAccess<'de>>(
        node: &mut Node,
        key: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        match key {
            "latest" => map.next_value_seed(Lenient::<AllLatest>::new(node)),
            "parents" => map.next_value_seed(Lenient::<Parents>::new(node)),
            "sets" => map.next_value_seed(Lenient::<Sets>::new(node)),
            _ => map.next_value::<IgnoredAny>().map(|_| ()),
        }
    }
}

/// `latest`: key → value with its time.
struct AllLatest;

impl Entries for AllLatest {
    const NAME: &'static str = "latest";

    fn entry<'de, A: MapAccess<'de>>(
        node: &mut Node,
        key: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        if !key.starts_with("kubernetes_") && key != "copy_of" && key != "host_node_id" {
            return map.next_value::<IgnoredAny>().map(|_| ());
        }
        node.latest.push((key.to_owned(), String::new()));
        map.next_value_seed(Lenient::<Latest>::new(node))
    }
}

/// The value that was added last to `latest`.
struct Latest;

impl Entries for Latest {
    const NAME: &'static str = "a value in latest";

    fn entry<'de, A: MapAccess<'de>>(
        node: &mut Node,
        key: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        if key != "value" {
            return map.next_value::<IgnoredAny>().map(|_| ());
        }
        let Some((name, mut value)) = node.latest.pop() else {
            return map.next_value::<IgnoredAny>().map(|_| ());
        };
        if !map.next_value_seed(Text(&mut value))? {
            node.is_wrong(|| format!("{name} has a value that is no text, or too long"));
        }
        node.latest.push((name, value));
        Ok(())
    }
}

/// `parents`: topology → ids.
struct Parents;

impl Entries for Parents {
    const NAME: &'static str = "parents";

    fn entry<'de, A: MapAccess<'de>>(
        node: &mut Node,
        key: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        let ids = texts(node, "parents", map)?;
        node.parents.push((key.to_owned(), ids));
        Ok(())
    }
}

/// `sets`: key → texts.
struct Sets;

impl Entries for Sets {
    const NAME: &'static str = "sets";

    fn entry<'de, A: MapAccess<'de>>(
        node: &mut Node,
        key: &str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        match key {
            "local_networks" => node.networks = texts(node, "sets", map)?,
            _ => drop(map.next_value::<IgnoredAny>()?),
        }
        Ok(())
    }
}

fn texts<'de, A: MapAccess<'de>>(
    node: &mut Node,
    part: &str,
    map: &mut A,
) -> Result<Vec<String>, A::Error> {
    let (texts, are_texts) = map.next_value_seed(Texts)?;
    if !are_texts {
        node.is_wrong(|| format!("{part} has something else than a list of texts"));
    }
    Ok(texts)
}

/// A list of texts, or `null`; and whether it is one.
struct Texts;

impl<'de> DeserializeSeed<'de> for Texts {
    type Value = (Vec<String>, bool);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Texts {
    type Value = (Vec<String>, bool);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of texts")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (mut texts, mut are_texts) = (Vec::new(), true);
        let mut text = String::new();
        while let Some(is_text) = seq.next_element_seed(Text(&mut text))? {
            are_texts &= is_text;
            texts.push(text.clone());
        }
        Ok((texts, are_texts))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok((Vec::new(), true))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        IgnoredAny.visit_map(map).map(|_| (Vec::new(), false))
    }

    nothing_else!(
        Self::Value,
        |_| (Vec::new(), false),
        visit_bool(bool),
        visit_i64(i64),
        visit_u64(u64),
        visit_f64(f64),
        visit_str(&str),
        visit_bytes(&[u8])
    );
}
