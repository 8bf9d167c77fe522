use std::{collections::VecDeque, os::unix::fs::MetadataExt as _, path::PathBuf};

use flow::{
    record::{Outcome, Protocol},
    source::{Access, Options, Pace, Scope, Source, Topology},
    wire::Resolve,
};

use super::*;
use crate::{capture::Event, hold::PATIENCE};

/// Gives these, and then fails.
struct Broken(VecDeque<Drained>);

impl Drain for Broken {
    fn drain(&mut self, _last: bool) -> Result<Drained, capture::Error> {
        let gone = || capture::Error::Drain(io::Error::other("gone"));
        self.0.pop_front().ok_or_else(gone)
    }

    fn tells_apart(&self) -> bool {
        false
    }

    fn take_single(&mut self) -> Result<Option<Portion>, capture::Error> {
        Ok(None)
    }
}

fn drained(count: u64, cgroup: u64) -> Drained {
    let now = Timestamp::from(SystemTime::now());
    Drained {
        window: Window { from: now, to: now },
        observations: Box::new(std::iter::once(Observation {
            event: Event::Connect(Outcome::Established),
            protocol: Protocol::Tcp,
            local: [10, 0, 1, 9].into(),
            remote: [10, 0, 2, 9].into(),
            port: 80,
            cgroup,
            netns: 0,
            pid: 0,
            comm: String::new(),
            client_port: 0,
            connection: None,
            count,
            first_seen: now,
            last_seen: now,
        })),
        losses: Losses::new(),
    }
}

/// Has these between two drains, and nothing else.
struct Single(VecDeque<Drained>);

impl Drain for Single {
    fn drain(&mut self, _last: bool) -> Result<Drained, capture::Error> {
        Ok(Drained {
            observations: Box::new(std::iter::empty()),
            ..drained(0, 0)
        })
    }

    fn tells_apart(&self) -> bool {
        true
    }

    fn take_single(&mut self) -> Result<Option<Portion>, capture::Error> {
        Ok(self.0.pop_front().map(|drained| Portion {
            drained,
            is_full: false,
        }))
    }
}

/// A cluster of one namespace, and what keeps it current.
fn topology() -> (tokio::runtime::Runtime, Topology) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let cluster = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}";
    std::fs::write(file.path(), cluster).unwrap();
    let options = Options {
        access: Access::default(),
        scope: Scope::BothEnds,
        jitter: Duration::ZERO,
        pace: Pace::default(),
    };
    let source = Source::File(file.path().to_owned());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let topology = runtime.block_on(Topology::start(&source, options)).unwrap();
    (runtime, topology)
}

fn worker<C>(
    capture: C,
    cgroups: PathBuf,
    topology: &Topology,
    patience: Duration,
) -> (Worker<C>, mpsc::Receiver<Report>) {
    let (reports, received) = mpsc::channel(10);
    let worker = Worker {
        capture,
        naming: Naming::new(
            Identity::new(cgroups, false, true),
            Resolver::new("here".to_owned(), Resolve::Both, true),
            topology.view().clone(),
            Hold::new(patience, Resolve::Both),
        ),
        scope: None,
        reports,
        pulse: Pulse::default(),
        totals: Totals::default(),
        looked: Instant::now(),
    };
    (worker, received)
}

/// The cgroups are not looked through for each single connection, and none is named without.
#[test]
fn single_connections_wait_for_their_cgroup() {
    const UID: &str = "6a6b4d5e-90fa-4d7c-9a44-9a5b3f6f7c11";
    const CONTAINER: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let root = tempfile::tempdir().unwrap();
    let young = root.path().join(format!("kubepods/pod{UID}/{CONTAINER}"));
    // Its number is that of a folder which is not below the root yet.
    let elsewhere = tempfile::tempdir_in(root.path().parent().unwrap()).unwrap();
    let cgroup = elsewhere.path().metadata().unwrap().ino();
    let singles = Single(VecDeque::from([drained(1, u64::MAX), drained(2, cgroup)]));
    let (_runtime, topology) = topology();
    let (mut worker, mut received) =
        worker(singles, root.path().to_owned(), &topology, Duration::ZERO);
    let later = Instant::now() + Duration::from_secs(1);
    // The first has the cgroups looked through.
    worker.take_single(later).unwrap();
    std::fs::create_dir_all(young.parent().unwrap()).unwrap();
    std::fs::rename(elsewhere.keep(), &young).unwrap();
    worker.take_single(later).unwrap();
    for _ in 0..2 {
        let between = received.try_recv().unwrap();
        assert!(between.records.is_empty(), "{:?}", between.records);
    }
    let drained = worker.drain(false).unwrap();
    let containers: Vec<_> = (drained.records.iter())
        .map(|record| record.process.as_ref()?.container.as_deref())
        .collect();
    assert_eq!(containers, [None, Some(CONTAINER)]);
}

#[test]
fn what_waits_when_capturing_fails_is_reported() {
    let (_runtime, topology) = topology();
    let capture = Broken(VecDeque::from([drained(7, 1)]));
    let (mut worker, mut received) =
        worker(capture, PathBuf::from("/nowhere"), &topology, PATIENCE);
    let (stop, stopped) = std_mpsc::channel();
    let first = worker.drain(false).unwrap();
    assert!(first.records.is_empty(), "it waits for a name");
    drop::<std_mpsc::Sender<std::convert::Infallible>>(stop);
    worker.run(&stopped).unwrap_err();
    let last = received.blocking_recv().unwrap();
    let counts: Vec<u64> = last.records.iter().map(|record| record.count).collect();
    assert_eq!(counts, [7]);
    assert!(last.window.from <= last.records[0].first_seen);
    assert_eq!(worker.totals.connections, 7);
}
