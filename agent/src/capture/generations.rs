//! The two generations of the map of flows, which take turns: the kernel's programs write to one, the agent empties the other.

/// Two maps, of which one is active.
pub(super) struct Generations<M> {
    maps: [M; 2],
    active: usize,
    /// Whether the idle one may have something: nobody has emptied it since it was active, or that failed half-way.
    is_left: bool,
}

impl<M> Generations<M> {
    /// The first is active, and both are empty.
    pub(super) fn new(maps: [M; 2]) -> Self {
        Self {
            maps,
            active: 0,
            is_left: false,
        }
    }

    /// The one that is written to.
    pub(super) fn active(&self) -> &M {
        &self.maps[self.active]
    }

    /// Lets the programs write to the idle one, once it is empty. When `activate` returns none of them uses the other any more.
    ///
    /// # Errors
    /// What either says. If it is `activate`, everything is as before.
    pub(super) fn swap<E>(
        &mut self,
        activate: impl FnOnce(&M) -> Result<(), E>,
        empty: impl FnOnce(&M) -> Result<(), E>,
    ) -> Result<(), E> {
        self.empty_idle(empty)?;
        let idle = 1 - self.active;
        activate(&self.maps[idle])?;
        self.active = idle;
        self.is_left = true;
        Ok(())
    }

    /// Takes everything out of the idle one, if it may have anything.
    ///
    /// # Errors
    /// What `empty` says. The rest is taken out when this or [`Self::swap`] is called again.
    pub(super) fn empty_idle<E>(
        &mut self,
        empty: impl FnOnce(&M) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.is_left {
            empty(&self.maps[1 - self.active])?;
            self.is_left = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// The kernel and the agent around two maps; the agent takes one entry out of a map before it fails.
    #[derive(Default)]
    struct World {
        taken: RefCell<Vec<u32>>,
        is_broken: Cell<bool>,
    }

    type Map = RefCell<Vec<u32>>;

    impl World {
        fn empty(&self, map: &Map) -> Result<(), ()> {
            let mut map = map.borrow_mut();
            let count = if self.is_broken.get() { 1 } else { map.len() };
            self.taken.borrow_mut().extend(map.drain(..count));
            if self.is_broken.get() {
                Err(())
            } else {
                Ok(())
            }
        }

        fn drain(&self, maps: &mut Generations<Map>) -> Result<(), ()> {
            maps.swap(|_| Ok(()), |map| self.empty(map))?;
            maps.empty_idle(|map| self.empty(map))
        }
    }

    #[test]
    fn what_a_failed_drain_left_is_in_the_next() {
        let world = World::default();
        let mut maps = Generations::new([Map::default(), Map::default()]);
        maps.active().borrow_mut().extend([1, 2, 3]);
        world.is_broken.set(true);
        world.drain(&mut maps).unwrap_err();
        maps.active().borrow_mut().extend([4, 5]);
        world.drain(&mut maps).unwrap_err();
        world.is_broken.set(false);
        // It may be the last one.
        world.drain(&mut maps).unwrap();
        assert_eq!(*world.taken.borrow(), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn what_was_not_activated_is_not_emptied() {
        let world = World::default();
        let mut maps = Generations::new([Map::default(), Map::default()]);
        maps.active().borrow_mut().push(1);
        maps.swap(|_| Err(()), |map| world.empty(map)).unwrap_err();
        maps.empty_idle(|map| world.empty(map)).unwrap();
        assert_eq!(*maps.active().borrow(), [1]);
        world.drain(&mut maps).unwrap();
        assert_eq!(*world.taken.borrow(), [1]);
    }
}
