//! `microshield-agent check`: what this node supports, found by trying it.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use comfy_table::{Table, presets::NOTHING};
use nix::{
    sys::{
        resource::{Resource, getrlimit},
        statfs::{CGROUP2_SUPER_MAGIC, statfs},
    },
    time::{ClockId, clock_gettime},
};
use serde_json::{Value, json};

use crate::{
    args::CheckArgs,
    capabilities::{Effective, NEEDED},
    capture::{self, Hooks, Probe},
    identity::{Mounts, knows_the_node_s_ids, sees_the_node_s_processes},
};

/// The oldest kernel: the maps of a map of maps may differ in size since then.
const OLDEST: (u32, u32) = (5, 10);

/// Maps count as the memory of their maker's cgroup since then; before, they are bounded by `RLIMIT_MEMLOCK`.
const CHARGED_TO_CGROUPS: (u32, u32) = (5, 11);

/// How well something is supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Ok,
    /// Capturing goes on without it, with less.
    Limited,
    /// There is no capturing without it.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// How well it is supported.
    pub state: State,
    /// What is there, and what follows from it.
    pub found: String,
}

/// Everything that was looked at.
#[derive(Debug)]
pub struct Report {
    /// In the order in which one depends on the other.
    pub findings: Vec<Finding>,
    /// The best hooks that can be used; `None` if nothing can be captured.
    pub hooks: Option<Hooks>,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }
}

/// Looks at everything, and prints it. Whether this node can be captured.
///
/// # Errors
/// If it cannot be printed.
pub fn run(args: &CheckArgs) -> io::Result<bool> {
    let report = Report::gather(args);
    let mut to = io::stdout().lock();
    if args.json {
        writeln!(to, "{:#}", report.json())?;
    } else {
        write!(to, "{}", report.text())?;
    }
    to.flush()?;
    Ok(report.hooks.is_some())
}

impl Report {
    /// Looks at everything.
    #[must_use]
    pub fn gather(args: &CheckArgs) -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let kernel = kernel.trim();
        let mut findings = vec![kernel_version(kernel), types()];
        let (cgroup_root, cgroup) = cgroup(args.cgroup_root.as_deref());
        findings.extend([cgroup, tracefs()]);
        let effective = Effective::read();
        let permitted = match &effective {
            Ok(effective) => effective.missing().all(|missing| !missing.required),
            // Then the kernel says.
            Err(_) => true,
        };
        findings.extend(NEEDED.iter().map(|needed| {
            let has = effective
                .as_ref()
                .is_ok_and(|effective| effective.has(needed));
            let (state, found) = match (has, needed.required) {
                (true, _) => (State::Ok, needed.needed_for.to_owned()),
                (false, true) => (State::Missing, needed.lost.to_owned()),
                (false, false) => (State::Limited, needed.lost.to_owned()),
            };
            Finding {
                what: needed.name,
                state,
                found,
            }
        }));
        let probe = permitted
            .then(|| capture::probe(&cgroup_root, args.map_entries, args.ring_bytes))
            .flatten();
        let hooks = probe.as_ref().and_then(Probe::best);
        match &probe {
            Some(probe) => findings.extend(tried(probe, args.map_entries)),
            None => findings.push(Finding {
                what: "hooks",
                state: State::Missing,
                found: if capture::is_built() {
                    "not tried: capabilities are missing".to_owned()
                } else {
                    "this agent was built without its kernel programs".to_owned()
                },
            }),
        }
        findings.extend(locked_memory(kernel));
        findings.extend([process_ids(), clock()]);
        if Path::new(capture::SCTP).exists() {
            findings.extend(probe.as_ref().and_then(sctp));
        }
        Self { findings, hooks }
    }

    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        for finding in &self.findings {
            table.add_row([finding.what, finding.state.name(), &finding.found]);
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let verdict = match self.hooks {
            Some(hooks) => format!("This node can be captured, by {hooks} hooks."),
            None => "This node cannot be captured.".to_owned(),
        };
        format!("{}\n\n{verdict}\n", table.trim_fmt())
    }

    fn json(&self) -> Value {
        let findings = self.findings.iter().map(|finding| {
            json!({
                "what": finding.what,
                "state": finding.state.name(),
                "found": finding.found,
            })
        });
        json!({
            "capture": self.hooks.is_some(),
            "hooks": self.hooks.map(|hooks| hooks.to_string()),
            "findings": findings.collect::<Vec<_>>(),
        })
    }
}

