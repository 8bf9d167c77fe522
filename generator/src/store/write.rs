//! One transaction.

use flow::time::Timestamp;
use serde::Serialize;
use sqlx::{QueryBuilder, Sqlite, SqliteConnection, query_builder::Separated};

use super::{Agent, Loss};
use crate::ledger::Rows;

/// The most rows of a statement: each statement is a round trip to the thread that owns the database. Others have a power
/// of two, so that there are few statements, which stay prepared.
const ROWS: usize = 128;

/// What has changed since the last commit. Every entry is the new whole, not a difference.
#[derive(Debug)]
pub struct Changes<'a> {
    /// Observations and their ends.
    pub ledger: Rows<'a>,
    /// Agents, by instance.
    pub agents: Vec<(&'a str, &'a Agent)>,
    /// Losses, by node and reason.
    pub losses: Vec<(&'a str, &'a str, &'a Loss)>,
    /// Instances that are forgotten.
    pub forgotten: &'a [String],
    /// Losses that are, by node and reason.
    pub forgotten_losses: &'a [(String, String)],
}

impl Changes<'_> {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ledger.is_empty()
            && self.agents.is_empty()
            && self.losses.is_empty()
            && self.forgotten.is_empty()
            && self.forgotten_losses.is_empty()
    }
}

/// The statements that begin and end the transaction are our own: SQLite may have ended one by itself when it failed, on a
/// full disk for one, and whoever counts transactions apart from SQLite takes the next for a part of this one then, which
/// is never committed.
pub(super) async fn commit(
    connection: &mut SqliteConnection,
    changes: &Changes<'_>,
) -> sqlx::Result<()> {
    execute(connection, "BEGIN IMMEDIATE").await?;
    let mut written = write(connection, changes).await;
    if written.is_ok() {
        written = execute(connection, "COMMIT").await;
    }
    if written.is_err()
        && let Err(error) = execute(connection, "ROLLBACK").await
    {
        // There was nothing to roll back any more; or else the next transaction cannot begin, and says so.
        tracing::debug!(%error, "rollback");
    }
    written
}

async fn execute(connection: &mut SqliteConnection, statement: &'static str) -> sqlx::Result<()> {
    sqlx::raw_sql(statement).execute(connection).await.map(drop)
}

async fn write(connection: &mut SqliteConnection, changes: &Changes<'_>) -> sqlx::Result<()> {
    // First: what was forgotten may be back.
    for instance in changes.forgotten {
        sqlx::query("DELETE FROM agents WHERE instance = ?")
            .bind(instance.clone())
            .execute(&mut *connection)
            .await?;
    }
    for (node, reason) in changes.forgotten_losses {
        sqlx::query("DELETE FROM losses WHERE node = ? AND reason = ?")
            .bind(node.clone())
            .bind(reason.clone())
            .execute(&mut *connection)
            .await?;
    }
    ledger(&mut *connection, changes.ledger).await?;
    write_agents(&mut *connection, &changes.agents).await?;
    write_losses(&mut *connection, &changes.losses).await
}

