use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use flow::{
    endpoint::{Endpoint, Pod},
    record::{Direction, Outcome, Protocol, Source, Tuple},
    time::Timestamp,
    wire::{Batch, MAX_BATCH_FLOWS, Window},
};

use super::*;
use crate::{
    capture::Losses,
    scope::position::{Keeper, Position},
    uplink::{
        loose::{MAX_FLOWS, OUTBOX_FULL},
        spool::MIN_SPOOL_BYTES,
    },
};

fn record(client: u32, count: u64) -> FlowRecord {
    let address = IpAddr::from(client.to_be_bytes());
    let server = IpAddr::from([10, 0, 0, 1]);
    FlowRecord {
        timestamp: Timestamp::from_nanos(5),
        hostname: "node-1".to_owned(),
        tuple: Tuple {
            src_addr: address,
            src_port: 0,
            dst_addr: server,
            dst_port: 80,
        },
        src: Endpoint::External(address),
        dst: Endpoint::External(server),
        protocol: Protocol::Tcp,
        direction: Direction::Ingress,
        outcome: Outcome::Established,
        count,
        first_seen: Timestamp::from_nanos(5),
        last_seen: Timestamp::from_nanos(5),
        process: None,
        sources: BTreeSet::from([Source::Ebpf]),
        via: None,
        connection: None,
    }
}

fn report(from: u64, records: Vec<FlowRecord>) -> Report {
    Report {
        window: Window {
            from: Timestamp::from_nanos(from * 1_000),
            to: Timestamp::from_nanos((from + 10) * 1_000),
        },
        records,
        losses: Losses::new(),
        receipt: None,
    }
}

fn batch(sealed: &Sealed) -> Batch {
    match wire::decode(&sealed.message, Encoding::MessagePack).unwrap() {
        AgentMessage::Batch(batch) => batch,
        other => panic!("{other:?}"),
    }
}

#[test]
fn batches_are_numbered_and_kept_until_acknowledged() {
    let mut outbox = Outbox::new(Resolve::Both, None, Meter::default());
    for number in 1..=3 {
        outbox.add(report(number * 10, vec![record(1, number)]));
        let sealed = outbox.seal().unwrap().unwrap();
        let batch = batch(&sealed);
        assert_eq!(batch.sequence, number);
        assert_eq!(batch.flows[0].count, number);
        assert!(outbox.seal().unwrap().is_none());
    }
    outbox.acknowledge(2).unwrap();
    let left = |after| {
        outbox
            .unacknowledged_after(after)
            .map(|batch| batch.sequence)
    };
    assert_eq!((left(0), left(3)), (Some(3), None));
    assert_eq!(outbox.close().lost, 3);
    outbox.acknowledge(3).unwrap();
    assert!(outbox.is_empty());
}

/// The position of the log goes on when what was read cannot be lost any more.
#[test]
fn a_receipt_is_given_back_when_everything_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("position");
    let keeper = Keeper::new(path.clone());
    let with_receipt = |round: u64| {
        keeper.push(round, Position::new(String::new(), Vec::new(), Vec::new()));
        Report {
            receipt: Some(keeper.receipt(round)),
            ..report(round, vec![record(1, 1)])
        }
    };
    let mut memory = Outbox::new(Resolve::Both, None, Meter::default());
    memory.add(with_receipt(1));
    memory.seal().unwrap().unwrap();
    memory.add(with_receipt(2));
    memory.acknowledge(1).unwrap();
    assert!(!path.exists(), "the second is not even sent");
    memory.seal().unwrap().unwrap();
    assert!(!path.exists(), "nor acknowledged");
    memory.acknowledge(2).unwrap();
    assert!(path.exists());

    std::fs::remove_file(&path).unwrap();
    let spool = Spool::open(&folder.path().join("spool"), 1 << 20, Resolve::Both).unwrap();
    let mut disk = Outbox::new(Resolve::Both, Some(spool), Meter::default());
    disk.add(with_receipt(3));
    assert!(path.exists());
}

