//! What an API server says, cut to what is used as soon as it is read.
//!
//! An object that is malformed does not lose the others: it is left out, with a warning that names it.

use std::{
    fmt,
    io::{BufReader, Read},
};

use k8s_openapi::{
    Metadata,
    api::{core::v1 as core, discovery::v1 as discovery},
    apimachinery::pkg::apis::meta::v1::{ListMeta, ObjectMeta},
};
use kube::core::Status;
use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;

use super::{
    kind::Kind,
    trouble::{Trouble, Verb},
};
use crate::{
    metered::{Allowance, Metered},
    time::Timestamp,
    topology::{
        Change, Common, EndpointSlice, FieldError, Namespace, Node, Object, ObjectKey, Objects,
        Pod, Service, end_of_pod,
    },
};

/// The longest text of one object, in bytes. etcd takes no more than 1.5 MiB, an API server three.
pub(super) const MAX_OBJECT_BYTES: usize = 8 << 20;

/// The most objects of one kind, about ten times what the largest clusters have.
pub(super) const MAX_OBJECTS: usize = 2_000_000;

/// Size of the buffer in front of the parser, in bytes.
const BUFFER: usize = 64 << 10;

/// What a page says of itself.
#[derive(Debug, Default)]
pub(super) struct Page {
    /// The version of the list.
    pub(super) version: Option<String>,
    /// Stands for the next page.
    pub(super) token: Option<String>,
}

/// What a line of a watch says.
#[derive(Debug)]
pub(super) enum Event {
    /// Something has changed.
    Change {
        change: Box<Change>,
        version: String,
    },
    /// Nothing has, up to this version.
    Bookmark { version: String },
    /// An object is not what it should be, and was passed over.
    Malformed { version: String },
}

/// What the pages of a list have brought so far.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) objects: Objects,
    common: Common,
    /// Objects that were left out.
    pub(super) malformed: usize,
    pages: usize,
    /// How many objects there may be, those left out included; and how many pages.
    most: usize,
}

/// Reads a page of a list; its objects are added to `listed`, which comes back.
pub(super) fn page(
    kind: Kind,
    text: impl Read,
    mut listed: Listed,
) -> Result<(Page, Listed), Trouble> {
    listed.pages += 1;
    if listed.pages > listed.most {
        return Err(Trouble::TooMany(listed.most));
    }
    let (text, allowance) = Metered::new(text, "an object", MAX_OBJECT_BYTES);
    let mut document =
        serde_json::Deserializer::from_reader(BufReader::with_capacity(BUFFER, text));
    let mut reader = PageReader {
        kind,
        listed,
        allowance,
    };
    let page = reader
        .deserialize_page(&mut document)
        .and_then(|page| document.end().map(|()| page))
        .map_err(|error| Trouble::Malformed(error.to_string()))?;
    Ok((page, reader.listed))
}

/// Reads a line of a watch.
pub(super) fn event(kind: Kind, line: &[u8]) -> Result<Event, Trouble> {
    #[derive(Deserialize)]
    struct Line<'a> {
        #[serde(rename = "type")]
        event: &'a str,
        #[serde(borrow)]
        object: &'a RawValue,
    }
    let malformed = |error: serde_json::Error| Trouble::Malformed(error.to_string());
    let Line { event, object } = serde_json::from_slice(line).map_err(malformed)?;
    if event == "ERROR" {
        let status: Status = serde_json::from_str(object.get()).map_err(malformed)?;
        return Err(Trouble::of_status(Verb::Watch, status));
    }
    let id: Id = serde_json::from_str(object.get()).map_err(malformed)?;
    let version = id.metadata.resource_version.clone();
    if version.is_empty() {
        return Err(Trouble::Malformed(format!(
            "an {event} event without version"
        )));
    }
    match event {
        "ADDED" | "MODIFIED" => Ok(match parse(kind, object.get()) {
            Ok(object) => Event::Change {
                change: Box::new(Change::Upsert(object)),
                version,
            },
            Err(error) => {
                warn(kind, &id, &error);
                Event::Malformed { version }
            }
        }),
        "DELETED" => Ok(Event::Change {
            change: Box::new(Change::Delete {
                key: id.key(kind),
                ended: end(kind, object.get()),
            }),
            version,
        }),
        "BOOKMARK" => Ok(Event::Bookmark { version }),
        _ => Err(Trouble::Malformed(format!("an event of type {event}"))),
    }
}

