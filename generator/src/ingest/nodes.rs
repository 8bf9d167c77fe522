//! How many connections each node has, where tokens prove whose they are.
//!
//! They are counted as soon as they have said hello, however long the keeper takes to let them in: nobody takes with one
//! node's token the places of all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::Refusal;

/// The most connections of a node: of the agent that runs, of the one that takes its place, and those of both that nobody has
/// noticed yet to be broken.
const MAX_OF_A_NODE: usize = 8;

/// Counts them.
#[derive(Clone, Debug, Default)]
pub(super) struct Nodes(Arc<Mutex<HashMap<String, usize>>>);

/// One of a node's connections, until it is dropped.
#[derive(Debug)]
pub(super) struct Resident {
    nodes: Nodes,
    node: String,
}

impl Nodes {
    /// Lets one more connection of a node in.
    ///
    /// # Errors
    /// If it has as many as it may have.
    pub(super) fn enter(&self, node: &str) -> Result<Resident, Refusal> {
        let mut nodes = self.lock();
        let here = nodes.entry(node.to_owned()).or_default();
        if *here >= MAX_OF_A_NODE {
            return Err(Refusal::policy(format!(
                "{MAX_OF_A_NODE} agents of node {node} are connected"
            )));
        }
        *here += 1;
        Ok(Resident {
            nodes: self.clone(),
            node: node.to_owned(),
        })
    }

    /// Nothing panics while it is held.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        let mut nodes = self.nodes.lock();
        if let Some(here) = nodes.get_mut(&self.node) {
            *here -= 1;
            if *here == 0 {
                nodes.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_node_does_not_take_the_places_of_all() {
        let nodes = Nodes::default();
        let enter = |node| nodes.enter(node).map_err(|refusal| refusal.reason);
        let mut few: Vec<_> = (0..MAX_OF_A_NODE)
            .map(|_| enter("node-1").unwrap())
            .collect();
        assert_eq!(
            enter("node-1").map(drop),
            Err("8 agents of node node-1 are connected".to_owned())
        );
        let other = enter("node-2").unwrap();
        few.pop();
        few.push(enter("node-1").unwrap());
        drop((few, other));
        assert!(nodes.lock().is_empty());
    }
}
