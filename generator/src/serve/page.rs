//! Pages of an export.

use crate::{flows::LostLine, ingest::Page, ledger::Cursor, status::LossStatus, store::State};

/// A page ends with the record that makes it so long, in bytes.
const PAGE: usize = 256 << 10;

/// The records after a place, or the first; with the last of them, what was lost.
pub(super) fn page(state: &State, after: Option<Cursor>) -> serde_json::Result<Page> {
    let mut lines = Vec::with_capacity(PAGE + PAGE / 8);
    for (cursor, record) in state.ledger.after(after) {
        serde_json::to_writer(&mut lines, &record)?;
        lines.push(b'\n');
        if lines.len() >= PAGE {
            return Ok(Page {
                lines: lines.into(),
                end: Some(cursor),
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
