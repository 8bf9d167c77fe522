//! Why the store could not do what was asked.

use std::{io, path::PathBuf};

/// Why the store could not be opened, read or written. `path` is the ledger's file, or `in memory`.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The data directory cannot be created or used.
    #[error("data directory {}: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Another process owns the data directory.
    #[error("data directory {} is in use by another process{}", path.display(), holder(*pid))]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The process that said it holds the directory.
        pid: Option<u32>,
    },
    /// There is nothing to read.
    #[error("data directory {} holds no ledger", path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// A newer program wrote the ledger.
    #[error(
        "ledger {path} has schema version {found}, this program knows none above {known}: \
         use the newer microshield that wrote it"
    )]
    NewerSchema {
        /// The ledger's file.
        path: String,
        /// The version that was found.
        found: u32,
        /// The newest version that this program knows.
        known: u32,
    },
    /// An older program wrote the ledger, and it was opened for reading only.
    #[error(
        "ledger {path} has schema version {found} and this program reads {known}: \
         start `microshield serve` on it once to bring it up to date"
    )]
    OlderSchema {
        /// The ledger's file.
        path: String,
        /// The version that was found.
        found: u32,
        /// The version that this program reads.
        known: u32,
    },
    /// Some other program's database.
    #[error("{path} is not a MicroShield ledger: {reason}")]
    Foreign {
        /// The file.
        path: String,
        /// What gave it away.
        reason: &'static str,
    },
    /// The file is damaged.
    #[error(
        "ledger {path} is damaged ({problem}): put a backup in its place, or move it away and begin anew;          `sqlite3 {path} .recover` may save what is in it"
    )]
    Damaged {
        /// The ledger's file.
        path: String,
        /// What was found first.
        problem: String,
    },
    /// The database refused.
    #[error("ledger {path}: cannot {action}: {source}")]
    Database {
        /// The ledger's file.
        path: String,
        /// What was being done.
        action: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// A row holds what this program did not write.
    #[error("ledger {path}: row {id} of {table}: {problem}")]
    Row {
        /// The ledger's file.
        path: String,
        /// The table.
        table: &'static str,
        /// The row's number.
        id: i64,
        /// What is wrong with it.
        problem: String,
    },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}
