//! Which services of a namespace select which of its pods.
//!
//! Pods of one template have the same labels, so services are matched with sets of labels, not with pods: a new pod joins
//! the group of its labels, and a new service is matched with each group once. A group finds the services that may
//! select it by one pair of each service's selector.

use std::{collections::HashMap, sync::Arc};

use super::{
    pod::{PodId, ServiceIds},
    service::{ServiceEntry, ServiceId},
    store::Store,
};
use crate::endpoint::Labels;

/// The groups and selectors of a namespace.
#[derive(Debug, Default)]
pub(super) struct Selection {
    groups: HashMap<Arc<Labels>, Group>,
    /// Label key → label value → services that are filed under this pair of their selector.
    by_pair: HashMap<String, HashMap<String, Vec<ServiceId>>>,
}

/// The living pods that have the same labels.
#[derive(Debug)]
struct Group {
    /// The services that select them.
    services: ServiceIds,
    pods: Vec<PodId>,
}

impl Selection {
    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.by_pair.is_empty()
    }

    /// Adds a pod that is in no group. Returns the services that select it.
    pub(super) fn join(
        &mut self,
        pod: PodId,
        labels: &Arc<Labels>,
        services: &Store<ServiceEntry>,
    ) -> ServiceIds {
        if let Some(group) = self.groups.get_mut(labels) {
            group.pods.push(pod);
            return group.services.clone();
        }
        let selecting = selecting(&self.by_pair, labels, services);
        self.groups.insert(
            Arc::clone(labels),
            Group {
                services: selecting.clone(),
                pods: vec![pod],
            },
        );
        selecting
    }

    /// Takes a pod out of the group of its labels.
    pub(super) fn leave(&mut self, pod: PodId, labels: &Labels) {
        let Some(group) = self.groups.get_mut(labels) else {
            return;
        };
        if let Some(i) = group.pods.iter().position(|other| *other == pod) {
            group.pods.swap_remove(i);
        }
        if group.pods.is_empty() {
            self.groups.remove(labels);
        }
    }

    /// Files a service under the pair of its selector that the fewest services are filed under. An empty selector selects
    /// nothing.
    pub(super) fn file(&mut self, service: ServiceId, selector: &Labels) {
        let filed = |(key, value): &(&String, &String)| {
            let values = self.by_pair.get(*key);
            values
                .and_then(|values| values.get(*value))
                .map_or(0, Vec::len)
        };
        if let Some((key, value)) = selector.iter().min_by_key(filed) {
            let values = self.by_pair.entry(key.clone()).or_default();
            values.entry(value.clone()).or_default().push(service);
        }
    }

    /// Takes a service out again.
    pub(super) fn unfile(&mut self, service: ServiceId, selector: &Labels) {
        for (key, value) in selector {
            let Some(values) = self.by_pair.get_mut(key) else {
                continue;
            };
            if let Some(services) = values.get_mut(value) {
                services.retain(|other| *other != service);
                if services.is_empty() {
                    values.remove(value);
                }
            }
            if values.is_empty() {
                self.by_pair.remove(key);
            }
        }
    }

    /// Matches all groups anew after services were filed. Returns the pods for which something changed, with the
    /// services that select them now.
    pub(super) fn rematch(
        &mut self,
        services: &Store<ServiceEntry>,
    ) -> Vec<(ServiceIds, Vec<PodId>)> {
        let mut changed = Vec::new();
        for (labels, group) in &mut self.groups {
            let found = selecting(&self.by_pair, labels, services);
            if found != group.services {
                group.services = found.clone();
                changed.push((found, group.pods.clone()));
            }
        }
        changed
    }
}

/// The services that select these labels.
fn selecting(
    by_pair: &HashMap<String, HashMap<String, Vec<ServiceId>>>,
    labels: &Labels,
    services: &Store<ServiceEntry>,
) -> ServiceIds {
    let mut found: Vec<(&str, ServiceId)> = labels
        .iter()
        .filter_map(|(key, value)| by_pair.get(key)?.get(value))
        .flatten()
        .filter_map(|id| Some((&services.get(*id)?.spec.identity, *id)))
        .filter(|(service, _)| selects(&service.selector, labels))
        .map(|(service, id)| (service.name.as_str(), id))
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, id)| id).collect()
}

fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}
