//! A node's form.
//!
//! It is read with patience: whatever has another form than it should costs the node in which it stands, not the report. The app
//! writes `null` for what is empty.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// The longest text that is kept, in bytes. Names and labels have at most 317 (a prefixed label's key); a list of a service's
/// ports may be longer.
const MAX_TEXT: usize = 16 << 10;

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

    /// What is wrong with it.
    pub(super) fn take_problem(&mut self) -> Option<String> {
        self.problem.take()
    }

    /// A host's addresses, each with the length of its network's prefix.
    pub(super) fn networks(&self) -> impl Iterator<Item = &str> {
        self.networks.iter().map(String::as_str)
    }

    /// Makes room for the next one.
    pub(super) fn clear(&mut self) {
        self.latest.clear();
        self.parents.clear();
        self.networks.clear();
        self.problem = None;
    }

    /// Takes note of what is wrong with it, if it is the first thing.
    pub(super) fn is_wrong(&mut self, problem: impl FnOnce() -> String) {
        self.problem.get_or_insert_with(problem);
    }
}

/// A text, put where it says. Tells whether it was one, and not too long; what is no text leaves it empty.
pub(super) struct Text<'a>(pub(super) &'a mut String);

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

/// MessagePack's own types: a number and bytes.
pub(super) struct Extension;

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
    entries: PhantomData<T>,
}

impl<'a, T: Entries> Lenient<'a, T> {
    fn new(node: &'a mut Node) -> Self {
        Self {
            node,
            entries: PhantomData,
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
pub(super) struct NodeSeed<'a>(pub(super) &'a mut Node);

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
