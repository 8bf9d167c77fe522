use std::iter;

use flow::wire::{End, Hello, Window};
use serde_json::json;

use super::*;
use crate::ingest;

const DAY: u64 = 24 * 60 * 60 * 1_000_000_000;

async fn keeper(retain: Option<Duration>) -> Keeper {
    let limits = Limits {
        retain,
        ..Limits::default()
    };
    let store = Store::in_memory().await.unwrap();
    let keeper = Keeper::load(store, None, limits, Meter::default()).await;
    keeper.unwrap()
}

fn hello(instance: &str) -> Hello {
    Hello {
        instance: instance.to_owned(),
        node: "node-1".to_owned(),
        version: "1".to_owned(),
        resolve: Resolve::Both,
        capabilities: Vec::new(),
        clock: None,
    }
}

/// A batch with two flows, seen a day after the epoch.
fn batch(sequence: u64) -> Packed<KnownEnd> {
    let seen = DAY / 1_000_000_000;
    let batch = json!({
        "sequence": sequence,
        "window": {"from": seen, "to": seen},
        "hostname": "node-1",
        "ends": [{"address": "10.0.1.2"}, {"address": "10.0.2.3"}],
        "flows": [
            {"src": 0, "dst": 1, "port": 80, "count": 1, "last_seen": seen},
            {"src": 0, "dst": 1, "port": 81, "count": 1, "last_seen": seen},
        ],
    });
    known(serde_json::from_value(batch).unwrap())
}

fn known(batch: Packed<End>) -> Packed<KnownEnd> {
    let mut serial = 0;
    let known = batch.try_map(|end| {
        serial += 1;
        Ok::<_, ()>(KnownEnd {
            serial,
            end: Arc::new(end),
        })
    });
    known.unwrap()
}

/// An observation of a port, made so many days after the epoch.
fn observation(port: u16, day: u64) -> FlowRecord {
    let seen = Timestamp::from_nanos(day * DAY);
    let record: FlowRecord = serde_json::from_value(json!({
        "timestamp": 1000.5, "hostname": "node-1",
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
        "src": {"pod": {}, "service": {}},
        "dst": {"pod": {}, "service": {}},
    }))
    .unwrap();
    FlowRecord {
        first_seen: seen,
        last_seen: seen,
        timestamp: seen,
        ..record
    }
}

fn ports(keeper: &Keeper) -> Vec<u16> {
    let records = keeper.state.ledger.records();
    records.map(|record| record.tuple.dst_port).collect()
}

/// The clock of the machine that this runs on is ahead of them by decades.
#[tokio::test]
async fn what_is_old_is_what_agents_have_told_of_long_before_the_newest() {
    let mut keeper = keeper(Some(Duration::from_secs(30 * 24 * 60 * 60))).await;
    for (port, day) in [(1, 5), (2, 15), (3, 40)] {
        keeper.state.ledger.observe(observation(port, day));
        let seen = Timestamp::from_nanos(day * DAY);
        let instance = port.to_string();
        keeper.state.agents.advance(&hello(&instance), 1, seen);
    }
    // Agents may not have reached a generator that has just started.
    keeper.settle(iter::empty()).await.unwrap();
    assert_eq!(ports(&keeper), [1, 2, 3]);

    for _ in 0..2 {
        keeper.sweep_at = Instant::now();
        keeper.settle(iter::empty()).await.unwrap();
        assert_eq!(ports(&keeper), [2, 3]);
        let instances: Vec<&str> = keeper.state.agents.iter().map(|(name, _)| name).collect();
        assert_eq!(instances, ["2", "3"]);
        assert!(keeper.sweep_at > Instant::now());
    }

    // What is told of may be that nothing was seen.
    keeper.state.losses.add(
        "node-1",
        "ring_full",
        1,
        Window {
            from: Timestamp::from_nanos(DAY),
            to: Timestamp::from_nanos(60 * DAY),
        },
    );
    keeper.sweep_at = Instant::now();
    keeper.settle(iter::empty()).await.unwrap();
    assert_eq!(ports(&keeper), [3]);
}

/// Policies are held back while losses are known, so whoever waits for changes must hear that they are forgotten.
#[tokio::test]
async fn losses_that_are_forgotten_are_a_change() {
    let mut keeper = keeper(Some(Duration::from_secs(30 * 24 * 60 * 60))).await;
    keeper.state.ledger.observe(observation(1, 40));
    let lost = Window {
        from: Timestamp::from_nanos(DAY),
        to: Timestamp::from_nanos(DAY),
    };
    keeper.state.losses.add("node-1", "ring_full", 1, lost);
    keeper.settle(iter::empty()).await.unwrap();
    let before = *keeper.revision().borrow();
    keeper.sweep_at = Instant::now();
    keeper.settle(iter::empty()).await.unwrap();
    assert_eq!(keeper.state.losses.iter().count(), 0);
    assert_eq!(ports(&keeper), [1]);
    assert_eq!(*keeper.revision().borrow(), before + 1);
}

