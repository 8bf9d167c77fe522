//! The store: the ledger on disk, and with it what keeps it exact over restarts.
//!
//! A batch's flows and the number of the batch are written in one transaction, so that after any crash the ledger has
//! either both or neither. The database is SQLite in the file `ledger.db` of the data directory, or in memory.

mod agents;
mod error;
mod load;
mod lock;
mod losses;
mod schema;
mod write;

use std::{path::Path, time::Duration};

use flow::{time::Timestamp, wire::Window};
use futures_util::TryStreamExt as _;
use sqlx::{
    ConnectOptions as _, Connection as _, Row as _, SqliteConnection,
    sqlite::{SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};

use self::{lock::DirectoryLock, schema::Found};
use crate::ledger::Ledger;

pub use self::{
    agents::{Agent, Agents, Standing},
    error::StoreError,
    losses::{Loss, Losses},
    write::Changes,
};

/// The database's name in the data directory.
const FILE_NAME: &str = "ledger.db";

/// How long to wait for another process that reads the database: it holds back no more than a checkpoint.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The database's log is cut to this size, in bytes, when it has been folded into its file.
const JOURNAL_BYTES: &str = "67108864";

/// Everything that the generator knows: what is in the store, and in memory while it runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// The observations.
    pub ledger: Ledger,
    /// Whose batches are in it.
    pub agents: Agents,
    /// What the agents said that they lost.
    pub losses: Losses,
}

/// The database of one data directory.
#[derive(Debug)]
pub struct Store {
    connection: SqliteConnection,
    /// The database's file, for messages.
    path: String,
    _lock: Option<DirectoryLock>,
}

impl Store {
    /// Opens the ledger of a data directory, which is created if it does not exist; an older schema is brought up to
    /// date.
    ///
    /// # Errors
    /// If the directory cannot be used or is in use, or what is in it is no ledger, or one of a newer version.
    pub async fn open(directory: &Path) -> Result<Self, StoreError> {
        let lock = DirectoryLock::take(directory)?;
        lock.create_beside(FILE_NAME)?;
        let options = SqliteConnectOptions::new()
            .filename(directory.join(FILE_NAME))
            .create_if_missing(true)
            // Readers do not block the writer, nor it them.
            .journal_mode(SqliteJournalMode::Wal)
            // `Normal` would sync the log at checkpoints only: a power loss could take back batches that were
            // acknowledged, and that the agent has therefore thrown away.
            .synchronous(SqliteSynchronous::Full)
            // What was deleted is given back by `compact`.
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .pragma("journal_size_limit", JOURNAL_BYTES);
        let mut store = Self::connect(options, &directory.join(FILE_NAME), Some(lock)).await?;
        store.check().await?;
        store.migrate().await?;
        store.compactable().await;
        Ok(store)
    }

