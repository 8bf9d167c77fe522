//! Places for those of whom the API server is asked, so that one who asks for much holds up nobody else.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// The most questions to the API server at a time, however many strangers knock.
const MAX_ASKING: usize = 8;

/// The most of them for one address, asked or waiting for their turn among those of other addresses.
const MAX_ASKING_PER_ADDRESS: usize = 4;

#[derive(Debug)]
pub(super) struct Places {
    all: Arc<Semaphore>,
    by_address: Mutex<HashMap<IpAddr, Weak<Semaphore>>>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_address: OwnedSemaphorePermit,
}

impl Places {
    pub(super) fn new() -> Self {
        Self {
            all: Arc::new(Semaphore::new(MAX_ASKING)),
            by_address: Mutex::default(),
        }
    }

    /// Waits for a place: first behind those of the same address, then behind the few that each address may have in the line.
    ///
    /// # Errors
    /// None in practice: places are never closed.
    pub(super) async fn take(&self, address: IpAddr) -> Result<Place, AcquireError> {
        let of_address = self.of(address).acquire_owned().await?;
        let of_all = Arc::clone(&self.all).acquire_owned().await?;
        Ok(Place {
            _of_all: of_all,
            _of_address: of_address,
        })
    }

    fn of(&self, address: IpAddr) -> Arc<Semaphore> {
        let mut by_address = self
            .by_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(places) = by_address.get(&address).and_then(Weak::upgrade) {
            return places;
        }
        by_address.retain(|_, places| places.strong_count() > 0);
        let places = Arc::new(Semaphore::new(MAX_ASKING_PER_ADDRESS));
        by_address.insert(address, Arc::downgrade(&places));
        places
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::{Instant, sleep};

    use super::*;

    /// How long the API server takes for an answer.
    const ANSWER: Duration = Duration::from_millis(50);

    #[tokio::test(start_paused = true)]
    async fn strangers_hold_up_nobody_of_another_address() {
        const STRANGERS: u32 = 2_000;
        let places = Arc::new(Places::new());
        let start = Instant::now();
        let ask = |address: [u8; 4]| {
            let places = Arc::clone(&places);
            tokio::spawn(async move {
                let place = places.take(address.into()).await.unwrap();
                sleep(ANSWER).await;
                drop(place);
                start.elapsed()
            })
        };
        // Of four addresses: together they would take all places, and the line behind them.
        let strangers: Vec<_> = (0..STRANGERS)
            .map(|number| ask([10, 0, 0, (number % 4) as u8]))
            .collect();
        let agent = ask([10, 0, 1, 1]).await.unwrap();
        assert!(agent <= 4 * ANSWER, "{agent:?}");
        for stranger in strangers {
            stranger.await.unwrap();
        }
        // Eight at a time, no more and no fewer.
        let rounds = start.elapsed().div_duration_f64(ANSWER).round() as u32;
        assert_eq!(rounds, (STRANGERS + 1).div_ceil(8));
        assert_eq!(places.of([10, 0, 2, 1].into()).available_permits(), 4);
        assert_eq!(places.by_address.lock().unwrap().len(), 1);
    }
}
