use std::collections::BTreeMap;

use flow::{
    record::FlowRecord,
    segment::ENTRY_HEADER_BYTES,
    time::Timestamp,
    wire::{self, AgentMessage, Batch, Encoding, Window},
};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{sending::Numbered, *};
use crate::uplink::loose::encode_unnumbered;

/// Connections by server port.
type Counts = BTreeMap<u16, u64>;

fn record(port: u16, count: u64) -> FlowRecord {
    let mut record: FlowRecord = serde_json::from_str(
        r#"{"timestamp": 1.5, "hostname": "node-1", "src": {"pod": {}, "service": {}}, "dst": {"pod": {}, "service": {}},
            "tuple": {"src_addr": "10.0.0.1", "src_port": 0, "dst_addr": "10.0.0.2", "dst_port": 1}}"#,
    )
    .unwrap();
    record.tuple.dst_port = port;
    record.count = count;
    record
}

fn entry_with(flows: Vec<FlowRecord>, losses: Losses) -> Entry {
    let connections = flows.iter().map(|flow| flow.count).sum();
    let window = Window {
        from: Timestamp::from_nanos(1_000_000_000),
        to: Timestamp::from_nanos(2_000_000_000),
    };
    let batch = AgentMessage::Batch(Batch {
        sequence: 0,
        window,
        flows,
        losses,
        health: None,
    });
    Entry {
        connections,
        message: encode_unnumbered(&batch).unwrap(),
    }
}

fn entry(port: u16, count: u64) -> Entry {
    entry_with(vec![record(port, count)], Losses::new())
}

fn batch(entry: &Entry) -> Batch {
    match wire::decode(&entry.message, Encoding::MessagePack).unwrap() {
        AgentMessage::Batch(batch) => batch,
        AgentMessage::Hello(hello) => panic!("{hello:?}"),
    }
}

fn open(folder: &Path) -> Spool {
    Spool::open(folder, MIN_SPOOL_BYTES, Resolve::Both).unwrap()
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "lock")
        .collect();
    names.sort();
    names
}

/// What a generator keeps, with its rules.
#[derive(Default)]
struct Ledger {
    counts: Counts,
    losses: Losses,
    last: BTreeMap<String, u64>,
}

impl Ledger {
    fn last(&self, instance: &str) -> u64 {
        self.last.get(instance).copied().unwrap_or(0)
    }

    fn store(&mut self, instance: &str, numbered: &Numbered) {
        let last = self.last(instance);
        if numbered.sequence <= last {
            return;
        }
        assert!(
            last == 0 || numbered.sequence == last + 1,
            "{} after {last}",
            numbered.sequence
        );
        self.last.insert(instance.to_owned(), numbered.sequence);
        let batch = batch(&numbered.entry);
        for flow in batch.flows {
            *self.counts.entry(flow.tuple.dst_port).or_default() += flow.count;
        }
        for (reason, count) in batch.losses {
            *self.losses.entry(reason).or_default() += count;
        }
    }

    /// Takes everything, over as many connections as it needs.
    fn drain(&mut self, spool: &mut Spool) {
        while spool.batches() > 0 {
            let (instance, _) = spool.identity().unwrap();
            spool.acknowledge(self.last(&instance));
            while let Some(next) = spool.next().unwrap() {
                self.store(&instance, &next);
                spool.acknowledge(next.sequence);
            }
        }
    }
}

#[test]
fn every_batch_arrives_once_over_crashes_of_either_side() {
    let mut random = StdRng::seed_from_u64(7);
    for round in 0..60 {
        let folder = tempfile::tempdir().unwrap();
        let (mut ledger, mut truth) = (Ledger::default(), Counts::new());
        let mut spool = open(folder.path());
        for _ in 0..random.random_range(1..200) {
            match random.random_range(0..10) {
                0..6 => {
                    let (port, count) = (random.random_range(1..50), random.random_range(1..9));
                    spool.append(&entry(port, count)).unwrap();
                    *truth.entry(port).or_default() += count;
                }
                // A connection, on which some is sent, less of it stored, and less of that acknowledged.
                6..9 => {
                    let (instance, _) = spool.identity().unwrap();
                    let known = ledger.last(&instance);
                    assert!(known + 1 >= spool.first_unacknowledged());
                    spool.acknowledge(known);
                    let mut acknowledged = 0;
                    for _ in 0..random.random_range(0..8) {
                        let Some(next) = spool.next().unwrap() else {
                            break;
                        };
                        ledger.store(&instance, &next);
                        if random.random() {
                            acknowledged = ledger.last(&instance);
                        }
                    }
                    // The uplink has what is under way in memory; here it is read again.
                    spool.acknowledge(acknowledged);
                    spool.cursor = None;
                }
                _ => {
                    drop(spool);
                    spool = open(folder.path());
                }
            }
        }
        drop(spool);
        let mut spool = open(folder.path());
        ledger.drain(&mut spool);
        assert_eq!(ledger.counts, truth, "round {round}");
        assert_eq!(ledger.losses, Losses::new());
    }
}