/// Of a kernel that has it.
fn sctp(probe: &Probe) -> Option<Finding> {
    let (state, found) = match probe.packets.as_ref()? {
        Ok(()) => (State::Ok, "this kernel has it; seen by the programs of UDP"),
        Err(_) => (State::Limited, "this kernel has it, and it is not captured"),
    };
    Some(Finding {
        what: "SCTP",
        state,
        found: found.to_owned(),
    })
}

fn kernel_version(release: &str) -> Finding {
    let (major, minor) = OLDEST;
    let oldest = format!("{major}.{minor} is the oldest");
    let (state, found) = match version(release) {
        Some(version) if version >= OLDEST => (State::Ok, format!("{release}; {oldest}")),
        // A vendor may have put the newer kernel's BPF into it; the hooks tell.
        Some(_) => (State::Limited, format!("{release}, and {oldest}")),
        None => (State::Limited, "not known".to_owned()),
    };
    Finding {
        what: "kernel",
        state,
        found: format!("Linux {found}"),
    }
}

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn types() -> Finding {
    let there = Path::new(capture::KERNEL_BTF).exists();
    Finding {
        what: "kernel types",
        state: if there { State::Ok } else { State::Limited },
        found: if there {
            format!("{} (BTF)", capture::KERNEL_BTF)
        } else {
            format!(
                "no {} (CONFIG_DEBUG_INFO_BTF): classic hooks, and who accepts is known from new listeners only",
                capture::KERNEL_BTF
            )
        },
    }
}

/// The folder of cgroups that an agent would look at, and what it is.
fn cgroup(told: Option<&Path>) -> (PathBuf, Finding) {
    let mounts = Mounts::read();
    let root = match (told, &mounts) {
        (Some(root), _) => Ok(root.to_owned()),
        (None, Ok(mounts)) => Ok(mounts.root.clone()),
        (None, Err(error)) => Err(error.to_string()),
    };
    let is_v2 = |root: &PathBuf| {
        statfs(root.as_path()).map(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC)
    };
    let hybrid = mounts.is_ok_and(|mounts| mounts.hybrid);
    let (state, found) = match root.as_ref().map(|root| (root.display(), is_v2(root))) {
        Ok((root, Ok(true))) if hybrid => (State::Ok, format!("{root}, beside version 1")),
        Ok((root, Ok(true))) => (State::Ok, root.to_string()),
        Ok((root, Ok(false))) => (
            State::Limited,
            format!("{root} is not of version 2: UDP and SCTP are not captured"),
        ),
        Ok((root, Err(error))) => (State::Missing, format!("{root}: {error}")),
        Err(error) => (State::Missing, error.clone()),
    };
    let finding = Finding {
        what: "cgroup v2",
        state,
        found,
    };
    (root.unwrap_or_default(), finding)
}

fn tracefs() -> Finding {
    let tracepoint = capture::tracepoint();
    Finding {
        what: "tracefs",
        state: if tracepoint.is_some() {
            State::Ok
        } else {
            State::Limited
        },
        found: match tracepoint {
            Some(path) => path.display().to_string(),
            None => "not mounted, or not for this process: classic hooks need it".to_owned(),
        },
    }
}

/// What became of loading and attaching.
fn tried(probe: &Probe, map_entries: u32) -> Vec<Finding> {
    let best = probe.best();
    let mut findings = Vec::new();
    for (hooks, result) in &probe.hooks {
        let (state, found) = match result {
            Ok(()) => (State::Ok, "loaded and attached".to_owned()),
            Err(error) if best.is_some() => (State::Limited, error.clone()),
            Err(error) => (State::Missing, error.clone()),
        };
        findings.push(Finding {
            what: match hooks {
                Hooks::Btf => "hooks: btf",
                Hooks::Classic => "hooks: classic",
            },
            state,
            found,
        });
    }
    if let Some(udp) = &probe.packets {
        findings.push(Finding {
            what: "UDP",
            state: if udp.is_ok() {
                State::Ok
            } else {
                State::Limited
            },
            found: match udp {
                Ok(()) => "loaded and attached".to_owned(),
                Err(error) => format!("not captured: {error}"),
            },
        });
    }
    if let Some(lists) = probe.iterators {
        findings.push(Finding {
            what: "open before",
            state: if lists { State::Ok } else { State::Limited },
            found: if lists {
                "the kernel lists what is older than the agent".to_owned()
            } else {
                "what is older than the agent is read from /proc, but for UDP: in conversations that are under way, who has \
                 spoken first is not known"
                    .to_owned()
            },
        });
    }
    if best.is_some() {
        findings.push(Finding {
            what: "memory",
            state: State::Ok,
            found: format!(
                "{:.1} MiB for the maps, with --map-entries {map_entries}",
                probe.map_bytes as f64 / f64::from(1 << 20)
            ),
        });
    }
    findings
}

