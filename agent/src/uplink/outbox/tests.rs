use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Pod},
    record::{Direction, Outcome, Protocol, Source, Tuple},
    time::Timestamp,
    wire::{Batch, MAX_BATCH_FLOWS, Window},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

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
    outbox.acknowledge(2);
    let left = |after| {
        outbox
            .unacknowledged_after(after)
            .map(|batch| batch.sequence)
    };
    assert_eq!((left(0), left(3)), (Some(3), None));
    assert_eq!(outbox.close().lost, 3);
    outbox.acknowledge(3);
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
    memory.acknowledge(1);
    assert!(!path.exists(), "the second is not even sent");
    memory.seal().unwrap().unwrap();
    assert!(!path.exists(), "nor acknowledged");
    memory.acknowledge(2);
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
    outbox.acknowledge(1);
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
    outbox.acknowledge(1);
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
        outbox.acknowledge(sequence);
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
        outbox.acknowledge(sequence);
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
        outbox.acknowledge(batch.sequence);
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
    };
    assert_eq!(outbox.give_up_first(), None);
    assert_eq!((meter.lost(BATCH_REFUSED), outbox.close().lost), (5, 7));
}

/// The number of the next batch, and how many connections it has.
fn seal(outbox: &mut Outbox) -> Option<(u64, u64)> {
    let sealed = outbox.seal().unwrap()?;
    let flows = batch(&sealed).flows;
    Some((sealed.sequence, flows.iter().map(|flow| flow.count).sum()))
}

/// Takes the folder out of the way, so that every call on a file in it fails, and none for good.
struct Disk {
    folder: PathBuf,
    away: PathBuf,
}

impl Disk {
    fn new(parent: &Path) -> Self {
        Self {
            folder: parent.join("spool"),
            away: parent.join("away"),
        }
    }

    fn open(&self, resolve: Resolve) -> Outbox {
        let spool = Spool::open(&self.folder, MIN_SPOOL_BYTES, resolve).unwrap();
        Outbox::new(resolve, Some(spool), Meter::default())
    }

    fn fail(&self, outbox: &mut Outbox) {
        fs::rename(&self.folder, &self.away).unwrap();
        fs::write(&self.folder, "").unwrap();
        // Files that are open stay so.
        outbox.close();
    }

    fn recover(&self) {
        fs::remove_file(&self.folder).unwrap();
        fs::rename(&self.away, &self.folder).unwrap();
    }
}

/// The ledger has more than was ever sent: what bears those numbers now is not what it has. None of what is left is missing,
/// so the first number is the first.
#[test]
fn numbers_that_a_ledger_has_already_are_not_given_again() {
    let folder = tempfile::tempdir().unwrap();
    let spool = || Spool::open(folder.path(), MIN_SPOOL_BYTES, Resolve::Both).unwrap();
    for is_on_disk in [false, true] {
        let disk = is_on_disk.then(spool);
        let mut outbox = Outbox::new(Resolve::Both, disk, Meter::default());
        let (instance, _) = outbox.identity();
        for count in 1..=4 {
            outbox.add(report(count, vec![record(1, count)]));
            assert_eq!(seal(&mut outbox), Some((count, count)));
        }
        outbox.acknowledge(2);
        assert_eq!(outbox.mismatch(2), None);
        assert_eq!(outbox.mismatch(4), None);
        assert_eq!(outbox.mismatch(5), Some(Mismatch::SetBack));
        outbox.start_anew(Mismatch::SetBack);
        assert_ne!(outbox.identity().0, instance);
        assert_eq!(
            (outbox.mismatch(0), outbox.first_unacknowledged()),
            (None, 1)
        );
        if is_on_disk {
            assert_eq!(seal(&mut outbox), Some((1, 3)));
            assert_eq!(seal(&mut outbox), Some((2, 4)));
        } else {
            assert_eq!(seal(&mut outbox), Some((1, 7)));
        }
        assert_eq!(seal(&mut outbox), None);
        assert_eq!(outbox.mismatch(3), Some(Mismatch::SetBack));
    }
    // The next run knows what was acknowledged under the other name.
    let mut outbox = Outbox::new(Resolve::Both, Some(spool()), Meter::default());
    outbox.identity();
    assert_eq!(outbox.first_unacknowledged(), 1);
    assert_eq!(seal(&mut outbox), Some((1, 3)));
    assert_eq!(seal(&mut outbox), Some((2, 4)));
    // Of an earlier run's batches the disk may have fewer than were sent.
    assert_eq!(outbox.mismatch(5), None);
}