#[test]
fn a_record_that_counts_nothing_says_who_else_saw_it() {
    let mut outbox = Outbox::new(Resolve::Both, None, Meter::default());
    let mut late = record(1, 0);
    late.sources = BTreeSet::from([Source::Scope]);
    outbox.add(report(1, vec![record(1, 5)]));
    outbox.add(report(2, vec![late]));
    let flows = batch(&outbox.seal().unwrap().unwrap()).flows;
    assert_eq!((flows.len(), flows[0].count), (1, 5));
    assert_eq!(
        flows[0].sources,
        BTreeSet::from([Source::Ebpf, Source::Scope])
    );
}

#[test]
fn what_waits_is_added_up() {
    let mut outbox = Outbox::new(Resolve::Both, None, Meter::default());
    for _ in 0..MAX_IN_FLIGHT {
        outbox.add(report(0, vec![record(1, 1)]));
        outbox.seal().unwrap().unwrap();
    }
    for second in 0..1_000 {
        outbox.add(report(second, vec![record(1, 2), record(2, 3)]));
        assert!(outbox.seal().unwrap().is_none(), "too many under way");
    }
    outbox.acknowledge(1).unwrap();
    let batch = batch(&outbox.seal().unwrap().unwrap());
    let counts: Vec<u64> = batch.flows.iter().map(|flow| flow.count).collect();
    assert_eq!(counts, [2_000, 3_000]);
    assert_eq!(batch.window.from, Timestamp::from_nanos(0));
    assert_eq!(batch.window.to, Timestamp::from_nanos(1_009_000));
}

#[test]
fn records_whose_other_end_is_only_an_address_keep_their_own_time() {
    let mut outbox = Outbox::new(Resolve::Local, None, Meter::default());
    for _ in 0..MAX_IN_FLIGHT {
        outbox.add(report(0, vec![record(1, 1)]));
        outbox.seal().unwrap().unwrap();
    }
    for second in 1..=3 {
        let mut later = record(1, second);
        later.last_seen = Timestamp::from_nanos(second * 1_000);
        outbox.add(report(second, vec![later]));
    }
    assert_eq!(outbox.close().lost, MAX_IN_FLIGHT as u64 + 6);
    outbox.acknowledge(1).unwrap();
    let batch = batch(&outbox.seal().unwrap().unwrap());
    let seen: Vec<(u64, u64)> = batch
        .flows
        .iter()
        .map(|flow| (flow.last_seen.as_nanos() / 1_000, flow.count))
        .collect();
    assert_eq!(seen, [(1, 1), (2, 2), (3, 3)]);
}

#[test]
fn a_full_outbox_counts_what_it_turns_away() {
    let meter = Meter::default();
    let mut outbox = Outbox::new(Resolve::Both, None, meter.clone());
    let clients = u32::try_from(MAX_FLOWS).unwrap() + 5;
    outbox.add(report(
        0,
        (0..clients).map(|client| record(client, 7)).collect(),
    ));
    // What is known already is still added up.
    outbox.add(report(0, vec![record(0, 1)]));
    assert_eq!(outbox.loose.len(), MAX_FLOWS);
    let mut sent = 0;
    let mut lost = 0;
    while let Some(sealed) = outbox.seal().unwrap() {
        let batch = batch(&sealed);
        assert!(batch.flows.len() <= MAX_BATCH_FLOWS);
        sent += batch.flows.iter().map(|flow| flow.count).sum::<u64>();
        lost += batch.losses.values().sum::<u64>();
        let sequence = batch.sequence;
        outbox.acknowledge(sequence).unwrap();
    }
    assert_eq!((lost, meter.lost(OUTBOX_FULL)), (35, 35));
    assert_eq!(sent + lost, u64::from(clients) * 7 + 1);
}