/// Names for starts of a kernel, as it gives them.
const BOOTS: [&str; 2] = [
    "a3b5a1f0-6a3e-4b5e-9a44-0d2f6d3c1b11\n",
    "0f8b2c77-1d0e-4c39-8f3b-7e52a9d4c022\n",
];

fn open_since(boot: &str, folder: &Path) -> Spool {
    Spool::open_since(boot.as_bytes(), folder, MIN_SPOOL_BYTES, Resolve::Both).unwrap()
}

/// What an agent was appending when it was killed nobody was told of; what a power failure took was kept.
#[test]
fn a_torn_end_is_cut_and_what_is_before_it_stays() {
    for is_same_boot in [true, false] {
        cut_at_every_length(is_same_boot);
    }
}

fn cut_at_every_length(is_same_boot: bool) {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    for port in 1..=3 {
        spool.append(&entry(port, u64::from(port))).unwrap();
    }
    drop(spool);
    let [name] = &files(folder.path())[..] else {
        panic!("one segment is expected");
    };
    let path = folder.path().join(name);
    let whole = fs::read(&path).unwrap();
    let ends: Vec<u64> = (1..=3)
        .scan(segment::HEADER_BYTES, |end, port| {
            *end += entry(port, u64::from(port)).len();
            Some(*end)
        })
        .collect();
    assert_eq!(ends[2], whole.len() as u64);
    for length in 0..=whole.len() {
        drop(open_since(BOOTS[0], folder.path()));
        fs::write(&path, &whole[..length]).unwrap();
        let mut spool = open_since(BOOTS[usize::from(!is_same_boot)], folder.path());
        let left = ends.iter().filter(|end| **end <= length as u64).count();
        assert_eq!(spool.batches(), left as u64, "cut at {length}");
        let at_an_end =
            left > 0 && ends.contains(&(length as u64)) || length as u64 == segment::HEADER_BYTES;
        let lost = spool.take_losses().here.get(SPOOL_CUT).copied();
        // No file has the name of a segment before it has its header.
        let is_beginning = is_same_boot && length as u64 > segment::HEADER_BYTES;
        let expected = (!at_an_end && !is_beginning).then_some(1);
        assert_eq!(lost, expected, "cut at {length}");
        // What comes after it is whole.
        spool.append(&entry(9, 9)).unwrap();
        drop(spool);
        let mut ledger = Ledger::default();
        ledger.drain(&mut open(folder.path()));
        let mut truth: Counts = (1..=left as u16)
            .map(|port| (port, u64::from(port)))
            .collect();
        truth.insert(9, 9);
        assert_eq!(ledger.counts, truth, "cut at {length}");
        for name in files(folder.path()) {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
    }
}

#[test]
fn what_was_damaged_or_torn_before_the_end_counts_on_the_same_boot_too() {
    for damaged in [0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = open_since(BOOTS[0], folder.path());
        two_segments(&mut spool);
        spool.append(&entry(1, 1)).unwrap();
        let path = spool.path(&spool.segments[damaged].name);
        drop(spool);
        let mut bytes = fs::read(&path).unwrap();
        if damaged == 0 {
            bytes.pop();
        } else {
            *bytes.last_mut().unwrap() ^= 1;
        }
        fs::write(&path, bytes).unwrap();
        let lost = open_since(BOOTS[0], folder.path()).take_losses().here;
        assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), 1)]));
    }
}

