//! Sockets that are older than the hooks: found once, counted as the hooks count.
//!
//! While they are looked for the hooks remember the connections that they count (`WITNESSED`), so that none is counted
//! twice: see `agent_ebpf::before`. Where the kernel cannot run its iterators `/proc` is read ([`crate::proc_sockets`]).

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    time::Instant,
};

use agent_common::{
    loss::Loss,
    name,
    sctp::IPPROTO_SCTP,
    types::{Comm, Connection, FlowKey, FlowValue, IPPROTO_TCP, ListenerKey, Owner, kind},
};
use aya::{
    Ebpf,
    maps::{ArrayOfMaps, HashMap, Map, MapData, MapError},
    programs::{Iter, ProgramError},
};

use super::{
    Error, Losses, clock,
    hooks::Iterators,
    iterators::{found, iterate, iterator, run},
    lose, map_error, slot, take,
};
use crate::{
    identity::{Mounts, sees_the_node_s_processes},
    proc_sockets::{CgroupIds, Found, Progress, Transport, Walk},
};

/// Connections that the hooks may count while older ones are looked for, for which there is room at least.
const WITNESSES: u32 = 65_536;

/// Room for no more than this many, which takes some 500 MB.
const MOST_WITNESSES: u32 = 1 << 22;

/// The reason under which is counted what could not be looked into: processes, network namespaces, or everything.
pub(super) const UNREAD: &str = "open_before_unread";

/// The same for connections that were found and for which there was no room, see `Loss::OpenBefore`.
const LEFT_OUT: &str = "open_before";

/// Flag of an update that makes entries and changes none.
const BPF_NOEXIST: u64 = 1;

type Witnessed = HashMap<MapData, Connection, u8>;

/// What has to be known before the hooks are attached, so that they say which connections they count.
pub(super) struct Search {
    witnessed: Witnessed,
    active: ArrayOfMaps<MapData, Witnessed>,
    active_fd: OwnedFd,
    started: Instant,
    /// Whether each look at UDP sockets has found what there is.
    knows_datagrams: bool,
}

/// What was found beside that which lies in the maps.
#[derive(Debug, Default)]
pub(super) struct Older {
    pub(super) flows: Vec<(FlowKey, FlowValue)>,
    pub(super) losses: Losses,
    /// Whether the programs that see datagrams know which sockets are older.
    pub(super) knows_datagrams: bool,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("the kernel has no iterator that leads to UDP sockets")]
struct NoIterator;

/// Room for every TCP socket that there is, and for those that are made meanwhile.
pub(super) fn witnesses() -> u32 {
    let text = fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    allocated(&text)
        .unwrap_or(WITNESSES)
        .saturating_add(WITNESSES)
        .min(MOST_WITNESSES)
}

/// `alloc` in the line `TCP: inuse 5 orphan 0 tw 0 alloc 8 mem 1`: sockets of all network namespaces and of IPv6 too.
fn allocated(sockstat: &str) -> Option<u32> {
    let mut fields = sockstat
        .lines()
        .find_map(|line| line.strip_prefix("TCP:"))?
        .split_ascii_whitespace();
    fields.find(|field| *field == "alloc")?;
    fields.next()?.parse().ok()
}

impl Search {
    /// To be called before the hooks are attached.
    pub(super) fn start(ebpf: &mut Ebpf) -> Result<Self, Error> {
        let witnessed = Witnessed::try_from(take(ebpf, name::WITNESSED)?)
            .map_err(map_error(name::WITNESSED))?;
        let active = take(ebpf, name::ACTIVE_WITNESSED)?;
        let active_fd = match &active {
            Map::ArrayOfMaps(data) => data.fd().as_fd().try_clone_to_owned(),
            _ => return Err(Error::Missing(name::ACTIVE_WITNESSED)),
        }
        .map_err(Error::Descriptor)?;
        let active = ArrayOfMaps::try_from(active).map_err(map_error(name::ACTIVE_WITNESSED))?;
        let mut search = Self {
            witnessed,
            active,
            active_fd,
            started: Instant::now(),
            knows_datagrams: true,
        };
        search.remember()?;
        Ok(search)
    }

