//! The programs for UDP and SCTP: loaded and attached to a cgroup, beside those of others.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use agent_common::name::{PACKET_EGRESS, PACKET_INGRESS, UDP_ADDRESS, UDP_BIND};
use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, CgroupSockAddr, Program,
        ProgramError,
    },
};

/// With a link, which is what aya takes since 5.7, programs of others at the same cgroup always stay, and this is the only
/// mode that older kernels know (`cgroup_bpf_link_attach` in `kernel/bpf/cgroup.c`).
const BESIDE_OTHERS: CgroupAttachMode = CgroupAttachMode::Single;

/// Why UDP and SCTP are not captured.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The cgroup cannot be opened.
    #[error("{}", .path.display())]
    Cgroup {
        /// Its folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused a program, the folder is no cgroup of the v2 hierarchy, or has a program that tolerates no other.
    #[error(
        "the kernel does not take the program {program}; UDP needs a cgroup of the v2 hierarchy"
    )]
    Program {
        /// Its name in the object.
        program: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
}

/// Loads the programs, and opens the cgroup at `path` for [`attach`]. If one is refused none is left.
pub(super) fn load(ebpf: &mut Ebpf, path: &Path) -> Result<File, PacketError> {
    let cgroup = File::open(path).map_err(|source| PacketError::Cgroup {
        path: path.to_owned(),
        source,
    })?;
    each(ebpf, |_, program| match program {
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    })?;
    Ok(cgroup)
}

/// Attaches the loaded programs to the cgroup: from then on they see the sockets of the processes in it and below. If one
/// cannot be attached none is left.
pub(super) fn attach(ebpf: &mut Ebpf, cgroup: &File) -> Result<(), PacketError> {
    each(ebpf, |name, program| match program {
        Program::CgroupSkb(program) => {
            let end = if name == PACKET_INGRESS {
                CgroupSkbAttachType::Ingress
            } else {
                CgroupSkbAttachType::Egress
            };
            program.attach(cgroup, end, BESIDE_OTHERS).map(drop)
        }
        Program::CgroupSock(program) => program.attach(cgroup, BESIDE_OTHERS).map(drop),
        Program::CgroupSockAddr(program) => program.attach(cgroup, BESIDE_OTHERS).map(drop),
        _ => Err(ProgramError::UnexpectedProgramType),
    })
}

/// Does this with each program, unless it fails with one: then none is left.
fn each(
    ebpf: &mut Ebpf,
    mut act: impl FnMut(&str, &mut Program) -> Result<(), ProgramError>,
) -> Result<(), PacketError> {
    // What names processes and addresses comes before what looks at packets.
    let order = UDP_BIND
        .into_iter()
        .chain(UDP_ADDRESS)
        .chain([PACKET_INGRESS, PACKET_EGRESS]);
    for program in order.clone() {
        let found = ebpf.program_mut(program).ok_or(ProgramError::NotLoaded);
        if let Err(source) = found.and_then(|found| act(program, found)) {
            for program in order {
                unload(ebpf, program);
            }
            return Err(PacketError::Program { program, source });
        }
    }
    Ok(())
}

/// Detaches a program; one that was not loaded stays as it is.
fn unload(ebpf: &mut Ebpf, name: &str) {
    let unloaded = match ebpf.program_mut(name) {
        Some(Program::CgroupSkb(program)) => CgroupSkb::unload(program),
        Some(Program::CgroupSock(program)) => CgroupSock::unload(program),
        Some(Program::CgroupSockAddr(program)) => CgroupSockAddr::unload(program),
        _ => Ok(()),
    };
    match unloaded {
        Ok(()) | Err(ProgramError::NotLoaded) => {}
        Err(error) => tracing::warn!(%error, name, "the program stays attached"),
    }
}
