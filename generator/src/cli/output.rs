//! Writing to standard output and to files.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, BufWriter, StdoutLock, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;

use super::Failure;

/// Writes what `write` writes to a file, or to standard output where there is none or it is called `-`. A file has its old
/// contents or all of the new; what is no regular file (a pipe, a device) is written to as it is. Returns `None` if the
/// reader of a pipe has seen enough and closed it, which is no failure.
///
/// # Errors
/// What `write` says, or if the file cannot be written.
pub(super) fn to<T>(
    path: Option<&Path>,
    write: impl FnOnce(&mut dyn Write) -> Result<T, Failure>,
) -> Result<Option<T>, Failure> {
    let path = path.filter(|path| *path != Path::new("-"));
    let mut sink = Sink {
        to: To::open(path).map_err(|error| cannot_write(path, error))?,
        has_no_reader: false,
    };
    let written = write(&mut sink).and_then(|value| {
        sink.flush().map_err(|error| cannot_write(path, error))?;
        Ok(value)
    });
    match written {
        Err(_) if sink.has_no_reader => Ok(None),
        Err(failure) => Err(failure),
        Ok(value) => {
            sink.to
                .persist()
                .map_err(|error| cannot_write(path, error))?;
            Ok(Some(value))
        }
    }
}

/// Writes to standard output what `write` writes. A reader that has seen enough and closed the pipe is no failure.
///
/// # Errors
/// If standard output cannot be written for another reason.
pub(super) fn to_stdout(
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Failure> {
    to(None, |to| {
        write(to).map_err(|error| cannot_write(None, error))
    })?;
    Ok(())
}

/// Writes a text to standard output.
///
/// # Errors
/// As [`to_stdout`].
pub(super) fn print(text: &str) -> Result<(), Failure> {
    to_stdout(|to| to.write_all(text.as_bytes()))
}

/// What is written to, and whether somebody still reads it.
struct Sink {
    to: To,
    has_no_reader: bool,
}

enum To {
    Stdout(BufWriter<StdoutLock<'static>>),
    /// A pipe or a device.
    Special(BufWriter<File>),
    /// Beside the place of a file, until all of it is written.
    Beside(BufWriter<NamedTempFile>, PathBuf),
}

impl To {
    fn open(path: Option<&Path>) -> io::Result<Self> {
        const BUFFER: usize = 1 << 16;
        let Some(path) = path else {
            let stdout = io::stdout().lock();
            return Ok(Self::Stdout(BufWriter::with_capacity(BUFFER, stdout)));
        };
        if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            let file = OpenOptions::new().write(true).open(path)?;
            return Ok(Self::Special(BufWriter::with_capacity(BUFFER, file)));
        }
        // A link stays one.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(directory)?;
        Ok(Self::Beside(BufWriter::with_capacity(BUFFER, file), path))
    }

    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Self::Stdout(to) => to,
            Self::Special(to) => to,
            Self::Beside(to, _) => to,
        }
    }

    /// Puts a file in its place, on disk. Otherwise the old contents stay.
    fn persist(self) -> io::Result<()> {
        if let Self::Beside(to, path) = self {
            let file = to.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)?;
        }
        Ok(())
    }
}

impl Sink {
    fn watch<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            self.has_no_reader |= error.kind() == io::ErrorKind::BrokenPipe;
        }
        result
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.to.writer().write(bytes);
        self.watch(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.to.writer().flush();
        self.watch(flushed)
    }
}

/// That a file, or standard output, cannot be written.
pub(super) fn cannot_write(path: Option<&Path>, error: io::Error) -> Failure {
    let place = match path {
        Some(path) => path.display().to_string(),
        None => "standard output".to_owned(),
    };
    Failure::other(anyhow::Error::new(error).context(format!("cannot write {place}")))
}
