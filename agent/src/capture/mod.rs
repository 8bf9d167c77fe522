//! Capture: loads the kernel programs, attaches them, and drains what they counted.

mod batch;
mod before;
mod bpf;
mod callers;
mod clock;
mod generations;
mod hooks;
mod iterators;
mod losses;
mod memory;
mod object;
mod observation;
mod offsets;
mod packets;
mod peers;
mod probe;
mod skipped;
mod slot;

use std::{
    collections::HashMap as StdHashMap,
    fmt,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use agent_common::{
    loss::Loss,
    name,
    types::{self, FlowEvent, FlowKey, FlowValue},
};
use aya::{
    Ebpf,
    maps::{Array, ArrayOfMaps, HashMap, Map, MapData, PerCpuArray, RingBuf},
};
use flow::{
    time::Timestamp,
    wire::{SCTP_NOT_CAPTURED, UDP_NOT_CAPTURED, UDP_OPEN_BEFORE_UNKNOWN, Window},
};

use self::{
    before::Search,
    callers::Callers,
    generations::Generations,
    hooks::Loaded,
    losses::LossCounters,
    observation::{observation, single},
    peers::Peers,
    skipped::SkippedRuns,
};
pub(crate) use self::{clock::Clock, losses::lose};
pub use self::{
    hooks::{Hooks, tracepoint},
    losses::Losses,
    object::{embedded_object, is_built},
    observation::{Event, Observation},
    offsets::KERNEL_BTF,
    packets::PacketError,
    probe::{Probe, probe},
};

/// What becomes of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// They are counted by flow.
    Flows,
    /// Each is reported when it is made and when it ends, as long as the ring buffer has room.
    Connections,
}

/// How to capture.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which form of the hooks to use; `None` takes what the kernel has.
    pub hooks: Option<Hooks>,
    /// Whether connections are told apart.
    pub mode: Mode,
    /// Capacity of each generation of the map of flows, in entries.
    pub map_entries: u32,
    /// Size of the overflow ring, in bytes; a power of two and a multiple of the page size.
    pub ring_bytes: u32,
    /// The folder of the cgroup whose processes' packets are to be seen. If it is not of the v2 hierarchy, neither UDP nor SCTP
    /// is captured.
    pub cgroup: PathBuf,
}

