//! Where the cgroup hierarchies are mounted.

use std::{fs, io, path::PathBuf};

const MOUNTS: &str = "/proc/self/mounts";

/// The mounts that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounts {
    /// Mount point of the cgroup v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid system.
    pub cgroup2: PathBuf,
    /// Whether cgroup v1 hierarchies are mounted beside it.
    pub hybrid: bool,
}

/// Why there is no cgroup hierarchy to look at.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The list of mounts cannot be read.
    #[error("{MOUNTS}")]
    Read(#[from] io::Error),
    /// It names no cgroup v2 mount.
    #[error(
        "{MOUNTS} lists no cgroup2 mount: mount one (`mount -t cgroup2 none /sys/fs/cgroup/unified`) or name it with --cgroup-root"
    )]
    NoCgroup2,
}

impl Mounts {
    /// Reads them from this process's mount namespace.
    ///
    /// # Errors
    /// If the list cannot be read or has no cgroup v2 hierarchy.
    pub fn read() -> Result<Self, MountsError> {
        Self::parse(&fs::read_to_string(MOUNTS)?).ok_or(MountsError::NoCgroup2)
    }

    /// `mounts` as in `man 5 fstab`: device, mount point, type, …
    fn parse(mounts: &str) -> Option<Self> {
        let of_type = |wanted: &'static str| {
            mounts.lines().filter_map(move |line| {
                let mut fields = line.split(' ');
                let point = fields.nth(1)?;
                (fields.next()? == wanted).then(|| PathBuf::from(unescape(point)))
            })
        };
        Some(Self {
            // The shortest path: containers' own mounts of it lie deeper.
            cgroup2: of_type("cgroup2").min_by_key(|path| path.as_os_str().len())?,
            hybrid: of_type("cgroup").next().is_some(),
        })
    }
}

/// Space, tab, backslash and newline are written as octal escapes.
fn unescape(field: &str) -> String {
    field
        .replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pure_and_hybrid_systems() {
        let pure = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(
            Mounts::parse(pure),
            Some(Mounts {
                cgroup2: "/sys/fs/cgroup".into(),
                hybrid: false
            })
        );
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs ro 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup2 /run/a\\040b/sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            Mounts::parse(hybrid),
            Some(Mounts {
                cgroup2: "/sys/fs/cgroup/unified".into(),
                hybrid: true
            })
        );
        assert_eq!(Mounts::parse("proc /proc proc rw 0 0\n"), None);
    }
}