/// What the ledger lacks has no number in it: it sees by the first number that something is missing.
#[test]
fn a_ledger_that_has_forgotten_gets_the_rest_under_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let spool = || Spool::open(folder.path(), MIN_SPOOL_BYTES, Resolve::Both).unwrap();
    for is_on_disk in [false, true] {
        let disk = is_on_disk.then(spool);
        let mut outbox = Outbox::new(Resolve::Both, disk, Meter::default());
        let (instance, _) = outbox.identity();
        for count in 1..=4 {
            outbox.add(report(count, vec![record(1, count)]));
            seal(&mut outbox).unwrap();
        }
        outbox.acknowledge(3);
        assert_eq!(outbox.mismatch(0), None, "it does not know the name");
        assert_eq!(outbox.mismatch(2), Some(Mismatch::Forgotten));
        outbox.start_anew(Mismatch::Forgotten);
        assert_ne!(outbox.identity().0, instance);
        assert_eq!(outbox.mismatch(0), None);
        assert_eq!(seal(&mut outbox), Some((4, 4)));
        outbox.acknowledge(4);
        assert!(outbox.is_empty());
    }
}

#[test]
fn what_the_disk_does_not_take_is_sent_from_memory() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::new(parent.path());
    let mut outbox = disk.open(Resolve::Both);
    outbox.add(report(0, vec![record(1, 1)]));
    let (spooled, _) = outbox.identity();
    assert_eq!(seal(&mut outbox), Some((1, 1)));
    outbox.acknowledge(1);

    disk.fail(&mut outbox);
    outbox.add(report(1, vec![record(1, 2)]));
    assert_eq!(seal(&mut outbox), None);
    assert!(outbox.is_turn_of_another(&spooled));
    let (passing, _) = outbox.identity();
    for count in [2, 3] {
        outbox.add(report(1, vec![record(1, count)]));
    }
    assert_eq!(seal(&mut outbox), Some((1, 7)));
    assert_eq!(seal(&mut outbox), None);
    outbox.add(report(1, vec![record(1, 3)]));
    assert_eq!(seal(&mut outbox), Some((2, 3)));
    // It is nowhere else.
    assert_eq!(outbox.close().lost, 10);
    assert_eq!(outbox.mismatch(0), None);
    outbox.acknowledge(1);
    assert_eq!(outbox.unacknowledged_after(1).unwrap().sequence, 2);
    assert!(!outbox.is_turn_of_another(&passing));

    // From here on it is in the spool again, and waits for what is under way.
    disk.recover();
    outbox.add(report(2, vec![record(1, 4)]));
    assert_eq!(
        outbox.close(),
        Leftover {
            lost: 3,
            spooled: 1
        }
    );
    assert_eq!(seal(&mut outbox), None);
    outbox.acknowledge(2);
    assert!(outbox.is_turn_of_another(&passing));
    assert_eq!(outbox.identity().0, spooled);
    assert_eq!(seal(&mut outbox), Some((2, 4)));
    outbox.acknowledge(2);
    assert!(outbox.is_empty());
    assert!(!outbox.is_turn_of_another(&spooled));
}

/// Those that wait in the spool have no numbers, and get none as long as it cannot be written to.
#[test]
fn what_waits_in_a_spool_that_cannot_be_written_to_holds_nothing_up() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::new(parent.path());
    let mut outbox = disk.open(Resolve::Both);
    outbox.add(report(0, vec![record(1, 1)]));
    disk.fail(&mut outbox);
    outbox.add(report(1, vec![record(1, 2)]));
    let (passing, _) = outbox.identity();
    assert_eq!(seal(&mut outbox), Some((1, 2)));
    assert_eq!(seal(&mut outbox), None);

    disk.recover();
    outbox.acknowledge(1);
    assert!(outbox.is_turn_of_another(&passing));
    assert_eq!(seal(&mut outbox), Some((1, 1)));
}

