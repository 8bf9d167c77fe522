use serde_json::json;

use super::*;

fn hello() -> Hello {
    Hello {
        instance: "one".to_owned(),
        node: "node-1".to_owned(),
        version: "1".to_owned(),
        resolve: flow::wire::Resolve::Both,
    }
}

/// A batch with ten connections to a port, and one lost.
fn batch(sequence: u64, port: u16) -> Batch {
    serde_json::from_value(json!({
        "sequence": sequence,
        "window": {"from": 1000.0, "to": 1001.0},
        "losses": {"ring_full": 1, "map_full": 0},
        "flows": [{
            "timestamp": 1000.5, "hostname": "node-1", "count": 10,
            "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
            "src": {"pod": {}, "service": {}}, "dst": {"pod": {}, "service": {}},
        }],
    }))
    .unwrap()
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
        let verdict = round.apply(&mut state, &hello(), batch(sequence, port), now);
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
        first.apply(&mut state, &hello(), batch(1, 80), now),
        Verdict::Applied
    );
    assert_eq!(
        first.apply(&mut state, &hello(), batch(2, 81), now),
        Verdict::Applied
    );
    let mut second = Round::new(Bounds::default());
    assert_eq!(
        second.apply(&mut state, &hello(), batch(3, 80), now),
        Verdict::Applied
    );

    let changes = second.changes(&state);
    let observations: Vec<_> = changes
        .observations
        .iter()
        .map(|(key, record)| (key.port, record.count))
        .collect();
    assert_eq!(observations, [(80, 20)]);
    assert_eq!(changes.agents[0].1.last_sequence, 3);
    let losses: Vec<_> = changes
        .losses
        .iter()
        .map(|(node, reason, loss)| (*node, *reason, loss.count))
        .collect();
    assert_eq!(losses, [("node-1", "ring_full", 3)]);
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
        let verdict = round.apply(&mut state, &hello(), batch(sequence, port), now);
        assert_eq!(verdict, Verdict::Applied);
    }
    assert_eq!(counts(&state), [(80, 20)]);
    assert_eq!(
        round.losses().collect::<Vec<_>>(),
        [("node-1", "ledger_full", 20), ("node-1", "ring_full", 4)]
    );
}

#[test]
fn an_agent_that_outlived_another_ledger_is_taken_in_and_its_past_is_missed() {
    let mut state = State::default();
    let mut round = Round::new(Bounds::default());
    let now = Timestamp::from_nanos(1);
    for sequence in [57, 58] {
        let verdict = round.apply(&mut state, &hello(), batch(sequence, 80), now);
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
