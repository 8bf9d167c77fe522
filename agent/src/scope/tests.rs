use std::io::Write as _;

use super::*;

const SECOND: u64 = 1_000_000_000;

/// A log of a node, and the position in it.
struct Stage {
    folder: tempfile::TempDir,
    /// When the test began, in nanoseconds of `CLOCK_MONOTONIC` and as it is told.
    began: Clock,
}

impl Stage {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            began: Clock::read().unwrap(),
        }
    }

    fn position(&self) -> PathBuf {
        self.folder.path().join("position")
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn open(&self) -> ScopeLog {
        self.open_with(ScopeMeter::default())
    }

    fn open_with(&self, meter: ScopeMeter) -> ScopeLog {
        let config = Config {
            sources: vec![LogSource::Files(self.log().display().to_string())],
            position: Some(self.position()),
        };
        ScopeLog::open(&config, meter).unwrap()
    }

    /// So many seconds before the test began.
    fn ago(&self, seconds: u64) -> Timestamp {
        let ns = self.began.monotonic_ns() - seconds * SECOND;
        self.began.at(ns)
    }

    /// Writes that a connection was made so many seconds before the test began.
    fn tell(&self, seconds: u64) {
        let ns = self.began.monotonic_ns() - seconds * SECOND;
        let mut file = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.log())
            .unwrap();
        // The time of the line says nothing where the kernel's is known.
        let now = jiff::Timestamp::now().strftime("%Y/%m/%d %H:%M:%S");
        writeln!(
            file,
            "<probe> INFO: {now} [CONN] [eBPF] {{node-1|{ns}|0|Connect|7|app|10.0.0.1|10.0.0.2|4000|80|0|0}}"
        )
        .unwrap();
    }
}

/// A drain of a window in which nothing was seen; returns how many connections leave.
fn drain(log: &mut ScopeLog, window: Window, losses: &Losses, is_last: bool) -> u64 {
    log.read();
    let drain = Drain {
        window,
        losses,
        is_last,
    };
    let released = log.merge(drain, Vec::new(), &|_, _| true);
    released.iter().map(|left| left.observation.count).sum()
}

/// Ends as an agent does, and starts again; returns how many of the connections that the log tells of now were not counted.
fn told_after(stage: &Stage, log: ScopeLog, tell: &[u64]) -> u64 {
    log.receipt(None).unwrap().handed_over();
    drop(log);
    for seconds in tell {
        stage.tell(*seconds);
    }
    let now = stage.ago(0);
    let window = Window { from: now, to: now };
    drain(&mut stage.open(), window, &Losses::new(), true)
}

/// When capturing fails, the last window has no length, and what the kernel counted since the last drain is lost: the log is
/// all that tells of it.
#[test]
fn what_came_after_the_last_good_drain_is_not_taken_for_counted() {
    let window = |stage: &Stage, from, to| Window {
        from: stage.ago(from),
        to: stage.ago(to),
    };
    let lossy = Losses::from([("flows_and_ring_full".to_owned(), 1)]);
    let harmless = Losses::from([("closes_lost".to_owned(), 1)]);
    for (last, losses, alone) in [
        // Made in the first window, and in the last.
        ([20, 0], Losses::new(), 0),
        ([20, 0], harmless, 0),
        ([20, 0], lossy, 1),
        ([0, 0], Losses::new(), 1),
    ] {
        let stage = Stage::new();
        let mut log = stage.open();
        drain(&mut log, window(&stage, 40, 20), &Losses::new(), false);
        let [from, to] = last;
        drain(&mut log, window(&stage, from, to), &losses, true);
        assert_eq!(
            told_after(&stage, log, &[30, 10]),
            alone,
            "{last:?} {losses:?}"
        );
    }
}

/// The next pod of the agent goes on where the one before was, and knows what that one counted.
#[test]
fn who_starts_again_neither_repeats_nor_skips() {
    let stage = Stage::new();
    stage.tell(60);
    let mut log = stage.open();
    let window = Window {
        from: stage.ago(40),
        to: stage.ago(20),
    };
    assert_eq!(drain(&mut log, window, &Losses::new(), true), 1);
    assert_eq!(told_after(&stage, log, &[30, 10]), 1);
    // Without the position all of it is new.
    fs::remove_file(stage.position()).unwrap();
    let window = Window {
        from: stage.ago(0),
        to: stage.ago(0),
    };
    assert_eq!(drain(&mut stage.open(), window, &Losses::new(), true), 3);
}

#[test]
fn what_is_malformed_is_counted_and_hinders_nothing() {
    let stage = Stage::new();
    stage.tell(30);
    let good = fs::read_to_string(stage.log()).unwrap();
    let long = "x".repeat(flow::scope_log::frame::MAX_FRAME_BYTES);
    let lines = [
        good.as_str(),
        "something else\n",
        &good.replace("|80|", "|eighty|"),
        &good.replace("Connect", "Excuse"),
        &good.replace("|0|0}", ""),
        &good.replace("Connect", "Close"),
        &format!("{long} [CONN] [eBPF]\n"),
        good.as_str(),
    ];
    fs::write(stage.log(), lines.concat()).unwrap();
    let meter = ScopeMeter::default();
    stage.open_with(meter.clone()).read();
    assert_eq!(meter.bytes.get(), lines.concat().len() as u64);
    let counts = [&meter.records, &meter.malformed, &meter.too_long].map(|counter| counter.get());
    assert_eq!(counts, [2, 3, 1]);
}

#[test]
fn losses_that_leave_a_window_complete() {
    for (reason, wanted) in [
        ("flows_and_ring_full", true),
        ("runs_skipped", true),
        ("open_before_unread", true),
        ("closes_lost", false),
        ("udp_peers_full", false),
        ("udp_not_captured", false),
        ("udp_open_before_unknown", false),
    ] {
        assert_eq!(is_connection(reason), wanted, "{reason}");
    }
}