#[test]
fn a_batch_that_is_too_long_is_divided_and_a_record_that_is_too_long_is_counted() {
    let meter = Meter::default();
    let mut outbox = Outbox::new(Resolve::Both, None, meter.clone());
    let long = |client, bytes| FlowRecord {
        hostname: "x".repeat(bytes),
        ..record(client, 1)
    };
    // By what a record may say none comes near to that; these are past the look that is taken at it.
    outbox.loose.widen(report(0, Vec::new()).window);
    for client in 1..=10 {
        outbox.loose.add(long(client, 1 << 20));
    }
    outbox.loose.add(long(99, wire::MAX_MESSAGE_BYTES + 1));
    outbox.loose.add(FlowRecord {
        count: 0,
        ..long(0, wire::MAX_MESSAGE_BYTES + 1)
    });
    let (mut sent, mut lost) = (0, 0);
    while let Some(sealed) = outbox.seal().unwrap() {
        let batch = batch(&sealed);
        sent += batch.flows.len();
        lost += batch.losses.get(RECORD_OUT_OF_BOUNDS).copied().unwrap_or(0);
        let sequence = batch.sequence;
        outbox.acknowledge(sequence).unwrap();
    }
    assert_eq!((sent, lost), (10, 1));
    assert_eq!(meter.lost(RECORD_OUT_OF_BOUNDS), 1);
    assert!(outbox.is_empty());
}

#[test]
fn a_record_that_is_out_of_bounds_costs_only_itself() {
    let meter = Meter::default();
    let mut outbox = Outbox::new(Resolve::Both, None, meter.clone());
    let mut odd = record(3, 4);
    odd.dst = Endpoint::Pod {
        pod: Arc::new(Pod {
            uid: "u".to_owned(),
            namespace: "n".to_owned(),
            name: "p".to_owned(),
            labels: Arc::new(
                (0..300)
                    .map(|key| (key.to_string(), String::new()))
                    .collect(),
            ),
            workload: None,
            node: None,
            host_network: false,
            addresses: Vec::new(),
            services: Arc::default(),
        }),
        service: None,
    };
    assert_eq!(
        bounds::record(&odd).unwrap_err().to_string(),
        "dst.pod.labels: 300 entries, the limit is 256"
    );
    outbox.add(report(
        0,
        vec![record(1, 1), odd.clone(), record(2, 2), odd],
    ));
    let batch = batch(&outbox.seal().unwrap().unwrap());
    let counts: Vec<u64> = batch.flows.iter().map(|flow| flow.count).collect();
    assert_eq!(counts, [1, 2]);
    let losses = Losses::from([(RECORD_OUT_OF_BOUNDS.to_owned(), 8)]);
    assert_eq!(batch.losses, losses);
    assert_eq!(meter.lost(RECORD_OUT_OF_BOUNDS), 8);
}

/// What a batch had told of is told again when the batch is dropped, but it has been lost once.
#[test]
fn a_loss_is_metered_once() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::open(folder.path(), MIN_SPOOL_BYTES, Resolve::Both).unwrap();
    let meter = Meter::default();
    let mut outbox = Outbox::new(Resolve::Both, Some(spool), meter.clone());
    let mut reports = 0;
    while meter.lost("spool_full") == 0 {
        let mut lossy = report(0, vec![record(reports, 5)]);
        lossy.losses.insert("ring_full".to_owned(), 2);
        outbox.add(lossy);
        reports += 1;
    }
    assert_eq!(meter.lost("ring_full"), u64::from(reports) * 2);
    outbox.identity();
    let mut told = Losses::new();
    while let Some(sealed) = outbox.seal().unwrap() {
        let batch = batch(&sealed);
        for (reason, count) in batch.losses {
            *told.entry(reason).or_default() += count;
        }
        outbox.acknowledge(batch.sequence).unwrap();
    }
    assert_eq!(told["ring_full"], meter.lost("ring_full"));
    assert_eq!(told["spool_full"], meter.lost("spool_full"));
}

#[test]
fn losses_travel_without_flows() {
    let mut outbox = Outbox::new(Resolve::Both, None, Meter::default());
    let mut lossy = report(0, Vec::new());
    lossy.losses.insert("flows_and_ring_full".to_owned(), 4);
    outbox.add(lossy);
    let batch = batch(&outbox.seal().unwrap().unwrap());
    assert_eq!(batch.losses["flows_and_ring_full"], 4);
    assert!(batch.flows.is_empty());
}