    /// Tells the UDP programs of sockets that are older than they are.
    pub(super) fn datagrams(&mut self, ebpf: &mut Ebpf, iterators: Iterators) {
        let looked = iterators
            .datagrams
            .then(|| run(ebpf, name::OPEN_DATAGRAMS, &mut Progress::start()));
        let error = match &looked {
            Some(Ok(())) => return,
            Some(Err(error)) => error as &dyn std::error::Error,
            None => &NoIterator as &dyn std::error::Error,
        };
        if std::mem::replace(&mut self.knows_datagrams, false) {
            tracing::error!(
                error,
                "of UDP conversations that are under way, who spoke first is not known"
            );
        }
    }

    /// To be called when they are attached: finds what is older, and ends the remembering.
    pub(super) fn run(
        mut self,
        ebpf: &mut Ebpf,
        iterators: Iterators,
        names_netns: bool,
        sees_sctp: bool,
    ) -> Result<Older, Error> {
        // Like every update of such a map it returns when all programs have ended that were running, and so every
        // state change whose tracepoint was passed before the hooks sat on it.
        self.remember()?;
        let mut older = Older {
            knows_datagrams: self.knows_datagrams,
            ..Older::default()
        };
        if !sees_the_node_s_processes() {
            tracing::error!(
                "this process sees no others (is hostPID missing?): what was open before is not known"
            );
            lose(&mut older.losses, UNREAD, 1);
            older.knows_datagrams = false;
        }
        let mut by = "iterators";
        let done = match iterators.connections.then(|| iterate(ebpf, &mut older)) {
            Some(Ok(found)) => Some((found.listeners, found.connections)),
            Some(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the kernel does not iterate, reading /proc");
                None
            }
            None => None,
        };
        let (listeners, connections) = match done {
            Some(counts) => counts,
            None => {
                by = "/proc";
                self.read_proc(ebpf, names_netns, &mut older)?
            }
        };
        let associations = if sees_sctp {
            self.read_associations(&mut older)?
        } else {
            0
        };
        let sockets = found(ebpf).map_err(map_error(name::OPEN_BEFORE))?.datagrams;
        for program in [
            name::OPEN_LISTENERS,
            name::OPEN_CONNECTIONS,
            name::OPEN_DATAGRAMS,
        ] {
            match iterator(ebpf, program).and_then(Iter::unload) {
                Ok(()) | Err(ProgramError::NotLoaded) => {}
                Err(error) => tracing::debug!(%error, program, "not unloaded"),
            }
        }
        slot::clear(self.active_fd.as_fd(), 0).map_err(|io_error| {
            map_error(name::ACTIVE_WITNESSED)(MapError::SyscallError(aya::sys::SyscallError {
                call: "bpf_map_delete_elem",
                io_error,
            }))
        })?;
        let milliseconds = self.started.elapsed().as_millis();
        // Looked for twice.
        let udp_sockets = sockets / 2;
        tracing::info!(
            listeners,
            connections,
            udp_sockets,
            associations,
            milliseconds,
            by,
            "open before"
        );
        Ok(older)
    }

    fn remember(&mut self) -> Result<(), Error> {
        self.active
            .set(0, &self.witnessed, 0)
            .map_err(map_error(name::ACTIVE_WITNESSED))
    }

    /// Does without iterators: returns how many listeners and connections were found.
    fn read_proc(
        &self,
        ebpf: &mut Ebpf,
        names_netns: bool,
        older: &mut Older,
    ) -> Result<(u64, u64), Error> {
        let found = walk(Transport::Tcp, older);
        let listeners = remember_listeners(ebpf, &found, names_netns, older)?;
        let connections = self.count(found, IPPROTO_TCP, names_netns, older)?;
        Ok((listeners, connections))
    }

    /// Counts SCTP's associations, which no iterator leads to. The programs for packets know no namespaces. Returns how many
    /// were counted.
    fn read_associations(&self, older: &mut Older) -> Result<u64, Error> {
        let found = walk(Transport::Sctp, older);
        self.count(found, IPPROTO_SCTP, false, older)
    }

