use flow::{observations::ObservationKey, wire::Hello};
use serde_json::json;

use super::*;

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
        let reason = format!("reason_{number}");
        state
            .losses
            .add("node-1", &reason, u64::from(number), window);
    }
    state
}

async fn commit(store: &mut Store, state: &State, forgotten: &[String]) {
    let keys: Vec<ObservationKey> = state.ledger.records().map(ObservationKey::of).collect();
    let changes = Changes {
        observations: keys.iter().zip(state.ledger.records()).collect(),
        agents: state.agents.iter().collect(),
        losses: state.losses.iter().collect(),
        forgotten,
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
    let keys = [ObservationKey::of(&record(1, 1))];
    let observation = record(1, 1);
    let changes = Changes {
        observations: vec![(&keys[0], &observation)],
        ..Changes::default()
    };
    reader.commit(&changes).await.unwrap_err();
    store.close().await.unwrap();
    assert_eq!(read(directory.path()).await.unwrap(), state);
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
            "UPDATE meta SET schema_version = 2",
            "has schema version 2, this program knows none above 1",
        ),
        ("DROP TABLE meta", "is not a MicroShield ledger"),
        ("DELETE FROM meta", "is not a MicroShield ledger"),
        (
            "ALTER TABLE meta RENAME COLUMN schema_version TO version",
            "is not a MicroShield ledger",
        ),
        (
            "UPDATE observations SET record = '{}' WHERE count = 7",
            "observation `ingress established TCP 7 pod \"1\" external 10.0.2.3`: missing field `timestamp`",
        ),
        (
            "UPDATE observations SET key = 'x' WHERE count = 7",
            "observation `x` belongs under the key `ingress established TCP 7 ",
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
