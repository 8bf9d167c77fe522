//! Pods: what they are called, which addresses they hold, which services they back.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use super::Learnt;
use crate::{
    endpoint,
    time::Timestamp,
    topology::{
        history::End,
        index::{Ended, HostPort, Index, Owner},
        objects::{ContainerPort, Phase, Pod},
        pod::{Life, PodEntry, PodId, ServiceIds},
        service::{ServiceEntry, ServiceId},
        store::Store,
    },
};

impl Index {
    /// The pods are now these.
    pub fn replace_pods(&mut self, mut list: Vec<Pod>, now: Timestamp) {
        // What the finished ones gave up bounds the others' starts, whatever the order of the list.
        list.sort_by_key(|pod| !matches!(pod.phase, Phase::Finished { .. }));
        let listed: HashSet<PodId> = list
            .into_iter()
            .map(|pod| self.set_pod(pod, Learnt::by_list(now)))
            .collect();
        let known = self.pods.iter().map(|(id, _)| id);
        let gone: Vec<PodId> = known.filter(|id| !listed.contains(id)).collect();
        for id in gone {
            self.end_pod(id, End::at(now), now);
        }
    }

    pub(super) fn set_pod(&mut self, pod: Pod, learnt: Learnt) -> PodId {
        let known = self.pods.id(&pod.identity.uid);
        let id = known.unwrap_or_else(|| self.pods.next_id());
        let living = known
            .and_then(|id| self.pods.get(id))
            .filter(|entry| !entry.has_ended());
        let was_finished = living.is_some_and(|entry| entry.life == Life::Finished);
        let old = living.map(|entry| Held::now(entry, id)).unwrap_or_default();
        // An address that a pod gets instead of another it has since now.
        let started = if old.addresses.is_empty() {
            pod.started
        } else {
            Some(learnt.since)
        };
        let phase = pod.phase;
        let new = match phase {
            Phase::Finished { at } if was_finished || at.is_none() => Held::default(),
            _ => Held::of(&pod.identity, &pod.ports, id),
        };

        self.set_entry(id, pod);
        self.move_held(id, &old, &new, started, learnt);
        if let Phase::Finished { at: Some(at) } = phase {
            let end = End::told(at, learnt.now);
            self.release_held(id, &new, end, learnt.now);
        }
        id
    }

    pub(super) fn delete_pod(&mut self, uid: &str, end: End, now: Timestamp) {
        if let Some(id) = self.pods.id(uid) {
            self.end_pod(id, end, now);
        }
    }

    /// The services that select a pod are now these.
    pub(super) fn set_selecting(&mut self, id: PodId, services: &ServiceIds) {
        let Some(entry) = self.pods.get_mut(id) else {
            return;
        };
        let old = std::mem::replace(&mut entry.services, services.clone());
        if entry.is_backend() {
            count(&mut self.services, &old, &entry.ports, Backend::Leaves);
            count(&mut self.services, services, &entry.ports, Backend::Joins);
        }
        let identity = endpoint::Pod {
            services: self.common.services(names(services, &self.services)),
            ..endpoint::Pod::clone(&entry.pod)
        };
        self.pods.set_identity(id, Arc::new(identity));
    }

    /// Stores a pod under its id, new or not, with the services that select it.
    fn set_entry(&mut self, id: PodId, mut pod: Pod) {
        self.common.share(&mut pod);
        let mut identity = pod.identity;
        let before = self.pods.get(id).filter(|entry| !entry.has_ended());
        let same_group = before.filter(|entry| {
            entry.pod.namespace == identity.namespace && entry.pod.labels == identity.labels
        });
        let services = match same_group {
            Some(entry) => entry.services.clone(),
            None => {
                if let Some(entry) = before
                    && let Some(namespace) = self.namespaces.get_mut(&entry.pod.namespace)
                {
                    namespace.selection.leave(id, &entry.pod.labels);
                }
                let namespace = self.namespaces.entry(identity.namespace.clone());
                let selection = &mut namespace.or_default().selection;
                selection.join(id, &identity.labels, &self.services)
            }
        };
        identity.services = self.common.services(names(&services, &self.services));

        let shared = before.map(|entry| Arc::clone(&entry.pod));
        let entry = PodEntry {
            pod: match shared {
                Some(shared) if *shared == identity => shared,
                _ => Arc::new(identity),
            },
            services,
            ports: pod.ports,
            life: match pod.phase {
                Phase::Finished { .. } => Life::Finished,
                Phase::Pending | Phase::Running => Life::Living,
            },
        };
        if let Some(before) = before.filter(|before| before.is_backend()) {
            let (services, ports) = (&before.services, &before.ports);
            count(&mut self.services, services, ports, Backend::Leaves);
        }
        if entry.is_backend() {
            let (services, ports) = (&entry.services, &entry.ports);
            count(&mut self.services, services, ports, Backend::Joins);
        }
        self.pods.set(id, entry, pod.static_uid);
    }