/// Repeated and refused batches share a transaction with one that is stored.
#[tokio::test]
async fn what_is_counted_as_stored_was_stored() {
    let mut keeper = keeper(None).await;
    let (queue, _receiver) = ingest::queue();
    let (session, feedback) = Session::new(hello("one"), false, Timestamp::default());
    let mut group = Vec::new();
    for sequence in [1, 1, 2, 7] {
        group.push(Request {
            session: Arc::clone(&session),
            ask: Ask::Store(Box::new(batch(sequence))),
            room: Some(queue.reserve(1).await.unwrap()),
        });
    }
    keeper.settle(group.into_iter()).await.unwrap();
    assert_eq!(feedback.borrow().stored, Some(2));
    assert!(session.is_refused());
    let meter = &keeper.meter;
    let counted = [&meter.batches, &meter.flows, &meter.repeated].map(|counter| counter.get());
    assert_eq!(counted, [2, 4, 1]);
}

/// Joins as an agent of this node; gives the session if it is let in, else why it is not.
fn join(
    keeper: &mut Keeper,
    instance: &str,
    node: &str,
    is_node_proven: bool,
) -> Result<Arc<Session>, String> {
    let hello = Hello {
        node: node.to_owned(),
        ..hello(instance)
    };
    let (session, feedback) = Session::new(hello, is_node_proven, Timestamp::default());
    if keeper.join(&session) {
        return Ok(session);
    }
    let refusal = feedback.borrow().refusal.clone();
    Err(refusal.unwrap().reason)
}

#[tokio::test]
async fn an_agent_does_not_take_over_the_instance_of_another_node() {
    let mut keeper = keeper(None).await;
    let owner = join(&mut keeper, "one", "node-1", true).unwrap();
    let refused = Err("instance one is of node node-1".to_owned());
    let result = join(&mut keeper, "one", "node-2", true).map(drop);
    assert_eq!(result, refused);
    assert!(!owner.is_refused());
    // Nor when it is away.
    let hello = owner.hello.clone();
    keeper.state.agents.advance(&hello, 7, Timestamp::default());
    drop(owner);
    let result = join(&mut keeper, "one", "node-2", true).map(drop);
    assert_eq!(result, refused);
    // It may come back, and others have their own.
    let back = join(&mut keeper, "one", "node-1", true).unwrap();
    let again = join(&mut keeper, "one", "node-1", true).unwrap();
    assert!(back.is_refused() && !again.is_refused());
    drop(join(&mut keeper, "two", "node-2", true).unwrap());
    // Where no token says it, a node may have been given another name.
    drop(join(&mut keeper, "two", "node-1", false).unwrap());
}

#[tokio::test]
async fn a_batch_is_vetted_before_it_counts() {
    let flows = r#"{"sequence": 1, "window": {"from": 1, "to": 9000}, "hostname": "node-2",
        "ends": [{"address": "10.0.0.1", "pod": {"id": "a", "namespace": "shop", "name": "a", "node": "node-1"}},
                 {"address": "10.0.0.2", "pod": {"id": "b", "namespace": "shop", "name": "b", "node": "node-2"}}],
        "flows": [{"src": 0, "dst": 1, "direction": "egress", "port": 80, "count": 2, "last_seen": 9000},
                  {"src": 0, "dst": 1, "direction": "ingress", "port": 80, "count": 3, "last_seen": 9000}]}"#;
    for (is_node_proven, taken, lost, hostname) in [(true, 1, 3, "node-1"), (false, 2, 0, "node-2")]
    {
        let mut keeper = keeper(None).await;
        let session = join(&mut keeper, "one", "node-1", is_node_proven).unwrap();
        let mut batch = known(serde_json::from_str(flows).unwrap());
        let mut round = Round::new(Bounds::default());
        let now = Timestamp::from_nanos(1_000_000_000_000);
        let verdict = keeper.apply(&mut round, &session, &mut batch, now);
        assert_eq!(verdict, Verdict::Applied);
        let records: Vec<FlowRecord> = keeper.state.ledger.records().collect();
        assert_eq!((records.len(), keeper.state.losses.total()), (taken, lost));
        for record in records {
            assert_eq!(record.hostname, hostname);
            assert_eq!(record.last_seen, Timestamp::from_nanos(1_060_000_000_000));
        }
    }
}