#[test]
fn a_lock_that_says_nothing_or_something_else_is_of_another_boot() {
    let folder = tempfile::tempdir().unwrap();
    let lock = folder.path().join("lock");
    let longer = format!("{}x", BOOTS[0]);
    for said in ["", "a3b5", BOOTS[1], &longer] {
        let mut spool = open_since(BOOTS[0], folder.path());
        spool.append(&entry(1, 1)).unwrap();
        let path = spool.path(&spool.segments[0].name);
        drop(spool);
        fs::write(&path, &fs::read(&path).unwrap()[..30]).unwrap();
        fs::write(&lock, said).unwrap();
        let lost = open_since(BOOTS[0], folder.path()).take_losses().here;
        assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), 1)]), "{said:?}");
        assert_eq!(fs::read_to_string(&lock).unwrap(), BOOTS[0]);
    }
}

#[test]
fn a_segment_that_cannot_be_begun_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    // A folder with something in it is in the way of the name.
    let name = format!("{:016x}-{:016x}.waiting", spool.next_id, spool.next_id);
    fs::create_dir_all(folder.path().join(&name).join("x")).unwrap();
    spool.append(&entry(1, 1)).unwrap_err();
    assert_eq!(
        (files(folder.path()), spool.batches()),
        (vec![name.clone()], 0)
    );
    fs::remove_dir_all(folder.path().join(name)).unwrap();
    spool.append(&entry(1, 1)).unwrap();
    assert_eq!(spool.batches(), 1);
}

/// What was delivered takes no room that the next batch lacks.
#[test]
fn a_full_disk_gets_back_what_is_delivered() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    spool.append(&entry(1, 1)).unwrap();
    spool.identity().unwrap();
    assert_eq!(spool.next().unwrap().unwrap().sequence, 1);
    spool.acknowledge(1);
    assert_eq!(files(folder.path()).len(), 1);
    spool.tail = Some(File::options().write(true).open("/dev/full").unwrap());
    spool.append(&entry(2, 2)).unwrap_err();
    assert_eq!(files(folder.path()).len(), 0);
    spool.append(&entry(3, 3)).unwrap();
    spool.identity().unwrap();
    assert_eq!(spool.next().unwrap().unwrap().sequence, 2);
}

#[test]
fn no_bytes_are_taken_for_a_batch_that_was_not_written() {
    let entries: Vec<Entry> = (1..=5).map(|port| entry(port, 1)).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("segment");
    let file = segment::create(&path, Resolve::Both).unwrap();
    let mut end = segment::HEADER_BYTES;
    for entry in &entries {
        segment::append(&file, end, entry).unwrap();
        end += entry.len();
    }
    let good = fs::read(&path).unwrap();
    let mut random = StdRng::seed_from_u64(1);
    for _ in 0..5_000 {
        let mut bytes = good.clone();
        for _ in 0..random.random_range(1..4) {
            let at = random.random_range(0..bytes.len());
            bytes[at] ^= 1 << random.random_range(0..8);
        }
        if let Some(parsed) = parse(&bytes) {
            assert!(entries.starts_with(&parsed.entries));
            assert!(parsed.good_bytes <= bytes.len() as u64);
        }
    }
}

#[test]
fn a_full_spool_adds_up_what_waits() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let mut truth = Counts::new();
    // Twenty times what fits, over a hundred edges.
    let mut appended = 0;
    while appended < 20 * MIN_SPOOL_BYTES {
        for port in 1..=100 {
            let entry = entry(port, 3);
            appended += entry.len();
            spool.append(&entry).unwrap();
            *truth.entry(port).or_default() += 3;
            assert!(spool.bytes() <= MIN_SPOOL_BYTES);
        }
    }
    assert_eq!(spool.take_losses(), Lost::default());
    let on_disk: u64 = files(folder.path())
        .iter()
        .map(|name| fs::metadata(folder.path().join(name)).unwrap().len())
        .sum();
    assert_eq!(on_disk, spool.bytes());
    drop(spool);
    let mut ledger = Ledger::default();
    ledger.drain(&mut open(folder.path()));
    assert_eq!(ledger.counts, truth);
}

