//! Objects, and what happened to them.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::Value;

/// The largest page, whatever is asked for.
const NO_LIMIT: usize = usize::MAX;

/// All objects by resource.
#[derive(Debug, Default)]
pub(super) struct Store {
    revision: u64,
    collections: BTreeMap<String, Collection>,
}

#[derive(Debug, Default)]
struct Collection {
    /// By namespace and name.
    objects: BTreeMap<(String, String), Arc<Stored>>,
    events: Vec<Event>,
    /// What happened up to this version is forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct Stored {
    text: String,
    name: String,
    node: String,
}

/// What happened to an object.
#[derive(Clone, Debug)]
pub(super) struct Event {
    version: u64,
    before: Option<Arc<Stored>>,
    /// As it is now, or was last.
    object: Arc<Stored>,
    exists: bool,
}

/// Part of a resource's objects: those with this name, those on this node.
#[derive(Clone, Debug, Default)]
pub(super) struct Selector {
    pub(super) name: Option<String>,
    pub(super) node: Option<String>,
}

/// Why there is no list or watch.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It is asked for what is forgotten.
    TooOld { wanted: u64, current: u64 },
    /// It is asked for what is yet to come.
    TooNew { wanted: u64, current: u64 },
}

/// A page of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) version: u64,
    /// Where the next one begins, if there is one.
    pub(super) next: Option<String>,
    pub(super) items: Vec<Arc<str>>,
}

impl Store {
    pub(super) fn put(&mut self, resource: &str, mut object: Value) -> Event {
        self.revision += 1;
        let version = self.revision;
        object["metadata"]["resourceVersion"] = Value::String(version.to_string());
        let stored = Arc::new(Stored::new(&object));
        let key = (text(&object, "/metadata/namespace"), stored.name.clone());
        let collection = self.collections.entry(resource.to_owned()).or_default();
        let before = collection.objects.insert(key, Arc::clone(&stored));
        collection.record(Event {
            version,
            before,
            object: stored,
            exists: true,
        })
    }

    pub(super) fn delete(&mut self, resource: &str, namespace: &str, name: &str) -> Option<Event> {
        let collection = self.collections.get_mut(resource)?;
        let key = (namespace.to_owned(), name.to_owned());
        let before = collection.objects.remove(&key)?;
        self.revision += 1;
        let version = self.revision;
        let mut object: Value = serde_json::from_str(&before.text).unwrap_or_default();
        object["metadata"]["resourceVersion"] = Value::String(version.to_string());
        Some(collection.record(Event {
            version,
            object: Arc::new(Stored::new(&object)),
            before: Some(before),
            exists: false,
        }))
    }

    pub(super) fn bookmark(&self) -> String {
        format!(
            "{{\"type\":\"BOOKMARK\",\"object\":{{\"metadata\":{{\"resourceVersion\":\"{}\",\"creationTimestamp\":null}}}}}}",
            self.revision
        )
    }

    pub(super) fn forget(&mut self) {
        for collection in self.collections.values_mut() {
            collection.events.clear();
            collection.forgotten = self.revision;
        }
    }

    /// The page that begins at `token`, of at most `limit` objects.
    pub(super) fn list(
        &self,
        resource: &str,
        selector: &Selector,
        limit: Option<usize>,
        token: Option<&str>,
    ) -> Page {
        let start = token.and_then(|token| token.split_once('.'));
        let start = start.map(|(namespace, name)| (namespace.to_owned(), name.to_owned()));
        let objects = self.collections.get(resource).map(|c| &c.objects);
        let mut selected = objects.into_iter().flatten().filter(|(key, object)| {
            selector.selects(object) && start.as_ref().is_none_or(|start| *key >= start)
        });
        let items = selected
            .by_ref()
            .take(limit.unwrap_or(NO_LIMIT))
            .map(|(_, object)| Arc::from(object.text.as_str()))
            .collect();
        let next = selected
            .next()
            .map(|((namespace, name), _)| format!("{namespace}.{name}"));
        Page {
            version: self.revision,
            next,
            items,
        }
    }

    /// Whether the server is as far as this version.
    pub(super) fn reaches(&self, wanted: u64) -> Result<(), Refusal> {
        if wanted > self.revision {
            return Err(Refusal::TooNew {
                wanted,
                current: self.revision,
            });
        }
        Ok(())
    }

    /// What happened after this version.
    pub(super) fn since(
        &self,
        resource: &str,
        version: u64,
        selector: &Selector,
    ) -> Result<Vec<String>, Refusal> {
        let Some(collection) = self.collections.get(resource) else {
            return Ok(Vec::new());
        };
        if version < collection.forgotten {
            return Err(Refusal::TooOld {
                wanted: version,
                current: self.revision,
            });
        }
        let events = collection.events.iter();
        Ok(events
            .filter(|event| event.version > version)
            .filter_map(|event| event.line(selector))
            .collect())
    }
}

impl Collection {
    fn record(&mut self, event: Event) -> Event {
        self.events.push(event.clone());
        event
    }
}

impl Stored {
    fn new(object: &Value) -> Self {
        Self {
            text: object.to_string(),
            name: text(object, "/metadata/name"),
            node: text(object, "/spec/nodeName"),
        }
    }
}

impl Event {
    /// How it looks to who watches a part of the objects; nothing if it does not concern it.
    pub(super) fn line(&self, selector: &Selector) -> Option<String> {
        let was = self
            .before
            .as_ref()
            .is_some_and(|before| selector.selects(before));
        let is = self.exists && selector.selects(&self.object);
        let event = match (was, is) {
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
            (false, false) => return None,
        };
        Some(format!(
            "{{\"type\":\"{event}\",\"object\":{}}}",
            self.object.text
        ))
    }
}

impl Selector {
    fn selects(&self, object: &Stored) -> bool {
        let matches = |wanted: &Option<String>, found: &str| {
            wanted.as_deref().is_none_or(|wanted| wanted == found)
        };
        matches(&self.name, &object.name) && matches(&self.node, &object.node)
    }
}

fn text(object: &Value, pointer: &str) -> String {
    let found = object.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}
