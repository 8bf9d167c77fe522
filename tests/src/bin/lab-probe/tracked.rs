//! What the kernel's connection tracking reports of this program's network namespace, as the probe prints it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

/// How long `conntrack` may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// The netlink sockets of this namespace: kernel address, protocol, port, groups.
const SOCKETS: &str = "/proc/thread-self/net/netlink";

/// `NETLINK_NETFILTER`.
const NETFILTER: &str = "12";

/// Follows the table of tracked connections; ends with its owner.
pub(crate) struct Tracked {
    follower: Child,
    lines: Receiver<String>,
}

impl Tracked {
    /// Begins, and waits until nothing is missed any more.
    pub(crate) fn follow() -> Result<Self> {
        // That program ends with this one, however that is.
        let mut follower = Command::new(lab::binary("lab-pod")?)
            .args(["--parent", &std::process::id().to_string()])
            .args(["exec", "conntrack"])
            .args(["-E", "-f", "ipv4", "-p", "tcp", "-o", "id"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = follower.stdout.take().context("no standard output")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut tracked = Self { follower, lines };
        let deadline = Instant::now() + PATIENCE;
        while !is_subscribed()? {
            let ended = tracked.follower.try_wait()?;
            ensure!(
                ended.is_none() && Instant::now() < deadline,
                "`conntrack` does not follow (cargo xtask setup installs it)"
            );
            thread::sleep(Duration::from_millis(10));
        }
        Ok(tracked)
    }

    /// What it has reported since it was last asked: `MsgType|TCPState|Src|SrcPort|Dst|DstPort|Src|SrcPort|Dst|DstPort|CtID`.
    pub(crate) fn records(&self) -> impl Iterator<Item = String> {
        self.lines.try_iter().filter_map(|line| record(&line))
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        if let Err(error) = self.follower.kill().and_then(|()| self.follower.wait()) {
            eprintln!("conntrack: {error}");
        }
    }
}

/// Whether somebody of this namespace has asked for events of its connections.
fn is_subscribed() -> Result<bool> {
    let sockets = fs::read_to_string(SOCKETS).context(SOCKETS)?;
    Ok(sockets.lines().any(|socket| {
        let fields: Vec<&str> = socket.split_whitespace().collect();
        fields.get(1) == Some(&NETFILTER)
            && (fields.get(3)).is_some_and(|groups| groups.bytes().any(|digit| digit != b'0'))
    }))
}

/// `[UPDATE] tcp 6 432000 ESTABLISHED src=… dst=… sport=… dport=… src=… dst=… sport=… dport=… [ASSURED] id=…`. What has no
/// state has ended.
fn record(line: &str) -> Option<String> {
    let (kind, rest) = line.trim_start().strip_prefix('[')?.split_once(']')?;
    let state = rest.split_whitespace().nth(3)?;
    let values = |name: &str| {
        let fields = rest.split_whitespace();
        let values = fields.filter_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        values.map(str::to_owned).collect::<Vec<_>>()
    };
    let (sources, servers) = (values("src"), values("dst"));
    let (source_ports, server_ports) = (values("sport"), values("dport"));
    let end = |addresses: &[String], ports: &[String], tuple: usize| {
        let address: Ipv4Addr = addresses.get(tuple)?.parse().ok()?;
        let port: u16 = ports.get(tuple)?.parse().ok()?;
        Some(format!("{address}|{port}"))
    };
    let mut record = format!("{kind}|{state}");
    for tuple in 0..2 {
        for end in [
            end(&sources, &source_ports, tuple)?,
            end(&servers, &server_ports, tuple)?,
        ] {
            record = format!("{record}|{end}");
        }
    }
    Some(format!("{record}|{}", values("id").first()?))
}
