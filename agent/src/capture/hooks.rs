//! Loading the object and attaching its programs, in the form that the kernel has.

use std::{
    fmt, fs, io,
    os::fd::{AsFd as _, AsRawFd as _, RawFd},
    path::{Path, PathBuf},
};

use agent_common::name;
use aya::{
    Btf, Ebpf, EbpfLoader,
    programs::{BtfTracePoint, Program, ProgramError, ProgramFd, RawTracePoint, TracePoint},
};

use super::{
    Error, Mode, Options, before, iterators,
    object::embedded_object,
    offsets::{KERNEL_BTF, Offsets},
    peers,
};

const CATEGORY: &str = "sock";
const TRACEPOINT: &str = "inet_sock_set_state";

/// Where tracefs is mounted, in the order in which aya looks.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The form of the tracepoint programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Hooks {
    /// BTF tracepoints: the kernel's own types, cheapest. Kernel 5.15 or newer with BTF.
    Btf,
    /// Classic tracepoints: kernel 5.10 or newer and a mounted tracefs; without BTF an accepted connection's owner is
    /// known only from its listener's call.
    Classic,
}

impl fmt::Display for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Btf => "btf",
            Self::Classic => "classic",
        })
    }
}

/// Why a program cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// BTF tracepoints were asked for, but this kernel does not describe what they need.
    #[error(
        "--hooks btf: {KERNEL_BTF} is missing or does not describe the socket fields that are needed (a kernel from 5.15 on, built with CONFIG_DEBUG_INFO_BTF, does); --hooks classic works without"
    )]
    NoTypes,
    /// The kernel's types cannot be read.
    #[error("{KERNEL_BTF}")]
    Types(#[from] aya::BtfError),
    /// tracefs is needed to find the classic tracepoint.
    #[error(
        "no tracepoint {CATEGORY}:{TRACEPOINT} under {} or {}: mount tracefs with `mount -t tracefs tracefs {}`",
        TRACEFS[0], TRACEFS[1], TRACEFS[0]
    )]
    NoTracefs,
    /// The tracepoint's record has another layout than the program reads.
    #[error("{}: field `{field}` is not where it is on kernels from 5.6 on", .path.display())]
    Layout {
        /// The tracepoint's `format` file.
        path: PathBuf,
        /// The field.
        field: &'static str,
    },
    /// The `format` file cannot be read.
    #[error("{}", .path.display())]
    Format {
        /// The tracepoint's `format` file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused the program.
    #[error("the kernel refuses the program {program}")]
    Program {
        /// Its name in the object.
        program: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
}

/// What was loaded.
pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    /// Which program will be attached.
    pub(super) hooks: Hooks,
    pub(super) iterators: Iterators,
    /// Whether programs know a socket's network namespace.
    pub(super) names_netns: bool,
}

/// Which iterators over what is older are loaded.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Iterators {
    /// Those over listeners and connections.
    pub(super) connections: bool,
    /// That over UDP sockets.
    pub(super) datagrams: bool,
}

