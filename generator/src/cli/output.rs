//! Writing to standard output and to files.

use std::{
    fs::Permissions,
    io::{self, BufWriter, Write},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use anyhow::Context as _;

use super::Failure;

/// Writes to standard output what `write` writes. A reader that has seen enough and closed the pipe is no failure.
///
/// # Errors
/// If standard output cannot be written for another reason.
pub(super) fn to_stdout(
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut stdout = BufWriter::with_capacity(1 << 16, io::stdout().lock());
    match write(&mut stdout).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error)
            .context("standard output")
            .map_err(Failure::other),
        _ => Ok(()),
    }
}

/// Writes a text to standard output.
///
/// # Errors
/// As [`to_stdout`].
pub(super) fn print(text: &str) -> Result<(), Failure> {
    to_stdout(|to| to.write_all(text.as_bytes()))
}

/// A file that has its old contents or, once [`persist`](Self::persist) was called, all of the new.
#[derive(Debug)]
pub(super) struct WholeFile<'a> {
    path: &'a Path,
    to: BufWriter<tempfile::NamedTempFile>,
}

impl<'a> WholeFile<'a> {
    /// Begins to write beside the file's place.
    ///
    /// # Errors
    /// If that cannot be written to.
    pub(super) fn create(path: &'a Path) -> Result<Self, Failure> {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory)
            .map_err(|error| cannot_write(path, error))?;
        Ok(Self {
            path,
            to: BufWriter::with_capacity(1 << 16, file),
        })
    }

    /// Puts the file in its place, on disk.
    ///
    /// # Errors
    /// If that cannot be done; the old contents stay.
    pub(super) fn persist(self) -> Result<(), Failure> {
        let path = self.path;
        let persist = || {
            let file = self
                .to
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)?;
            Ok(())
        };
        persist().map_err(|error| cannot_write(path, error))
    }
}

impl Write for WholeFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// Writes to a file what `write` writes: the file has its old contents or all of the new.
///
/// # Errors
/// If it cannot be written.
pub(super) fn to_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    let mut file = WholeFile::create(path)?;
    write(&mut file).map_err(|error| cannot_write(path, error))?;
    file.persist()
}

fn cannot_write(path: &Path, error: io::Error) -> Failure {
    let context = format!("cannot write {}", path.display());
    Failure::other(anyhow::Error::new(error).context(context))
}