    /// Counts what the hooks have not counted, and returns how many these are.
    fn count(
        &self,
        found: Found,
        protocol: u8,
        names_netns: bool,
        older: &mut Older,
    ) -> Result<u64, Error> {
        let before = older.flows.len();
        // After the tables were read: a connection that is in one, and is not witnessed now, was there before the hooks.
        let now_ns = clock::monotonic_ns().map_err(Error::Clock)?;
        for connection in found.connections {
            let mut ends = connection.ends;
            if !names_netns {
                ends.netns = 0;
            }
            match self.witnessed.get(&ends, 0) {
                Err(MapError::KeyNotFound) => {}
                Ok(_) => continue,
                Err(error) => return Err(map_error(name::WITNESSED)(error)),
            }
            let owner = connection.owner.as_ref();
            let key = FlowKey {
                local: ends.local,
                remote: ends.remote,
                cgroup: owner.map_or(0, |owner| owner.cgroup),
                netns: ends.netns,
                port: if connection.accepted {
                    ends.local_port
                } else {
                    ends.remote_port
                },
                protocol,
                kind: if connection.accepted {
                    kind::ACCEPTED
                } else {
                    kind::CONNECTED
                },
            };
            let value = FlowValue {
                count: 1,
                first_ns: now_ns,
                last_ns: now_ns,
                pid: owner.map_or(0, |owner| owner.pid),
                padding: 0,
                comm: owner.map_or(Comm::UNKNOWN, |owner| Comm::new(owner.comm.as_bytes())),
            };
            older.flows.push((key, value));
        }
        Ok((older.flows.len() - before) as u64)
    }
}

/// Looks at all namespaces and processes.
fn walk(transport: Transport, older: &mut Older) -> Found {
    let mount = Mounts::read().ok().map(|mounts| mounts.root);
    let walk = Walk::new(transport, PathBuf::from("/proc"), CgroupIds::new(mount));
    let found = walk.run().unwrap_or_else(|error| {
        tracing::error!(%error, "what was open before is not known");
        Found {
            unread: 1,
            ..Found::default()
        }
    });
    if found.ownerless > 0 {
        tracing::warn!(
            sockets = found.ownerless,
            "some processes let nobody look at their files (is CAP_SYS_PTRACE missing?): their sockets are named by address"
        );
    }
    lose(&mut older.losses, UNREAD, found.unread);
    lose(&mut older.losses, LEFT_OUT, found.left_out);
    found
}

/// Tells the hooks who listens. Those that do not know namespaces apart look for exact addresses only.
fn remember_listeners(
    ebpf: &mut Ebpf,
    found: &Found,
    names_netns: bool,
    older: &mut Older,
) -> Result<u64, Error> {
    let map = ebpf
        .map_mut(name::LISTENERS)
        .ok_or(Error::Missing(name::LISTENERS))?;
    let mut listeners: HashMap<_, ListenerKey, Owner> =
        HashMap::try_from(map).map_err(map_error(name::LISTENERS))?;
    let (mut count, mut lost) = (0, 0);
    for listener in &found.listeners {
        let Some(process) = &listener.owner else {
            continue;
        };
        let key = ListenerKey {
            address: listener.address,
            netns: if names_netns { listener.netns } else { 0 },
            port: listener.port,
            padding: 0,
        };
        let owner = Owner {
            cgroup: process.cgroup,
            socket: 0,
            pid: process.pid,
            padding: 0,
            comm: Comm::new(process.comm.as_bytes()),
        };
        match listeners.insert(key, owner, BPF_NOEXIST) {
            Ok(()) => count += 1,
            // The hooks know better.
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => {
                tracing::debug!(%error, "a listener's owner is not remembered");
                lost += 1;
            }
        }
    }
    lose(&mut older.losses, Loss::ListenersFull.name(), lost);
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_all_namespaces() {
        let text =
            "sockets: used 32\nTCP: inuse 12 orphan 0 tw 0 alloc 17 mem 0\nUDP: inuse 0 mem 0\n";
        assert_eq!(allocated(text), Some(17));
        assert_eq!(allocated("UDP: alloc 3\n"), None);
        assert_eq!(allocated(""), None);
    }
}