#[test]
fn a_batch_that_is_given_up_keeps_its_number_and_becomes_a_loss() {
    let meter = Meter::default();
    let mut outbox = Outbox::new(Resolve::Both, None, meter.clone());
    assert_eq!(outbox.give_up_first(), None);
    let mut first = report(0, vec![record(1, 5)]);
    first.losses.insert("socket_unreadable".to_owned(), 2);
    outbox.add(first);
    outbox.seal().unwrap().unwrap();
    assert_eq!(outbox.give_up_first(), Some(5));
    let instead = outbox.unacknowledged_after(0).unwrap();
    let batch = batch(&instead);
    assert_eq!((instead.sequence, batch.sequence), (1, 1));
    assert!(batch.flows.is_empty());
    assert_eq!(batch.losses["socket_unreadable"], 2);
    assert_eq!(batch.losses[BATCH_REFUSED], 5);
    assert_eq!(meter.lost("socket_unreadable"), 2);
    assert_eq!(meter.lost(BATCH_REFUSED), 5);
    assert_eq!(outbox.close().lost, 0);

    // What is no batch is not given up.
    outbox.in_flight[0] = Sealed {
        sequence: 1,
        message: Bytes::from_static(b"?"),
        connections: 7,
        is_spooled: false,
    };
    assert_eq!(outbox.give_up_first(), None);
    assert_eq!((meter.lost(BATCH_REFUSED), outbox.close().lost), (5, 7));
}

/// The ledger has more than was ever sent: what bears those numbers now is not what it has.
#[test]
fn numbers_that_a_ledger_has_already_are_not_given_again() {
    let folder = tempfile::tempdir().unwrap();
    let spool = || Spool::open(folder.path(), MIN_SPOOL_BYTES, Resolve::Both).unwrap();
    for is_on_disk in [false, true] {
        let disk = is_on_disk.then(spool);
        let mut outbox = Outbox::new(Resolve::Both, disk, Meter::default());
        outbox.add(report(0, vec![record(1, 5)]));
        let (instance, _) = outbox.identity();
        assert_eq!(outbox.seal().unwrap().unwrap().sequence, 1);
        assert_eq!(outbox.mismatch(0), None);
        assert_eq!(outbox.mismatch(1), None);
        assert_eq!(outbox.mismatch(2), Some(Mismatch::SetBack));
        outbox.start_anew().unwrap();
        assert_ne!(outbox.identity().0, instance);
        assert_eq!(outbox.mismatch(0), None);
        let again = outbox.unacknowledged_after(0).unwrap();
        assert_eq!(batch(&again).flows[0].count, 5);
    }
    // Of an earlier run's batches the disk may have fewer than were sent.
    let mut outbox = Outbox::new(Resolve::Both, Some(spool()), Meter::default());
    outbox.identity();
    assert_eq!(outbox.mismatch(2), None);
}

/// A spool whose folder is gone takes no more than one on a full disk.
#[test]
fn what_the_disk_does_not_take_is_sent_from_memory() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("spool");
    let spool = Spool::open(&folder, 1 << 20, Resolve::Both).unwrap();
    let mut outbox = Outbox::new(Resolve::Both, Some(spool), Meter::default());
    let seal = |outbox: &mut Outbox| {
        let sealed = outbox.seal().unwrap();
        sealed.map(|sealed| (sealed.sequence, batch(&sealed).flows[0].count))
    };
    outbox.add(report(0, vec![record(1, 1)]));
    let (instance, _) = outbox.identity();
    assert_eq!(seal(&mut outbox), Some((1, 1)));
    outbox.acknowledge(1).unwrap();

    std::fs::remove_dir_all(&folder).unwrap();
    outbox.close();
    for count in [2, 3] {
        outbox.add(report(1, vec![record(1, count)]));
        assert_eq!(seal(&mut outbox), Some((count, count)));
        assert_eq!(seal(&mut outbox), None);
    }
    // It is nowhere else.
    assert_eq!(outbox.close().lost, 5);
    assert_eq!(outbox.mismatch(1), None);
    assert_eq!(outbox.unacknowledged_after(1).unwrap().sequence, 2);
    outbox.acknowledge(2).unwrap();
    assert!(!outbox.is_turn_of_another(&instance));

    // From here on it is in the spool again, under the same instance and without a gap.
    std::fs::create_dir(&folder).unwrap();
    outbox.add(report(2, vec![record(1, 4)]));
    assert_eq!(
        outbox.close(),
        Leftover {
            lost: 3,
            spooled: 1
        }
    );
    assert_eq!(seal(&mut outbox), Some((4, 4)));
    outbox.acknowledge(4).unwrap();
    assert!(outbox.is_empty());
    assert!(!outbox.is_turn_of_another(&instance));
}

