//! How many may stand in the door: connections that have not shown yet who they are.
//!
//! They are counted apart from those that have, so that strangers cannot take the agents' places; and by address, so that
//! one stranger cannot take those of all others.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

/// The most connections that have not said a valid hello.
const MAX_UNKNOWN: usize = 2_048;

/// The most of them from one address.
const MAX_UNKNOWN_PER_ADDRESS: usize = 256;

/// Counts them.
#[derive(Clone, Debug, Default)]
pub(super) struct Door {
    unknown: Arc<Mutex<Unknown>>,
}

#[derive(Debug, Default)]
struct Unknown {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// A connection that has not shown yet who it is.
#[derive(Debug)]
pub(super) struct Stranger {
    door: Door,
    address: IpAddr,
}

impl Door {
    /// Lets a connection stand in the door, if there is room.
    pub(super) fn enter(&self, address: IpAddr) -> Option<Stranger> {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        if unknown.all >= MAX_UNKNOWN {
            return None;
        }
        let here = unknown.by_address.entry(address).or_default();
        if *here >= MAX_UNKNOWN_PER_ADDRESS {
            return None;
        }
        *here += 1;
        unknown.all += 1;
        Some(Stranger {
            door: self.clone(),
            address,
        })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let mut unknown = self
            .door
            .unknown
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        unknown.all -= 1;
        if let Some(here) = unknown.by_address.get_mut(&self.address) {
            *here -= 1;
            if *here == 0 {
                unknown.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_the_room_of_all() {
        let door = Door::default();
        let address = |number: usize| IpAddr::from(u32::try_from(number).unwrap().to_be_bytes());
        let mut inside: Vec<Stranger> = (0..MAX_UNKNOWN_PER_ADDRESS)
            .map(|_| door.enter(address(1)).unwrap())
            .collect();
        assert!(door.enter(address(1)).is_none());
        for number in 0..MAX_UNKNOWN - MAX_UNKNOWN_PER_ADDRESS {
            inside.push(door.enter(address(number + 2)).unwrap());
        }
        assert!(door.enter(address(99_999)).is_none());
        inside.remove(0);
        assert!(door.enter(address(1)).is_some());
        drop(inside);
        let unknown = door.unknown.lock().unwrap();
        assert!(unknown.all == 0 && unknown.by_address.is_empty());
    }
}