#[test]
fn what_a_full_spool_cannot_add_up_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let told = Losses::from([("ring_full".to_owned(), 2)]);
    let mut batches = 0;
    let (mut lost, mut told_before) = (Losses::new(), Losses::new());
    for port in 1..=6_000 {
        let entry = entry_with(vec![record(port, 5)], told.clone());
        spool.append(&entry).unwrap();
        batches += 1;
        let Lost { here, before } = spool.take_losses();
        for (all, some) in [(&mut lost, here), (&mut told_before, before)] {
            for (reason, count) in some {
                add(all, &reason, count);
            }
        }
        assert!(spool.bytes() <= MIN_SPOOL_BYTES);
    }
    assert!(lost[SPOOL_FULL] > 0, "{lost:?}");
    assert_eq!(lost.len(), 1, "{lost:?}");
    let mut ledger = Ledger::default();
    ledger.drain(&mut spool);
    assert_eq!(
        ledger.counts.values().sum::<u64>() + lost[SPOOL_FULL],
        batches * 5
    );
    assert_eq!(
        ledger.losses["ring_full"] + told_before["ring_full"],
        batches * 2
    );
    // The oldest went: what is there are the newest, without a gap.
    let kept: Vec<u16> = ledger.counts.into_keys().collect();
    let newest: Vec<u16> = (kept[0]..=6_000).collect();
    assert_eq!(kept, newest);
    assert!(kept.len() > 1_000, "{}", kept.len());
}

#[test]
fn what_may_have_been_sent_is_not_merged() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let mut ledger = Ledger::default();
    let mut truth = Counts::new();
    for port in 1..=100 {
        spool.append(&entry(port, 1)).unwrap();
        *truth.entry(port).or_default() += 1;
    }
    // Stored, and not acknowledged.
    let (instance, _) = spool.identity().unwrap();
    for _ in 0..50 {
        let next = spool.next().unwrap().unwrap();
        ledger.store(&instance, &next);
    }
    for _ in 0..30 {
        for port in 1..=100 {
            spool.append(&entry(port, 1)).unwrap();
            *truth.entry(port).or_default() += 1;
        }
    }
    assert_eq!(spool.take_losses(), Lost::default());
    drop(spool);
    ledger.drain(&mut open(folder.path()));
    assert_eq!(ledger.counts, truth);
}

#[test]
fn a_merge_that_was_cut_short_leaves_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let mut truth = Counts::new();
    while spool.segments.len() < 4 {
        spool.append(&entry(1, 1)).unwrap();
        *truth.entry(1).or_default() += 1;
    }
    let before: Vec<(String, Vec<u8>)> = files(folder.path())
        .into_iter()
        .map(|name| {
            let bytes = fs::read(folder.path().join(&name)).unwrap();
            (name, bytes)
        })
        .collect();
    assert!(spool.merge_oldest().unwrap());
    drop(spool);
    let after = files(folder.path());
    // The merged segment is there, and the ones that it was made of are too.
    for (name, bytes) in before.iter().filter(|(name, _)| !after.contains(name)) {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    fs::write(folder.path().join("merge.tmp"), "half").unwrap();
    let mut ledger = Ledger::default();
    ledger.drain(&mut open(folder.path()));
    assert_eq!(ledger.counts, truth);
}

/// Turns a bit in the second entry of the oldest segment, whose entries are all like this one.
fn damage_second_entry(spool: &Spool, like: &Entry) {
    let path = spool.path(&spool.segments[0].name);
    let mut bytes = fs::read(&path).unwrap();
    let second = usize::try_from(segment::HEADER_BYTES + like.len()).unwrap();
    bytes[second + ENTRY_HEADER_BYTES] ^= 1;
    fs::write(&path, bytes).unwrap();
}

#[test]
fn what_has_become_unreadable_when_it_is_merged_is_counted() {
    for (count, told) in [(3, Losses::new()), (0, Losses::from([("x".to_owned(), 1)]))] {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = open(folder.path());
        let like = entry_with(vec![record(1, count)], told);
        let mut appended = 0;
        while spool.segments.len() < 4 {
            spool.append(&like).unwrap();
            appended += count;
        }
        damage_second_entry(&spool, &like);
        let held = spool.segments[0].connections;
        assert!(spool.merge_oldest().unwrap());
        let lost = spool.take_losses().here;
        // Of batches that tell of losses only nobody knows any more how many these were.
        let expected = (held - count).max(1);
        assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), expected)]));
        let mut ledger = Ledger::default();
        ledger.drain(&mut spool);
        if count > 0 {
            assert_eq!(ledger.counts[&1] + expected, appended);
        }
    }
}

