//! Documents of a file, and the objects in them.

use std::{collections::BTreeMap, fmt, path::Path};

use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde::{
    Deserializer,
    de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor},
};
use serde_yaml::{Mapping, Value};

use super::{FileError, MAX_WARNINGS};
use crate::{
    locate::{Segment, Syntax, line_of, segments},
    topology::{
        convert::FieldError,
        objects::{EndpointSlice, Namespace, Node, Object, Objects, Pod, Service},
    },
};

/// How many warnings get their line: to find one, the file is read again.
const MAX_LOCATED: usize = 10;

/// The longest text, in bytes, that begins like JSON and may be YAML all the same.
const MAX_HANDWRITTEN_BYTES: usize = 64 << 10;

/// The longest part of a parser's message that is shown, in bytes: it may quote the file.
const MAX_MESSAGE_BYTES: usize = 300;

/// Reads a file's text.
pub(super) struct Reader<'a> {
    path: &'a Path,
    text: &'a [u8],
    syntax: Syntax,
    document: usize,
    pub(super) objects: Objects,
    pub(super) skipped: BTreeMap<String, usize>,
    pub(super) warnings: Vec<String>,
    /// How many warnings were left out.
    pub(super) unsaid: usize,
}

/// What is wrong with an object.
struct ObjectError {
    /// The field's path in the object; empty for the object itself.
    field: String,
    message: String,
}

impl From<FieldError> for ObjectError {
    fn from(error: FieldError) -> Self {
        Self {
            message: format!("`{}` is not {}", error.value, error.expected),
            field: error.field,
        }
    }
}

impl<'a> Reader<'a> {
    pub(super) fn new(path: &'a Path, text: &'a [u8]) -> Self {
        Self {
            path,
            text,
            syntax: Syntax::Yaml,
            document: 0,
            objects: Objects::default(),
            skipped: BTreeMap::new(),
            warnings: Vec::new(),
            unsaid: 0,
        }
    }

    /// JSON is nearly YAML, but its own parser is faster by far; what that one refuses may still be YAML, if someone wrote
    /// it by hand.
    pub(super) fn read(&mut self) -> Result<(), FileError> {
        let first = self.text.iter().find(|byte| !byte.is_ascii_whitespace());
        if first != Some(&b'{') {
            return self.read_yaml();
        }
        let mut json = Self::new(self.path, self.text);
        match json.read_json() {
            Err(_) if self.text.len() <= MAX_HANDWRITTEN_BYTES && self.read_yaml().is_ok() => {}
            Err(refused) => return Err(refused),
            Ok(()) => *self = json,
        }
        Ok(())
    }

    fn read_json(&mut self) -> Result<(), FileError> {
        self.syntax = Syntax::Json;
        let mut documents = serde_json::Deserializer::from_slice(self.text);
        while documents.end().is_err() {
            let read = Document { reader: self }.deserialize(&mut documents);
            read.map_err(|error| self.malformed(error.line(), error.column(), &error))?;
            self.document += 1;
        }
        Ok(())
    }

    fn read_yaml(&mut self) -> Result<(), FileError> {
        for document in serde_yaml::Deserializer::from_slice(self.text) {
            let read = Document { reader: self }.deserialize(document);
            read.map_err(|error| {
                let place = error.location();
                let (line, column) = place.map_or((1, 1), |place| (place.line(), place.column()));
                self.malformed(line, column, &error)
            })?;
            self.document += 1;
        }
        Ok(())
    }

    fn malformed(&self, line: usize, column: usize, error: &dyn fmt::Display) -> FileError {
        FileError::Malformed {
            path: self.path.to_owned(),
            line,
            column,
            message: shortened(&error.to_string().replacen(
                &format!(" at line {line} column {column}"),
                "",
                1,
            )),
        }
    }

    /// `item` counts from 0; `None` for a document that is one object.
    fn take(&mut self, value: Value, item: Option<usize>, list_kind: Option<&str>) {
        let kind = match (text(&value, "kind"), list_kind) {
            (Some(kind), _) => kind.to_owned(),
            // The API leaves the kind out of the items of a `PodList`.
            (None, Some(list)) if list != "List" => list.trim_end_matches("List").to_owned(),
            (None, _) => {
                let error = ObjectError {
                    field: String::new(),
                    message: "it has no `kind`".to_owned(),
                };
                return self.warn("object", &value, item, error);
            }
        };
        let version = text(&value, "apiVersion").unwrap_or_default();
        let group = version.split_once('/').map_or("", |(group, _)| group);
        let known = match (kind.as_str(), group) {
            ("EndpointSlice", "discovery.k8s.io") => version == "discovery.k8s.io/v1",
            ("EndpointSlice", "") => version.is_empty(),
            ("Namespace" | "Node" | "Service" | "Pod", "") => true,
            _ => false,
        };
        if !known {
            let ours = ["Namespace", "Node", "Service", "Pod", "EndpointSlice"];
            let kind = if ours.contains(&kind.as_str()) {
                format!("{kind} of {version}")
            } else {
                kind
            };
            *self.skipped.entry(kind).or_default() += 1;
            return;
        }
        let object = match kind.as_str() {
            "Namespace" => typed::<core::Namespace, Namespace>(&value).map(Object::Namespace),
            "Node" => typed::<core::Node, Node>(&value).map(Object::Node),
            "Service" => typed::<core::Service, Service>(&value).map(Object::Service),
            "Pod" => typed::<core::Pod, Pod>(&value).map(Object::Pod),
            _ => {
                typed::<discovery::EndpointSlice, EndpointSlice>(&value).map(Object::EndpointSlice)
            }
        };
        match object {
            Ok(object) => self.objects.push(object),
            Err(error) => self.warn(&kind, &value, item, error),
        }
    }

