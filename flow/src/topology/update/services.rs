//! Services and their endpoint slices.

use std::{collections::HashSet, net::IpAddr};

use super::Learnt;
use crate::{
    record::Protocol,
    time::Timestamp,
    topology::{
        index::{Ended, Index, Owner},
        objects::{EndpointSlice, Service},
        service::{ServiceEntry, ServiceId},
    },
};

impl Index {
    /// The services are now these.
    pub fn replace_services(&mut self, list: Vec<Service>, now: Timestamp) {
        let mut listed = HashSet::new();
        let mut touched = HashSet::new();
        for service in list {
            let namespace = service.identity.namespace.clone();
            let (id, refiled) = self.set_service(service, Learnt::by_list(now));
            listed.insert(id);
            if refiled {
                touched.insert(namespace);
            }
        }
        let living = self.services.iter().filter(|(_, s)| s.ended.is_none());
        let gone: Vec<(ServiceId, String)> = living
            .filter(|(id, _)| !listed.contains(id))
            .map(|(id, service)| (id, service.spec.identity.namespace.clone()))
            .collect();
        for (id, namespace) in gone {
            self.end_service(id, Learnt::by_list(now));
            touched.insert(namespace);
        }
        for namespace in touched {
            self.rematch(&namespace);
        }
    }

    pub(super) fn upsert_service(&mut self, service: Service, learnt: Learnt) {
        let namespace = service.identity.namespace.clone();
        if self.set_service(service, learnt).1 {
            self.rematch(&namespace);
        }
    }

    pub(super) fn delete_service(&mut self, namespace: &str, name: &str, learnt: Learnt) {
        if let Some(id) = self.service_id(namespace, name) {
            self.end_service(id, learnt);
            self.rematch(namespace);
        }
    }

    /// The endpoint slices are now these.
    pub fn replace_endpoint_slices(&mut self, list: Vec<EndpointSlice>, now: Timestamp) {
        let listed: HashSet<(String, String)> = list
            .iter()
            .map(|slice| (slice.namespace.clone(), slice.name.clone()))
            .collect();
        let known = self.namespaces.iter().flat_map(|(namespace, entry)| {
            let names = entry.slices.names();
            names.map(move |name| (namespace.clone(), name.to_owned()))
        });
        let gone: Vec<_> = known.filter(|key| !listed.contains(key)).collect();
        for slice in list {
            self.set_slice(slice, now);
        }
        for (namespace, name) in gone {
            self.end_slice(&namespace, &name, now);
        }
    }

    pub(super) fn set_slice(&mut self, slice: EndpointSlice, now: Timestamp) {
        let namespace = slice.namespace.clone();
        let entry = self.namespaces.entry(namespace.clone()).or_default();
        let services = entry.slices.upsert(slice);
        self.refresh_services(&namespace, &services, now);
    }

    pub(super) fn end_slice(&mut self, namespace: &str, name: &str, now: Timestamp) {
        if let Some(entry) = self.namespaces.get_mut(namespace) {
            let services = entry.slices.remove(name);
            self.refresh_services(namespace, &services, now);
            self.tidy(namespace);
        }
    }

    fn refresh_services(&mut self, namespace: &str, names: &[String], now: Timestamp) {
        let Some(entry) = self.namespaces.get(namespace) else {
            return;
        };
        for name in names {
            let service = entry.services.get(name);
            if let Some((id, service)) =
                service.and_then(|id| Some((*id, self.services.get_mut(*id)?)))
                && service.ended.is_none()
                && service.refresh(entry.slices.backends(name), now)
            {
                self.ended.push_back((now, Ended::ServiceVersion(id)));
            }
        }
    }

    fn service_id(&self, namespace: &str, name: &str) -> Option<ServiceId> {
        self.namespaces.get(namespace)?.services.get(name).copied()
    }

