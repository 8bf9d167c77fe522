//! How many may stand in the door: connections that have not shown yet who they are.
//!
//! They are counted apart from those that have, so that strangers cannot take the agents' places. When there are too many,
//! those of one network, and in it of one address, make way for those of others: who comes alone gets in, however many one
//! stranger sends.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::AbortHandle;
use tracing::warn;

use crate::network::network;

/// The most connections that have not said a valid hello.
const MAX_UNKNOWN: usize = 2_048;

/// Counts them.
#[derive(Clone, Debug, Default)]
pub(super) struct Door(Arc<Mutex<Unknown>>);

#[derive(Debug, Default)]
struct Unknown {
    all: usize,
    /// How each can be ended, in the order in which they came. Addresses of one network are neighbours.
    by_address: BTreeMap<IpAddr, BTreeMap<u64, AbortHandle>>,
    /// How many have come so far.
    came: u64,
    /// Whether it was said that there are too many, since there were few the last time.
    crowded: bool,
}

/// Whether it was said that some are sent away, since there were few the last time.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    is_said: bool,
}

impl Crowd {
    /// One is sent away: whether that is to be said.
    pub(super) const fn is_news(&mut self) -> bool {
        !std::mem::replace(&mut self.is_said, true)
    }

    /// One is let in, where there may be `many` by now.
    pub(super) const fn let_in(&mut self, many: bool) {
        self.is_said &= many;
    }
}

/// A connection that has not shown yet who it is.
#[derive(Debug)]
pub(super) struct Stranger {
    door: Door,
    address: IpAddr,
    number: u64,
}

impl Door {
    /// Lets a connection stand in the door, from where it can be `ended` to make room for others. `None` if each that stands
    /// there is the only one of its network.
    pub(super) fn enter(&self, address: IpAddr, ended: AbortHandle) -> Option<Stranger> {
        let address = address.to_canonical();
        let mut unknown = self.lock();
        if unknown.all >= MAX_UNKNOWN {
            unknown.make_room_for(address)?;
        }
        unknown.came += 1;
        unknown.all += 1;
        let number = unknown.came;
        let here = unknown.by_address.entry(address).or_default();
        here.insert(number, ended);
        Some(Stranger {
            door: self.clone(),
            address,
            number,
        })
    }

    /// Whether half of the room is taken.
    pub(super) fn is_half_full(&self) -> bool {
        self.lock().is_half_full()
    }

    /// Nothing panics while it is held.
    fn lock(&self) -> MutexGuard<'_, Unknown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Unknown {
    /// Of the network that has the most when one more of `address` has come, if that is more than one, ends the oldest of the
    /// address that has the most.
    fn make_room_for(&mut self, address: IpAddr) -> Option<()> {
        let standing: Vec<Standing> = self
            .by_address
            .iter()
            .filter_map(|(&other, here)| {
                let comes = usize::from(other == address);
                Some(Standing {
                    address: other,
                    network: network(other),
                    number: here.len() + comes,
                    oldest: *here.first_key_value()?.0,
                })
            })
            .collect();
        let own = network(address);
        let is_new = !self.by_address.contains_key(&address);
        let of_network = |addresses: &&[Standing]| {
            let comes = usize::from(is_new && addresses[0].network == own);
            addresses.iter().map(|it| it.number).sum::<usize>() + comes
        };
        let networks = standing.chunk_by(|one, other| one.network == other.network);
        let most = networks.max_by_key(of_network)?;
        if of_network(&most) < 2 {
            return None;
        }
        let most = most
            .iter()
            .max_by_key(|it| (it.number, Reverse(it.oldest)))?;
        if !self.crowded {
            warn!(
                address = %most.address,
                "too many connections that have not said who they are: the oldest of those networks and addresses that have the most are ended"
            );
        }
        self.crowded = true;
        self.remove(most.address, most.oldest)?.abort();
        Some(())
    }

    fn remove(&mut self, address: IpAddr, number: u64) -> Option<AbortHandle> {
        let here = self.by_address.get_mut(&address)?;
        let ended = here.remove(&number)?;
        if here.is_empty() {
            self.by_address.remove(&address);
        }
        self.all -= 1;
        self.crowded &= self.is_half_full();
        Some(ended)
    }

    const fn is_half_full(&self) -> bool {
        self.all >= MAX_UNKNOWN / 2
    }
}

/// What stands in the door of an address.
struct Standing {
    address: IpAddr,
    network: IpAddr,
    /// How many, with the one that comes.
    number: usize,
    /// The number of the oldest.
    oldest: u64,
}

