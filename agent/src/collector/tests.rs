use std::{collections::VecDeque, path::PathBuf};

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

fn drained(count: u64) -> Drained {
    let now = Timestamp::from(SystemTime::now());
    Drained {
        window: Window { from: now, to: now },
        observations: Box::new(std::iter::once(Observation {
            event: Event::Connect(Outcome::Established),
            protocol: Protocol::Tcp,
            local: [10, 0, 1, 9].into(),
            remote: [10, 0, 2, 9].into(),
            port: 80,
            cgroup: 1,
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

#[test]
fn what_waits_when_capturing_fails_is_reported() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
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
    let topology = runtime.block_on(Topology::start(&source, options)).unwrap();
    let (reports, mut received) = mpsc::channel(10);
    let (stop, stopped) = std_mpsc::channel();
    let mut worker = Worker {
        capture: Broken(VecDeque::from([drained(7)])),
        naming: Naming {
            identity: Identity::new(PathBuf::from("/nowhere"), false),
            resolver: Resolver::new("here".to_owned(), Resolve::Both, true),
            view: topology.view().clone(),
            hold: Hold::new(PATIENCE, Resolve::Both),
        },
        scope: None,
        reports,
        pulse: Pulse::default(),
        totals: Totals::default(),
        looked: Instant::now(),
    };
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
