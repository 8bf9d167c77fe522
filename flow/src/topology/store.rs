//! Things by number.

use std::ops::{Index, IndexMut};

use slab::Slab;

/// Things by number; the numbers of things that were removed are given out again.
///
/// A number has 32 bits, because several are kept of each pod; memory is full before they are used up.
#[derive(Debug)]
pub(super) struct Store<T>(Slab<T>);

/// The number of a thing in its store.
pub(super) type Id = u32;

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self(Slab::new())
    }
}

impl<T> Store<T> {
    pub(super) fn get(&self, id: Id) -> Option<&T> {
        self.0.get(id as usize)
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        self.0.get_mut(id as usize)
    }

    /// The number that the next new thing gets.
    pub(super) fn next_id(&self) -> Id {
        self.0.vacant_key() as Id
    }

    pub(super) fn insert(&mut self, thing: T) -> Id {
        self.0.insert(thing) as Id
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<T> {
        self.0.try_remove(id as usize)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.0.iter().map(|(id, thing)| (id as Id, thing))
    }
}

impl<T> Index<Id> for Store<T> {
    type Output = T;

    fn index(&self, id: Id) -> &T {
        &self.0[id as usize]
    }
}

impl<T> IndexMut<Id> for Store<T> {
    fn index_mut(&mut self, id: Id) -> &mut T {
        &mut self.0[id as usize]
    }
}
