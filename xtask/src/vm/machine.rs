//! One boot of a machine.

use std::{
    io::{BufRead as _, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::console::Summary;
use crate::proc::line;

/// The longest that a machine may run, with everything that it tests: a tenth of it is enough where nothing else runs.
const LIMIT: Duration = Duration::from_secs(2400);

/// The longest that it may say nothing: no test takes as long.
const SILENCE: Duration = Duration::from_secs(600);

/// What the kernel is told. On a busy host the timer's interrupts come too late for its check of them, which then ends in a panic;
/// and waiting for readers, as the end of each network namespace does many times, is to take less time than processors.
const KERNEL: &str = "quiet panic=-1 mitigations=off no_timer_check rcupdate.rcu_expedited=1";

/// Memory in MiB: the initramfs, which stays in it, and the lab.
const MEMORY: u32 = 3072;

/// A machine that is ended when this is dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// Boots a kernel with an initramfs, shows what it says under a name, and returns what became of the tests.
///
/// By software emulation, which is there everywhere: a virtual machine's own virtualisation often is not, or hangs.
///
/// # Errors
/// If the machine does not boot, takes too long, or a test fails.
pub(crate) fn boot(
    name: &str,
    kernel: &Path,
    initramfs: &Path,
    tests: &[String],
) -> Result<Summary> {
    // It does not outlive this program, however that ends.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        // A plain processor: emulating wide registers takes longer than doing without. One thread in turn for all processors:
        // with one each, QEMU before 8.0 may translate code while another processor patches it, and keep the breakpoint that
        // stood there for that moment, on which the kernel dies (`Oops: int3`).
        .args(["-accel", "tcg,thread=single", "-cpu", "qemu64", "-smp", "2"])
        .args(["-m", &MEMORY.to_string()])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        // What comes after `--` are the first program's arguments.
        .args([
            "-append",
            &format!("console=ttyS0 {KERNEL} -- {}", tests.join(" ")),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    eprintln!("+ {}", line(&command));
    let mut machine = Machine(command.spawn().with_context(|| line(&command))?);
    let console = machine.0.stdout.take().context("no serial line")?;
    let summary = watch(name, console)?;
    if !summary.is_good() {
        bail!("{summary}");
    }
    Ok(summary)
}

/// Reads the serial line until it ends, or somebody has waited too long.
fn watch(name: &str, console: impl Read + Send + 'static) -> Result<Summary> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        // Not all that a kernel says is UTF-8.
        for line in BufReader::new(console).split(b'\n') {
            let Ok(line) = line else { return };
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                return;
            }
        }
    });
    let start = Instant::now();
    let end = start + LIMIT;
    let mut summary = Summary::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(SILENCE)) {
            Ok(line) => {
                let seconds = start.elapsed().as_secs();
                eprintln!("{name:>6} {seconds:4} s  {}", line.trim_end());
                summary.read(&line);
            }
            Err(RecvTimeoutError::Disconnected) if summary.has_ended() => return Ok(summary),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine ended early: {summary}"),
            Err(RecvTimeoutError::Timeout) if left <= SILENCE => {
                bail!("not done after {} s: {summary}", LIMIT.as_secs())
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!("nothing heard for {} s: {summary}", SILENCE.as_secs())
            }
        }
    }
}