    fn warn(&mut self, kind: &str, value: &Value, item: Option<usize>, error: ObjectError) {
        if self.warnings.len() >= MAX_WARNINGS {
            self.unsaid += 1;
            return;
        }
        let mut warning = self.path.display().to_string();
        if self.warnings.len() < MAX_LOCATED {
            let list = item.map(|item| [Segment::Key("items".to_owned()), Segment::Item(item)]);
            let mut path: Vec<Segment> = list.into_iter().flatten().collect();
            path.extend(segments(&error.field));
            if let Some(line) = line_of(self.text, self.syntax, self.document, &path) {
                warning.push_str(&format!(":{line}"));
            }
        }
        warning.push_str(&format!(": {kind}"));
        let metadata = value.get("metadata");
        let named = |key| metadata.and_then(|metadata| text(metadata, key));
        match (named("namespace"), named("name")) {
            (Some(namespace), Some(name)) => warning.push_str(&format!(" {namespace}/{name}")),
            (None, Some(name)) => warning.push_str(&format!(" {name}")),
            (_, None) => {}
        }
        match item {
            Some(item) => warning.push_str(&format!(" (item {})", item + 1)),
            None => warning.push_str(&format!(" (document {})", self.document + 1)),
        }
        if !error.field.is_empty() {
            warning.push_str(&format!(": {}", error.field));
        }
        warning.push_str(&format!(": {}", error.message));
        self.warnings.push(warning);
    }
}

fn text<'v>(value: &'v Value, key: &str) -> Option<&'v str> {
    value.get(key)?.as_str()
}

/// An object of the API's type, cut to ours.
fn typed<A, O>(value: &Value) -> Result<O, ObjectError>
where
    A: DeserializeOwned,
    O: TryFrom<A, Error = FieldError>,
{
    let object: A = serde_path_to_error::deserialize(value).map_err(|error| {
        let field = error.path().to_string();
        ObjectError {
            field: if field == "." { String::new() } else { field },
            message: shortened(&error.into_inner().to_string()),
        }
    })?;
    Ok(O::try_from(object)?)
}

/// A parser's message, cut to a length that can be shown.
fn shortened(message: &str) -> String {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    message[..end].to_owned()
}

/// One document: an object, or a list of objects that are taken one by one so that no more than one is held.
struct Document<'r, 'a> {
    reader: &'r mut Reader<'a>,
}

impl<'de> DeserializeSeed<'de> for Document<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Document<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a Kubernetes object or a list of them")
    }

    /// A document that says `null`.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    /// A document without content.
    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<(), M::Error> {
        let mut object = Mapping::new();
        let mut nameless = Vec::new();
        let mut is_list = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                is_list = true;
                map.next_value_seed(Items {
                    reader: self.reader,
                    nameless: &mut nameless,
                })?;
            } else if object
                .insert(key.as_str().into(), map.next_value()?)
                .is_some()
            {
                return Err(M::Error::custom(format_args!("`{key}` stands there twice")));
            }
        }
        let object = Value::Mapping(object);
        if is_list {
            let kind = text(&object, "kind");
            for (item, value) in nameless {
                self.reader.take(value, Some(item), kind);
            }
        } else if object.get("kind").is_none() && object.get("apiVersion").is_none() {
            return Err(M::Error::custom(
                "neither `kind` nor `apiVersion`: not a Kubernetes object",
            ));
        } else {
            self.reader.take(object, None, None);
        }
        Ok(())
    }
}

/// The items of a list. Those without a kind wait for the list's own, which may come after them.
struct Items<'r, 'a> {
    reader: &'r mut Reader<'a>,
    nameless: &'r mut Vec<(usize, Value)>,
}

impl<'de> DeserializeSeed<'de> for Items<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of Kubernetes objects")
    }

    /// The API writes an empty list as `null`.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<(), S::Error> {
        let mut item = 0;
        while let Some(value) = items.next_element::<Value>()? {
            if text(&value, "kind").is_some() {
                self.reader.take(value, Some(item), None);
            } else {
                self.nameless.push((item, value));
            }
            item += 1;
        }
        Ok(())
    }
}
