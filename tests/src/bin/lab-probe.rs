//! A stand-in for the modified Weave Scope probe: watches TCP sockets by another way than the agent, the text of the kernel's
//! tracepoint, and writes the probe's lines about those of some addresses to a file.
//!
//! It prints `ready` when it watches, and ends on SIGTERM.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
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
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use nix::sys::signal::{SigSet, Signal};

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
    writeln!(io::stdout(), "ready")?;
    watch(&cli, &mut pipe, &mut out, &is_over)?;
    drop(pipe);
    Ok(())
}

fn watch(cli: &Cli, pipe: &mut File, out: &mut File, is_over: &AtomicBool) -> Result<()> {
    let mut callers = HashMap::new();
    let mut rest = String::new();
    let mut buffer = vec![0; 64 << 10];
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
                    write(cli, out, &record)?;
                }
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
    let line = format!("<probe> INFO: {time} [CONN] [eBPF] {{{record}}}");
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
