use std::os::unix::fs::PermissionsExt as _;

use flow::{record::FlowRecord, wire::Hello};
use serde_json::json;

use super::*;
use crate::ledger::Rows;

fn record(port: u16, count: u64) -> FlowRecord {
    serde_json::from_value(json!({
        "timestamp": 1000.5, "hostname": "node-1", "count": count,
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
        "src": {"pod": {"id": "1;<pod>", "namespace": "shop", "name": "web-1", "labels": {"app": "web"}}, "service": {}},
        "dst": {"pod": {}, "service": {}},
    }))
    .unwrap()
}

fn hello(instance: &str) -> Hello {
    Hello {
        instance: instance.to_owned(),
        node: "node-1".to_owned(),
        version: "1".to_owned(),
        resolve: flow::wire::Resolve::Both,
        capabilities: Vec::new(),
        clock: None,
    }
}

/// A state with so many observations, agents and losses that each takes several statements.
fn state() -> State {
    let mut state = State::default();
    for number in 1..=300 {
        state.ledger.observe(record(number, u64::from(number)));
        let moment = Timestamp::from_nanos(u64::from(number));
        let sequence = u64::MAX - u64::from(number);
        state
            .agents
            .advance(&hello(&number.to_string()), sequence, moment);
        let window = Window {
            from: moment,
            to: moment,
        };
        // More reasons of a node than are told apart.
        let (node, reason) = (format!("node-{}", number % 4), format!("reason_{number}"));
        state.losses.add(&node, &reason, u64::from(number), window);
    }
    state
}

/// Changes of the ledger, and nothing else.
fn changes_of(ledger: Rows<'_>) -> Changes<'_> {
    Changes {
        ledger,
        agents: Vec::new(),
        losses: Vec::new(),
        forgotten: &[],
        forgotten_losses: &[],
    }
}

async fn commit(store: &mut Store, state: &State, forgotten: &[String]) {
    let changes = Changes {
        agents: state.agents.iter().collect(),
        losses: state.losses.iter().collect(),
        forgotten,
        ..changes_of(state.ledger.rows())
    };
    store.commit(&changes).await.unwrap();
}

#[tokio::test]
async fn what_is_committed_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    let mut state = state();
    let mut store = Store::open(directory.path()).await.unwrap();
    commit(&mut store, &state, &[]).await;
    assert_eq!(store.load().await.unwrap(), state);

    state.ledger.observe(record(7, 100));
    let old = Timestamp::from_nanos(100);
    let forgotten = state.agents.forget_before(old, |_| false);
    // One of them is back in the very round in which it was forgotten.
    state.agents.advance(&hello("7"), 1, old);
    commit(&mut store, &state, &forgotten).await;
    store.close().await.unwrap();
    let mut store = Store::open(directory.path()).await.unwrap();
    assert_eq!(store.load().await.unwrap(), state);
}

#[tokio::test]
async fn it_is_read_while_it_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let state = state();
    let mut store = Store::open(directory.path()).await.unwrap();
    commit(&mut store, &state, &[]).await;
    let mut reader = Store::open_read_only(directory.path()).await.unwrap();
    assert_eq!(reader.load().await.unwrap(), state);
    commit(&mut store, &state, &[]).await;
    let mut other = Ledger::default();
    other.observe(record(1, 1));
    let changes = changes_of(other.rows());
    reader.commit(&changes).await.unwrap_err();
    store.close().await.unwrap();
    assert_eq!(read(directory.path()).await.unwrap(), state);
}

/// A container has no folder for temporary files.
#[tokio::test]
async fn nothing_is_kept_in_temporary_files() {
    let directory = tempfile::tempdir().unwrap();
    let writing = Store::open(directory.path()).await.unwrap();
    let reading = Store::open_read_only(directory.path()).await.unwrap();
    for mut store in [writing, reading] {
        let kept: i64 = sqlx::query_scalar("PRAGMA temp_store")
            .fetch_one(&mut store.connection)
            .await
            .unwrap();
        assert_eq!(kept, 2, "not in memory");
    }
}

#[tokio::test]
async fn nobody_but_its_user_reads_it() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("new/ledger");
    let mut store = Store::open(&directory).await.unwrap();
    commit(&mut store, &state(), &[]).await;
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&directory).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        files.push(path.file_name().unwrap().to_owned());
    }
    files.sort();
    assert_eq!(
        files,
        ["ledger.db", "ledger.db-shm", "ledger.db-wal", "lock"]
    );
}