/// The bound on maps, on kernels that have it.
fn locked_memory(kernel: &str) -> Option<Finding> {
    if version(kernel)? >= CHARGED_TO_CGROUPS {
        return None;
    }
    let (soft, _hard) = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    Some(Finding {
        what: "RLIMIT_MEMLOCK",
        state: if soft >= 64 << 20 {
            State::Ok
        } else {
            State::Limited
        },
        found: format!("{} KiB bound the maps before Linux 5.11", soft >> 10),
    })
}

fn process_ids() -> Finding {
    let node_s = knows_the_node_s_ids();
    Finding {
        what: "process ids",
        state: if node_s { State::Ok } else { State::Limited },
        found: if node_s {
            "the node's own".to_owned()
        } else if sees_the_node_s_processes() {
            "of the node, which is a container itself: those in records name no process here, and on hybrid nodes pods without \
             a cgroup of version 2 are known by address only"
                .to_owned()
        } else {
            "of a namespace: those in records name no process here, what was open before the agent started is not found, and \
             on hybrid nodes pods without a cgroup of version 2 are known by address only (hostPID is missing?)"
                .to_owned()
        },
    }
}

fn clock() -> Finding {
    let read = |clock| clock_gettime(clock).map(Duration::from);
    let (state, found) = match (
        read(ClockId::CLOCK_MONOTONIC),
        read(ClockId::CLOCK_BOOTTIME),
    ) {
        (Ok(awake), Ok(since_boot)) => (
            State::Ok,
            format!(
                "CLOCK_MONOTONIC; {} s of the {} s since boot were spent in suspend",
                since_boot.saturating_sub(awake).as_secs(),
                since_boot.as_secs()
            ),
        ),
        (Err(error), _) | (_, Err(error)) => (State::Limited, error.to_string()),
    };
    Finding {
        what: "clock",
        state,
        found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (release, wanted) in [
            ("6.18.5-cloud", Some((6, 18))),
            ("5.10.0-28-amd64", Some((5, 10))),
            ("4.18.0-553.el8_10.x86_64", Some((4, 18))),
            ("6", None),
            ("", None),
        ] {
            assert_eq!(version(release), wanted, "{release}");
        }
        let state = |release| kernel_version(release).state;
        assert_eq!(state("5.10.1"), State::Ok);
        assert_eq!(state("5.9.16"), State::Limited);
    }

    #[test]
    fn what_was_refused_is_limited_while_another_form_is_there() {
        let mut probe = Probe {
            hooks: [
                (Hooks::Btf, Err("no types".to_owned())),
                (Hooks::Classic, Ok(())),
            ],
            packets: Some(Err("no cgroup".to_owned())),
            iterators: Some(false),
            map_bytes: 33 << 20,
        };
        let states = |probe: &Probe| -> Vec<(&str, State)> {
            let findings = tried(probe, 65_536);
            findings.iter().map(|it| (it.what, it.state)).collect()
        };
        assert_eq!(
            states(&probe),
            [
                ("hooks: btf", State::Limited),
                ("hooks: classic", State::Ok),
                ("UDP", State::Limited),
                ("open before", State::Limited),
                ("memory", State::Ok),
            ]
        );
        assert_eq!(probe.best(), Some(Hooks::Classic));
        assert_eq!(sctp(&probe).map(|it| it.state), Some(State::Limited));
        probe.hooks[1].1 = Err("no tracefs".to_owned());
        probe.packets = Some(Ok(()));
        assert_eq!(sctp(&probe).map(|it| it.state), Some(State::Ok));
        (probe.packets, probe.iterators) = (None, None);
        assert!(sctp(&probe).is_none());
        assert_eq!(
            states(&probe),
            [
                ("hooks: btf", State::Missing),
                ("hooks: classic", State::Missing)
            ]
        );
        assert_eq!(probe.best(), None);
    }

    #[test]
    fn the_report_says_so_in_either_form() {
        let report = Report {
            findings: vec![Finding {
                what: "kernel",
                state: State::Ok,
                found: "Linux 6.18".to_owned(),
            }],
            hooks: None,
        };
        assert_eq!(
            report.text(),
            "kernel  ok  Linux 6.18\n\nThis node cannot be captured.\n"
        );
        assert_eq!(report.json()["capture"], false);
        assert_eq!(report.json()["findings"][0]["state"], "ok");
    }
}
