//! Where in a text a field stands.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

/// How a text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Syntax {
    /// JSON documents, one after the other.
    Json,
    /// YAML documents.
    Yaml,
}

/// A step from a value to one inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segment {
    /// The value of this key.
    Key(String),
    /// The item with this number, from 0.
    Item(usize),
}

/// The path of a field from the root of its object. As text: `spec.ingress[0].from[1].ipBlock.cidr`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldPath(pub Vec<Segment>);

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Item(item) => write!(f, "[{item}]")?,
                // The keys of labels hold dots and slashes.
                Segment::Key(key) if key.is_empty() || key.contains(['.', '/', '[']) => {
                    write!(f, "[{key}]")?;
                }
                Segment::Key(key) if i == 0 => f.write_str(key)?,
                Segment::Key(key) => write!(f, ".{key}")?,
            }
        }
        Ok(())
    }
}

/// The steps of a path like `spec.ports[0].port`.
#[must_use]
pub fn segments(path: &str) -> Vec<Segment> {
    path.split(['.', '['])
        .filter(|part| !part.is_empty())
        .map(|part| match part.strip_suffix(']').map(str::parse) {
            Some(Ok(item)) => Segment::Item(item),
            _ => Segment::Key(part.to_owned()),
        })
        .collect()
}

/// The line of what the path leads to in a document of a text, counted from 1, or of the last thing on the way that
/// exists. Documents are counted from 0.
///
/// The parsers tell where they stand only in their errors, so the text is read again and an error made to happen there.
#[must_use]
pub fn line_of(text: &[u8], syntax: Syntax, document: usize, path: &[Segment]) -> Option<usize> {
    let seed = Locate { path };
    match syntax {
        Syntax::Yaml => {
            let mut documents = serde_yaml::Deserializer::from_slice(text);
            let error = seed.deserialize(documents.nth(document)?).err()?;
            Some(error.location()?.line())
        }
        Syntax::Json => {
            let mut documents = serde_json::Deserializer::from_slice(text);
            for _ in 0..document {
                IgnoredAny::deserialize(&mut documents).ok()?;
            }
            Some(seed.deserialize(&mut documents).err()?.line())
        }
    }
}

#[derive(Clone, Copy)]
struct Locate<'p> {
    path: &'p [Segment],
}

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Every visit ends in an error; those that are not written out here are errors of serde.
impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("something else")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        if let Some((Segment::Key(wanted), rest)) = self.path.split_first() {
            let is_last = rest.is_empty();
            while let Some(is_wanted) = map.next_key_seed(Key { wanted, is_last })? {
                if is_wanted {
                    return map.next_value_seed(Self { path: rest });
                }
                map.next_value::<IgnoredAny>()?;
            }
        }
        Err(M::Error::custom("here"))
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<(), S::Error> {
        if let Some((Segment::Item(wanted), rest)) = self.path.split_first() {
            for _ in 0..*wanted {
                items.next_element::<IgnoredAny>()?;
            }
            if items.next_element_seed(Self { path: rest })?.is_some() {
                return Ok(());
            }
        }
        Err(S::Error::custom("here"))
    }
}

/// Says whether a key is the wanted one. If it is and the path ends there, that is an error: the value may begin on a line
/// of its own.
struct Key<'p> {
    wanted: &'p str,
    is_last: bool,
}

impl<'de> DeserializeSeed<'de> for Key<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        // The parsers give a place to the errors of visitors only.
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Key<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        let is_wanted = key == self.wanted;
        if is_wanted && self.is_last {
            return Err(E::custom("here"));
        }
        Ok(is_wanted)
    }
}