/// Why capturing is not possible, or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel object does not load.
    #[error("cannot load the kernel object")]
    Load(#[source] aya::EbpfError),
    /// The object and the agent do not belong together.
    #[error("the kernel object has no {0}")]
    Missing(&'static str),
    /// A map could not be opened, read or written.
    #[error("map {map}")]
    Map {
        /// The map's name in the object.
        map: &'static str,
        /// What the kernel said.
        source: aya::maps::MapError,
    },
    /// A drain failed half-way; the next one reports what this one got.
    #[error("cannot drain the map of flows")]
    Drain(#[source] std::io::Error),
    /// The map of UDP peers or that of SCTP calls cannot be read or cut.
    #[error("cannot go through the map of peers")]
    Peers(#[source] std::io::Error),
    /// The hooks cannot be attached.
    #[error(transparent)]
    Attach(#[from] hooks::AttachError),
    /// The clocks cannot be read.
    #[error("cannot read the clock")]
    Clock(#[source] nix::Error),
    /// A file descriptor could not be duplicated.
    #[error("cannot duplicate a map's descriptor")]
    Descriptor(#[source] std::io::Error),
}

/// The result of one drain.
pub struct Drained {
    /// From the last drain to this one.
    pub window: Window,
    /// What was counted in it. Made one by one, because each is several times what the kernel has of it, and there may be as
    /// many as its map has entries.
    pub observations: Box<dyn Iterator<Item = Observation>>,
    /// What was lost in it.
    pub losses: Losses,
}

/// What was taken out between two drains.
pub struct Portion {
    /// It: from the last drain until now, and nothing lost, which the next drain tells.
    pub drained: Drained,
    /// Whether there may be more.
    pub is_full: bool,
}

/// What happened to single connections is taken out in portions of this many: as a record each is several times as large as in
/// the ring.
const PORTION: usize = 4_096;

/// The most that a drain takes out where nothing is taken out before it. What is left stays in the ring for the next one.
const PORTIONS: usize = 16;

/// There once the kernel has loaded its SCTP.
pub const SCTP: &str = "/proc/net/sctp";

type FlowMap = HashMap<MapData, FlowKey, FlowValue>;

/// The running capture. Dropping it detaches the programs; so does the kernel when the process ends in any other way,
/// because nothing is pinned.
pub struct Capture {
    // The programs' links live in it.
    _ebpf: Ebpf,
    hooks: Hooks,
    mode: Mode,
    /// `None` if neither UDP nor SCTP is captured.
    peers: Option<Peers>,
    generations: Generations<Generation>,
    active_map: ArrayOfMaps<MapData, FlowMap>,
    overflow: RingBuf<MapData>,
    /// How many events the ring holds.
    overflow_room: usize,
    connections: RingBuf<MapData>,
    /// Single connections taken out of the ring but not reported yet.
    events: Vec<types::ConnectionEvent>,
    losses: LossCounters,
    /// To be reported with the first drain.
    at_start: Losses,
    /// Taken out of the maps but not reported yet; what a drain that failed half-way got stays here.
    taken: Vec<(FlowKey, FlowValue)>,
    callers: Callers,
    messages: Option<aya_log::EbpfLogger<&'static dyn log::Log>>,
    window_start: Timestamp,
    ebb: memory::Ebb,
}

/// One of the two maps of flows, and a descriptor of it for the batch calls.
struct Generation {
    map: FlowMap,
    fd: OwnedFd,
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture")
            .field("hooks", &self.hooks)
            .finish_non_exhaustive()
    }
}

impl Capture {
    /// Loads the programs and attaches them.
    ///
    /// # Errors
    /// If the kernel refuses; the error says which capability, file or feature is missing where that can be told.
    pub fn start(options: &Options) -> Result<Self, Error> {
        let Loaded {
            mut ebpf,
            hooks,
            iterators,
            names_netns,
        } = hooks::load(options)?;
        let generations = Generations::new([generation(&mut ebpf, 0)?, generation(&mut ebpf, 1)?]);
        let mut active_map = ArrayOfMaps::try_from(take(&mut ebpf, name::ACTIVE_FLOWS)?)
            .map_err(map_error(name::ACTIVE_FLOWS))?;
        active_map
            .set(0, &generations.active().map, 0)
            .map_err(map_error(name::ACTIVE_FLOWS))?;
        let overflow = RingBuf::try_from(take(&mut ebpf, name::OVERFLOW)?)
            .map_err(map_error(name::OVERFLOW))?;
        let connections = RingBuf::try_from(take(&mut ebpf, name::CONNECTIONS)?)
            .map_err(map_error(name::CONNECTIONS))?;
        let losses = PerCpuArray::try_from(take(&mut ebpf, name::LOSSES)?)
            .map_err(map_error(name::LOSSES))?;
        let changes = PerCpuArray::try_from(take(&mut ebpf, name::CHANGES)?)
            .map_err(map_error(name::CHANGES))?;
        let messages = aya_log::EbpfLogger::init(&mut ebpf)
            .inspect_err(|error| tracing::debug!(%error, "no messages from the kernel programs"))
            .ok();
        let mut search = Search::start(&mut ebpf)?;
        let program = hooks::attach(&mut ebpf, hooks, options.mode)?;
        let skipped = SkippedRuns::new(changes, program).map_err(map_error(name::CHANGES))?;
        // Before the programs see packets, and again at once: what the first look knows of a socket they need from the
        // beginning, and of those that are made between the looks the first datagrams may pass unseen.
        let attached = packets::load(&mut ebpf, &options.cgroup).and_then(|cgroup| {
            search.datagrams(&mut ebpf, iterators);
            packets::attach(&mut ebpf, &cgroup)
        });
        search.datagrams(&mut ebpf, iterators);
        let peers = match attached {
            Ok(()) => {
                let map = descriptor(&take(&mut ebpf, name::PEERS)?, name::PEERS)?;
                let calls = descriptor(&take(&mut ebpf, name::SCTP_CALLS)?, name::SCTP_CALLS)?;
                let lack = Array::try_from(take(&mut ebpf, name::PEERS_LACK_ROOM)?)
                    .map_err(map_error(name::PEERS_LACK_ROOM))?;
                Some(Peers::new(map, calls, lack, options.map_entries))
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "UDP is not captured");
                None
            }
        };
        let has_sctp = Path::new(SCTP).exists();
        let sees_sctp = has_sctp && peers.is_some();
        let found = search.run(&mut ebpf, iterators, names_netns, sees_sctp)?;
        let mut at_start = found.losses;
        if peers.is_none() {
            at_start.insert(UDP_NOT_CAPTURED.to_owned(), 1);
            if has_sctp {
                tracing::warn!("this kernel has SCTP, which is not captured either");
                at_start.insert(SCTP_NOT_CAPTURED.to_owned(), 1);
            }
        } else if !found.knows_datagrams {
            at_start.insert(UDP_OPEN_BEFORE_UNKNOWN.to_owned(), 1);
        }
        memory::give_back();
        // What is older than this was found, not seen to come about. Whoever adds up with what others saw goes by it.
        let window_start = Clock::read().map_err(Error::Clock)?.now();
        Ok(Self {
            _ebpf: ebpf,
            hooks,
            mode: options.mode,
            peers,
            generations,
            active_map,
            overflow,
            overflow_room: events_in(options.ring_bytes),
            connections,
            events: Vec::new(),
            losses: LossCounters::new(losses, skipped),
            at_start,
            taken: found.flows,
            callers: Callers::default(),
            messages,
            ebb: memory::Ebb::default(),
            window_start,
        })
    }

    /// The form of the hooks in use.
    #[must_use]
    pub fn hooks(&self) -> Hooks {
        self.hooks
    }

    /// Whether UDP and SCTP are captured too.
    #[must_use]
    pub fn sees_packets(&self) -> bool {
        self.peers.is_some()
    }

    /// Takes out everything that was counted since the last drain. Each connection is in exactly one drain. What happened to
    /// single connections may be left for the next, unless this is the `last`.
    ///
    /// # Errors
    /// If a map cannot be read. Nothing is lost by that: what was read and what was not are both there for the next call.
    pub fn drain(&mut self, last: bool) -> Result<Drained, Error> {
        let mut empty = |generation: &Generation| {
            batch::take_all(generation.fd.as_fd(), &mut self.taken).map_err(Error::Drain)
        };
        // See `ACTIVE_FLOWS` in agent-ebpf.
        let activate = |generation: &Generation| {
            let set = self.active_map.set(0, &generation.map, 0);
            set.map_err(map_error(name::ACTIVE_FLOWS))
        };
        self.generations.swap(activate, &mut empty)?;
        let clock = Clock::read().map_err(Error::Clock)?;
        self.generations.empty_idle(empty)?;
        self.drain_overflow();
        self.take_events(if last { usize::MAX } else { PORTIONS * PORTION });
        if let Some(peers) = &mut self.peers {
            peers.forget_silent(clock.monotonic_ns())?;
        }
        if let Some(messages) = &mut self.messages {
            messages.flush();
        }
        self.ebb.drained(self.taken.len() + self.events.len());

        let window = self.window(&clock);
        self.window_start = window.to;
        let mut losses = self.losses.since_last().map_err(map_error(name::LOSSES))?;
        for (reason, count) in std::mem::take(&mut self.at_start) {
            lose(&mut losses, &reason, count);
        }
        let forgotten = self.callers.settle(&mut self.taken);
        lose(&mut losses, Loss::ConnectOwnersFull.name(), forgotten);
        Ok(Drained {
            window,
            observations: Box::new(
                std::mem::take(&mut self.taken)
                    .into_iter()
                    .map(move |(key, value)| observation(&key, &value, &clock))
                    .chain(
                        std::mem::take(&mut self.events)
                            .into_iter()
                            .map(move |event| single(&event, &clock)),
                    ),
            ),
            losses,
        })
    }

    /// Whether single connections are to be taken out between two drains: their ring holds a fraction of a second's.
    #[must_use]
    pub fn tells_apart(&self) -> bool {
        self.mode == Mode::Connections
    }

    /// Takes out a portion of what happened to single connections, and nothing else. `None` if there is nothing.
    ///
    /// # Errors
    /// If the clock cannot be read.
    pub fn take_single(&mut self) -> Result<Option<Portion>, Error> {
        let clock = Clock::read().map_err(Error::Clock)?;
        self.take_events(PORTION);
        if self.events.is_empty() {
            return Ok(None);
        }
        let events = std::mem::take(&mut self.events);
        Ok(Some(Portion {
            is_full: events.len() == PORTION,
            drained: Drained {
                window: self.window(&clock),
                observations: Box::new(events.into_iter().map(move |event| single(&event, &clock))),
                losses: Losses::new(),
            },
        }))
    }

    fn take_events(&mut self, most: usize) {
        while self.events.len() < most
            && let Some(item) = self.connections.next()
        {
            self.events
                .extend(object::read_event::<types::ConnectionEvent>(&item));
        }
    }

    /// Since the last drain. The time of day may have been set back meanwhile.
    fn window(&self, clock: &Clock) -> Window {
        let now = clock.now();
        Window {
            from: self.window_start.min(now),
            to: now,
        }
    }

    fn drain_overflow(&mut self) {
        let overflow = &mut self.overflow;
        let events = std::iter::from_fn(|| {
            let item = overflow.next()?;
            Some(object::read_event::<FlowEvent>(&item))
        });
        self.taken.extend(add_up(events, self.overflow_room));
    }
}

/// Adds up what goes through the ring, which has one event a connection. No more than there is room for in it at once: programs
/// may fill it as fast as it is emptied.
fn add_up(
    events: impl Iterator<Item = Option<FlowEvent>>,
    most: usize,
) -> StdHashMap<FlowKey, FlowValue> {
    let mut sums: StdHashMap<FlowKey, FlowValue> = StdHashMap::new();
    for FlowEvent { key, value } in events.take(most).flatten() {
        sums.entry(key)
            .and_modify(|sum| {
                if sum.pid == 0 {
                    (sum.pid, sum.comm) = (value.pid, value.comm);
                }
                // What only names the owner has no times.
                if sum.count == 0 {
                    sum.first_ns = value.first_ns;
                }
                sum.count += value.count;
                sum.last_ns = sum.last_ns.max(value.last_ns);
            })
            .or_insert(value);
    }
    sums
}

/// Events that a ring of so many bytes has room for; each has a head (`BPF_RINGBUF_HDR_SZ`).
fn events_in(ring_bytes: u32) -> usize {
    ring_bytes as usize / (8 + size_of::<FlowEvent>())
}

fn generation(ebpf: &mut Ebpf, index: usize) -> Result<Generation, Error> {
    let name = name::FLOWS[index];
    let map = take(ebpf, name)?;
    let fd = descriptor(&map, name)?;
    let map = FlowMap::try_from(map).map_err(map_error(name))?;
    Ok(Generation { map, fd })
}

/// A descriptor of a hash map of its own, for the batch calls.
fn descriptor(map: &Map, name: &'static str) -> Result<OwnedFd, Error> {
    match map {
        Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned(),
        _ => return Err(Error::Missing(name)),
    }
    .map_err(Error::Descriptor)
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, Error> {
    ebpf.take_map(name).ok_or(Error::Missing(name))
}

fn map_error(map: &'static str) -> impl Fn(aya::maps::MapError) -> Error {
    move |source| Error::Map { map, source }
}

#[cfg(test)]
mod tests {
    use agent_common::{
        address::Address,
        types::{Comm, IPPROTO_UDP, kind},
    };

    use super::*;

    #[test]
    fn a_ring_that_is_filled_all_the_time_is_left_some_time() {
        let key = FlowKey {
            local: Address::UNSPECIFIED,
            remote: Address::UNSPECIFIED,
            cgroup: 1,
            netns: 1,
            port: 80,
            protocol: IPPROTO_UDP,
            kind: kind::CONNECTED,
        };
        let value = FlowValue {
            count: 1,
            first_ns: 1,
            last_ns: 1,
            pid: 1,
            padding: 0,
            comm: Comm::UNKNOWN,
        };
        let room = events_in(4096);
        assert_eq!(room, 39);
        let sums = add_up(std::iter::repeat(Some(FlowEvent { key, value })), room);
        assert_eq!(sums[&key].count, 39);
    }
}