/// Writes what has changed in the ledger. What is forgotten goes first: its number may be another's now.
pub(super) async fn ledger(connection: &mut SqliteConnection, rows: Rows<'_>) -> sqlx::Result<()> {
    for (statement, forgotten) in [
        ("DELETE FROM counts WHERE id = ?", rows.forgotten()),
        ("DELETE FROM observations WHERE id = ?", rows.forgotten()),
        ("DELETE FROM ends WHERE id = ?", rows.forgotten_ends()),
    ] {
        for id in forgotten {
            sqlx::query(statement)
                .bind(*id)
                .execute(&mut *connection)
                .await?;
        }
    }
    let ends = rows.ends().map(|end| Ok((end.row, json(end.end)?)));
    write_rows(
        connection,
        ["REPLACE INTO ends (id, what) ", ""],
        ends,
        |mut row, (id, what)| {
            row.push_bind(id).push_bind(what);
        },
    )
    .await?;
    let names = rows.names().map(|names| {
        let details = json(&names.details)?;
        Ok((names, details))
    });
    write_rows(
        connection,
        [
            "REPLACE INTO observations (id, client, server, protocol, port, direction, details) ",
            "",
        ],
        names,
        |mut row, (names, details)| {
            row.push_bind(names.row)
                .push_bind(names.client)
                .push_bind(names.server)
                .push_bind(names.protocol.name())
                .push_bind(names.port)
                .push_bind(names.direction.name())
                .push_bind(details);
        },
    )
    .await?;
    write_rows(
        connection,
        [
            "REPLACE INTO counts (id, count, first_seen_ns, last_seen_ns, timestamp_ns) ",
            "",
        ],
        rows.counts().map(Ok),
        |mut row, counts| {
            row.push_bind(counts.row)
                .push_bind(count(counts.count))
                .push_bind(nanos(counts.first_seen))
                .push_bind(nanos(counts.last_seen))
                .push_bind(nanos(counts.timestamp));
        },
    )
    .await
}

/// Writes rows, many at a time: by what stands before and behind the values.
async fn write_rows<T>(
    connection: &mut SqliteConnection,
    [insert, behind]: [&'static str; 2],
    mut rows: impl Iterator<Item = sqlx::Result<T>>,
    mut bind: impl FnMut(Separated<'_, Sqlite, &'static str>, T),
) -> sqlx::Result<()> {
    loop {
        let mut some = rows.by_ref().take(ROWS).collect::<sqlx::Result<Vec<T>>>()?;
        if some.is_empty() {
            return Ok(());
        }
        while let Some(power) = some.len().checked_ilog2() {
            let mut insert: QueryBuilder<Sqlite> = QueryBuilder::new(insert);
            insert.push_values(some.drain(..1 << power), &mut bind);
            insert.push(behind);
            insert.build().execute(&mut *connection).await?;
        }
    }
}

fn json(what: &impl Serialize) -> sqlx::Result<String> {
    serde_json::to_string(what).map_err(|error| sqlx::Error::Encode(error.into()))
}

async fn write_agents(
    connection: &mut SqliteConnection,
    agents: &[(&str, &Agent)],
) -> sqlx::Result<()> {
    write_rows(
        connection,
        [
            "INSERT INTO agents (instance, node, version, last_sequence, last_seen_ns) ",
            " ON CONFLICT (instance) DO UPDATE SET node = excluded.node, version = excluded.version, \
             last_sequence = excluded.last_sequence, last_seen_ns = excluded.last_seen_ns",
        ],
        agents.iter().map(Ok),
        |mut row, (instance, agent)| {
            row.push_bind((*instance).to_owned())
                .push_bind(agent.node.clone())
                .push_bind(agent.version.clone())
                // The bits of the number: all 64 are used to compare it.
                .push_bind(agent.last_sequence.cast_signed())
                .push_bind(nanos(agent.last_seen));
        },
    )
    .await
}

async fn write_losses(
    connection: &mut SqliteConnection,
    losses: &[(&str, &str, &Loss)],
) -> sqlx::Result<()> {
    write_rows(
        connection,
        [
            "INSERT INTO losses (node, reason, count, window_from_ns, window_to_ns) ",
            " ON CONFLICT (node, reason) DO UPDATE SET count = excluded.count, \
             window_from_ns = excluded.window_from_ns, window_to_ns = excluded.window_to_ns",
        ],
        losses.iter().map(Ok),
        |mut row, (node, reason, loss)| {
            row.push_bind((*node).to_owned())
                .push_bind((*reason).to_owned())
                .push_bind(count(loss.count))
                .push_bind(nanos(loss.window.from))
                .push_bind(nanos(loss.window.to));
        },
    )
    .await
}

/// SQLite's integers are signed: a count that high has stopped counting.
fn count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Nanoseconds since the Unix epoch; the year 2262 is the last.
fn nanos(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