#[test]
fn what_has_become_unreadable_when_it_is_sent_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    for _ in 0..3 {
        spool.append(&entry(1, 5)).unwrap();
    }
    damage_second_entry(&spool, &entry(1, 5));
    let mut ledger = Ledger::default();
    ledger.drain(&mut spool);
    assert_eq!(ledger.counts, Counts::from([(1, 5)]));
    let lost = spool.take_losses().here;
    assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), 10)]));
}

/// Puts a file in the place of a segment that can be opened, but not read: every read of it is an input/output error.
fn make_unreadable(path: &Path) {
    let unreadable = Path::new("/proc/self/mem");
    assert_eq!(
        fs::read(unreadable).unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    fs::remove_file(path).unwrap();
    std::os::unix::fs::symlink(unreadable, path).unwrap();
}

/// A full segment and one that is appended to, each with entries of one connection; returns how many the first has.
fn two_segments(spool: &mut Spool) -> u64 {
    while spool.segments.len() < 2 {
        spool.append(&entry(1, 1)).unwrap();
    }
    spool.segments[0].connections
}

#[test]
fn what_the_disk_does_not_give_back_when_it_is_sent_is_counted_and_holds_nothing_up() {
    for is_gone in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = open(folder.path());
        let first = two_segments(&mut spool);
        spool.identity().unwrap();
        spool.cursor = None;
        let path = spool.path(&spool.segments[0].name);
        if is_gone {
            fs::remove_file(&path).unwrap();
        } else {
            make_unreadable(&path);
        }
        let mut ledger = Ledger::default();
        ledger.drain(&mut spool);
        assert_eq!(ledger.counts, Counts::from([(1, 1)]));
        let lost = spool.take_losses().here;
        assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), first)]));
    }
}

/// Numbers that an earlier process gave to what follows would leave a gap.
#[test]
fn what_follows_what_the_disk_does_not_give_back_has_numbers_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let first = two_segments(&mut spool);
    let (instance, _) = spool.identity().unwrap();
    while spool.next().unwrap().is_some() {}
    drop(spool);
    let mut spool = open(folder.path());
    assert_eq!(spool.identity().unwrap().0, instance);
    damage_second_entry(&spool, &entry(1, 1));
    let mut ledger = Ledger::default();
    ledger.drain(&mut spool);
    assert_eq!(ledger.counts, Counts::from([(1, 2)]));
    assert_eq!(ledger.last(&instance), 1);
    let lost = spool.take_losses().here;
    assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), first - 1)]));
}

/// Where the first that is not acknowledged begins only those before it tell.
#[test]
fn what_comes_after_what_the_disk_does_not_give_back_is_not_mistaken() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let first = two_segments(&mut spool);
    spool.identity().unwrap();
    assert_eq!(spool.next().unwrap().unwrap().sequence, 1);
    spool.acknowledge(1);
    spool.cursor = None;
    make_unreadable(&spool.path(&spool.segments[0].name));
    // The numbers of what is lost are given to nothing else.
    assert_eq!(spool.next().unwrap(), None);
    let (instance, _) = spool.identity().unwrap();
    let next = spool.next().unwrap().unwrap();
    assert_eq!((next.sequence, next.entry), (1, entry(1, 1)));
    assert_eq!(spool.next().unwrap(), None);
    spool.append(&entry(2, 1)).unwrap();
    let next = spool.next().unwrap().unwrap();
    assert_eq!((next.sequence, next.entry), (2, entry(2, 1)));
    assert_eq!(spool.identity().unwrap().0, instance);
    let lost = spool.take_losses().here[SPOOL_CUT];
    assert!((first - 1..=first).contains(&lost), "{lost} of {first}");
}

#[test]
fn what_the_disk_does_not_give_back_when_it_is_merged_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    while spool.segments.len() < 4 {
        spool.append(&entry(1, 1)).unwrap();
    }
    make_unreadable(&spool.path(&spool.segments[0].name));
    let lost = spool.segments[0].connections;
    assert!(spool.merge_oldest().unwrap());
    assert_eq!(
        spool.take_losses().here,
        Losses::from([(SPOOL_CUT.to_owned(), lost)])
    );
}

