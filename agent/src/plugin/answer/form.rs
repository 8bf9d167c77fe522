//! A report's form, as far as an answer has one.

use std::collections::{BTreeMap, BTreeSet};

use flow::record::Outcome;
use serde::Serialize;

use crate::plugin::recent::Flow;

/// A time at which nobody else has said anything.
const LONG_PAST: &str = "1970-01-01T00:00:01Z";

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Report<'a> {
    pub(super) endpoint: Topology<'a>,
    pub(super) process: Topology<'a>,
    pub(super) container: Topology<'a>,
    pub(super) pod: Topology<'a>,
    pub(super) host: Topology<'a>,
    pub(super) plugins: Vec<Plugin<'a>>,
}

#[derive(Debug, Serialize)]
pub(super) struct Plugin<'a> {
    pub(super) id: &'a str,
    pub(super) label: &'static str,
    pub(super) description: &'static str,
    pub(super) interfaces: [&'static str; 1],
    pub(super) api_version: &'static str,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Topology<'a> {
    pub(super) nodes: BTreeMap<String, Node<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) metadata_templates: BTreeMap<&'static str, MetadataTemplate>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) table_templates: BTreeMap<&'static str, TableTemplate>,
}

#[derive(Debug, Serialize)]
pub(super) struct Node<'a> {
    pub(super) id: String,
    pub(super) topology: &'static str,
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub(super) adjacency: BTreeSet<String>,
    pub(super) latest: BTreeMap<String, Latest<'a>>,
    pub(super) parents: Option<BTreeMap<&'static str, Vec<String>>>,
    pub(super) sets: (),
    pub(super) children: (),
}

#[derive(Debug, Serialize)]
pub(super) struct Latest<'a> {
    pub(super) timestamp: &'a str,
    pub(super) value: String,
}

#[derive(Debug, Serialize)]
pub(super) struct MetadataTemplate {
    pub(super) id: &'static str,
    pub(super) label: &'static str,
    #[serde(rename = "dataType", skip_serializing_if = "str::is_empty")]
    pub(super) data_type: &'static str,
    pub(super) priority: f64,
    pub(super) from: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct TableTemplate {
    pub(super) id: &'static str,
    pub(super) label: &'static str,
    pub(super) prefix: &'static str,
    #[serde(rename = "type")]
    pub(super) form: &'static str,
    pub(super) columns: Vec<Column>,
    #[serde(rename = "fixedRows")]
    pub(super) fixed_rows: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Column {
    pub(super) id: &'static str,
    pub(super) label: &'static str,
    #[serde(rename = "dataType")]
    pub(super) data_type: &'static str,
}

impl<'a> Topology<'a> {
    pub(super) fn node(&mut self, id: &str, topology: &'static str) -> &mut Node<'a> {
        let nodes = &mut self.nodes;
        nodes
            .entry(id.to_owned())
            .or_insert_with(|| Node::new(id.to_owned(), topology))
    }
}

impl<'a> Node<'a> {
    pub(super) fn new(id: String, topology: &'static str) -> Self {
        Self {
            id,
            topology,
            adjacency: BTreeSet::new(),
            latest: BTreeMap::new(),
            parents: None,
            sets: (),
            children: (),
        }
    }

    /// Something that we know best.
    pub(super) fn set(&mut self, key: &str, value: String, timestamp: &'a str) {
        self.latest
            .insert(key.to_owned(), Latest { timestamp, value });
    }

    /// Something for a node that Scope does not know.
    pub(super) fn fill(&mut self, key: &str, value: String) {
        self.latest.entry(key.to_owned()).or_insert(Latest {
            timestamp: LONG_PAST,
            value,
        });
    }

    pub(super) fn parent(&mut self, topology: &'static str, id: &str) {
        let parents = self.parents.get_or_insert_default();
        let ids = parents.entry(topology).or_default();
        if !ids.iter().any(|known| known == id) {
            ids.push(id.to_owned());
        }
    }

    /// Adds to a list of names, separated by commas.
    pub(super) fn add_name(&mut self, key: &str, name: &str, timestamp: &'a str) {
        let known = self.latest.get(key).map_or("", |latest| &latest.value);
        let mut names: BTreeSet<&str> = known.split(", ").filter(|name| !name.is_empty()).collect();
        names.insert(name);
        let names: Vec<&str> = names.into_iter().collect();
        let names = names.join(", ");
        self.set(key, names, timestamp);
    }

    /// Adds a flow's connections.
    pub(super) fn count(&mut self, flow: &Flow, timestamp: &'a str) {
        self.add_name("microshield_protocols", flow.protocol.name(), timestamp);
        let key = match flow.outcome {
            Outcome::Established => "microshield_connections",
            Outcome::Failed => "microshield_failed",
        };
        let known = self.latest.get(key).map_or("0", |latest| &latest.value);
        let count = known.parse::<u64>().unwrap_or_default();
        self.set(key, count.saturating_add(flow.count).to_string(), timestamp);
    }
}
