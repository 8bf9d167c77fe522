//! What `/proc` says of processes (`man 5 proc`).

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// A process that has a socket open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// Id of its cgroup in the v2 hierarchy; 0 if it could not be found.
    pub cgroup: u64,
}

/// The ids of all processes, in ascending order.
///
/// # Errors
/// If the folder cannot be read.
pub(super) fn ids(proc: &Path) -> io::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(proc)? {
        ids.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok()),
        );
    }
    ids.sort_unstable();
    Ok(ids)
}

/// Whether an error says that the process, or what is asked of it, is gone: it ended, or is a zombie.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL))
}

/// What tells a process's network namespace from all others: the inode number of its table of sockets, which needs no
/// permission to look into the process.
///
/// # Errors
/// If it cannot be read.
pub(super) fn namespace(proc: &Path, pid: u32) -> io::Result<u64> {
    fs::metadata(proc.join(format!("{pid}/net/tcp"))).map(|table| table.ino())
}

/// Inode number of a process's network namespace; `None` if it cannot be read.
pub(super) fn netns(proc: &Path, pid: u32) -> Option<u32> {
    let link = fs::read_link(proc.join(format!("{pid}/ns/net"))).ok()?;
    number_in(&link, "net:[")
}

/// Calls `each` with the inode number of every socket that a process has open, as far as it lets itself be looked into. A
/// file that is closed meanwhile is no matter.
pub(super) fn sockets(proc: &Path, pid: u32, mut each: impl FnMut(u64)) {
    let Ok(files) = fs::read_dir(proc.join(format!("{pid}/fd"))) else {
        return;
    };
    for file in files.flatten() {
        if let Ok(link) = fs::read_link(file.path())
            && let Some(inode) = number_in(&link, "socket:[")
        {
            each(inode);
        }
    }
}

/// The number in `PREFIX[NUMBER]`.
fn number_in<N: std::str::FromStr>(link: &Path, prefix: &str) -> Option<N> {
    link.to_str()?
        .strip_prefix(prefix)?
        .strip_suffix(']')?
        .parse()
        .ok()
}

/// From processes to the ids of their cgroups.
#[derive(Debug)]
pub struct CgroupIds {
    /// Where a cgroup hierarchy is mounted, v2 if there is one.
    mount: Option<PathBuf>,
    ids: HashMap<String, u64>,
}

impl CgroupIds {
    /// Looks at the hierarchy that is mounted there.
    #[must_use]
    pub fn new(mount: Option<PathBuf>) -> Self {
        Self {
            mount,
            ids: HashMap::new(),
        }
    }

    /// The id in the contents of a process's `cgroup` file. Where nobody has mounted the v2 hierarchy all are in its root.
    ///
    /// A process outside of this one's cgroup namespace has a path with `..`, of which nothing can be made.
    fn id(&mut self, contents: &str) -> u64 {
        let path = contents
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap_or_default();
        let Some(mount) = &self.mount else {
            return 0;
        };
        if path.split('/').any(|component| component == "..") {
            return 0;
        }
        if let Some(id) = self.ids.get(path) {
            return *id;
        }
        let id = fs::metadata(mount.join(path)).map_or(0, |folder| folder.ino());
        self.ids.insert(path.to_owned(), id);
        id
    }
}

/// What is known of a process; less if it is gone meanwhile.
pub(super) fn describe(proc: &Path, pid: u32, cgroups: &mut CgroupIds) -> Process {
    let read =
        |file: &str| fs::read_to_string(proc.join(format!("{pid}/{file}"))).unwrap_or_default();
    Process {
        pid,
        comm: read("comm").trim_end_matches('\n').to_owned(),
        cgroup: cgroups.id(&read("cgroup")),
    }
}
