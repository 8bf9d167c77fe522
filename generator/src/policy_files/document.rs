//! The documents of a file, and the policies in them.

use std::path::Path;

use flow::locate::{FieldPath, Segment, Syntax, line_of};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde::Deserialize;
use serde_yaml::{Mapping, Value};

use super::PolicyFilesError;
use crate::evaluate::InvalidPolicy;

const API_VERSION: &str = "networking.k8s.io/v1";

/// A file that was parsed.
pub(super) struct Document<'a> {
    path: &'a Path,
    text: &'a [u8],
    syntax: Syntax,
}

/// An object in a file.
pub(super) struct Object {
    value: Value,
    /// Which of the file's documents it is in, from 0.
    document: usize,
    /// Which item of the document's list it is, from 0; `None` if the document is the object.
    item: Option<usize>,
}

/// What is wrong with an object.
pub(super) struct Flaw {
    field: FieldPath,
    message: String,
}

impl<'a> Document<'a> {
    /// The objects of a file, as far as it can be parsed, and why it cannot be further.
    ///
    /// JSON is nearly YAML, but its own parser is faster by far; what that one refuses may still be YAML.
    pub(super) fn parse(
        path: &'a Path,
        text: &'a [u8],
    ) -> (Self, Vec<Object>, Result<(), PolicyFilesError>) {
        let mut parsed = Self {
            path,
            text,
            syntax: Syntax::Json,
        };
        let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
        if first == Some(&b'{')
            && let Ok(objects) = json(text)
        {
            return (parsed, objects, Ok(()));
        }
        parsed.syntax = Syntax::Yaml;
        let mut objects = Vec::new();
        for (i, document) in serde_yaml::Deserializer::from_slice(text).enumerate() {
            let read = Value::deserialize(document).and_then(|mut value| {
                value.apply_merge()?;
                Ok(value)
            });
            match read {
                Ok(value) => add(&mut objects, value, i),
                Err(error) => return (parsed, objects, Err(malformed(path, &error))),
            }
        }
        (parsed, objects, Ok(()))
    }

    /// The policy that an object is. It is checked for what the API's types can hold, not for whether they are valid.
    pub(super) fn policy(
        &self,
        object: &Object,
        namespace: Option<&str>,
    ) -> Result<NetworkPolicy, Flaw> {
        let value = &object.value;
        if !value.is_mapping() {
            return Err(Flaw::whole("not a Kubernetes object"));
        }
        match (text(value, "kind"), text(value, "apiVersion")) {
            (Some("NetworkPolicy"), Some(API_VERSION)) => {}
            (Some("NetworkPolicy"), version) => {
                return Err(Flaw {
                    field: FieldPath(vec![Segment::Key("apiVersion".to_owned())]),
                    message: format!(
                        "only {API_VERSION} is understood, not {}",
                        version.unwrap_or("none")
                    ),
                });
            }
            _ => {
                return Err(Flaw::whole(&format!(
                    "not a NetworkPolicy of {API_VERSION}"
                )));
            }
        }

        let mut unknown = None;
        let mut ignored = |path: serde_ignored::Path<'_>| {
            let path = FieldPath(segments(&path));
            if is_meant(&path) {
                unknown.get_or_insert(path);
            }
        };
        let typed =
            serde_path_to_error::deserialize(serde_ignored::Deserializer::new(value, &mut ignored));
        let mut policy: NetworkPolicy = typed.map_err(|error| Flaw {
            field: FieldPath(error.path().iter().filter_map(segment).collect()),
            message: error.inner().to_string(),
        })?;
        if let Some(field) = unknown {
            return Err(Flaw {
                field,
                message: "not a field of a NetworkPolicy".to_owned(),
            });
        }
        if policy.metadata.namespace.is_none() {
            policy.metadata.namespace = namespace.map(str::to_owned);
        }
        Ok(policy)
    }

    /// The error of an object.
    pub(super) fn refuse(&self, object: &Object, flaw: Flaw) -> PolicyFilesError {
        let list = object
            .item
            .map(|item| [Segment::Key("items".to_owned()), Segment::Item(item)]);
        let mut path: Vec<Segment> = list.into_iter().flatten().collect();
        path.extend_from_slice(&flaw.field.0);
        PolicyFilesError::Object {
            path: self.path.to_owned(),
            line: line_of(self.text, self.syntax, object.document, &path),
            object: object.name(),
            field: flaw.field.to_string(),
            message: flaw.message,
        }
    }
}

