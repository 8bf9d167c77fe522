//! Programs that a lab runs, and what they print.

use std::{
    env, io,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::pace;

/// How long a program may take to say that it is ready, or to end when asked to.
pub(crate) fn patience() -> Duration {
    pace::patience(Duration::from_secs(10))
}

/// How a program of the lab ends: what went wrong is said on standard error.
#[must_use]
pub fn exit_code(program: &str, result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Finds a program of this workspace: in `MICROSHIELD_BIN_DIR`, or where this program was built.
///
/// # Errors
/// If it is not there.
pub fn binary(name: &str) -> Result<PathBuf> {
    let folder = match env::var_os("MICROSHIELD_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let own = env::current_exe().context("the path of this program")?;
            let folder = own.parent().context("this program has no folder")?;
            // Cargo puts test programs one level deeper.
            match folder.parent() {
                Some(parent) if folder.ends_with("deps") => parent.to_owned(),
                _ => folder.to_owned(),
            }
        }
    };
    let path = folder.join(name);
    if !path.is_file() {
        bail!("{} is missing: build the whole workspace", path.display());
    }
    Ok(path)
}

/// A running program; it is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: Arc<Lines>,
    stderr: Arc<Lines>,
    readers: Vec<thread::JoinHandle<()>>,
}

/// The lines that a program has printed so far.
#[derive(Debug, Default)]
struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

impl Process {
    /// Starts a program.
    ///
    /// # Errors
    /// If that fails; `name` is in every message.
    pub(crate) fn spawn(name: String, mut command: Command) -> Result<Self> {
        command
            // A terminal's Ctrl-C is for the lab, which ends its programs in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn_in_lasting_thread(command).with_context(|| name.clone())?;
        let (stdout, stderr) = (Arc::default(), Arc::default());
        let readers = vec![
            read(child.stdout.take(), Arc::clone(&stdout)),
            read(child.stderr.take(), Arc::clone(&stderr)),
        ];
        Ok(Self {
            child,
            name,
            stdout,
            stderr,
            readers,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line on its standard output.
    ///
    /// # Errors
    /// If none comes in time or the program ends before; with what it said on standard error.
    pub fn wait_stdout(&self, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_line(&self.stdout, wanted, patience())
    }

    /// Waits for a line on its standard error.
    ///
    /// # Errors
    /// As [`Self::wait_stdout`].
    pub fn wait_stderr(&self, wanted: impl Fn(&str) -> bool) -> Result<String> {
        self.wait_line(&self.stderr, wanted, patience())
    }

    /// What it has printed on standard output so far.
    #[must_use]
    pub fn stdout(&self) -> Vec<String> {
        self.stdout.lock().lines.clone()
    }

    /// What it has printed on standard error so far.
    #[must_use]
    pub fn stderr(&self) -> Vec<String> {
        self.stderr.lock().lines.clone()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Waits until it ends and has printed everything.
    ///
    /// # Errors
    /// If it takes longer than `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                for reader in self.readers.drain(..) {
                    // A reader cannot panic, and a panic would end in the reader's own message.
                    let _ended = reader.join();
                }
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} did not end{}", self.name, self.last_words());
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks it to end, and waits until it has.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn stop(&mut self, signal: Signal) -> Result<ExitStatus> {
        if self.child.try_wait()?.is_none() {
            self.signal(signal)?;
        }
        self.wait(patience())
    }

    /// Its resident memory in bytes, from `/proc`.
    ///
    /// # Errors
    /// If it is gone.
    pub fn resident_bytes(&self) -> Result<u64> {
        let file = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&file).with_context(|| file.clone())?;
        let kib: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.trim().strip_suffix(" kB"))
            .with_context(|| format!("{file} has no VmRSS"))?
            .trim()
            .parse()?;
        Ok(kib * 1024)
    }

    fn wait_line(
        &self,
        lines: &Lines,
        wanted: impl Fn(&str) -> bool,
        patience: Duration,
    ) -> Result<String> {
        match lines.find(wanted, patience) {
            Some(line) => Ok(line),
            None => bail!(
                "{} did not say what was expected{}",
                self.name,
                self.last_words()
            ),
        }
    }

    /// The end of its standard error, for a message.
    fn last_words(&self) -> String {
        let stderr = self.stderr();
        let from = stderr.len().saturating_sub(20);
        stderr[from..]
            .iter()
            .map(|line| format!("\n    {line}"))
            .collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, or it ends now; there is no third case, and nobody to tell.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, wanted: impl Fn(&str) -> bool, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        let mut seen = 0;
        let mut state = self.lock();
        loop {
            if let Some(line) = state.lines[seen..].iter().find(|line| wanted(line)) {
                return Some(line.clone());
            }
            seen = state.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Reads lines until the program's end is reached or it prints something that is not text.
fn read(
    stream: Option<impl io::Read + Send + 'static>,
    lines: Arc<Lines>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        if let Some(stream) = stream {
            for line in io::BufRead::lines(io::BufReader::new(stream)).map_while(Result::ok) {
                lines.lock().lines.push(line);
                lines.changed.notify_all();
            }
        }
        lines.lock().ended = true;
        lines.changed.notify_all();
    })
}

/// Starts a program from a thread that lasts as long as this process.
///
/// The kernel sends the signal that a child asked for at its parent's death when the *thread* that made the child
/// ends, and tests run in threads that come and go.
fn spawn_in_lasting_thread(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, queue) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in queue {
                // Who ordered it waits for it; if not, the child is killed by being dropped nowhere but at our end.
                let _delivered = reply.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (reply, result) = mpsc::channel();
    let gone = || io::Error::other("the spawning thread is gone");
    SPAWNER
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_closed| gone())?;
    result.recv().map_err(|_closed| gone())?
}