/// Those that wait in the spool have no numbers, and get none as long as it cannot be written to.
#[test]
fn what_waits_in_a_spool_that_cannot_be_written_to_holds_nothing_up() {
    let parent = tempfile::tempdir().unwrap();
    let (folder, away) = (parent.path().join("spool"), parent.path().join("away"));
    let spool = Spool::open(&folder, 1 << 20, Resolve::Both).unwrap();
    let mut outbox = Outbox::new(Resolve::Both, Some(spool), Meter::default());
    outbox.add(report(0, vec![record(1, 1)]));
    outbox.close();
    std::fs::rename(&folder, &away).unwrap();
    outbox.add(report(1, vec![record(1, 2)]));
    let (instance, _) = outbox.identity();
    let first = outbox.seal().unwrap().unwrap();
    assert_eq!((first.sequence, batch(&first).flows[0].count), (1, 2));
    assert!(outbox.seal().unwrap().is_none());

    std::fs::rename(&away, &folder).unwrap();
    outbox.acknowledge(1).unwrap();
    assert!(!outbox.is_turn_of_another(&instance));
    let waited = outbox.seal().unwrap().unwrap();
    assert_eq!((waited.sequence, batch(&waited).flows[0].count), (2, 1));
}

/// What is under way was numbered within the instance whose turn it was; another's same numbers are other batches'.
#[test]
fn what_is_under_way_comes_again_under_the_same_instance() {
    let parent = tempfile::tempdir().unwrap();
    let (folder, away) = (parent.path().join("spool"), parent.path().join("away"));
    let spool = |resolve| Some(Spool::open(&folder, 1 << 20, resolve).unwrap());
    let mut earlier = Outbox::new(Resolve::Local, spool(Resolve::Local), Meter::default());
    earlier.add(report(0, vec![record(1, 1)]));
    earlier.close();
    drop(earlier);

    let mut outbox = Outbox::new(Resolve::Both, spool(Resolve::Both), Meter::default());
    std::fs::rename(&folder, &away).unwrap();
    outbox.add(report(1, vec![record(1, 2)]));
    let (instance, resolve) = outbox.identity();
    assert_eq!(resolve, Resolve::Both);
    let passed_by = outbox.seal().unwrap().unwrap();
    assert_eq!(
        (passed_by.sequence, batch(&passed_by).flows[0].count),
        (1, 2)
    );

    // The connection breaks, and the disk has recovered.
    std::fs::rename(&away, &folder).unwrap();
    assert_eq!(outbox.identity(), (instance.clone(), Resolve::Both));
    assert_eq!(outbox.mismatch(0), None);
    assert_eq!(outbox.unacknowledged_after(0).unwrap().sequence, 1);
    assert!(outbox.seal().unwrap().is_none());
    outbox.acknowledge(1).unwrap();
    assert!(outbox.is_turn_of_another(&instance));
    let (next, resolve) = outbox.identity();
    assert_ne!(next, instance);
    assert_eq!(resolve, Resolve::Local);
    let waited = outbox.seal().unwrap().unwrap();
    assert_eq!((waited.sequence, batch(&waited).flows[0].count), (1, 1));
}