    fn end_pod(&mut self, id: PodId, end: End, now: Timestamp) {
        let Some(entry) = self.pods.get_mut(id).filter(|pod| !pod.has_ended()) else {
            return;
        };
        let held = Held::now(entry, id);
        if entry.is_backend() {
            let (services, ports) = (&entry.services, &entry.ports);
            count(&mut self.services, services, ports, Backend::Leaves);
        }
        entry.life = Life::Ended(now);
        let pod = Arc::clone(&entry.pod);
        if let Some(namespace) = self.namespaces.get_mut(&pod.namespace) {
            namespace.selection.leave(id, &pod.labels);
        }
        self.tidy(&pod.namespace);
        self.release_held(id, &held, end, now);
        self.ended.push_back((now, Ended::Pod(id)));
    }

    fn move_held(
        &mut self,
        id: PodId,
        old: &Held,
        new: &Held,
        started: Option<Timestamp>,
        learnt: Learnt,
    ) {
        self.move_addresses(&old.addresses, &new.addresses, started, learnt);
        let is_gone = |port: &&HostPort| !new.host_ports.contains(port);
        for port in old.host_ports.iter().filter(is_gone) {
            self.release_host_port(id, port, learnt.end(), learnt.now);
        }
        for port in &new.host_ports {
            let from = started.unwrap_or_default().min(learnt.now);
            self.host_ports.hold(port.clone(), id, from);
        }
    }

    fn release_held(&mut self, id: PodId, held: &Held, end: End, now: Timestamp) {
        for (address, owner) in &held.addresses {
            self.release_address(*address, *owner, end, now);
        }
        for port in &held.host_ports {
            self.release_host_port(id, port, end, now);
        }
    }

    fn release_host_port(&mut self, id: PodId, port: &HostPort, end: End, now: Timestamp) {
        if self.host_ports.release(port, id, end) {
            let ended = Ended::HostPort(port.clone(), id);
            self.ended.push_back((now, ended));
        }
    }
}

/// What a pod has for itself while it lives. A pod on the host's network has nothing: its addresses are the node's.
#[derive(Default)]
struct Held {
    addresses: Vec<(IpAddr, Owner)>,
    host_ports: Vec<HostPort>,
}

impl Held {
    fn of(pod: &endpoint::Pod, ports: &[ContainerPort], id: PodId) -> Self {
        if pod.host_network {
            return Self::default();
        }
        let addresses = pod.addresses.iter();
        let host_ports = ports.iter().filter_map(|port| {
            let node = pod.node.clone()?;
            Some((node, port.protocol, port.host_port?))
        });
        Self {
            addresses: addresses
                .map(|address| (*address, Owner::Pod(id)))
                .collect(),
            host_ports: host_ports.collect(),
        }
    }

    fn now(entry: &PodEntry, id: PodId) -> Self {
        if entry.is_backend() {
            Self::of(&entry.pod, &entry.ports, id)
        } else {
            Self::default()
        }
    }
}

#[derive(Clone, Copy)]
enum Backend {
    Joins,
    Leaves,
}

fn count(
    services: &mut Store<ServiceEntry>,
    ids: &[ServiceId],
    ports: &[ContainerPort],
    backend: Backend,
) {
    for id in ids {
        if let Some(service) = services.get_mut(*id) {
            match backend {
                Backend::Joins => service.add_backend(ports),
                Backend::Leaves => service.remove_backend(ports),
            }
        }
    }
}

fn names(ids: &[ServiceId], services: &Store<ServiceEntry>) -> Arc<[String]> {
    let found = ids.iter().filter_map(|id| services.get(*id));
    found
        .map(|service| service.spec.identity.name.clone())
        .collect()
}