/// Loads the object with this kernel's offsets and the wanted sizes, and loads the one program that will be attached, and
/// the iterators where the kernel has what they need.
pub(super) fn load(options: &Options) -> Result<Loaded, Error> {
    let offsets = Offsets::of_this_kernel();
    let hooks = match options.hooks {
        Some(Hooks::Btf) if !offsets.suffice_for_typed_sockets() => {
            return Err(AttachError::NoTypes.into());
        }
        Some(hooks) => hooks,
        None if offsets.suffice_for_typed_sockets() => Hooks::Btf,
        None => Hooks::Classic,
    };
    if !offsets.names_cgroup() || !offsets.names_netns() {
        tracing::warn!(
            cgroup = offsets.names_cgroup(),
            netns = offsets.names_netns(),
            "this kernel does not describe all socket fields: the owner of connections to listeners that are older than the agent is found by address only"
        );
    }

    let mut loader = EbpfLoader::new();
    // The object needs no relocation against the kernel's types, and its own maps no kernel types.
    loader
        .btf(None)
        .map_max_entries(name::OVERFLOW, options.ring_bytes);
    loader.map_max_entries(name::WITNESSED, before::witnesses());
    for map in name::FLOWS {
        loader.map_max_entries(map, options.map_entries);
    }
    loader.map_max_entries(name::PEERS, peers::capacity(options.map_entries));
    let (open, connections) = match options.mode {
        Mode::Flows => (1, 4096),
        Mode::Connections => (options.map_entries, options.ring_bytes),
    };
    loader
        .map_max_entries(name::OPEN, open)
        .map_max_entries(name::CONNECTIONS, connections);
    for map in [name::LISTENERS, name::SCTP_CALLS] {
        loader.map_max_entries(map, options.map_entries.div_ceil(4));
    }
    let crossed = options.map_entries.div_ceil(64);
    loader.map_max_entries(name::CROSSED, crossed);
    // Nobody is looked up there where a socket leads to its cgroup.
    let callers = if offsets.names_cgroup() {
        1
    } else {
        options.map_entries
    };
    loader.map_max_entries(name::CONNECT_OWNERS, callers);
    for (global, offset) in offsets.globals() {
        loader.override_global(global, offset, true);
    }
    let log_level = kernel_log_level();
    loader.override_global(aya_log::LEVEL, &log_level, true);
    let mut ebpf = loader.load(embedded_object()).map_err(Error::Load)?;

    let typed = offsets.suffice_for_typed_sockets() || offsets.suffice_for_iterators();
    let types = typed
        .then(Btf::from_sys_fs)
        .transpose()
        .map_err(AttachError::from)?;
    let hooks = match (hooks, &types) {
        (Hooks::Btf, Some(types)) => match load_btf(&mut ebpf, options.mode, types) {
            Ok(()) => Hooks::Btf,
            Err(error) if options.hooks.is_none() => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "BTF tracepoint refused, taking the classic one");
                load_classic(&mut ebpf, options.mode)?;
                Hooks::Classic
            }
            Err(error) => return Err(error.into()),
        },
        _ => {
            load_classic(&mut ebpf, options.mode)?;
            Hooks::Classic
        }
    };
    let iterators = match types.filter(|_| offsets.suffice_for_iterators()) {
        Some(types) => iterators::load(&mut ebpf, &types),
        None => Iterators::default(),
    };
    Ok(Loaded {
        ebpf,
        hooks,
        iterators,
        names_netns: offsets.names_netns(),
    })
}

/// Attaches the program that [`load`] loaded, and returns the descriptor of the one whose skipped runs the kernel counts, which
/// is open as long as `ebpf` lives.
pub(super) fn attach(ebpf: &mut Ebpf, hooks: Hooks, mode: Mode) -> Result<RawFd, Error> {
    let attached = match hooks {
        Hooks::Btf => {
            let program = btf_program(ebpf, mode)?;
            program.attach().and_then(|_link| descriptor(program.fd()?))
        }
        // Its counter comes second, and so runs second: what it has counted has been seen, or is missed for good.
        Hooks::Classic => {
            classic_program(ebpf, mode)?
                .attach(CATEGORY, TRACEPOINT)
                .map_err(refused(program_name(hooks, mode)))?;
            let counter = counter_program(ebpf, mode)?;
            let attached = counter
                .attach(TRACEPOINT)
                .and_then(|_link| descriptor(counter.fd()?));
            return Ok(attached.map_err(refused(counter_name(mode)))?);
        }
    };
    Ok(attached.map_err(refused(program_name(hooks, mode)))?)
}

fn descriptor(program: &ProgramFd) -> Result<RawFd, ProgramError> {
    Ok(program.as_fd().as_raw_fd())
}

fn load_btf(ebpf: &mut Ebpf, mode: Mode, types: &Btf) -> Result<(), AttachError> {
    btf_program(ebpf, mode)?
        .load(TRACEPOINT, types)
        .map_err(refused(program_name(Hooks::Btf, mode)))
}

fn load_classic(ebpf: &mut Ebpf, mode: Mode) -> Result<(), AttachError> {
    check_format()?;
    classic_program(ebpf, mode)?
        .load()
        .map_err(refused(program_name(Hooks::Classic, mode)))?;
    counter_program(ebpf, mode)?
        .load()
        .map_err(refused(counter_name(mode)))
}

fn btf_program(ebpf: &mut Ebpf, mode: Mode) -> Result<&mut BtfTracePoint, AttachError> {
    program(ebpf, program_name(Hooks::Btf, mode))
}

fn classic_program(ebpf: &mut Ebpf, mode: Mode) -> Result<&mut TracePoint, AttachError> {
    program(ebpf, program_name(Hooks::Classic, mode))
}