#[test]
fn a_spool_is_opened_though_the_disk_does_not_give_all_of_it_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    two_segments(&mut spool);
    let path = spool.path(&spool.segments[0].name);
    drop(spool);
    make_unreadable(&path);
    let mut spool = open(folder.path());
    let mut ledger = Ledger::default();
    ledger.drain(&mut spool);
    assert_eq!(ledger.counts, Counts::from([(1, 1)]));
    // Nobody knows how many they were.
    let lost = spool.take_losses().here;
    assert_eq!(lost, Losses::from([(SPOOL_CUT.to_owned(), 1)]));
    assert!(!fs::exists(&path).unwrap());
}

#[test]
fn a_ledger_that_forgot_gets_the_rest_under_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let mut truth = Counts::new();
    for port in 1..=20 {
        spool.append(&entry(port, 1)).unwrap();
    }
    let (instance, _) = spool.identity().unwrap();
    for _ in 0..10 {
        let next = spool.next().unwrap().unwrap();
        spool.acknowledge(next.sequence);
    }
    spool.start_anew(spool.first_unacknowledged());
    assert_ne!(spool.identity().unwrap().0, instance);
    assert_eq!(spool.first_unacknowledged(), 11);
    // What was acknowledged is known to have been also after a crash.
    drop(spool);
    let mut spool = open(folder.path());
    spool.identity().unwrap();
    assert_eq!((spool.first_unacknowledged(), spool.batches()), (11, 10));
    spool.append(&entry(30, 1)).unwrap();
    let mut ledger = Ledger::default();
    ledger.drain(&mut spool);
    truth.extend((11..=20).chain([30]).map(|port| (port, 1)));
    assert_eq!(ledger.counts, truth);
}

/// A process that is killed before it has sent anything more leaves nothing under the name that the ledger does not know.
#[test]
fn who_starts_anew_does_so_for_the_next_process_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    let first = two_segments(&mut spool);
    let (old, _) = spool.identity().unwrap();
    while spool.next().unwrap().is_some() {}
    spool.acknowledge(2);
    spool.start_anew(1);
    drop(spool);
    assert!(files(folder.path()).iter().all(|name| !name.contains(&old)));
    let mut ledger = Ledger::default();
    ledger.drain(&mut open(folder.path()));
    // All but the first two, and that of the second segment, under one name.
    assert_eq!(ledger.counts, Counts::from([(1, first - 2 + 1)]));
    assert_eq!(ledger.last.into_values().collect::<Vec<_>>(), [first - 1]);
}

#[test]
fn what_the_ledger_has_of_an_earlier_run_is_not_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut spool = open(folder.path());
    for port in 1..=5 {
        spool.append(&entry(port, 1)).unwrap();
    }
    spool.identity().unwrap();
    while spool.next().unwrap().is_some() {}
    drop(spool);
    let mut spool = open(folder.path());
    spool.identity().unwrap();
    spool.acknowledge(3);
    assert_eq!(spool.next().unwrap().unwrap().sequence, 4);
}

#[test]
fn batches_of_a_run_that_named_otherwise_are_said_to_be() {
    let folder = tempfile::tempdir().unwrap();
    let local = |folder: &Path| Spool::open(folder, MIN_SPOOL_BYTES, Resolve::Local).unwrap();
    let mut spool = local(folder.path());
    spool.append(&entry(1, 1)).unwrap();
    drop(spool);
    let mut spool = open(folder.path());
    spool.append(&entry(2, 1)).unwrap();
    let (first, resolve) = spool.identity().unwrap();
    assert_eq!(resolve, Resolve::Local);
    assert_eq!(spool.next().unwrap().unwrap().entry, entry(1, 1));
    assert_eq!(spool.next().unwrap(), None);
    spool.acknowledge(1);
    let (second, resolve) = spool.identity().unwrap();
    assert_eq!(resolve, Resolve::Both);
    assert_ne!(first, second);
    assert_eq!(spool.next().unwrap().unwrap().entry, entry(2, 1));
}

#[test]
fn a_spool_has_one_owner_and_is_nobody_else_s_to_read() {
    use std::os::unix::fs::PermissionsExt as _;

    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("spool");
    let mut spool = open(&folder);
    spool.append(&entry(1, 1)).unwrap();
    let second = Spool::open(&folder, MIN_SPOOL_BYTES, Resolve::Both);
    assert!(matches!(second, Err(SpoolError::InUse { .. })));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    for name in files(&folder) {
        assert_eq!(mode(&folder.join(name)), 0o600);
    }
    drop(spool);
    assert_eq!(open(&folder).batches(), 1);
}
