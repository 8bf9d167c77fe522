//! `/v1/export`: the whole ledger, a page at a time.
//!
//! Neither the keeper nor a connection ever holds more than a page: the next one is made when the reader has taken the one
//! before. So the lines are not of one moment, but each is of one, and what was lost is said last.

use std::sync::Arc;

use futures_util::{Stream, stream};
use hyper::body::{Bytes, Frame};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

use super::{Ended, http::DEADLINE};
use crate::ledger::Cursor;

/// How many exports go on at a time. Each keeps the keeper busy for a page whenever its reader is ready for one.
const MAX_EXPORTS: usize = 4;

/// Asks the keeper for the records after a place, or for the first.
#[derive(Debug)]
pub struct PageRequest {
    /// Where the last page ended.
    pub after: Option<PageEnd>,
    /// Where the page goes.
    pub answer: oneshot::Sender<Page>,
}

/// A part of an export.
#[derive(Clone, Debug)]
pub struct Page {
    /// Whole lines.
    pub lines: Bytes,
    /// Where it ends; `None` if it is the last.
    pub end: Option<PageEnd>,
}

/// Where a page ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEnd {
    /// How often the ledger had been read from the store: places are of one reading.
    pub load: u64,
    /// The place of the last record.
    pub place: Cursor,
}

/// Who makes the pages, and how many may have some made.
#[derive(Debug)]
pub struct Exports {
    keeper: mpsc::Sender<PageRequest>,
    places: Arc<Semaphore>,
}

/// When the peer took something for the last time.
#[derive(Clone, Debug)]
pub(super) struct Progress(watch::Sender<Instant>);

impl Exports {
    /// Exports of this keeper's ledger.
    #[must_use]
    pub fn of(keeper: mpsc::Sender<PageRequest>) -> Self {
        Self {
            keeper,
            places: Arc::new(Semaphore::new(MAX_EXPORTS)),
        }
    }

    /// An export, if there is a place for one more. It ends with an error if the keeper ends before it.
    pub(super) fn begin(
        &self,
        progress: Progress,
    ) -> Option<impl Stream<Item = Result<Frame<Bytes>, Ended>> + use<>> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let export = Export {
            keeper: self.keeper.clone(),
            progress,
            next: Some(None),
            _place: place,
        };
        Some(stream::try_unfold(export, Export::page))
    }
}

struct Export {
    keeper: mpsc::Sender<PageRequest>,
    progress: Progress,
    /// What the next page comes after, if there is one.
    next: Option<Option<PageEnd>>,
    _place: OwnedSemaphorePermit,
}

impl Export {
    async fn page(mut self) -> Result<Option<(Frame<Bytes>, Self)>, Ended> {
        let Some(after) = self.next.take() else {
            return Ok(None);
        };
        self.progress.made();
        let (answer, page) = oneshot::channel();
        let request = PageRequest { after, answer };
        self.keeper.send(request).await.or(Err(Ended))?;
        let page = page.await.or(Err(Ended))?;
        self.next = page.end.map(Some);
        Ok(Some((Frame::data(page.lines), self)))
    }
}

impl Progress {
    pub(super) fn new() -> Self {
        Self(watch::channel(Instant::now()).0)
    }

    fn made(&self) {
        self.0.send_replace(Instant::now());
    }

    /// Ready when the peer has not taken anything for too long.
    pub(super) async fn ceased(&self) {
        let mut last = self.0.subscribe();
        loop {
            let until = *last.borrow_and_update() + DEADLINE;
            if !matches!(timeout_at(until, last.changed()).await, Ok(Ok(()))) {
                return;
            }
        }
    }
}
