//! The real program.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use flow::{lost::Lost, record::FlowRecord};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};

/// Far longer than anything takes on the slowest machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running `microshield serve`; killed when dropped.
pub(crate) struct Generator {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

impl Generator {
    /// Starts it on a free port, and waits until it listens.
    pub(crate) fn start(args: &[&str]) -> Self {
        let mut child = microshield()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Log::default());
        let written = Arc::clone(&log);
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                written.lines.lock().unwrap().push(line);
                written.grown.notify_all();
            }
        });
        let line = log.wait_for("listening address=");
        let (_, address) = line.split_once("listening address=").unwrap();
        let address = address.trim().parse().unwrap();
        Self {
            child,
            address,
            log,
        }
    }

    pub(crate) fn on(data_dir: &Path, args: &[&str]) -> Self {
        let mut all = vec!["--data-dir", data_dir.to_str().unwrap()];
        all.extend(args);
        Self::start(&all)
    }

    /// The first line of the log that contains `text`, once there is one.
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        self.log.wait_for(text)
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far.
    pub(crate) fn log(&self) -> String {
        self.log.lines.lock().unwrap().join("\n")
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends it as Kubernetes would. Returns how, and how long it took.
    pub(crate) fn terminate(mut self) -> (ExitStatus, Duration) {
        let start = Instant::now();
        let pid = Pid::from_raw(self.child.id().try_into().unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        (self.child.wait().unwrap(), start.elapsed())
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Log {
    fn wait_for(&self, text: &str) -> String {
        let find = |lines: &[String]| lines.iter().find(|line| line.contains(text)).cloned();
        let (lines, _) = self
            .grown
            .wait_timeout_while(self.lines.lock().unwrap(), PATIENCE, |lines| {
                find(lines).is_none()
            })
            .unwrap();
        find(&lines).unwrap_or_else(|| panic!("no `{text}` in the log:\n{}", lines.join("\n")))
    }
}

/// The command without any setting of the surroundings.
pub(crate) fn microshield() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_microshield"));
    command.env_clear().stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub(crate) fn run(args: &[&str]) -> Output {
    microshield().args(args).output().unwrap()
}

/// For tests that open thousands of connections: the usual limit is a thousand files.
pub(crate) fn raise_file_limit() {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
}

/// The records of a ledger.
pub(crate) fn export(data_dir: &Path) -> Vec<FlowRecord> {
    let output = run(&["export", "--data-dir", data_dir.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty() && Lost::parse_line(line).is_none())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}