/// It has said who it is, or has gone, or was ended.
impl Drop for Stranger {
    fn drop(&mut self) {
        self.door.lock().remove(self.address, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(door: &Door, address: usize) -> Option<(Stranger, AbortHandle)> {
        let address = IpAddr::from(u32::try_from(address).unwrap().to_be_bytes());
        let (handle, _) = AbortHandle::new_pair();
        Some((door.enter(address, handle.clone())?, handle))
    }

    #[test]
    fn few_addresses_do_not_keep_out_others() {
        const FEW: usize = 8;
        let door = Door::default();
        let silent: Vec<_> = (0..MAX_UNKNOWN)
            .map(|number| enter(&door, number % FEW).unwrap())
            .collect();
        let ended = || silent.iter().filter(|(_, it)| it.is_aborted()).count();
        assert_eq!(ended(), 0);
        // One that comes again and again makes way for itself.
        for _ in 0..10 {
            drop(enter(&door, 0).unwrap());
        }
        let others: Vec<_> = (0..MAX_UNKNOWN - FEW)
            .map(|number| enter(&door, FEW + number).unwrap())
            .collect();
        assert!(others.iter().all(|(_, it)| !it.is_aborted()));
        // Each address has one now, the last that came of it.
        let left: Vec<_> = silent.iter().filter(|(_, it)| !it.is_aborted()).collect();
        assert_eq!(door.lock().all, MAX_UNKNOWN);
        assert!(left.len() <= FEW, "{} left", left.len());
        assert!(enter(&door, 2 * MAX_UNKNOWN).is_none());
        drop(others);
        drop(silent);
        let unknown = door.lock();
        assert!(unknown.all == 0 && unknown.by_address.is_empty() && !unknown.crowded);
    }

    #[test]
    fn a_network_makes_way_as_one_and_in_it_who_has_most() {
        let enter = |door: &Door, address: String| {
            let (handle, _) = AbortHandle::new_pair();
            let stranger = door.enter(address.parse().unwrap(), handle.clone());
            stranger.map(|stranger| (stranger, handle))
        };
        let ended = |all: &[(Stranger, AbortHandle)]| -> Vec<usize> {
            let ended = all.iter().enumerate().filter(|(_, it)| it.1.is_aborted());
            ended.map(|(place, _)| place).collect()
        };
        let door = Door::default();
        // Of each address of its network one.
        let all: Vec<_> = (0..MAX_UNKNOWN)
            .map(|number| enter(&door, format!("2001:db8:0:1::{number:x}")).unwrap())
            .collect();
        let others: Vec<_> = (0..3)
            .map(|number| enter(&door, format!("2001:db8:0:2::{number:x}")).unwrap())
            .collect();
        assert_eq!((ended(&all), ended(&others)), (vec![0, 1, 2], vec![]));
        drop((all, others));

        let neighbour = enter(&door, "2001:db8::1".to_owned()).unwrap();
        let all: Vec<_> = (1..MAX_UNKNOWN)
            .map(|_| enter(&door, "2001:db8::2".to_owned()).unwrap())
            .collect();
        let other = enter(&door, "2001:db8::3".to_owned()).unwrap();
        assert_eq!(ended(&all), [0]);
        assert_eq!(ended(&[neighbour, other]), [0; 0]);
        drop(all);

        // IPv4 is no network in the form of IPv6 either.
        let all: Vec<_> = (0..MAX_UNKNOWN)
            .map(|number| {
                enter(
                    &door,
                    format!("::ffff:10.0.{}.{}", number >> 8, number & 255),
                )
            })
            .collect();
        assert!(all.iter().all(Option::is_some));
        assert!(enter(&door, "::ffff:10.1.0.1".to_owned()).is_none());
        assert!(enter(&door, "10.0.0.1".to_owned()).is_some());
    }

    #[test]
    fn it_is_said_once_that_there_are_too_many_until_there_are_few() {
        let mut crowd = Crowd::default();
        assert!(crowd.is_news());
        assert!(!crowd.is_news());
        // One that leaves and one that comes change nothing.
        crowd.let_in(true);
        assert!(!crowd.is_news());
        crowd.let_in(false);
        assert!(crowd.is_news());

        let door = Door::default();
        let mut standing: Vec<_> = (0..MAX_UNKNOWN / 2)
            .map(|number| enter(&door, number).unwrap())
            .collect();
        assert!(door.is_half_full());
        standing.pop();
        assert!(!door.is_half_full());
    }

    #[test]
    fn the_oldest_makes_way() {
        let door = Door::default();
        let all: Vec<_> = (0..MAX_UNKNOWN).map(|_| enter(&door, 1).unwrap()).collect();
        let _another = enter(&door, 2).unwrap();
        assert!(all[0].1.is_aborted() && !all[1].1.is_aborted());
    }
}