#[tokio::test]
async fn memory_forgets() {
    let state = state();
    let mut store = Store::in_memory().await.unwrap();
    commit(&mut store, &state, &[]).await;
    assert_eq!(store.load().await.unwrap(), state);
    let mut other = Store::in_memory().await.unwrap();
    assert_eq!(other.load().await.unwrap(), State::default());
}

/// A data directory whose ledger was changed by `sql`.
async fn altered(sql: &'static str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).await.unwrap();
    commit(&mut store, &state(), &[]).await;
    sqlx::raw_sql(sql)
        .execute(&mut store.connection)
        .await
        .unwrap();
    store.close().await.unwrap();
    directory
}

#[tokio::test]
async fn what_this_program_did_not_write_is_refused() {
    for (sql, refusal) in [
        (
            "UPDATE meta SET schema_version = 3",
            "has schema version 3, this program knows none above 2",
        ),
        ("DROP TABLE meta", "is not a MicroShield ledger"),
        ("DELETE FROM meta", "is not a MicroShield ledger"),
        (
            "ALTER TABLE meta RENAME COLUMN schema_version TO version",
            "is not a MicroShield ledger",
        ),
        (
            "UPDATE observations SET details = '{}' WHERE port = 7",
            "row 7 of observations: missing field `outcome`",
        ),
        (
            "UPDATE observations SET protocol = 'X' WHERE port = 7",
            "row 7 of observations: unknown variant `X`",
        ),
        (
            "UPDATE observations SET port = 8 WHERE port = 7",
            "row 8 of observations: it is there twice",
        ),
        (
            "UPDATE ends SET what = '{}' WHERE id = 1",
            "row 1 of ends: missing field `address`",
        ),
        (
            "UPDATE ends SET what = (SELECT what FROM ends WHERE id = 1)",
            "row 2 of ends: it is there twice",
        ),
        (
            "DELETE FROM ends WHERE id = 2",
            "row 1 of observations: one of its ends is missing",
        ),
        (
            "DELETE FROM counts WHERE id = 7",
            "row 7 of observations: its counts are missing",
        ),
        ("DROP TABLE losses", "cannot read: "),
    ] {
        let directory = altered(sql).await;
        let loaded = async {
            let mut store = Store::open(directory.path()).await?;
            store.load().await
        };
        let refusals = [loaded.await, read(directory.path()).await];
        for loaded in refusals {
            let error = loaded.expect_err(sql).to_string();
            assert!(error.contains(refusal), "{error}\nnot: {refusal}");
            let file = directory.path().join("ledger.db").display().to_string();
            assert!(error.contains(&file), "{error}");
        }
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(
        directory.path().join("ledger.db"),
        "not a database ".repeat(1000),
    )
    .unwrap();
    let error = Store::open(directory.path()).await.unwrap_err();
    assert!(error.to_string().contains("not a database"), "{error}");
}

#[tokio::test]
async fn there_may_be_nothing_to_read() {
    let directory = tempfile::tempdir().unwrap();
    let missing = Store::open_read_only(directory.path()).await;
    assert!(matches!(missing, Err(StoreError::Missing { .. })));
    let missing = Store::open_read_only(&directory.path().join("nowhere")).await;
    assert!(matches!(missing, Err(StoreError::Missing { .. })));
}

#[tokio::test]
async fn what_is_forgotten_is_gone_from_the_disk_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut state = State::default();
    for number in 1..=3_000 {
        let mut record = record(number, 1);
        record.last_seen = Timestamp::from_nanos(2_000_000_000_000 + u64::from(number) * 1_000);
        state.ledger.observe(record);
    }
    let weight = state.ledger.bytes();
    let mut store = Store::open(directory.path()).await.unwrap();
    commit(&mut store, &state, &[]).await;
    let before = store.bytes().await.unwrap();
    let forgotten = state
        .ledger
        .forget_before(Timestamp::from_nanos(2_000_002_901_000));
    assert_eq!((forgotten, state.ledger.len()), (2_900, 100));
    assert!(
        state.ledger.bytes() < weight / 20,
        "{}",
        state.ledger.bytes()
    );
    let changes = changes_of(state.ledger.rows());
    store.commit(&changes).await.unwrap();
    store.compact().await.unwrap();
    let after = store.bytes().await.unwrap();
    assert!(after < before / 5, "{before} bytes before, {after} after");
    assert_eq!(store.load().await.unwrap(), state);
}

