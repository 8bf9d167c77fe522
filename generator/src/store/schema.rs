//! The tables, and how a ledger of an older version is brought up to date.

use sqlx::{Connection as _, SqliteConnection};

/// `MIGRATIONS[n]` leads from version `n` to `n + 1`; version 0 is an empty database. They only ever grow at the end.
const MIGRATIONS: [&str; 1] = [
    // One row: the version. `observations` has the flow records of the ledger, as JSON, each under its observation
    // key; `count` and the times (nanoseconds since the Unix epoch) repeat what the record says, for SQL to work with.
    // `agents` has, for each run of an agent, the last batch that is part of the ledger. `losses` is a sum per node
    // and reason, with the span from the first to the last window in which some were lost.
    "CREATE TABLE meta (schema_version INTEGER NOT NULL);
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
     );",
];

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
pub(super) async fn migrate(connection: &mut SqliteConnection, from: u32) -> sqlx::Result<()> {
    let mut transaction = connection.begin().await?;
    for step in MIGRATIONS.into_iter().skip(from as usize) {
        sqlx::raw_sql(step).execute(&mut *transaction).await?;
    }
    sqlx::query("UPDATE meta SET schema_version = ?")
        .bind(VERSION)
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await
}
