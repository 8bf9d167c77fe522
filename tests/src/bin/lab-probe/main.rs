//! A stand-in for the modified Weave Scope probe: watches TCP sockets by another way than the agent, the text of the kernel's
//! tracepoint, and writes the probe's lines about those of some addresses to a file. If asked it also writes those about the
//! connections that the kernel tracks in its network namespace.
//!
//! It prints `ready` when it watches, and ends on SIGTERM.
#![forbid(unsafe_code)]

mod tracked;

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    net::Ipv4Addr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use nix::sys::signal::{SigSet, Signal};

use self::tracked::Tracked;

/// Where the instances of the kernel's tracing are.
const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// What the names of ours begin with; the process id follows.
const NAME: &str = "microshield-probe-";

/// How long to wait for more.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Parser)]
struct Cli {
    /// The host's name.
    #[arg(long)]
    host: String,
    /// Whose sockets are watched.
    #[arg(long = "address", required = true)]
    addresses: Vec<Ipv4Addr>,
    /// The file to append to.
    #[arg(long)]
    out: PathBuf,
    /// What is put around the lines.
    #[arg(long, value_enum, default_value_t = Form::Plain)]
    form: Form,
    /// By how many seconds its clock is ahead.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    ahead: i64,
    /// Tells of tracked connections too, so many milliseconds later than of sockets; of sockets so much later if negative.
    #[arg(long, allow_negative_numbers = true)]
    tracked: Option<i64>,
}

/// Lines that are not written yet, by when they are to be.
#[derive(Default)]
struct Late {
    lines: VecDeque<(Instant, String)>,
    by: Duration,
}

impl Late {
    fn add(&mut self, record: String) {
        self.lines.push_back((Instant::now() + self.by, record));
    }