/// A disk that has become read-only still has what a ledger has forgotten, under names that cannot be changed.
#[test]
fn what_cannot_be_renamed_for_a_ledger_that_has_forgotten_holds_nothing_up() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::new(parent.path());
    let mut outbox = disk.open(Resolve::Both);
    for count in 1..=3 {
        outbox.add(report(0, vec![record(1, count)]));
    }
    let (old, _) = outbox.identity();
    while seal(&mut outbox).is_some() {}
    outbox.acknowledge(2);
    disk.fail(&mut outbox);
    assert_eq!(outbox.mismatch(1), Some(Mismatch::Forgotten));
    outbox.start_anew(Mismatch::Forgotten);
    outbox.add(report(1, vec![record(1, 40)]));
    let (passing, _) = outbox.identity();
    assert_eq!(seal(&mut outbox), Some((1, 40)));
    outbox.acknowledge(1);
    assert!(!outbox.is_turn_of_another(&passing));

    disk.recover();
    assert!(outbox.is_turn_of_another(&passing));
    let (new, _) = outbox.identity();
    assert_ne!(new, old);
    assert_eq!(seal(&mut outbox), Some((3, 3)));
    outbox.acknowledge(3);
    assert!(outbox.is_empty());
}

/// What is under way was numbered within the instance whose turn it was; another's same numbers are other batches'.
#[test]
fn what_is_under_way_comes_again_under_the_same_instance() {
    let parent = tempfile::tempdir().unwrap();
    let disk = Disk::new(parent.path());
    let mut earlier = disk.open(Resolve::Local);
    earlier.add(report(0, vec![record(1, 1)]));
    drop(earlier);

    let mut outbox = disk.open(Resolve::Both);
    disk.fail(&mut outbox);
    outbox.add(report(1, vec![record(1, 2)]));
    let (instance, resolve) = outbox.identity();
    assert_eq!(resolve, Resolve::Both);
    assert_eq!(seal(&mut outbox), Some((1, 2)));

    // The connection breaks, and the disk has recovered.
    disk.recover();
    assert_eq!(outbox.identity(), (instance.clone(), Resolve::Both));
    assert_eq!(outbox.mismatch(0), None);
    assert_eq!(outbox.unacknowledged_after(0).unwrap().sequence, 1);
    assert_eq!(seal(&mut outbox), None);
    outbox.acknowledge(1);
    assert!(outbox.is_turn_of_another(&instance));
    let (next, resolve) = outbox.identity();
    assert_ne!(next, instance);
    assert_eq!(resolve, Resolve::Local);
    assert_eq!(seal(&mut outbox), Some((1, 1)));
}

/// What a generator keeps, with its rules.
#[derive(Clone, Default)]
struct Ledger {
    /// By client, of whom each has called once.
    connections: BTreeMap<IpAddr, u64>,
    last: BTreeMap<String, u64>,
    /// Whether it has forgotten something.
    was_put_back: bool,
}

impl Ledger {
    fn last(&self, instance: &str) -> u64 {
        self.last.get(instance).copied().unwrap_or(0)
    }

    /// Whether the connection goes on.
    fn store(&mut self, instance: &str, sealed: &Sealed) -> bool {
        let batch = batch(sealed);
        let last = self.last(instance);
        if batch.sequence <= last {
            return true;
        }
        if batch.sequence != last + 1 {
            // Where nothing is forgotten, there is no first number that is none, and no gap.
            assert!(self.was_put_back, "{} after {last}", batch.sequence);
            if last > 0 {
                return false;
            }
        }
        assert_eq!(batch.losses, Losses::new());
        self.last.insert(instance.to_owned(), batch.sequence);
        for flow in batch.flows {
            *self.connections.entry(flow.tuple.src_addr).or_default() += flow.count;
        }
        true
    }

