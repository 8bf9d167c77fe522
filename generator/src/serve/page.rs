//! Pages of an export.

use std::io;

use crate::{
    ingest::{Page, PageEnd},
    status::lost,
    store::State,
};

/// A page ends with the record that makes it so long, in bytes.
const PAGE: usize = 256 << 10;

/// The records after a place, or the first; with the last of them, what was lost. `load` says how often the state was read.
pub(super) fn page(state: &State, load: u64, after: Option<PageEnd>) -> io::Result<Page> {
    let mut lines = Vec::with_capacity(PAGE + PAGE / 8);
    for (place, record) in state.ledger.after(after.map(|end| end.place)) {
        serde_json::to_writer(&mut lines, &record)?;
        lines.push(b'\n');
        if lines.len() >= PAGE {
            return Ok(Page {
                lines: lines.into(),
                end: Some(PageEnd { load, place }),
            });
        }
    }
    for lost in state.losses.iter().map(lost) {
        lost.write_line(&mut lines)?;
    }
    Ok(Page {
        lines: lines.into(),
        end: None,
    })
}
