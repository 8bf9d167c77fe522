//! How the index changes: one object at a time, or a list of a whole kind.

mod nodes;
mod pods;
mod services;

use std::{mem::discriminant, net::IpAddr};

use super::{
    index::{Ended, Index, Owner},
    objects::{Change, Namespace, Object, ObjectKey, Objects},
};
use crate::time::Timestamp;

/// When and how something was learnt.
#[derive(Clone, Copy, Debug)]
struct Learnt {
    now: Timestamp,
    by: By,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// It may have been so for long.
    List,
    /// It was not so a moment ago.
    Event,
}

impl Learnt {
    fn by_list(now: Timestamp) -> Self {
        Self { now, by: By::List }
    }

    fn by_event(now: Timestamp) -> Self {
        Self { now, by: By::Event }
    }
}

impl Index {
    /// Everything is now as listed; what is not listed has ended at `now`.
    pub fn replace(&mut self, objects: Objects, now: Timestamp) {
        self.replace_namespaces(objects.namespaces);
        self.replace_nodes(objects.nodes, now);
        self.replace_endpoint_slices(objects.endpoint_slices, now);
        self.replace_services(objects.services, now);
        self.replace_pods(objects.pods, now);
    }

    /// One object has changed at `now`.
    pub fn apply(&mut self, change: Change, now: Timestamp) {
        match change {
            Change::Upsert(Object::Namespace(namespace)) => self.set_namespace(namespace),
            Change::Upsert(Object::Node(node)) => {
                self.set_node(node, Learnt::by_event(now));
            }
            Change::Upsert(Object::Service(service)) => self.upsert_service(service, now),
            Change::Upsert(Object::EndpointSlice(slice)) => self.set_slice(slice, now),
            Change::Upsert(Object::Pod(pod)) => {
                self.set_pod(pod, Learnt::by_event(now));
            }
            Change::Delete(ObjectKey::Namespace { name }) => self.end_namespace(&name),
            Change::Delete(ObjectKey::Node { name }) => self.delete_node(&name, now),
            Change::Delete(ObjectKey::Service { namespace, name }) => {
                self.delete_service(&namespace, &name, now);
            }
            Change::Delete(ObjectKey::EndpointSlice { namespace, name }) => {
                self.end_slice(&namespace, &name, now);
            }
            Change::Delete(ObjectKey::Pod { uid }) => self.delete_pod(&uid, now),
        }
    }

    /// The namespaces are now these.
    pub fn replace_namespaces(&mut self, list: Vec<Namespace>) {
        for entry in self.namespaces.values_mut() {
            entry.object = None;
        }
        for namespace in list {
            self.set_namespace(namespace);
        }
        self.namespaces.retain(|_, entry| !entry.is_empty());
    }

    fn set_namespace(&mut self, namespace: Namespace) {
        let entry = self.namespaces.entry(namespace.name.clone());
        entry.or_default().object = Some(namespace);
    }

    fn end_namespace(&mut self, name: &str) {
        if let Some(entry) = self.namespaces.get_mut(name) {
            entry.object = None;
        }
        self.tidy(name);
    }

    /// An object held the addresses `old` and holds `new` from now on; the new ones since `started` if that can be.
    fn move_addresses(
        &mut self,
        old: &[(IpAddr, Owner)],
        new: &[(IpAddr, Owner)],
        started: Option<Timestamp>,
        learnt: Learnt,
    ) {
        for (address, owner) in old.iter().filter(|held| !new.contains(held)) {
            self.release_address(*address, *owner, learnt.now, learnt.now);
        }
        for (address, owner) in new.iter().filter(|held| !old.contains(held)) {
            let from = self.start(*address, *owner, started, learnt);
            self.addresses.hold(*address, *owner, from);
        }
    }

    /// `owner` gave `address` up at `at`, which is learnt at `now`.
    fn release_address(&mut self, address: IpAddr, owner: Owner, at: Timestamp, now: Timestamp) {
        if self.addresses.release(&address, owner, at) {
            self.ended.push_back((now, Ended::Address(address, owner)));
        }
    }

    /// Since when `owner` holds `address`, if its object started at `started`: see [`Index`].
    fn start(
        &self,
        address: IpAddr,
        owner: Owner,
        started: Option<Timestamp>,
        learnt: Learnt,
    ) -> Timestamp {
        let unknown = match learnt.by {
            By::List => Timestamp::default(),
            By::Event => learnt.now,
        };
        let others = self.addresses.of(&address).iter();
        let released = others
            .filter(|span| discriminant(&span.owner) == discriminant(&owner))
            .filter_map(|span| match learnt.by {
                By::List if span.is_open() => None,
                By::List | By::Event => Some(span.to),
            });
        let earliest = started.unwrap_or(unknown);
        released.fold(earliest, Timestamp::max).min(learnt.now)
    }
}
