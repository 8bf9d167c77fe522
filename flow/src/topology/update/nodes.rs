//! Nodes: their addresses and pod ranges.

use std::{collections::HashSet, net::IpAddr, sync::Arc};

use super::Learnt;
use crate::{
    time::Timestamp,
    topology::{
        index::{Ended, Index, NodeEntry, NodeId, Owner},
        objects::Node,
    },
};

impl Index {
    /// The nodes are now these.
    pub fn replace_nodes(&mut self, list: Vec<Node>, now: Timestamp) {
        let listed: HashSet<NodeId> = list
            .into_iter()
            .map(|node| self.set_node(node, Learnt::by_list(now)))
            .collect();
        let known = self.nodes.iter().map(|(id, _)| id);
        let gone: Vec<NodeId> = known.filter(|id| !listed.contains(id)).collect();
        for id in gone {
            self.end_node(id, Learnt::by_list(now));
        }
    }

    pub(super) fn set_node(&mut self, spec: Node, learnt: Learnt) -> NodeId {
        let known = self.node_ids.get(&spec.identity.name).copied();
        let living = known
            .map(|id| (id, &self.nodes[id]))
            .filter(|(_, node)| node.ended.is_none());
        let mut old = (Vec::new(), Vec::new());
        // An address that a node gets later than its others it has since now.
        let mut started = spec.created;
        if let Some((id, node)) = living {
            if node.spec == spec {
                return id;
            }
            old = (held(&node.spec, id), node.spec.pod_cidrs.clone());
            if !old.0.is_empty() {
                started = Some(learnt.since);
            }
        }

        let ranges = spec.pod_cidrs.clone();
        let entry = NodeEntry {
            node: Arc::clone(&spec.identity),
            spec,
            ended: None,
        };
        let id = match known {
            Some(id) => {
                self.nodes[id] = entry;
                id
            }
            None => {
                let name = entry.spec.identity.name.clone();
                let id = self.nodes.insert(entry);
                self.node_ids.insert(name, id);
                id
            }
        };
        for range in old.1.iter().filter(|range| !ranges.contains(range)) {
            self.pod_ranges.remove(*range, id);
        }
        for range in ranges {
            self.pod_ranges.insert(range, id);
        }
        let new = held(&self.nodes[id].spec, id);
        self.move_addresses(&old.0, &new, started, learnt);
        id
    }

    pub(super) fn delete_node(&mut self, name: &str, learnt: Learnt) {
        if let Some(id) = self.node_ids.get(name) {
            self.end_node(*id, learnt);
        }
    }

    fn end_node(&mut self, id: NodeId, learnt: Learnt) {
        let now = learnt.now;
        let node = &mut self.nodes[id];
        if node.ended.is_some() {
            return;
        }
        node.ended = Some(now);
        let addresses = held(&node.spec, id);
        for range in &node.spec.pod_cidrs {
            self.pod_ranges.remove(*range, id);
        }
        self.move_addresses(&addresses, &[], None, learnt);
        self.ended.push_back((now, Ended::Node(id)));
    }
}

fn held(spec: &Node, id: NodeId) -> Vec<(IpAddr, Owner)> {
    let addresses = spec.identity.addresses.iter().chain(&spec.interfaces);
    addresses
        .map(|address| (*address, Owner::Node(id)))
        .collect()
}