/// What tells an object from others, and one version from another.
#[derive(Debug, Default, Deserialize)]
struct Id {
    #[serde(default)]
    metadata: IdMetadata,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct IdMetadata {
    namespace: String,
    name: String,
    uid: String,
    resource_version: String,
}

impl Id {
    fn key(self, kind: Kind) -> ObjectKey {
        let IdMetadata {
            namespace,
            name,
            uid,
            ..
        } = self.metadata;
        match kind {
            Kind::Pods => ObjectKey::Pod { uid },
            Kind::Services => ObjectKey::Service { namespace, name },
            Kind::EndpointSlices => ObjectKey::EndpointSlice { namespace, name },
            Kind::Nodes => ObjectKey::Node { name },
            Kind::Namespaces => ObjectKey::Namespace { name },
        }
    }
}

/// When a deleted object ended, if it tells. That it is gone is true even if the rest of it is malformed.
fn end(kind: Kind, text: &str) -> Option<Timestamp> {
    #[derive(Deserialize)]
    struct LastWords {
        status: core::PodStatus,
    }
    if kind != Kind::Pods {
        return None;
    }
    let LastWords { status } = serde_json::from_str(text).ok()?;
    end_of_pod(&status)
}

/// What is wrong with an object.
struct ObjectError(String);

impl From<FieldError> for ObjectError {
    fn from(error: FieldError) -> Self {
        Self(error.to_string())
    }
}

fn parse(kind: Kind, text: &str) -> Result<Object, ObjectError> {
    match kind {
        Kind::Pods => typed::<core::Pod, Pod>(text).map(Object::Pod),
        Kind::Services => typed::<core::Service, Service>(text).map(Object::Service),
        Kind::EndpointSlices => {
            typed::<discovery::EndpointSlice, EndpointSlice>(text).map(Object::EndpointSlice)
        }
        Kind::Nodes => typed::<core::Node, Node>(text).map(Object::Node),
        Kind::Namespaces => typed::<core::Namespace, Namespace>(text).map(Object::Namespace),
    }
}

fn typed<A, O>(text: &str) -> Result<O, ObjectError>
where
    A: DeserializeOwned + Metadata<Ty = ObjectMeta>,
    O: TryFrom<A, Error = FieldError>,
{
    let object = serde_json::from_str(text).or_else(|_without_path| {
        // The path of the field is worth a second look only where there is something to say of it.
        let mut text = serde_json::Deserializer::from_str(text);
        serde_path_to_error::deserialize::<_, A>(&mut text)
            .map_err(|error| ObjectError(error.to_string()))
    })?;
    Ok(O::try_from(object)?)
}

fn warn(kind: Kind, id: &Id, error: &ObjectError) {
    let IdMetadata {
        namespace, name, ..
    } = &id.metadata;
    tracing::warn!(%kind, namespace, name, error = error.0, "an object is malformed and left out");
}

impl Default for Listed {
    fn default() -> Self {
        Self {
            objects: Objects::default(),
            common: Common::default(),
            malformed: 0,
            pages: 0,
            most: MAX_OBJECTS,
        }
    }
}

impl Listed {
    fn push(&mut self, mut object: Object) {
        if let Object::Pod(pod) = &mut object {
            self.common.share(pod);
        }
        self.objects.push(object);
    }
}

/// Takes a list apart.
struct PageReader {
    kind: Kind,
    listed: Listed,
    allowance: Allowance,
}

impl PageReader {
    fn deserialize_page<'de, D: Deserializer<'de>>(
        &mut self,
        deserializer: D,
    ) -> Result<Page, D::Error> {
        deserializer.deserialize_map(List(self))
    }

    fn take(&mut self, text: &str) {
        match parse(self.kind, text) {
            Ok(object) => self.listed.push(object),
            Err(error) => {
                self.listed.malformed += 1;
                // One is told by name: a mistake of a writer is in all of its objects.
                if self.listed.malformed == 1 {
                    let id = serde_json::from_str(text).unwrap_or_default();
                    warn(self.kind, &id, &error);
                }
            }
        }
        self.allowance.renew();
    }
}

struct List<'r>(&'r mut PageReader);