    /// Says whether the service was filed anew among the selectors of its namespace, which then must be matched again.
    fn set_service(&mut self, spec: Service, learnt: Learnt) -> (ServiceId, bool) {
        let identity = &spec.identity;
        let namespace = self
            .namespaces
            .entry(identity.namespace.clone())
            .or_default();
        let backends = namespace.slices.backends(&identity.name);
        let known = namespace.services.get(&identity.name).copied();
        let mut started = spec.created;
        let mut old = None;
        let id = match known {
            None => {
                let entry = ServiceEntry::new(spec.clone(), backends, learnt.now);
                let id = self.services.insert(entry);
                namespace.services.insert(identity.name.clone(), id);
                id
            }
            Some(id) => {
                let entry = &mut self.services[id];
                let living = entry.ended.take().is_none();
                if living && entry.spec == spec {
                    return (id, false);
                }
                let before = std::mem::replace(&mut entry.spec, spec.clone());
                if entry.refresh(backends, learnt.now) {
                    let ended = Ended::ServiceVersion(id);
                    self.ended.push_back((learnt.now, ended));
                }
                if living {
                    // An address or port that it did not have until now.
                    started = Some(learnt.since);
                    old = Some(before);
                }
                id
            }
        };
        let old_selector = old.as_ref().map(|old| &old.identity.selector);
        let refile = old_selector != Some(&identity.selector);
        if refile {
            if let Some(selector) = old_selector {
                namespace.selection.unfile(id, selector);
            }
            namespace.selection.file(id, &identity.selector);
        }

        let old_addresses = old.as_ref().map(|old| held(old, id)).unwrap_or_default();
        self.move_addresses(&old_addresses, &held(&spec, id), started, learnt);
        let old_ports = old.as_ref().map(node_ports).unwrap_or_default();
        self.move_node_ports(id, &old_ports, &node_ports(&spec), started, learnt);
        (id, refile)
    }

    fn end_service(&mut self, id: ServiceId, learnt: Learnt) {
        let now = learnt.now;
        let entry = &mut self.services[id];
        if entry.ended.is_some() {
            return;
        }
        entry.ended = Some(now);
        let identity = &entry.spec.identity;
        if let Some(namespace) = self.namespaces.get_mut(&identity.namespace) {
            namespace.selection.unfile(id, &identity.selector);
        }
        let addresses = held(&entry.spec, id);
        let ports = node_ports(&entry.spec);
        self.move_addresses(&addresses, &[], None, learnt);
        self.move_node_ports(id, &ports, &[], None, learnt);
        self.ended.push_back((now, Ended::Service(id)));
    }

    fn move_node_ports(
        &mut self,
        id: ServiceId,
        old: &[(Protocol, u16)],
        new: &[(Protocol, u16)],
        started: Option<Timestamp>,
        learnt: Learnt,
    ) {
        for port in old.iter().filter(|port| !new.contains(port)) {
            if self.node_ports.release(port, id, learnt.end()) {
                let ended = Ended::NodePort(*port, id);
                self.ended.push_back((learnt.now, ended));
            }
        }
        for port in new.iter().filter(|port| !old.contains(port)) {
            let from = started.unwrap_or_default().min(learnt.now);
            self.node_ports.hold(*port, id, from);
        }
    }

    /// Matches the selectors of a namespace with its pods anew.
    fn rematch(&mut self, namespace: &str) {
        let Some(entry) = self.namespaces.get_mut(namespace) else {
            return;
        };
        for (services, pods) in entry.selection.rematch(&self.services) {
            for pod in pods {
                self.set_selecting(pod, &services);
            }
        }
    }
}

fn held(spec: &Service, id: ServiceId) -> Vec<(IpAddr, Owner)> {
    let cluster = spec.cluster_addresses.iter();
    let external = spec.external_addresses.iter();
    cluster
        .map(|address| (*address, Owner::ClusterAddress(id)))
        .chain(external.map(|address| (*address, Owner::ExternalAddress(id))))
        .collect()
}

fn node_ports(spec: &Service) -> Vec<(Protocol, u16)> {
    let ports = spec.ports.iter();
    ports
        .filter_map(|port| Some((port.protocol, port.node_port?)))
        .collect()
}
