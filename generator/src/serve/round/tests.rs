use std::sync::Arc;

use flow::wire::End;
use serde_json::json;

use super::*;

fn hello() -> Hello {
    Hello {
        instance: "one".to_owned(),
        node: "node-1".to_owned(),
        version: "1".to_owned(),
        resolve: flow::wire::Resolve::Both,
        capabilities: Vec::new(),
        clock: None,
    }
}

/// A batch with ten connections to a port, and one lost.
fn batch(sequence: u64, port: u16) -> Packed<KnownEnd> {
    let batch: Packed<End> = serde_json::from_value(json!({
        "sequence": sequence,
        "window": {"from": 1000.0, "to": 1001.0},
        "losses": {"ring_full": 1, "map_full": 0},
        "hostname": "node-1",
        "ends": [{"address": "10.0.1.2"}, {"address": "10.0.2.3"}],
        "flows": [{"src": 0, "dst": 1, "port": port, "count": 10, "last_seen": 1000.5}],
    }))
    .unwrap();
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

fn counts(state: &State) -> Vec<(u16, u64)> {
    state
        .ledger
        .records()
        .map(|record| (record.tuple.dst_port, record.count))
        .collect()
}

#[test]
fn each_batch_counts_once_and_in_its_turn() {
    let mut state = State::default();
    let mut round = Round::new(Bounds::default());
    let now = Timestamp::from_nanos(1);
    for (sequence, port, expected) in [
        (1, 80, Ok(Verdict::Applied)),
        (1, 81, Ok(Verdict::Known)),
        (2, 80, Ok(Verdict::Applied)),
        (1, 80, Ok(Verdict::Known)),
        (
            4,
            80,
            Err("batch 4 leaves a gap: batch 3 is the next of this instance"),
        ),
    ] {
        let verdict = round.apply(&mut state, &hello(), &batch(sequence, port), None, now);
        let expected = expected.unwrap_or_else(|reason: &str| Verdict::Refused(reason.to_owned()));
        assert_eq!(verdict, expected, "batch {sequence}");
    }
    assert_eq!(counts(&state), [(80, 20)]);
    assert_eq!(state.agents.last_sequence("one"), 2);
    assert_eq!(
        round.losses().collect::<Vec<_>>(),
        [("node-1", "ring_full", 2)]
    );
}

#[test]
fn changes_are_the_new_whole_of_what_the_round_touched() {
    let mut state = State::default();
    let now = Timestamp::from_nanos(1);
    let mut first = Round::new(Bounds::default());
    assert_eq!(
        first.apply(&mut state, &hello(), &batch(1, 80), None, now),
        Verdict::Applied
    );
    assert_eq!(
        first.apply(&mut state, &hello(), &batch(2, 81), None, now),
        Verdict::Applied
    );
    assert_eq!(first.changes(&state).ledger.names().count(), 2);
    state.ledger.stored();
    let mut second = Round::new(Bounds::default());
    assert_eq!(
        second.apply(&mut state, &hello(), &batch(3, 80), None, now),
        Verdict::Applied
    );

    let changes = second.changes(&state);
    let counts: Vec<u64> = changes.ledger.counts().map(|row| row.count).collect();
    assert_eq!(counts, [20]);
    assert_eq!(changes.ledger.names().count(), 0);
    assert_eq!(changes.agents[0].1.last_sequence, 3);
    let losses: Vec<_> = changes
        .losses
        .iter()
        .map(|(node, reason, loss)| (*node, *reason, loss.count))
        .collect();
    assert_eq!(losses, [("node-1", "ring_full", 3)]);
    state.ledger.stored();
    assert!(Round::new(Bounds::default()).changes(&state).is_empty());
}

#[test]
fn a_full_ledger_counts_what_it_does_not_take() {
    let mut state = State::default();
    let mut round = Round::new(Bounds {
        observations: 1,
        ..Bounds::default()
    });
    let now = Timestamp::from_nanos(1);
    for (sequence, port) in [(1, 80), (2, 81), (3, 80), (4, 82)] {
        let verdict = round.apply(&mut state, &hello(), &batch(sequence, port), None, now);
        assert_eq!(verdict, Verdict::Applied);
    }
    assert_eq!(counts(&state), [(80, 20)]);
    assert_eq!(
        round.losses().collect::<Vec<_>>(),
        [("node-1", "ledger_full", 20), ("node-1", "ring_full", 4)]
    );
}

/// The labels of a pod change again and again: the older ones are of no use, and take no room.
#[test]
fn ends_that_nobody_uses_do_not_fill_the_ledger() {
    const BYTES: usize = 400_000;
    let name = |_: &mut FlowRecord| {};
    for naming in [None, Some(&name as Naming<'_>)] {
        let mut state = State::default();
        let mut round = Round::new(Bounds {
            bytes: BYTES,
            ..Bounds::default()
        });
        let now = Timestamp::from_nanos(1);
        // All of these have a serial of their own.
        let relabelled = |sequence: u64, port: u16| {
            let mut batch = batch(sequence, port);
            let label = format!("{sequence}{}", "x".repeat(10_000));
            let end: End = serde_json::from_value(json!({
                "address": "10.0.2.3",
                "pod": {"id": "db", "namespace": "shop", "name": "db", "labels": {"tier": label}},
            }))
            .unwrap();
            for (place, known) in (0..).zip(&mut batch.ends) {
                known.serial = 2 * sequence + place;
            }
            batch.ends[1].end = Arc::new(end);
            batch.flows[0].last_seen = Timestamp::from_nanos((1_000 + sequence) * 1_000_000_000);
            batch
        };
        // Together they have a megabyte and more.
        for sequence in 1..=100 {
            round.apply(&mut state, &hello(), &relabelled(sequence, 80), naming, now);
        }
        assert_eq!(state.ledger.len(), 1);
        round.apply(&mut state, &hello(), &relabelled(101, 81), naming, now);
        assert_eq!(counts(&state), [(80, 1_000), (81, 10)]);
        let lost: Vec<_> = round.losses().map(|(_, reason, _)| reason).collect();
        assert_eq!(lost, ["ring_full"]);
        assert!(state.ledger.bytes() < BYTES, "{}", state.ledger.bytes());
    }
}

#[test]
fn an_end_is_written_with_the_first_observation_that_has_it() {
    let mut state = State::default();
    let mut round = Round::new(Bounds {
        observations: 1,
        ..Bounds::default()
    });
    let now = Timestamp::from_nanos(1);
    let new_ends = |state: &State| state.ledger.rows().ends().count();
    // None of its flows was its agent's to tell.
    let mut nothing = batch(1, 80);
    nothing.flows.clear();
    round.apply(&mut state, &hello(), &nothing, None, now);
    assert_eq!(new_ends(&state), 0);
    assert!(state.ledger.rows().is_empty());

    round.apply(&mut state, &hello(), &batch(2, 80), None, now);
    assert_eq!(new_ends(&state), 2);
    state.ledger.stored();
    round.apply(&mut state, &hello(), &batch(3, 80), None, now);
    assert_eq!(new_ends(&state), 0);

    // There is no room for what is between others.
    let mut refused = batch(4, 81);
    for (place, known) in (0..).zip(&mut refused.ends) {
        known.serial = 10 + place;
        let end: End =
            serde_json::from_value(json!({"address": format!("10.0.9.{place}")})).unwrap();
        known.end = Arc::new(end);
    }
    round.apply(&mut state, &hello(), &refused, None, now);
    assert_eq!(counts(&state), [(80, 20)]);
    assert_eq!(new_ends(&state), 0);
    // What was never written need not be deleted.
    state.ledger.forget_before(Timestamp::from_nanos(u64::MAX));
    assert_eq!(state.ledger.rows().forgotten_ends().len(), 2);
}

/// It says who has seen what was counted before: where nothing was, there is nothing to say, and nothing is lost.
#[test]
fn a_count_of_0_makes_no_observation() {
    let name = |_: &mut FlowRecord| {};
    for naming in [None, Some(&name as Naming<'_>)] {
        let mut state = State::default();
        let mut round = Round::new(Bounds::default());
        let now = Timestamp::from_nanos(1);
        let mut nothing = batch(1, 80);
        nothing.flows[0].count = 0;
        let verdict = round.apply(&mut state, &hello(), &nothing, naming, now);
        assert_eq!(verdict, Verdict::Applied);
        assert_eq!(counts(&state), []);

        round.apply(&mut state, &hello(), &batch(2, 80), naming, now);
        let mut more = batch(3, 80);
        more.flows[0].count = 0;
        more.sources = [flow::record::Source::Scope].into();
        round.apply(&mut state, &hello(), &more, naming, now);
        assert_eq!(counts(&state), [(80, 10)]);
        let sources = state.ledger.records().map(|record| record.sources);
        assert_eq!(
            sources.collect::<Vec<_>>(),
            [[flow::record::Source::Scope].into()]
        );
        let lost: Vec<_> = round.losses().map(|(_, reason, _)| reason).collect();
        assert_eq!(lost, ["ring_full"]);
    }
}

#[test]
fn an_agent_that_outlived_another_ledger_is_taken_in_and_its_past_is_missed() {
    let mut state = State::default();
    let mut round = Round::new(Bounds::default());
    let now = Timestamp::from_nanos(1);
    for sequence in [57, 58] {
        let verdict = round.apply(&mut state, &hello(), &batch(sequence, 80), None, now);
        assert_eq!(verdict, Verdict::Applied);
    }
    assert_eq!(counts(&state), [(80, 20)]);
    assert_eq!(
        round.losses().collect::<Vec<_>>(),
        [
            ("node-1", "batches_before_this_ledger", 1),
            ("node-1", "ring_full", 2)
        ]
    );
}
