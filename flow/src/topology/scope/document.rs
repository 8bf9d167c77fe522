//! The parts of a report that are read.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Deserializer};

/// A report. All other topologies are left unread.
#[derive(Debug, Deserialize)]
pub(super) struct Report {
    #[serde(rename = "Pod")]
    pub(super) pods: Topology,
    #[serde(rename = "Service", default)]
    pub(super) services: Topology,
    #[serde(rename = "Namespace", default)]
    pub(super) namespaces: Topology,
    #[serde(rename = "Host", default)]
    pub(super) hosts: Topology,
    #[serde(rename = "Deployment", default)]
    pub(super) deployments: Topology,
    #[serde(rename = "StatefulSet", default)]
    pub(super) stateful_sets: Topology,
    #[serde(rename = "DaemonSet", default)]
    pub(super) daemon_sets: Topology,
    #[serde(rename = "CronJob", default)]
    pub(super) cron_jobs: Topology,
    #[serde(rename = "Job", default)]
    pub(super) jobs: Topology,
}

/// Nodes of one kind by id.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Topology {
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) nodes: BTreeMap<String, Node>,
}

/// One node of a topology.
#[derive(Debug, Deserialize)]
pub(super) struct Node {
    #[serde(default, deserialize_with = "null_is_empty")]
    latest: HashMap<String, Latest>,
    #[serde(default, deserialize_with = "null_is_empty")]
    parents: HashMap<String, Option<Vec<String>>>,
    #[serde(default, deserialize_with = "null_is_empty")]
    sets: HashMap<String, Option<Vec<String>>>,
}

#[derive(Debug, Deserialize)]
struct Latest {
    value: String,
}

impl Node {
    /// The latest value of a key.
    pub(super) fn latest(&self, key: &str) -> Option<&str> {
        self.latest.get(key).map(|latest| latest.value.as_str())
    }

    /// The latest value of a key without which the node says nothing.
    pub(super) fn required(&self, key: &str) -> Result<&str, String> {
        self.latest(key)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| format!("{key} is missing"))
    }

    /// All latest values with their keys.
    pub(super) fn all_latest(&self) -> impl Iterator<Item = (&str, &str)> {
        self.latest
            .iter()
            .map(|(key, latest)| (key.as_str(), latest.value.as_str()))
    }

    /// The id of the first parent in a topology.
    pub(super) fn parent(&self, topology: &str) -> Option<&str> {
        let ids = self.parents.get(topology)?.as_ref()?;
        ids.first().map(String::as_str)
    }

    /// The members of a set.
    pub(super) fn sets(&self, key: &str) -> impl Iterator<Item = &str> {
        let members = self.sets.get(key).and_then(Option::as_ref);
        members.into_iter().flatten().map(String::as_str)
    }
}

/// The app writes `null` for what is empty.
fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}
