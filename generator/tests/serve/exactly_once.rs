//! What was acknowledged is in the ledger, and nothing is in it twice.

use std::{collections::BTreeMap, time::Duration};

use flow::{
    record::FlowRecord,
    wire::{Encoding, GeneratorMessage},
};
use tokio::time::sleep;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::{
    client::{Client, batch, batch_with_losses, counts, flow},
    generator::{Generator, export, run},
};

/// Flows that differ from batch to batch, over a few edges.
fn flows(sequence: u64) -> Vec<FlowRecord> {
    (0..50)
        .map(|number| {
            let port = u16::try_from(1_000 + (sequence * 7 + number) % 20).unwrap();
            flow("web", "db", port, sequence * 100 + number)
        })
        .collect()
}

fn truth(batches: u64) -> BTreeMap<u16, u64> {
    let all: Vec<FlowRecord> = (1..=batches).flat_map(flows).collect();
    counts(&all)
}

#[tokio::test(flavor = "multi_thread")]
async fn over_kills_in_the_middle() {
    const BATCHES: u64 = 400;
    /// Sent before the first of them must be acknowledged.
    const AHEAD: u64 = 12;
    let data = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    let mut kills: u64 = 0;
    while acknowledged < BATCHES {
        let generator = Generator::on(data.path(), &[]);
        let (mut agent, stored) = Client::join(generator.address, "one").await;
        assert!(
            stored >= acknowledged,
            "batch {acknowledged} was acknowledged, {stored} is the last that survived"
        );
        acknowledged = stored;
        let mut sent = stored;
        // Killed after another number of acknowledgements each time, with batches on their way, queued and in a commit.
        let until = (stored + 20 + kills * 3).min(BATCHES);
        while acknowledged < until {
            while sent < BATCHES && sent < acknowledged + AHEAD {
                sent += 1;
                agent.say(&batch(sent, flows(sent))).await;
            }
            match agent.hear().await.unwrap() {
                GeneratorMessage::Ack { sequence } => {
                    assert!(sequence > acknowledged && sequence <= sent);
                    acknowledged = sequence;
                }
                other => panic!("{other:?}"),
            }
        }
        if acknowledged < BATCHES {
            sleep(Duration::from_micros(kills * 700)).await;
        }
        generator.kill();
        kills += 1;
    }
    assert!(kills > 5, "{kills} kills");
    assert_eq!(counts(&export(data.path())), truth(BATCHES));
}

#[tokio::test(flavor = "multi_thread")]
async fn over_reconnects_and_repetitions() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    let (mut agent, stored) = Client::join(generator.address, "one").await;
    assert_eq!(stored, 0);
    agent.deliver(1, flows(1)).await;
    agent.deliver(2, flows(2)).await;
    // The acknowledgement of 3 is not waited for.
    agent.say(&batch(3, flows(3))).await;
    drop(agent);

    let (mut agent, stored) = Client::join_in(generator.address, "one", Encoding::Json).await;
    assert!(stored == 2 || stored == 3, "{stored}");
    // 3 may be on its way still, over the older connection.
    let mut last = stored;
    for sequence in [1, 3, 2, 3, 1] {
        agent.say(&batch(sequence, flows(sequence))).await;
        // What is known is acknowledged by what is known up to.
        last = last.max(sequence);
        match agent.hear().await.unwrap() {
            GeneratorMessage::Ack { sequence } if sequence == last => {}
            GeneratorMessage::Ack { sequence: 3 } if last == 2 => last = 3,
            other => panic!("{other:?} after {last}"),
        }
    }
    assert_eq!(last, 3);
    agent.say(&batch(4, flows(4))).await;
    while agent.hear().await.unwrap() != (GeneratorMessage::Ack { sequence: 4 }) {}

    // Another instance counts for itself.
    let (mut other, stored) = Client::join(generator.address, "other").await;
    assert_eq!(stored, 0);
    other.deliver(1, flows(5)).await;
    assert_eq!(counts(&export(data.path())), truth(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, flows(1)).await;
    agent.say(&batch(3, flows(3))).await;
    agent.say(&batch(2, flows(2))).await;
    let end = agent.end().await;
    let reason = "batch 3 leaves a gap: batch 2 is the next of this instance";
    assert_eq!(end.refusal.as_deref(), Some(reason));
    assert_eq!(end.close_reason, reason);
    assert_eq!(end.code, Some(CloseCode::Protocol));

    // What came after the gap on that connection was not taken either.
    let (mut agent, stored) = Client::join(generator.address, "one").await;
    assert_eq!(stored, 1);
    agent.deliver(2, flows(2)).await;
    assert_eq!(counts(&export(data.path())), truth(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newer_connection_of_an_instance_stays() {
    let generator = Generator::start(&[]);
    let (mut older, _) = Client::join(generator.address, "one").await;
    older.deliver(1, flows(1)).await;
    let (mut newer, stored) = Client::join(generator.address, "one").await;
    assert_eq!(stored, 1);
    let end = older.end().await;
    let reason = "the same instance has connected again";
    assert_eq!(end.refusal.as_deref(), Some(reason));
    assert_eq!(end.code, Some(CloseCode::Policy));
    newer.deliver(2, flows(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_are_kept_and_told() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    for sequence in [1, 1, 2] {
        let lossy = batch_with_losses(sequence, Vec::new(), &[("ring_full", 3), ("map_full", 0)]);
        agent.say(&lossy).await;
        agent.hear().await.unwrap();
    }
    let line = generator.wait_for_log("observations lost");
    assert!(line.contains("ERROR"), "{line}");
    for part in ["node-1", "ring_full", "count=3"] {
        assert!(line.contains(part), "{line}");
    }
    let output = run(&["export", "--data-dir", data.path().to_str().unwrap()]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        told,
        "microshield: node node-1: 6 observations lost: ring_full\n"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_store_that_fails_for_a_while() {
    use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};

    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, flows(1)).await;

    let mut database = SqliteConnectOptions::new()
        .filename(data.path().join("ledger.db"))
        .connect()
        .await
        .unwrap();
    // The agent's number is written after its flows: these must be taken back.
    let fail = "CREATE TRIGGER fail BEFORE UPDATE ON agents BEGIN SELECT RAISE(ABORT, 'disk is full'); END";
    sqlx::raw_sql(fail).execute(&mut database).await.unwrap();
    agent.say(&batch(2, flows(2))).await;
    let end = agent.end().await;
    assert_eq!(
        end.refusal.as_deref(),
        Some("the batch cannot be stored now")
    );
    assert_eq!(end.code, Some(CloseCode::Error));
    let line = generator.wait_for_log("batches not stored");
    assert!(line.contains("disk is full"), "{line}");

    sqlx::raw_sql("DROP TRIGGER fail")
        .execute(&mut database)
        .await
        .unwrap();
    let (mut agent, stored) = Client::join(generator.address, "one").await;
    assert_eq!(stored, 1);
    agent.deliver(2, flows(2)).await;
    agent.deliver(3, flows(3)).await;
    assert_eq!(counts(&export(data.path())), truth(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_goes_on_with_a_generator_that_remembers_nothing() {
    let generator = Generator::start(&[]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, flows(1)).await;
    agent.deliver(2, flows(2)).await;
    generator.kill();
    let generator = Generator::start(&[]);
    let (mut agent, stored) = Client::join(generator.address, "one").await;
    assert_eq!(stored, 0);
    agent.deliver(3, flows(3)).await;
    let line = generator.wait_for_log("observations lost");
    for part in ["batches_before_this_ledger", "count=1"] {
        assert!(line.contains(part), "{line}");
    }
}
