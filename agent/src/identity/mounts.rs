//! Where the cgroup hierarchies are mounted.

use std::{fs, io, path::PathBuf};

const MOUNTS: &str = "/proc/self/mounts";

/// The mounts that matter here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounts {
    /// Mount point of the cgroup v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid system. Where it is
    /// not mounted, that of a v1 hierarchy: for the kernel all sockets are in the root then, whose id is the same in both.
    pub root: PathBuf,
    /// Whether cgroup v1 hierarchies are mounted beside it.
    pub hybrid: bool,
}

/// Why there is no cgroup hierarchy to look at.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The list of mounts cannot be read.
    #[error("{MOUNTS}")]
    Read(#[from] io::Error),
    /// It names no cgroup mount.
    #[error(
        "{MOUNTS} lists no cgroup mount: mount one (`mount -t cgroup2 none /sys/fs/cgroup`) or name it with --cgroup-root"
    )]
    NoCgroup,
}

impl Mounts {
    /// Reads them from this process's mount namespace.
    ///
    /// # Errors
    /// If the list cannot be read or has no cgroup hierarchy.
    pub fn read() -> Result<Self, MountsError> {
        Self::parse(&fs::read_to_string(MOUNTS)?).ok_or(MountsError::NoCgroup)
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
        // The shortest path: containers' own mounts of it lie deeper.
        let outermost = |wanted| of_type(wanted).min_by_key(|path| path.as_os_str().len());
        Some(Self {
            root: outermost("cgroup2").or_else(|| outermost("cgroup"))?,
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
                root: "/sys/fs/cgroup".into(),
                hybrid: false
            })
        );
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs ro 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\ncgroup2 /run/a\\040b/sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            Mounts::parse(hybrid),
            Some(Mounts {
                root: "/sys/fs/cgroup/unified".into(),
                hybrid: true
            })
        );
        let old = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n";
        assert_eq!(
            Mounts::parse(old),
            Some(Mounts {
                root: "/sys/fs/cgroup/memory".into(),
                hybrid: true
            })
        );
        assert_eq!(Mounts::parse("proc /proc proc rw 0 0\n"), None);
    }
}