impl<'de> Visitor<'de> for List<'_> {
    type Value = Page;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Page, M::Error> {
        let mut metadata = ListMeta::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "items" => map.next_value_seed(Items(&mut *self.0))?,
                "metadata" => metadata = map.next_value()?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        Ok(Page {
            version: some(metadata.resource_version),
            token: some(metadata.continue_),
        })
    }
}

struct Items<'r>(&'r mut PageReader);

impl<'de> DeserializeSeed<'de> for Items<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Items<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the items of a list")
    }

    /// An empty list may be written as `null`.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<(), S::Error> {
        while let Some(text) = items.next_element::<Box<RawValue>>()? {
            let listed = &self.0.listed;
            if listed.objects.len() + listed.malformed >= listed.most {
                return Err(de::Error::custom(Trouble::TooMany(listed.most)));
            }
            self.0.take(text.get());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = r#"{"metadata": {"name": "a", "resourceVersion": "3"}}"#;

    fn nodes(text: &str) -> Result<(Page, Vec<String>), String> {
        let (page, listed) = page(Kind::Nodes, text.as_bytes(), Listed::default())
            .map_err(|trouble| trouble.to_string())?;
        let nodes = listed.objects.nodes.iter();
        let names = nodes.map(|node| node.identity.name.clone());
        Ok((page, names.collect()))
    }

    #[test]
    fn a_malformed_object_does_not_lose_the_others() {
        let text = format!(
            r#"{{"kind": "NodeList", "items": [{NODE}, {{"metadata": {{"name": 7}}}}, {{"spec": {{"podCIDRs": ["x"]}}, "metadata": {{"name": "b"}}}},
                {{"metadata": {{"name": "c"}}}}], "metadata": {{"resourceVersion": "9", "continue": "next"}}}}"#
        );
        let (page, names) = nodes(&text).unwrap();
        assert_eq!(names, ["a", "c"]);
        assert_eq!(page.version.as_deref(), Some("9"));
        assert_eq!(page.token.as_deref(), Some("next"));
    }

    #[test]
    fn an_empty_list_has_a_version() {
        for items in ["null", "[]"] {
            let text = format!(
                r#"{{"items": {items}, "metadata": {{"resourceVersion": "9", "continue": ""}}}}"#
            );
            let (page, names) = nodes(&text).unwrap();
            assert!(names.is_empty() && page.token.is_none());
            assert_eq!(page.version.as_deref(), Some("9"));
        }
    }

    #[test]
    fn half_a_list_is_none() {
        for text in ["", "[]", r#"{"items": [{}"#, r#"{"items": 7}"#, "{} {}"] {
            assert!(nodes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_object_that_is_too_long_ends_the_list() {
        // What is in the buffer already does not count.
        let long = "x".repeat(MAX_OBJECT_BYTES + BUFFER);
        let error = nodes(&format!(r#"{{"items": [{NODE}, {{"x": "{long}"}}]}}"#)).unwrap_err();
        assert!(error.contains("an object of more than"), "{error}");
        // Many small ones may be as long together.
        let many = vec![NODE; 2 * MAX_OBJECT_BYTES / NODE.len()].join(",");
        let (_, names) = nodes(&format!(r#"{{"items": [{many}]}}"#)).unwrap();
        assert!(names.len() * NODE.len() > MAX_OBJECT_BYTES);
    }

    #[test]
    fn too_many_objects_end_the_list() {
        let read = |most| {
            let listed = Listed {
                most,
                ..Listed::default()
            };
            let text = format!(r#"{{"items": [{NODE}, {NODE}, {NODE}]}}"#);
            page(Kind::Nodes, text.as_bytes(), listed)
        };
        assert_eq!(read(3).unwrap().1.objects.len(), 3);
        let error = read(2).unwrap_err().to_string();
        assert!(error.contains("more than 2 objects"), "{error}");
        // What is left out counts, and so do pages that bring nothing.
        let two = || Listed {
            most: 2,
            ..Listed::default()
        };
        let bad = r#"{"items": [{"metadata": 1}, {"metadata": 2}, {"metadata": 3}]}"#;
        assert!(page(Kind::Nodes, bad.as_bytes(), two()).is_err());
        let mut listed = two();
        for _ in 0..2 {
            listed = page(Kind::Nodes, b"{}".as_slice(), listed).unwrap().1;
        }
        assert!(page(Kind::Nodes, b"{}".as_slice(), listed).is_err());
    }

    fn check(line: &str, expected: &str) {
        let found = match event(Kind::Nodes, line.as_bytes()) {
            Ok(Event::Change { change, version }) => match *change {
                Change::Upsert(object) => format!("set {:?} at {version}", object.key()),
                Change::Delete { key, .. } => format!("delete {key:?} at {version}"),
            },
            Ok(Event::Bookmark { version }) => format!("bookmark at {version}"),
            Ok(Event::Malformed { version }) => format!("malformed at {version}"),
            Err(trouble) => trouble.to_string(),
        };
        assert!(found.contains(expected), "{line}: {found}");
    }

    #[test]
    fn the_end_of_a_pod_is_when_its_last_container_ended() {
        let check = |status: &str, expected: Option<u64>| {
            let line = format!(
                r#"{{"type": "DELETED", "object": {{"metadata": {{"uid": "u", "resourceVersion": "4",
                    "deletionTimestamp": "2026-01-01T00:00:30Z"}}, "status": {status}}}}}"#
            );
            let line = line.replace('\n', " ");
            let Ok(Event::Change { change, .. }) = event(Kind::Pods, line.as_bytes()) else {
                panic!("{line}");
            };
            let Change::Delete { ended, .. } = *change else {
                panic!("{line}");
            };
            let second = |second| Timestamp::from_nanos((1_767_225_600 + second) * 1_000_000_000);
            assert_eq!(ended, expected.map(second), "{line}");
        };
        let container = |state: &str| {
            format!(
                r#"{{"name": "a", "image": "", "imageID": "", "ready": false, "restartCount": 0, {state}}}"#
            )
        };
        let ended = |time: &str| {
            container(&format!(
                r#""state": {{"terminated": {{"exitCode": 0, "finishedAt": "{time}"}}}}"#
            ))
        };
        let both = |one: &str, other: &str| format!(r#"{{"containerStatuses": [{one}, {other}]}}"#);
        let (early, late) = ("2026-01-01T00:00:01Z", "2026-01-01T00:00:02Z");
        check(&both(&ended(early), &ended(late)), Some(2));
        check(
            &both(&ended(late), &container(r#""state": {"running": {}}"#)),
            None,
        );
        check(
            &both(
                &ended(late),
                &container(r#""state": {"terminated": {"exitCode": 137}}"#),
            ),
            None,
        );
        let crashed = container(&format!(
            r#""state": {{"waiting": {{}}}}, "lastState": {{"terminated": {{"exitCode": 1, "finishedAt": "{late}"}}}}"#
        ));
        check(&both(&crashed, &ended(early)), Some(2));
        check("{}", None);
        check("7", None);
    }

    #[test]
    fn events() {
        let of =
            |event: &str, object: &str| format!(r#"{{"type": "{event}", "object": {object}}}"#);
        check(&of("ADDED", NODE), r#"set Node { name: "a" } at 3"#);
        check(&of("MODIFIED", NODE), r#"set Node { name: "a" } at 3"#);
        check(&of("DELETED", NODE), r#"delete Node { name: "a" } at 3"#);
        check(&of("BOOKMARK", NODE), "bookmark at 3");
        let bad = r#"{"metadata": {"name": "a", "resourceVersion": "4"}, "spec": {"podCIDRs": 1}}"#;
        check(&of("ADDED", bad), "malformed at 4");
        check(
            &of("ADDED", r#"{"metadata": {"name": "a"}}"#),
            "without version",
        );
        check(&of("RENAMED", NODE), "of type RENAMED");
        check(
            &of("ERROR", r#"{"code": 410, "message": "too old"}"#),
            "too old",
        );
        check("<html>", "not what an API server says");
    }
}
