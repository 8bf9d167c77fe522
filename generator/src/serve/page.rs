//! Pages of an export.

use crate::{
    flows::LostLine,
    ingest::{Page, PageEnd},
    status::LossStatus,
    store::State,
};

/// A page ends with the record that makes it so long, in bytes.
const PAGE: usize = 256 << 10;

/// The records after a place, or the first; with the last of them, what was lost. `load` says how often the state was read.
pub(super) fn page(state: &State, load: u64, after: Option<PageEnd>) -> serde_json::Result<Page> {
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
    for loss in state.losses.iter() {
        let line = LostLine {
            lost: LossStatus::from(loss),
        };
        serde_json::to_writer(&mut lines, &line)?;
        lines.push(b'\n');
    }
    Ok(Page {
        lines: lines.into(),
        end: None,
    })
}
