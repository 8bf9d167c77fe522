//! The tables, and how a ledger of an older version is brought up to date.

use flow::record::FlowRecord;
use futures_util::TryStreamExt as _;
use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::{StoreError, database_error, write};
use crate::ledger::Ledger;

/// `MIGRATIONS[n]` leads from version `n` to `n + 1`; version 0 is an empty database. They only ever grow at the end.
const MIGRATIONS: [Migration; 2] = [
    Migration {
        sql: FIRST,
        then: None,
    },
    Migration {
        sql: SECOND,
        then: Some(Then::Move),
    },
];

/// A step.
#[derive(Clone, Copy)]
struct Migration {
    sql: &'static str,
    /// What SQL cannot do.
    then: Option<Then>,
}

#[derive(Clone, Copy)]
enum Then {
    /// What is in `records` goes into the tables that have taken its place.
    Move,
}

/// One row: the version. `observations` has the flow records of the ledger, as JSON, each under its observation key;
/// `count` and the times (nanoseconds since the Unix epoch) repeat what the record says. `agents` has, for each run of an
/// agent, the last batch that is part of the ledger. `losses` is a sum per node and reason, with the span from the first to
/// the last window in which some were lost.
pub(super) const FIRST: &str = "CREATE TABLE meta (schema_version INTEGER NOT NULL);
     INSERT INTO meta (schema_version) VALUES (0);
     CREATE TABLE observations (
         key TEXT PRIMARY KEY NOT NULL,
         record TEXT NOT NULL,
         count INTEGER NOT NULL,
         first_seen_ns INTEGER NOT NULL,
         last_seen_ns INTEGER NOT NULL
     );
     CREATE TABLE agents (
         instance TEXT PRIMARY KEY NOT NULL,
         node TEXT NOT NULL,
         version TEXT NOT NULL,
         last_sequence INTEGER NOT NULL,
         last_seen_ns INTEGER NOT NULL
     );
     CREATE TABLE losses (
         node TEXT NOT NULL,
         reason TEXT NOT NULL,
         count INTEGER NOT NULL,
         window_from_ns INTEGER NOT NULL,
         window_to_ns INTEGER NOT NULL,
         PRIMARY KEY (node, reason)
     );";

/// An observation is three things now: what it is of, in `observations`; how often and when it was made, in `counts`, which
/// change with every batch and are therefore short; and its ends, in `ends`, as JSON, which many observations have in common.
/// `details` is JSON: outcome, the observer's node, process, sources, and what was called where that was translated.
const SECOND: &str = "ALTER TABLE observations RENAME TO records;
     CREATE TABLE ends (id INTEGER PRIMARY KEY, what TEXT NOT NULL);
     CREATE TABLE observations (
         id INTEGER PRIMARY KEY,
         client INTEGER NOT NULL,
         server INTEGER NOT NULL,
         protocol TEXT NOT NULL,
         port INTEGER NOT NULL,
         direction TEXT NOT NULL,
         details TEXT NOT NULL
     );
     CREATE TABLE counts (
         id INTEGER PRIMARY KEY,
         count INTEGER NOT NULL,
         first_seen_ns INTEGER NOT NULL,
         last_seen_ns INTEGER NOT NULL,
         timestamp_ns INTEGER NOT NULL
     );";

/// The version that this program writes.
pub(super) const VERSION: u32 = MIGRATIONS.len() as u32;

/// What is in a database file.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A ledger of this version; 0 if there is nothing at all.
    Version(u32),
    /// Tables, but not a ledger's.
    Foreign,
}

/// Looks without changing anything.
pub(super) async fn inspect(connection: &mut SqliteConnection) -> sqlx::Result<Found> {
    let (tables, meta): (i64, i64) =
        sqlx::query_as("SELECT count(*), count(*) FILTER (WHERE name = 'meta') FROM sqlite_schema")
            .fetch_one(&mut *connection)
            .await?;
    if tables == 0 {
        return Ok(Found::Version(0));
    }
    if meta == 0 {
        return Ok(Found::Foreign);
    }
    match sqlx::query_scalar("SELECT schema_version FROM meta")
        .fetch_optional(connection)
        .await
    {
        Ok(Some(version)) => Ok(Found::Version(version)),
        // A `meta` of another shape.
        Ok(None) | Err(sqlx::Error::Database(_) | sqlx::Error::ColumnDecode { .. }) => {
            Ok(Found::Foreign)
        }
        Err(error) => Err(error),
    }
}

/// Brings a ledger from version `from` to [`VERSION`]: every step or, if one fails or the process dies, none.
pub(super) async fn migrate(
    connection: &mut SqliteConnection,
    path: &str,
    from: u32,
) -> Result<(), StoreError> {
    let failed = database_error(path, "bring up to date");
    let mut transaction = connection.begin().await.map_err(&failed)?;
    for Migration { sql, then } in MIGRATIONS.into_iter().skip(from as usize) {
        sqlx::raw_sql(sql)
            .execute(&mut *transaction)
            .await
            .map_err(&failed)?;
        if let Some(Then::Move) = then {
            let ledger = read_records(&mut transaction, path).await?;
            write::ledger(&mut transaction, ledger.rows())
                .await
                .map_err(&failed)?;
            sqlx::raw_sql("DROP TABLE records")
                .execute(&mut *transaction)
                .await
                .map_err(&failed)?;
        }
    }
    sqlx::query("UPDATE meta SET schema_version = ?")
        .bind(VERSION)
        .execute(&mut *transaction)
        .await
        .map_err(&failed)?;
    transaction.commit().await.map_err(&failed)
}

/// The ledger of the first version.
async fn read_records(connection: &mut SqliteConnection, path: &str) -> Result<Ledger, StoreError> {
    let mut ledger = Ledger::default();
    let mut rows = sqlx::query("SELECT rowid, record FROM records").fetch(connection);
    let failed = database_error(path, "read");
    while let Some(row) = rows.try_next().await.map_err(&failed)? {
        let record: &str = row.try_get(1).map_err(&failed)?;
        let record: FlowRecord = match serde_json::from_str(record) {
            Ok(record) => record,
            Err(error) => {
                return Err(StoreError::Row {
                    path: path.to_owned(),
                    table: "observations",
                    id: row.try_get(0).map_err(&failed)?,
                    problem: error.to_string(),
                });
            }
        };
        ledger.observe(record);
    }
    Ok(ledger)
}