fn counter_program(ebpf: &mut Ebpf, mode: Mode) -> Result<&mut RawTracePoint, AttachError> {
    program(ebpf, counter_name(mode))
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, AttachError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(ProgramError::NotLoaded)
        .and_then(TryInto::try_into)
        .map_err(refused(name))
}

fn refused(program: &'static str) -> impl Fn(ProgramError) -> AttachError {
    move |source| AttachError::Program { program, source }
}

const fn program_name(hooks: Hooks, mode: Mode) -> &'static str {
    let forms = match hooks {
        Hooks::Btf => name::STATE_BTF,
        Hooks::Classic => name::STATE_CLASSIC,
    };
    forms[of_mode(mode)]
}

const fn counter_name(mode: Mode) -> &'static str {
    name::STATE_CHANGES[of_mode(mode)]
}

const fn of_mode(mode: Mode) -> usize {
    match mode {
        Mode::Flows => 0,
        Mode::Connections => 1,
    }
}

/// The classic tracepoint's folder, where tracefs is mounted.
#[must_use]
pub fn tracepoint() -> Option<PathBuf> {
    let folder = |root: &str| {
        Path::new(root)
            .join("events")
            .join(CATEGORY)
            .join(TRACEPOINT)
    };
    let mut folders = TRACEFS.into_iter().map(folder);
    folders.find(|folder| folder.join("format").exists())
}

/// Compares the tracepoint's record with the layout that the program was written for.
fn check_format() -> Result<(), AttachError> {
    let path = tracepoint().ok_or(AttachError::NoTracefs)?.join("format");
    let format = fs::read_to_string(&path).map_err(|source| AttachError::Format {
        path: path.clone(),
        source,
    })?;
    match misplaced_field(&format) {
        Some(field) => Err(AttachError::Layout { path, field }),
        None => Ok(()),
    }
}

/// The first field of the record that is not where the program reads it.
fn misplaced_field(format: &str) -> Option<&'static str> {
    const FIELDS: [(&str, &str); 9] = [
        ("skaddr", "offset:8;\tsize:8;"),
        ("oldstate", "offset:16;\tsize:4;"),
        ("newstate", "offset:20;\tsize:4;"),
        ("sport", "offset:24;\tsize:2;"),
        ("dport", "offset:26;\tsize:2;"),
        ("family", "offset:28;\tsize:2;"),
        ("protocol", "offset:30;\tsize:2;"),
        ("saddr_v6[16]", "offset:40;\tsize:16;"),
        ("daddr_v6[16]", "offset:56;\tsize:16;"),
    ];
    FIELDS
        .into_iter()
        .find(|(field, place)| {
            !format
                .lines()
                .any(|line| line.contains(&format!(" {field};")) && line.contains(place))
        })
        .map(|(field, _)| field)
}

/// The kernel programs log only what somebody would see.
fn kernel_log_level() -> u8 {
    if tracing::enabled!(tracing::Level::DEBUG) {
        aya_log::Level::Debug as u8
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.18 prints it, cut to the record's own fields.
    const FORMAT: &str = "\
\tfield:const void * skaddr;\toffset:8;\tsize:8;\tsigned:0;
\tfield:int oldstate;\toffset:16;\tsize:4;\tsigned:1;
\tfield:int newstate;\toffset:20;\tsize:4;\tsigned:1;
\tfield:__u16 sport;\toffset:24;\tsize:2;\tsigned:0;
\tfield:__u16 dport;\toffset:26;\tsize:2;\tsigned:0;
\tfield:__u16 family;\toffset:28;\tsize:2;\tsigned:0;
\tfield:__u16 protocol;\toffset:30;\tsize:2;\tsigned:0;
\tfield:__u8 saddr[4];\toffset:32;\tsize:4;\tsigned:0;
\tfield:__u8 daddr[4];\toffset:36;\tsize:4;\tsigned:0;
\tfield:__u8 saddr_v6[16];\toffset:40;\tsize:16;\tsigned:0;
\tfield:__u8 daddr_v6[16];\toffset:56;\tsize:16;\tsigned:0;
";

    #[test]
    fn a_moved_field_is_noticed() {
        assert_eq!(misplaced_field(FORMAT), None);
        let older = FORMAT.replace(
            "protocol;\toffset:30;\tsize:2;",
            "protocol;\toffset:30;\tsize:1;",
        );
        assert_eq!(misplaced_field(&older), Some("protocol"));
    }
}
