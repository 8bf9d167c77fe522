//! The plugin's socket: its name, and how it comes and goes.

use std::{
    fmt, fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    str::FromStr,
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// Who may connect: the probe, which runs as the same user, root. Flows are nobody else's business.
const MODE: u32 = 0o600;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// Where the plugin listens. The socket's name, without extension, is the plugin's id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginSocket {
    path: PathBuf,
    id: String,
}

impl PluginSocket {
    /// The plugin's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// `^[A-Za-z0-9]+([-][A-Za-z0-9]+)*$`, as the probe has it.
fn is_plugin_id(id: &str) -> bool {
    id.split('-')
        .all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

impl FromStr for PluginSocket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let id = path.file_stem().and_then(|stem| stem.to_str());
        match id {
            Some(id) if is_plugin_id(id) => Ok(Self {
                id: id.to_owned(),
                path,
            }),
            _ => Err(format!(
                "Scope takes no plugin of this name: expected letters and digits, with single `-` between them, and an extension \
                 if any, as in {}",
                path.with_file_name("microshield.sock").display()
            )),
        }
    }
}

impl fmt::Display for PluginSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// Why the plugin cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another program serves the socket.
    #[error("{}: somebody listens there already", .0.display())]
    Taken(PathBuf),
    /// Something else has the name.
    #[error("{}: there is something that is no socket", .0.display())]
    NoSocket(PathBuf),
    /// The system does not allow it.
    #[error("{}: {source}", path.display())]
    Io {
        /// The socket or its folder.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// A socket that is listened on. It is removed when this is dropped, if it is still ours.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Listener {
    /// Makes the socket, and its folder if that is missing. A socket that nobody listens on, as a killed agent leaves it behind, is
    /// replaced.
    ///
    /// # Errors
    /// If somebody listens there, if the name is taken by something else, or if the system does not allow it.
    pub fn open(socket: &PluginSocket) -> Result<Self, SocketError> {
        let path = socket.path();
        if let Some(folder) = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            fs::create_dir_all(folder).map_err(failed(folder))?;
        }
        remove_stale(path)?;
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed(path))?;
        let address = SockAddr::unix(path).map_err(failed(path))?;
        listener.bind(&address).map_err(failed(path))?;
        // Nobody can connect before `listen`, so nobody whom the mode keeps out has connected.
        fs::set_permissions(path, fs::Permissions::from_mode(MODE)).map_err(failed(path))?;
        listener.listen(BACKLOG).map_err(failed(path))?;
        listener.set_nonblocking(true).map_err(failed(path))?;
        let listener = std::os::unix::net::UnixListener::from(std::os::fd::OwnedFd::from(listener));
        let metadata = fs::symlink_metadata(path).map_err(failed(path))?;
        Ok(Self {
            inner: UnixListener::from_std(listener).map_err(failed(path))?,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        })
    }

    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<tokio::net::UnixStream> {
        self.inner.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "the plugin's socket stays behind");
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> SocketError + use<> {
    let path = path.to_owned();
    move |source| SocketError::Io { path, source }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        metadata => metadata.map_err(failed(path))?,
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NoSocket(path.to_owned()));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed(path))?;
    probe.set_nonblocking(true).map_err(failed(path))?;
    match probe.connect(&SockAddr::unix(path).map_err(failed(path))?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(socket = %path.display(), "a socket that nobody listens on is replaced");
            fs::remove_file(path).map_err(failed(path))
        }
        // Connected, or so many wait to be that it would block.
        _ => Err(SocketError::Taken(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_one_that_scope_takes() {
        for (path, id) in [
            ("/run/microshield.sock", "microshield"),
            ("micro-shield-2.sock", "micro-shield-2"),
            ("/run/plugins/X", "X"),
        ] {
            assert_eq!(path.parse::<PluginSocket>().unwrap().id(), id);
        }
        for bad in [
            "",
            "/",
            "/run/..",
            "a_b.sock",
            "-a.sock",
            "a-.sock",
            "a--b.sock",
            "a.b.sock",
            "ä.sock",
        ] {
            let error = bad.parse::<PluginSocket>().unwrap_err();
            assert!(error.contains("letters and digits"), "{bad}: {error}");
        }
    }

    fn open(path: &Path) -> Result<Listener, SocketError> {
        Listener::open(&path.to_str().unwrap().parse().unwrap())
    }

    #[tokio::test]
    async fn the_socket_comes_and_goes_with_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plugins/microshield/microshield.sock");
        let first = open(&path).unwrap();
        let mode = fs::symlink_metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, MODE);
        assert!(matches!(open(&path), Err(SocketError::Taken(_))));
        drop(first);
        assert!(!path.exists());

        // One whose owner was killed.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = open(&path).unwrap();

        // One that somebody has replaced is not ours to remove.
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(second);
        assert!(path.exists());
        drop(other);

        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        assert!(matches!(open(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    /// An agent that is too busy to accept is there all the same. Who asks it must not wait for it either.
    #[test]
    fn a_socket_with_a_full_queue_is_not_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("microshield.sock");
        let address = SockAddr::unix(&path).unwrap();
        let busy = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        busy.bind(&address).unwrap();
        busy.listen(1).unwrap();
        let mut waiting = Vec::new();
        loop {
            let client = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
            client.set_nonblocking(true).unwrap();
            match client.connect(&address) {
                Ok(()) => waiting.push(client),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        let (sender, opened) = std::sync::mpsc::channel();
        let second = path.clone();
        std::thread::spawn(move || sender.send(open(&second).map(drop)));
        let opened = opened.recv_timeout(std::time::Duration::from_secs(20));
        let opened = opened.expect("it waits for the other's turn");
        assert!(matches!(opened, Err(SocketError::Taken(_))), "{opened:?}");
        assert!(path.exists());
    }
}