    /// A connection on which so many new batches arrive at most; of those that arrive some are acknowledged.
    fn hear(
        &mut self,
        outbox: &mut Outbox,
        most: usize,
        mut is_acknowledged: impl FnMut() -> bool,
    ) {
        let (instance, _) = outbox.identity();
        if let Some(mismatch) = outbox.mismatch(self.last(&instance)) {
            assert!(self.was_put_back, "{mismatch:?}");
            assert_eq!(mismatch, Mismatch::Forgotten);
            outbox.start_anew(mismatch);
            return;
        }
        outbox.acknowledge(self.last(&instance));
        let mut sent = 0;
        while let Some(again) = outbox.unacknowledged_after(sent) {
            sent = again.sequence;
            if !self.store(&instance, &again) {
                return;
            }
        }
        for _ in 0..most {
            match outbox.seal().unwrap() {
                Some(sealed) if !self.store(&instance, &sealed) => return,
                None if outbox.in_flight.is_empty() => return,
                Some(_) | None => {}
            }
            if is_acknowledged() {
                outbox.acknowledge(self.last(&instance));
            }
            if outbox.is_turn_of_another(&instance) {
                return;
            }
        }
        // What is sent now does not arrive.
        outbox.seal().unwrap();
    }
}

fn callers(batch: Batch) -> impl Iterator<Item = IpAddr> {
    batch.flows.into_iter().map(|flow| flow.tuple.src_addr)
}

/// Agents are killed and begun with another `--resolve`, disks fail and recover, connections break, and in every other round
/// the ledger is put back to what it was: nothing counts twice, nothing is missing but what was in memory alone or is
/// forgotten, and no number is.
#[test]
fn every_connection_counts_once_whatever_becomes_of_disk_process_and_ledger() {
    let mut random = StdRng::seed_from_u64(11);
    let (mut passed, mut killed, mut put_back) = (0, 0, 0);
    for round in 0..120 {
        let parent = tempfile::tempdir().unwrap();
        let disk = Disk::new(parent.path());
        let mut outbox = disk.open(Resolve::Both);
        let (mut ledger, mut saved) = (Ledger::default(), None::<Ledger>);
        let (mut lost, mut forgotten) = (BTreeSet::new(), BTreeSet::new());
        let (mut clients, mut fails) = (0, false);
        for second in 0..random.random_range(1..250) {
            match random.random_range(0..14) {
                0..5 => {
                    clients += 1;
                    outbox.add(report(second, vec![record(clients, 1)]));
                }
                5..9 => {
                    let most = random.random_range(0..9);
                    let memory = outbox.instance.clone();
                    let before = ledger.last(&memory);
                    ledger.hear(&mut outbox, most, || random.random());
                    passed += ledger.last(&memory) - before;
                }
                9 | 10 if fails => {
                    disk.recover();
                    fails = false;
                }
                9 => {
                    disk.fail(&mut outbox);
                    fails = true;
                }
                11 if !fails => {
                    if outbox.turn.kept == Kept::Memory {
                        let known = ledger.last(&outbox.turn.instance);
                        let under_way = outbox.in_flight.iter();
                        let unheard = under_way.filter(|batch| batch.sequence > known);
                        lost.extend(unheard.flat_map(|sealed| callers(batch(sealed))));
                    }
                    while let Some(packed) = outbox.loose.pack(Health::default()).unwrap() {
                        lost.extend(callers(packed.batch));
                    }
                    killed += 1;
                    drop(outbox);
                    let local = random.random_bool(0.2);
                    outbox = disk.open(if local { Resolve::Local } else { Resolve::Both });
                }
                12 if round % 2 == 1 => saved = Some(ledger.clone()),
                13 => {
                    if let Some(saved) = &saved {
                        let known = ledger.connections.into_keys();
                        forgotten.extend(known.filter(|it| !saved.connections.contains_key(it)));
                        ledger = saved.clone();
                        ledger.was_put_back = true;
                        put_back += 1;
                    }
                }
                _ => {}
            }
        }
        if fails {
            disk.recover();
        }
        for _ in 0..1_000 {
            ledger.hear(&mut outbox, 20, || true);
        }
        assert!(outbox.is_empty(), "round {round}");
        for client in 1..=clients {
            let client = IpAddr::from(client.to_be_bytes());
            let counted = ledger.connections.get(&client).copied().unwrap_or(0);
            let expected = if lost.contains(&client) {
                0..=0
            } else {
                u64::from(!forgotten.contains(&client))..=1
            };
            assert!(
                expected.contains(&counted),
                "round {round}, {client}: {counted} times"
            );
        }
    }
    let happened = (passed, killed, put_back);
    assert!(
        passed > 100 && killed > 100 && put_back > 100,
        "{happened:?}"
    );
}
