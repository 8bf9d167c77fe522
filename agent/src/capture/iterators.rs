//! The iterators over the open files of all processes, which find what is older than the hooks (`agent_ebpf::before`).

use std::io::{self, Read as _};

use agent_common::{name, types::OpenBefore};
use aya::{
    Btf, Ebpf,
    maps::{Array, MapError},
    programs::{Iter, ProgramError, links::LinkError},
};

use super::{
    before::{Older, UNREAD},
    hooks::Iterators,
    lose,
};
use crate::proc_sockets::Progress;

/// The target of the iterators: the open files of all processes.
const ITERATED: &str = "task_file";

/// How often connections are looked for at most. A connection that is handed from one process to another, or accepted, at
/// the wrong moment is missed once; the second time nothing new is the end.
const MOST_PASSES: u32 = 6;

/// Why the iterators did not do.
#[derive(Debug, thiserror::Error)]
pub(super) enum IteratorError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Loads the iterators that the kernel takes.
pub(super) fn load(ebpf: &mut Ebpf, types: &Btf) -> Iterators {
    let mut takes = |program| match iterator(ebpf, program).and_then(|it| it.load(ITERATED, types))
    {
        Ok(()) => true,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, program, "the kernel refuses an iterator");
            false
        }
    };
    Iterators {
        connections: takes(name::OPEN_LISTENERS) && takes(name::OPEN_CONNECTIONS),
        datagrams: takes(name::OPEN_DATAGRAMS),
    }
}

/// Runs the iterators until they find nothing more.
pub(super) fn iterate(ebpf: &mut Ebpf, older: &mut Older) -> Result<OpenBefore, IteratorError> {
    let mut progress = Progress::start();
    run(ebpf, name::OPEN_LISTENERS, &mut progress)?;
    let mut last = 0;
    for pass in 0..MOST_PASSES {
        run(ebpf, name::OPEN_CONNECTIONS, &mut progress)?;
        let found = found(ebpf)?.connections;
        if pass > 0 && found == last {
            return Ok(self::found(ebpf)?);
        }
        last = found;
    }
    tracing::error!(
        "each look has found connections that the one before had missed: some may be missing"
    );
    lose(&mut older.losses, UNREAD, 1);
    Ok(found(ebpf)?)
}

/// Runs one of them once.
pub(super) fn run(
    ebpf: &mut Ebpf,
    program: &'static str,
    progress: &mut Progress,
) -> Result<(), IteratorError> {
    let iterator = iterator(ebpf, program)?;
    let link = iterator.attach()?;
    let mut file = iterator.take_link(link)?.into_file()?;
    // The program writes nothing: the end of the file is the end of the files. After a million of them the kernel wants to
    // be asked again (`bpf_seq_read` in `kernel/bpf/bpf_iter.c`).
    loop {
        match file.read(&mut [0; 16]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error.into()),
        }
        if progress.is_due() {
            let found = found(ebpf)?;
            tracing::info!(
                files = found.files,
                connections = found.connections,
                "looking for what was open before"
            );
        }
    }
}

/// One of them, to be loaded, attached or unloaded.
pub(super) fn iterator<'a>(
    ebpf: &'a mut Ebpf,
    program: &'static str,
) -> Result<&'a mut Iter, ProgramError> {
    ebpf.program_mut(program)
        .ok_or(ProgramError::NotLoaded)
        .and_then(TryInto::try_into)
}

/// What they have found so far.
pub(super) fn found(ebpf: &Ebpf) -> Result<OpenBefore, MapError> {
    let map = ebpf.map(name::OPEN_BEFORE).ok_or(MapError::KeyNotFound)?;
    Array::<_, OpenBefore>::try_from(map)?.get(&0, 0)
}
