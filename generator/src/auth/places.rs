//! Places for those of whom the API server is asked, so that one who asks for much holds up nobody else.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

use crate::network::network;

/// The most questions to the API server at a time, however many strangers knock.
const MAX_ASKING: usize = 8;

/// All of one address or network wait for one place in the line, so those who come alone are soon at its head.
#[derive(Debug)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    /// Where one place in the line is waited for.
    entries: Mutex<HashMap<Entry, Weak<Semaphore>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Entry {
    Address(IpAddr),
    Network(IpAddr),
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MAX_ASKING)),
            entries: Mutex::default(),
        }
    }

    /// Waits for a place, until it is dropped: first behind those of the same address, then behind one of each other address
    /// of the same network, then behind one of each other network.
    ///
    /// # Errors
    /// None in practice: places are never closed.
    pub(super) async fn take(&self, address: IpAddr) -> Result<OwnedSemaphorePermit, AcquireError> {
        let address = address.to_canonical();
        let of_address = self.entry(Entry::Address(address));
        let _first_of_address = of_address.acquire_owned().await?;
        let of_network = self.entry(Entry::Network(network(address)));
        let _first_of_network = of_network.acquire_owned().await?;
        Arc::clone(&self.all).acquire_owned().await
    }

    fn entry(&self, entry: Entry) -> Arc<Semaphore> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(one) = entries.get(&entry).and_then(Weak::upgrade) {
            return one;
        }
        entries.retain(|_, one| one.strong_count() > 0);
        let one = Arc::new(Semaphore::new(1));
        entries.insert(entry, Arc::downgrade(&one));
        one
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, sleep};

    use super::*;

    /// How long the API server takes for an answer.
    const ANSWER: Duration = Duration::from_millis(50);

    const STRANGERS: u16 = 2_000;

    /// How long an agent waits when all strangers have come just before it, in answers; all of them are answered.
    async fn rounds_behind(agent: &str, stranger: impl Fn(u16) -> String) -> u32 {
        let places = Arc::new(Places::new());
        let start = Instant::now();
        let ask = |address: &str| {
            let (places, address) = (Arc::clone(&places), address.parse().unwrap());
            tokio::spawn(async move {
                let place = places.take(address).await.unwrap();
                sleep(ANSWER).await;
                drop(place);
                start.elapsed()
            })
        };
        let rounds = |time: Duration| time.div_duration_f64(ANSWER).round() as u32;
        let strangers: Vec<_> = (0..STRANGERS)
            .map(|number| ask(&stranger(number)))
            .collect();
        let waited = rounds(ask(agent).await.unwrap());
        for stranger in strangers {
            stranger.await.unwrap();
        }
        // Eight at a time, no more and no fewer.
        assert_eq!(
            rounds(start.elapsed()),
            u32::from(STRANGERS + 1).div_ceil(8)
        );
        drop(places.entry(Entry::Address([10, 0, 2, 1].into())));
        assert_eq!(places.entries.lock().unwrap().len(), 1);
        waited
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_hold_up_nobody_of_another_address() {
        let few = |number| format!("10.0.0.{}", number % 4);
        let waited = rounds_behind("10.0.1.1", few).await;
        assert!(waited <= 3, "{waited}");
        let many = |number| format!("10.1.{}.{}", number % 400 / 200, number % 200);
        let waited = rounds_behind("10.0.1.1", many).await;
        assert!((50..=53).contains(&waited), "{waited}");
    }

    /// One of an IPv6 network may have all its addresses, and each may be of another.
    #[tokio::test(start_paused = true)]
    async fn strangers_of_one_network_hold_up_nobody_of_another() {
        let each_another = |number| format!("2001:db8:0:1::{number:x}");
        let waited = rounds_behind("2001:db8:0:2::1", each_another).await;
        assert!(waited <= 3, "{waited}");
        let all_one = |_| "2001:db8:0:1::1".to_owned();
        let waited = rounds_behind("2001:db8:0:1::2", all_one).await;
        assert!(waited <= 3, "{waited}");
    }
}
