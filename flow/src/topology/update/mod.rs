//! How the index changes: one object at a time, or a list of a whole kind.

mod nodes;
mod pods;
mod services;

use std::{mem::discriminant, net::IpAddr};

use super::{
    history::End,
    index::{Ended, Index, Owner},
    objects::{Change, Namespace, Object, ObjectKey, Objects},
};
use crate::time::Timestamp;

/// When and how something was learnt.
#[derive(Clone, Copy, Debug)]
struct Learnt {
    now: Timestamp,
    /// It was not so before this time.
    since: Timestamp,
    by: By,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// It may have been so for long.
    List,
    /// It was not so at [`Learnt::since`].
    Event,
}

impl Learnt {
    fn by_list(now: Timestamp) -> Self {
        Self {
            now,
            since: now,
            by: By::List,
        }
    }

    fn by_event(since: Timestamp, now: Timestamp) -> Self {
        Self {
            now,
            since: since.min(now),
            by: By::Event,
        }
    }

    /// The end of what is no more.
    fn end(self) -> End {
        End {
            earliest: self.since,
            latest: self.now,
        }
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
        self.apply_late(change, now, now);
    }

    /// One object has changed at some time between `since` and `now`, as is learnt now.
    pub fn apply_late(&mut self, change: Change, since: Timestamp, now: Timestamp) {
        let learnt = Learnt::by_event(since, now);
        match change {
            Change::Upsert(Object::Namespace(namespace)) => self.set_namespace(namespace),
            Change::Upsert(Object::Node(node)) => {
                self.set_node(node, learnt);
            }
            Change::Upsert(Object::Service(service)) => self.upsert_service(service, learnt),
            Change::Upsert(Object::EndpointSlice(slice)) => self.set_slice(slice, now),
            Change::Upsert(Object::Pod(pod)) => {
                self.set_pod(pod, learnt);
            }
            Change::Delete { key, ended } => self.delete(key, ended, learnt),
        }
    }

    fn delete(&mut self, key: ObjectKey, ended: Option<Timestamp>, learnt: Learnt) {
        let now = learnt.now;
        match key {
            ObjectKey::Namespace { name } => self.end_namespace(&name),
            ObjectKey::Node { name } => self.delete_node(&name, learnt),
            ObjectKey::Service { namespace, name } => {
                self.delete_service(&namespace, &name, learnt);
            }
            ObjectKey::EndpointSlice { namespace, name } => {
                self.end_slice(&namespace, &name, now);
            }
            ObjectKey::Pod { uid } => {
                let told = ended.map(|ended| End::told(ended, now));
                self.delete_pod(&uid, told.unwrap_or(learnt.end()), now);
            }
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
            self.release_address(*address, *owner, learnt.end(), learnt.now);
        }
        for (address, owner) in new.iter().filter(|held| !old.contains(held)) {
            let from = self.start(*address, *owner, started, learnt);
            self.addresses.hold(*address, *owner, from);
        }
    }

    /// `owner` gave `address` up, which is learnt at `now`.
    fn release_address(&mut self, address: IpAddr, owner: Owner, end: End, now: Timestamp) {
        if self.addresses.release(&address, owner, end) {
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
            By::Event => learnt.since,
        };
        let others = self.addresses.of(&address).iter();
        let released = others
            .filter(|span| discriminant(&span.owner) == discriminant(&owner))
            .filter_map(|span| match learnt.by {
                By::List if span.is_open() => None,
                By::Event if span.is_open() => Some(learnt.since),
                By::List | By::Event => Some(span.surely_to),
            });
        let earliest = started.unwrap_or(unknown);
        released.fold(earliest, Timestamp::max).min(learnt.now)
    }
}
