//! What of the programs this kernel takes from this process: they are loaded and attached for a moment.

use std::{fs, path::Path};

use flow::causes::in_full;

use super::{Hooks, Mode, Options, hooks, object::is_built, packets};

/// What the kernel said to each part.
#[derive(Debug)]
pub struct Probe {
    /// To the tracepoint programs, in either form.
    pub hooks: [(Hooks, Result<(), String>); 2],
    /// To those that see packets, of UDP and SCTP; `None` if no form of hooks was loaded.
    pub packets: Option<Result<(), String>>,
    /// Whether it lists what is older than the agent, by iterators over open files; `None` likewise.
    pub iterators: Option<bool>,
    /// What the maps take of the kernel's memory, in bytes; 0 if nothing was loaded.
    pub map_bytes: u64,
}

impl Probe {
    /// The form that an agent would take.
    #[must_use]
    pub fn best(&self) -> Option<Hooks> {
        let mut taken = self.hooks.iter().filter(|(_, result)| result.is_ok());
        taken.next().map(|(hooks, _)| *hooks)
    }
}

/// Loads and attaches each form of hooks, one after the other. What they would count in that moment goes nowhere, and an
/// agent that runs on the node is not disturbed.
///
/// `None` if this agent was built without its kernel programs.
#[must_use]
pub fn probe(cgroup: &Path, map_entries: u32, ring_bytes: u32) -> Option<Probe> {
    if !is_built() {
        return None;
    }
    let mut probe = Probe {
        hooks: [Hooks::Btf, Hooks::Classic].map(|hooks| (hooks, Ok(()))),
        packets: None,
        iterators: None,
        map_bytes: 0,
    };
    for (form, result) in &mut probe.hooks {
        let options = Options {
            hooks: Some(*form),
            mode: Mode::Flows,
            map_entries,
            ring_bytes,
            cgroup: cgroup.to_owned(),
        };
        let mut loaded = match hooks::load(&options) {
            Ok(loaded) => loaded,
            Err(error) => {
                *result = Err(in_full(&error));
                continue;
            }
        };
        if let Err(error) = hooks::attach(&mut loaded.ebpf, loaded.hooks, options.mode) {
            *result = Err(in_full(&error));
            continue;
        }
        if probe.packets.is_none() {
            probe.map_bytes = map_bytes();
            probe.iterators = Some(loaded.iterators.connections && loaded.iterators.datagrams);
            let attached = packets::load(&mut loaded.ebpf, cgroup)
                .and_then(|cgroup| packets::attach(&mut loaded.ebpf, &cgroup));
            probe.packets = Some(attached.map_err(|error| in_full(&error)));
        }
    }
    Some(probe)
}

/// The kernel's memory for the maps that this process has open (`bpf_map_show_fdinfo` in `kernel/bpf/syscall.c`).
fn map_bytes() -> u64 {
    let descriptors = fs::read_dir("/proc/self/fdinfo").into_iter().flatten();
    descriptors
        .flatten()
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .filter(|info| info.contains("map_type:"))
        .filter_map(|info| {
            let memory = info
                .lines()
                .find_map(|line| line.strip_prefix("memlock:"))?;
            memory.trim().parse::<u64>().ok()
        })
        .sum()
}