    /// The next one, if its time has come.
    fn next(&mut self, is_last: bool) -> Option<String> {
        let is_due = |(due, _): &mut (Instant, String)| is_last || *due <= Instant::now();
        self.lines.pop_front_if(is_due).map(|(_, record)| record)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Form {
    Plain,
    Cri,
    Docker,
}

/// An instance of the kernel's tracing; removed when dropped.
struct Instance(PathBuf);

impl Instance {
    fn new() -> Result<Self> {
        let instances = Path::new(INSTANCES);
        for entry in fs::read_dir(instances).context(INSTANCES)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(pid) = name.strip_prefix(NAME) else {
                continue;
            };
            // Somebody else may be as quick.
            if !Path::new("/proc").join(pid).exists()
                && let Err(error) = fs::remove_dir(entry.path())
            {
                eprintln!("{name}: {error}");
            }
        }
        let path = instances.join(format!("{NAME}{}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        fs::write(self.0.join(file), text).with_context(|| file.to_owned())
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let is_over = Arc::new(AtomicBool::new(false));
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    thread::spawn({
        let is_over = Arc::clone(&is_over);
        move || {
            if signals.wait().is_ok() {
                is_over.store(true, Ordering::Relaxed);
            }
        }
    });
    let instance = Instance::new()?;
    // As the probe's programs, and the agent's, take their times.
    instance.write("trace_clock", "mono")?;
    let event = "events/sock/inet_sock_set_state";
    // TCP_ESTABLISHED and TCP_SYN_SENT.
    instance.write(&format!("{event}/filter"), "newstate==1 || newstate==2")?;
    instance.write(&format!("{event}/enable"), "1")?;
    let mut pipe = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(instance.0.join("trace_pipe"))?;
    let out = OpenOptions::new().create(true).append(true).open(&cli.out);
    let mut out = out.with_context(|| cli.out.display().to_string())?;
    let tracked = cli.tracked.map(|_| Tracked::follow()).transpose()?;
    writeln!(io::stdout(), "ready")?;
    watch(&cli, &mut pipe, tracked.as_ref(), &mut out, &is_over)?;
    drop(pipe);
    Ok(())
}

fn watch(
    cli: &Cli,
    pipe: &mut File,
    tracked: Option<&Tracked>,
    out: &mut File,
    is_over: &AtomicBool,
) -> Result<()> {
    let mut callers = HashMap::new();
    let mut rest = String::new();
    let mut buffer = vec![0; 64 << 10];
    let delay = cli.tracked.unwrap_or(0);
    let late = |is_it: bool| Late {
        by: Duration::from_millis(if is_it { delay.unsigned_abs() } else { 0 }),
        ..Late::default()
    };
    let (mut sockets, mut connections) = (late(delay < 0), late(delay > 0));
    loop {
        let is_last = is_over.load(Ordering::Relaxed);
        loop {
            let read = match pipe.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("trace_pipe"),
            };
            rest += str::from_utf8(&buffer[..read])?;
            let end = rest.rfind('\n').map_or(0, |end| end + 1);
            for line in rest.drain(..end).collect::<String>().lines() {
                ensure!(!line.contains("LOST"), "the kernel's buffer was full");
                if let Some(record) = record(cli, line, &mut callers) {
                    sockets.add(format!("[eBPF] {{{record}}}"));
                }
            }
        }
        for record in tracked.into_iter().flat_map(Tracked::records) {
            connections.add(format!("[conntrack] {{{}|{record}}}", cli.host));
        }
        for late in [&mut sockets, &mut connections] {
            while let Some(record) = late.next(is_last) {
                write(cli, out, &record)?;
            }
        }
        if is_last {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
}

/// Whom a process called, and on which port.
type Call = (Ipv4Addr, Ipv4Addr, u16);

/// `COMM-PID [CPU] FLAGS SECONDS: inet_sock_set_state: family=AF_INET protocol=IPPROTO_TCP sport=… dport=… saddr=… daddr=…
/// … oldstate=… newstate=…`
fn record(cli: &Cli, line: &str, callers: &mut HashMap<Call, (String, String)>) -> Option<String> {
    let (head, fields) = line.split_once(": inet_sock_set_state: ")?;
    let field = |name: &str| {
        let (_, value) = fields.split_once(&format!("{name}="))?;
        value.split(' ').next()
    };
    // IPv4 on a socket of IPv6 is IPv4 all the same: its addresses stand in these fields too.
    if field("protocol") != Some("IPPROTO_TCP") {
        return None;
    }
    let local: Ipv4Addr = field("saddr")?.parse().ok()?;
    let remote: Ipv4Addr = field("daddr")?.parse().ok()?;
    let (local_port, remote_port) = (field("sport")?, field("dport")?);
    if !cli.addresses.contains(&local) {
        return None;
    }
    let (task, rest) = head.trim_start().split_once(" [")?;
    let (comm, pid) = task.trim_end().rsplit_once('-')?;
    let cpu = rest.split(']').next()?;
    let (seconds, micros) = head.rsplit(' ').next()?.split_once('.')?;
    let ns = seconds.parse::<u64>().ok()? * 1_000_000_000 + micros.parse::<u64>().ok()? * 1_000;
    let call = (local, remote, remote_port.parse().ok()?);
    let (event, (comm, pid)) = match (field("oldstate")?, field("newstate")?.trim()) {
        ("TCP_CLOSE", "TCP_SYN_SENT") => {
            callers.insert(call, (comm.to_owned(), pid.to_owned()));
            return None;
        }
        ("TCP_SYN_SENT", "TCP_ESTABLISHED") => ("Connect", callers.get(&call).cloned()?),
        ("TCP_SYN_RECV", "TCP_ESTABLISHED") => ("Accept", ("server".to_owned(), "1".to_owned())),
        _ => return None,
    };
    let host = &cli.host;
    Some(format!(
        "{host}|{ns}|{}|{event}|{pid}|{comm}|{local}|{remote}|{local_port}|{remote_port}|0|0",
        cpu.trim_start_matches('0')
    ))
}

fn write(cli: &Cli, out: &mut File, record: &str) -> Result<()> {
    let now = jiff::Timestamp::now();
    let own = now + jiff::SignedDuration::from_secs(cli.ahead);
    let time = own.strftime("%Y/%m/%d %H:%M:%S%.6f");
    let line = format!("<probe> INFO: {time} [CONN] {record}");
    let framed = match cli.form {
        Form::Plain => format!("{line}\n"),
        Form::Cri => format!("{now} stderr F {line}\n"),
        Form::Docker => format!(
            "{}\n",
            serde_json::json!({"log": format!("{line}\n"), "stream": "stderr", "time": now.to_string()})
        ),
    };
    out.write_all(framed.as_bytes())?;
    Ok(())
}
