//! The first program of a machine that tests another kernel (`cargo xtask test --vm`): makes the system that the lab expects,
//! runs the end-to-end tests whose names contain one of its arguments, several at the same time because most of their time is
//! waiting, and ends the machine.
#![forbid(unsafe_code)]

use std::{
    convert::Infallible,
    env,
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, ExitStatus},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
        wait::{WaitStatus, wait},
    },
    unistd::Pid,
};

/// Kind and place of what is mounted, in this order.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("tracefs", "/sys/kernel/tracing"),
];

/// Where the kernel's modules are, by names in the order in which they are to be loaded.
const MODULES: &str = "/modules";

/// Where our programs are.
const PROGRAMS: &str = "/lab";

/// What the lab is told of the machine (`lab::pace`): by software emulation everything takes ten times as long and longer, on
/// a busy host more. Going through maps of the usual size takes milliseconds.
const PACE: [(&str, &str); 3] = [
    ("LAB_PATIENCE", "20"),
    ("LAB_SHARE", "125"),
    ("LAB_MAP_ENTRIES", "4096"),
];

/// How many tests run at the same time.
const AT_ONCE: &str = "4";

/// Files that a process may have open: a server in the lab keeps thousands of connections.
const FILES: u64 = 65_536;

fn main() {
    let filters: Vec<String> = env::args().skip(1).collect();
    let verdict = match prepare().and_then(|()| run(&filters)) {
        Ok(true) => "passed",
        Ok(false) => "failed",
        Err(error) => {
            eprintln!("vm-init: {error:#}");
            "failed"
        }
    };
    eprintln!("vm-init: {verdict}");
    let Err(error) = end();
    eprintln!("vm-init: the machine does not end: {error}");
}

fn prepare() -> Result<()> {
    let nothing: Option<&str> = None;
    for (kind, place) in MOUNTS {
        let made = mount(Some(kind), place, Some(kind), MsFlags::empty(), nothing);
        // Kernels with CONFIG_DEVTMPFS_MOUNT have done that one.
        if made != Err(Errno::EBUSY) {
            made.with_context(|| place.to_owned())?;
        }
    }
    let mut modules: Vec<_> = fs::read_dir(MODULES)
        .context(MODULES)?
        .collect::<Result<_, _>>()?;
    modules.sort_by_key(fs::DirEntry::file_name);
    for module in modules {
        load(&module.path()).with_context(|| module.path().display().to_string())?;
    }
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).context("the number of open files")?;
    let status = command("/bin/ip")
        .args(["link", "set", "lo", "up"])
        .status()?;
    anyhow::ensure!(status.success(), "ip link set lo up: {status}");
    let version = fs::read_to_string("/proc/version").unwrap_or_default();
    let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = uptime.split(' ').next().unwrap_or_default();
    eprintln!("vm-init: ready after {seconds} s: {}", version.trim_end());
    Ok(())
}

fn load(module: &Path) -> Result<()> {
    match finit_module(File::open(module)?, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", "/bin")
        .env("RUST_BACKTRACE", "1")
        .env("MICROSHIELD_BIN_DIR", PROGRAMS)
        .envs(PACE);
    command
}

/// Whether all tests have passed.
fn run(filters: &[String]) -> Result<bool> {
    let program = format!("{PROGRAMS}/e2e");
    let child = command(&program)
        .args(["--test-threads", AT_ONCE])
        .env("LAB_TESTS", filters.join(","))
        .spawn()
        .context(program)?;
    let status = wait_for(Pid::from_raw(child.id().cast_signed()))?;
    Ok(status.success())
}

/// Waits for a process; all that have lost their parents come to their end here too.
fn wait_for(child: Pid) -> Result<ExitStatus> {
    loop {
        match wait()? {
            WaitStatus::Exited(pid, code) if pid == child => {
                return Ok(ExitStatus::from_raw(code << 8));
            }
            WaitStatus::Signaled(pid, signal, _) if pid == child => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            _ => {}
        }
    }
}

/// Returns only if it cannot be.
fn end() -> Result<Infallible, Errno> {
    reboot(RebootMode::RB_AUTOBOOT)
}