    /// A ledger that is forgotten with the process.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub async fn in_memory() -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new().in_memory(true);
        let mut store = Self::connect(options, Path::new("in memory"), None).await?;
        store.migrate().await?;
        Ok(store)
    }

    /// Opens the ledger of a data directory for reading, also while another process writes it.
    ///
    /// # Errors
    /// If there is no ledger, or one of another version.
    pub async fn open_read_only(directory: &Path) -> Result<Self, StoreError> {
        let file = directory.join(FILE_NAME);
        let exists = file.try_exists().map_err(|source| StoreError::Directory {
            path: directory.to_owned(),
            source,
        })?;
        if !exists {
            return Err(StoreError::Missing {
                path: directory.to_owned(),
            });
        }
        let options = SqliteConnectOptions::new().filename(&file).read_only(true);
        let mut store = Self::connect(options, &file, None).await?;
        match store.version().await? {
            schema::VERSION => Ok(store),
            // A process that has just created the file has not written the tables yet.
            0 => Err(StoreError::Missing {
                path: directory.to_owned(),
            }),
            found => Err(StoreError::OlderSchema {
                path: store.path,
                found,
                known: schema::VERSION,
            }),
        }
    }

    /// Reads everything, as it was at one moment.
    ///
    /// # Errors
    /// If the database cannot be read, or holds what this program did not write.
    pub async fn load(&mut self) -> Result<State, StoreError> {
        let failed = database_error(&self.path, "read");
        let mut snapshot = self.connection.begin().await.map_err(&failed)?;
        let state = State {
            ledger: load::ledger(&mut snapshot, &self.path).await?,
            agents: read_agents(&mut snapshot).await.map_err(&failed)?,
            losses: read_losses(&mut snapshot).await.map_err(&failed)?,
        };
        snapshot.rollback().await.map_err(&failed)?;
        Ok(state)
    }

    /// Writes changes: all of them or, if it fails, none. When this returns they survive a power loss.
    ///
    /// # Errors
    /// If the database cannot be written. Should even the outcome be unknown, [`Store::load`] tells the truth.
    pub async fn commit(&mut self, changes: &Changes<'_>) -> Result<(), StoreError> {
        write::commit(&mut self.connection, changes)
            .await
            .map_err(database_error(&self.path, "write"))
    }

    /// Gives the space of what was deleted back to the file system.
    ///
    /// # Errors
    /// If that fails; nothing is lost then.
    pub async fn compact(&mut self) -> Result<(), StoreError> {
        sqlx::raw_sql("PRAGMA incremental_vacuum")
            .execute(&mut self.connection)
            .await
            .map_err(database_error(&self.path, "compact"))?;
        Ok(())
    }

    /// Looks whether the file is whole: the rows themselves are read anyway, but not what leads to them.
    async fn check(&mut self) -> Result<(), StoreError> {
        let found: Result<String, _> = sqlx::query_scalar("PRAGMA quick_check(1)")
            .fetch_one(&mut self.connection)
            .await;
        match found {
            Ok(found) if found == "ok" => Ok(()),
            Ok(problem) => Err(StoreError::Damaged {
                path: self.path.clone(),
                problem,
            }),
            Err(source) => Err(database_error(&self.path, "read")(source)),
        }
    }

    /// A ledger from before there was compaction is rewritten once. If there is no space for that it stays as it is.
    async fn compactable(&mut self) {
        let mode = sqlx::query_scalar::<_, i64>("PRAGMA auto_vacuum")
            .fetch_one(&mut self.connection)
            .await;
        if !matches!(mode, Ok(0)) {
            return;
        }
        let rewrite = "PRAGMA auto_vacuum = INCREMENTAL; VACUUM";
        if let Err(error) = sqlx::raw_sql(rewrite).execute(&mut self.connection).await {
            tracing::warn!(%error, path = self.path, "the ledger cannot be made compactable");
        }
    }

    /// What the database takes, in bytes.
    ///
    /// # Errors
    /// If it cannot be read.
    pub async fn bytes(&mut self) -> Result<u64, StoreError> {
        let size = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()";
        let bytes: i64 = sqlx::query_scalar(size)
            .fetch_one(&mut self.connection)
            .await
            .map_err(database_error(&self.path, "read"))?;
        Ok(bytes.cast_unsigned())
    }

    /// Closes the database properly, so that its log is folded into its file.
    ///
    /// # Errors
    /// If that fails; nothing that was committed is lost.
    pub async fn close(self) -> Result<(), StoreError> {
        self.connection
            .close()
            .await
            .map_err(database_error(&self.path, "close"))
    }

    async fn connect(
        options: SqliteConnectOptions,
        file: &Path,
        lock: Option<DirectoryLock>,
    ) -> Result<Self, StoreError> {
        let path = file.display().to_string();
        let connection = options
            .busy_timeout(BUSY_TIMEOUT)
            // A statement that fails halfway is taken back with what it keeps in a temporary file otherwise, and a container
            // has no folder for such. It is no more than the pages that one statement changes; only `compactable` keeps
            // a copy of everything, once, before the ledger itself is in memory.
            .pragma("temp_store", "MEMORY")
            .disable_statement_logging()
            .connect()
            .await
            .map_err(database_error(&path, "open"))?;
        Ok(Self {
            connection,
            path,
            _lock: lock,
        })
    }

    async fn migrate(&mut self) -> Result<(), StoreError> {
        let from = self.version().await?;
        if from == schema::VERSION {
            return Ok(());
        }
        schema::migrate(&mut self.connection, &self.path, from).await
    }

    /// The version of the schema; 0 if there is none.
    async fn version(&mut self) -> Result<u32, StoreError> {
        let found = schema::inspect(&mut self.connection)
            .await
            .map_err(database_error(&self.path, "read"))?;
        match found {
            Found::Version(version) if version <= schema::VERSION => Ok(version),
            Found::Version(found) => Err(StoreError::NewerSchema {
                path: self.path.clone(),
                found,
                known: schema::VERSION,
            }),
            Found::Foreign => Err(StoreError::Foreign {
                path: self.path.clone(),
                reason: "it has other tables",
            }),
        }
    }
}

/// Reads the state from a data directory, whether or not a generator is running on it.
///
/// # Errors
/// As for [`Store::open_read_only`] and [`Store::load`].
pub async fn read(directory: &Path) -> Result<State, StoreError> {
    let mut store = Store::open_read_only(directory).await?;
    let state = store.load().await?;
    store.close().await?;
    Ok(state)
}

async fn read_agents(connection: &mut SqliteConnection) -> sqlx::Result<Agents> {
    let mut agents = Agents::default();
    let mut rows =
        sqlx::query("SELECT instance, node, version, last_sequence, last_seen_ns FROM agents")
            .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let agent = Agent {
            node: row.try_get(1)?,
            version: row.try_get(2)?,
            last_sequence: row.try_get::<i64, _>(3)?.cast_unsigned(),
            last_seen: time(row.try_get(4)?),
        };
        agents.insert(row.try_get(0)?, agent);
    }
    Ok(agents)
}

async fn read_losses(connection: &mut SqliteConnection) -> sqlx::Result<Losses> {
    let mut losses = Losses::default();
    let mut rows =
        sqlx::query("SELECT node, reason, count, window_from_ns, window_to_ns FROM losses")
            .fetch(connection);
    while let Some(row) = rows.try_next().await? {
        let kind = (row.try_get(0)?, row.try_get(1)?);
        let loss = Loss {
            count: row.try_get::<i64, _>(2)?.cast_unsigned(),
            window: Window {
                from: time(row.try_get(3)?),
                to: time(row.try_get(4)?),
            },
        };
        losses.restore(kind, loss);
    }
    Ok(losses)
}

fn time(nanos: i64) -> Timestamp {
    Timestamp::from_nanos(nanos.cast_unsigned())
}

fn database_error<'a>(
    path: &'a str,
    action: &'static str,
) -> impl Fn(sqlx::Error) -> StoreError + 'a {
    move |source| StoreError::Database {
        path: path.to_owned(),
        action,
        source,
    }
}

#[cfg(test)]
mod tests;