#[tokio::test]
async fn it_grows_with_edges_and_not_with_connections() {
    let directory = tempfile::tempdir().unwrap();
    let mut state = state();
    let mut store = Store::open(directory.path()).await.unwrap();
    commit(&mut store, &state, &[]).await;
    let (disk, memory) = (store.bytes().await.unwrap(), state.ledger.bytes());
    for _ in 0..50 {
        for number in 1..=300 {
            state.ledger.observe(record(number, 1_000));
        }
        commit(&mut store, &state, &[]).await;
    }
    assert_eq!(state.ledger.bytes(), memory);
    // Counts have more digits now.
    let grown = store.bytes().await.unwrap();
    assert!(
        grown <= disk + disk / 10,
        "{disk} bytes before, {grown} after"
    );
}

#[tokio::test]
async fn damage_is_found_when_it_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).await.unwrap();
    commit(&mut store, &state(), &[]).await;
    store.close().await.unwrap();
    let file = directory.path().join("ledger.db");
    let whole = std::fs::read(&file).unwrap();
    let mut refused = 0;
    for page in 1..whole.len() / 4_096 {
        let mut damaged = whole.clone();
        damaged[page * 4_096..][..512].fill(0x5a);
        std::fs::write(&file, &damaged).unwrap();
        let loaded = async {
            let mut store = Store::open(directory.path()).await?;
            store.load().await
        };
        // A page that nothing uses may be anything.
        match loaded.await {
            Ok(loaded) => assert_eq!(loaded, state(), "page {page}"),
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("ledger.db"), "{error}");
                refused += 1;
            }
        }
    }
    assert!(refused > 10, "{refused}");
}

/// A file as it was when a migration was killed between any two of its writes is as before it or as after it.
#[tokio::test]
async fn a_migration_is_done_or_not_begun() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ledger.db");
    let options = SqliteConnectOptions::new()
        .filename(&file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal);
    let mut killed = options.connect().await.unwrap();
    // What `migrate` does, up to the moment before it is committed.
    sqlx::raw_sql("BEGIN; CREATE TABLE meta (schema_version INTEGER NOT NULL); CREATE TABLE observations (key TEXT)")
        .execute(&mut killed)
        .await
        .unwrap();
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let mut store = Store::open(copy.path()).await.unwrap();
    commit(&mut store, &state(), &[]).await;
    assert_eq!(store.load().await.unwrap(), state());
}

/// A new ledger as the first version made it.
async fn first_version(directory: &Path) -> SqliteConnection {
    let mut old = SqliteConnectOptions::new()
        .filename(directory.join("ledger.db"))
        .create_if_missing(true)
        .connect()
        .await
        .unwrap();
    sqlx::raw_sql(schema::FIRST)
        .execute(&mut old)
        .await
        .unwrap();
    old
}

#[tokio::test]
async fn a_ledger_of_the_first_version_is_brought_up_to_date() {
    let directory = tempfile::tempdir().unwrap();
    let state = state();
    let mut old = first_version(directory.path()).await;
    for (number, record) in state.ledger.records().enumerate() {
        sqlx::query("INSERT INTO observations VALUES (?, ?, 1, 1, 1)")
            .bind(format!("key {number}"))
            .bind(serde_json::to_string(&record).unwrap())
            .execute(&mut old)
            .await
            .unwrap();
    }
    sqlx::raw_sql("UPDATE meta SET schema_version = 1")
        .execute(&mut old)
        .await
        .unwrap();
    old.close().await.unwrap();

    let unread = read(directory.path()).await.unwrap_err();
    assert!(
        matches!(unread, StoreError::OlderSchema { found: 1, .. }),
        "{unread}"
    );
    let mut store = Store::open(directory.path()).await.unwrap();
    assert_eq!(store.load().await.unwrap().ledger, state.ledger);
    commit(&mut store, &state, &[]).await;
    assert_eq!(store.load().await.unwrap(), state);
}

#[tokio::test]
async fn what_a_ledger_of_the_first_version_cannot_have_stops_its_migration() {
    let directory = tempfile::tempdir().unwrap();
    let mut old = first_version(directory.path()).await;
    let row =
        "INSERT INTO observations VALUES ('x', '{}', 1, 1, 1); UPDATE meta SET schema_version = 1";
    sqlx::raw_sql(row).execute(&mut old).await.unwrap();
    old.close().await.unwrap();
    for _ in 0..2 {
        let error = Store::open(directory.path()).await.unwrap_err().to_string();
        let problem = "row 1 of observations: missing field `timestamp`";
        assert!(error.contains(problem), "{error}");
    }
}
