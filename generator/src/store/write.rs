//! One transaction.

use flow::{observations::ObservationKey, record::FlowRecord, time::Timestamp};
use sqlx::{QueryBuilder, Sqlite, SqliteConnection};

use super::{Agent, Loss};

/// Rows per statement: each statement is a round trip to the thread that owns the database.
const ROWS: usize = 128;

/// What has changed since the last commit. Every entry is the new whole, not a difference.
#[derive(Debug, Default)]
pub struct Changes<'a> {
    /// Aggregated records, under their keys.
    pub observations: Vec<(&'a ObservationKey, &'a FlowRecord)>,
    /// Agents, by instance.
    pub agents: Vec<(&'a str, &'a Agent)>,
    /// Losses, by node and reason.
    pub losses: Vec<(&'a str, &'a str, &'a Loss)>,
    /// Instances that are forgotten.
    pub forgotten: &'a [String],
    /// Observations that are.
    pub forgotten_observations: &'a [ObservationKey],
    /// Losses that are, by node and reason.
    pub forgotten_losses: &'a [(String, String)],
}

impl Changes<'_> {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.observations.is_empty()
            && self.agents.is_empty()
            && self.losses.is_empty()
            && self.forgotten.is_empty()
            && self.forgotten_observations.is_empty()
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
    for key in changes.forgotten_observations {
        sqlx::query("DELETE FROM observations WHERE key = ?")
            .bind(key.to_string())
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
    write_observations(&mut *connection, &changes.observations).await?;
    write_agents(&mut *connection, &changes.agents).await?;
    write_losses(&mut *connection, &changes.losses).await
}

async fn write_observations(
    connection: &mut SqliteConnection,
    observations: &[(&ObservationKey, &FlowRecord)],
) -> sqlx::Result<()> {
    for rows in observations.chunks(ROWS) {
        let rows = rows
            .iter()
            .map(|(key, record)| Ok((key.to_string(), serde_json::to_string(record)?, *record)))
            .collect::<Result<Vec<_>, serde_json::Error>>()
            .map_err(|error| sqlx::Error::Encode(error.into()))?;
        let mut insert: QueryBuilder<Sqlite> = QueryBuilder::new(
            "INSERT INTO observations (key, record, count, first_seen_ns, last_seen_ns) ",
        );
        insert.push_values(rows, |mut row, (key, json, record)| {
            row.push_bind(key)
                .push_bind(json)
                .push_bind(count(record.count))
                .push_bind(nanos(record.first_seen))
                .push_bind(nanos(record.last_seen));
        });
        insert.push(
            " ON CONFLICT (key) DO UPDATE SET record = excluded.record, count = excluded.count, \
             first_seen_ns = excluded.first_seen_ns, last_seen_ns = excluded.last_seen_ns",
        );
        insert.build().execute(&mut *connection).await?;
    }
    Ok(())
}

async fn write_agents(
    connection: &mut SqliteConnection,
    agents: &[(&str, &Agent)],
) -> sqlx::Result<()> {
    for rows in agents.chunks(ROWS) {
        let mut insert: QueryBuilder<Sqlite> = QueryBuilder::new(
            "INSERT INTO agents (instance, node, version, last_sequence, last_seen_ns) ",
        );
        insert.push_values(rows, |mut row, (instance, agent)| {
            row.push_bind((*instance).to_owned())
                .push_bind(agent.node.clone())
                .push_bind(agent.version.clone())
                // The bits of the number: all 64 are used to compare it.
                .push_bind(agent.last_sequence.cast_signed())
                .push_bind(nanos(agent.last_seen));
        });
        insert.push(
            " ON CONFLICT (instance) DO UPDATE SET node = excluded.node, version = excluded.version, \
             last_sequence = excluded.last_sequence, last_seen_ns = excluded.last_seen_ns",
        );
        insert.build().execute(&mut *connection).await?;
    }
    Ok(())
}

async fn write_losses(
    connection: &mut SqliteConnection,
    losses: &[(&str, &str, &Loss)],
) -> sqlx::Result<()> {
    for rows in losses.chunks(ROWS) {
        let mut insert: QueryBuilder<Sqlite> = QueryBuilder::new(
            "INSERT INTO losses (node, reason, count, window_from_ns, window_to_ns) ",
        );
        insert.push_values(rows, |mut row, (node, reason, loss)| {
            row.push_bind((*node).to_owned())
                .push_bind((*reason).to_owned())
                .push_bind(count(loss.count))
                .push_bind(nanos(loss.window.from))
                .push_bind(nanos(loss.window.to));
        });
        insert.push(
            " ON CONFLICT (node, reason) DO UPDATE SET count = excluded.count, \
             window_from_ns = excluded.window_from_ns, window_to_ns = excluded.window_to_ns",
        );
        insert.build().execute(&mut *connection).await?;
    }
    Ok(())
}

/// SQLite's integers are signed: a count that high has stopped counting.
fn count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Nanoseconds since the Unix epoch; the year 2262 is the last.
fn nanos(time: Timestamp) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