impl Object {
    fn name(&self) -> String {
        let kind = text(&self.value, "kind").unwrap_or("object");
        let metadata = self.value.get("metadata");
        let named = |key| metadata.and_then(|metadata| text(metadata, key));
        match (named("namespace"), named("name")) {
            (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
            (None, Some(name)) => format!("{kind} {name}"),
            (_, None) => kind.to_owned(),
        }
    }
}

impl Flaw {
    fn whole(message: &str) -> Self {
        Self {
            field: FieldPath::default(),
            message: message.to_owned(),
        }
    }
}

impl From<InvalidPolicy> for Flaw {
    fn from(error: InvalidPolicy) -> Self {
        Self {
            field: error.field,
            message: error.problem.to_string(),
        }
    }
}

fn json(text: &[u8]) -> serde_json::Result<Vec<Object>> {
    let mut objects = Vec::new();
    let documents = serde_json::Deserializer::from_slice(text).into_iter::<Value>();
    for (i, value) in documents.enumerate() {
        add(&mut objects, value?, i);
    }
    Ok(objects)
}

/// Adds the object of a document, or the objects of its list.
fn add(objects: &mut Vec<Object>, mut value: Value, document: usize) {
    let object = |value, item| Object {
        value,
        document,
        item,
    };
    let of_policies = match (text(&value, "kind"), text(&value, "apiVersion")) {
        (Some("List"), Some("v1")) => false,
        (Some("NetworkPolicyList"), Some(API_VERSION)) => true,
        // A document without content.
        _ if value.is_null() => return,
        _ => return objects.push(object(value, None)),
    };
    let items = match value.get_mut("items").map(std::mem::take) {
        Some(Value::Sequence(items)) => items,
        // The API writes an empty list as `null`.
        Some(Value::Null) | None => return,
        Some(_) => return objects.push(object(value, None)),
    };
    for (i, mut item) in items.into_iter().enumerate() {
        // The API leaves kind and version out of the items of a list of one kind.
        if let (true, Value::Mapping(fields)) = (of_policies, &mut item) {
            set(fields, "kind", "NetworkPolicy");
            set(fields, "apiVersion", API_VERSION);
        }
        objects.push(object(item, Some(i)));
    }
}

fn set(fields: &mut Mapping, key: &str, value: &str) {
    fields.entry(key.into()).or_insert_with(|| value.into());
}

fn text<'v>(value: &'v Value, key: &str) -> Option<&'v str> {
    value.get(key)?.as_str()
}

/// Whether an unknown field can have been meant to change what the policy allows. Of metadata there is more than the API's
/// types of one version know, and some versions write a `status`.
fn is_meant(path: &FieldPath) -> bool {
    !matches!(path.0.first(), Some(Segment::Key(key)) if key == "metadata" || key == "status")
}

fn segments(path: &serde_ignored::Path<'_>) -> Vec<Segment> {
    use serde_ignored::Path;
    let (parent, last) = match path {
        Path::Root => return Vec::new(),
        Path::Seq { parent, index } => (parent, Some(Segment::Item(*index))),
        Path::Map { parent, key } => (parent, Some(Segment::Key(key.clone()))),
        Path::Some { parent }
        | Path::NewtypeStruct { parent }
        | Path::NewtypeVariant { parent } => (parent, None),
    };
    let mut segments = segments(parent);
    segments.extend(last);
    segments
}

fn segment(segment: &serde_path_to_error::Segment) -> Option<Segment> {
    use serde_path_to_error::Segment as S;
    match segment {
        S::Seq { index } => Some(Segment::Item(*index)),
        S::Map { key } => Some(Segment::Key(key.clone())),
        S::Enum { .. } | S::Unknown => None,
    }
}

fn malformed(path: &Path, error: &serde_yaml::Error) -> PolicyFilesError {
    let place = error.location();
    let (line, column) = place.map_or((1, 1), |place| (place.line(), place.column()));
    let message = error.to_string();
    let end = message.rfind(" at line ").unwrap_or(message.len());
    PolicyFilesError::Malformed {
        path: path.to_owned(),
        line,
        column,
        message: message[..end].to_owned(),
    }
}
