//! The ledger, as it was written.

use std::collections::HashMap;

use flow::wire::End;
use futures_util::TryStreamExt as _;
use serde::{
    Deserialize,
    de::{
        IntoDeserializer as _,
        value::{Error as WordError, StrDeserializer},
    },
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};

use super::{StoreError, database_error, time};
use crate::ledger::{CountRow, Ledger, NameRow};

/// Reads all observations and their ends.
pub(super) async fn ledger(
    connection: &mut SqliteConnection,
    path: &str,
) -> Result<Ledger, StoreError> {
    let failed = database_error(path, "read");
    let wrong = |table, id, problem: String| StoreError::Row {
        path: path.to_owned(),
        table,
        id,
        problem,
    };
    let mut ledger = Ledger::default();
    let mut ends = HashMap::new();
    let mut rows = sqlx::query("SELECT id, what FROM ends").fetch(&mut *connection);
    while let Some(row) = rows.try_next().await.map_err(&failed)? {
        let id: i64 = row.try_get(0).map_err(&failed)?;
        let what: &str = row.try_get(1).map_err(&failed)?;
        let end: End =
            serde_json::from_str(what).map_err(|error| wrong("ends", id, error.to_string()))?;
        let Some(place) = ledger.restore_end(id, end) else {
            return Err(wrong("ends", id, "it is there twice".to_owned()));
        };
        ends.insert(id, place);
    }
    drop(rows);
    let mut rows = sqlx::query(
        "SELECT id, client, server, protocol, port, direction, details, \
         count, first_seen_ns, last_seen_ns, timestamp_ns FROM observations LEFT JOIN counts USING (id)",
    )
    .fetch(&mut *connection);
    while let Some(row) = rows.try_next().await.map_err(&failed)? {
        let id: i64 = row.try_get(0).map_err(&failed)?;
        let of_observations = |problem: String| wrong("observations", id, problem);
        let names = names(&row)
            .map_err(&failed)?
            .map_err(|error| of_observations(error.to_string()))?;
        let Some(counts) = counts(&row).map_err(&failed)? else {
            return Err(of_observations("its counts are missing".to_owned()));
        };
        let (Some(&client), Some(&server)) = (ends.get(&names.client), ends.get(&names.server))
        else {
            return Err(of_observations("one of its ends is missing".to_owned()));
        };
        if ledger.restore(names, counts, client, server).is_none() {
            return Err(of_observations("it is there twice".to_owned()));
        }
    }
    Ok(ledger)
}

fn names(row: &SqliteRow) -> sqlx::Result<serde_json::Result<NameRow>> {
    fn word<T: for<'de> Deserialize<'de>>(text: &str) -> serde_json::Result<T> {
        let word: StrDeserializer<'_, WordError> = text.into_deserializer();
        T::deserialize(word).map_err(serde::de::Error::custom)
    }
    let (protocol, direction, details) = (row.try_get(3)?, row.try_get(5)?, row.try_get(6)?);
    let (id, client, server, port) = (
        row.try_get(0)?,
        row.try_get(1)?,
        row.try_get(2)?,
        row.try_get(4)?,
    );
    let parse = || {
        Ok(NameRow {
            row: id,
            client,
            server,
            protocol: word(protocol)?,
            port,
            direction: word(direction)?,
            details: serde_json::from_str(details)?,
        })
    };
    Ok(parse())
}

fn counts(row: &SqliteRow) -> sqlx::Result<Option<CountRow>> {
    let Some(count) = row.try_get::<Option<i64>, _>(7)? else {
        return Ok(None);
    };
    Ok(Some(CountRow {
        row: row.try_get(0)?,
        count: count.cast_unsigned(),
        first_seen: time(row.try_get(8)?),
        last_seen: time(row.try_get(9)?),
        timestamp: time(row.try_get(10)?),
    }))
}
