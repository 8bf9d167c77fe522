//! The node's cgroups by id.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use super::{Owner, parse_cgroup_path};

/// How many rounds a cgroup stays known after it was last seen or asked for: its flows may be drained after its end.
const ROUNDS_KEPT: u32 = 600;

/// How deep cgroups are looked for: kubelet's containers lie five deep, and containers may nest.
const DEEPEST: usize = 32;

/// The cgroups below one folder, by id. A cgroup's id is the inode number of its folder (`kernfs`, since 5.5).
///
/// The folders are read when an id is asked for that is not known, at most once a round.
#[derive(Debug)]
pub struct CgroupTree {
    root: PathBuf,
    known: HashMap<u64, Entry>,
    round: u32,
    read_this_round: bool,
}

#[derive(Debug)]
struct Entry {
    owner: Owner,
    last_seen: u32,
}

impl CgroupTree {
    /// A tree below `root`, which is read at the first question.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            known: HashMap::new(),
            round: 0,
            read_this_round: false,
        }
    }

    /// The owner of the cgroup with this id; `None` if it is not below the root.
    pub fn owner(&mut self, id: u64) -> Option<Owner> {
        if id == 0 {
            return None;
        }
        if !self.known.contains_key(&id) && !self.read_this_round {
            self.read_this_round = true;
            if let Err(error) = self.read() {
                tracing::warn!(%error, root = %self.root.display(), "cgroups cannot be read");
            }
        }
        self.known.get_mut(&id).map(|entry| {
            entry.last_seen = self.round;
            entry.owner.clone()
        })
    }

    /// Ends a round: the folders may be read again.
    pub fn next_round(&mut self) {
        self.round = self.round.saturating_add(1);
        self.read_this_round = false;
    }

    /// Lets the folders be read again in this round.
    pub fn look_again(&mut self) {
        self.read_this_round = false;
    }

    fn read(&mut self) -> io::Result<()> {
        // The root's own failure is an error; folders below may go while they are read.
        let id = fs::metadata(&self.root)?.ino();
        self.note(id, &self.root.clone());
        self.read_folder(&self.root.clone(), 0);
        let oldest = self.round.saturating_sub(ROUNDS_KEPT);
        self.known.retain(|_, entry| entry.last_seen >= oldest);
        Ok(())
    }

    fn read_folder(&mut self, folder: &Path, depth: usize) {
        if depth > DEEPEST {
            return;
        }
        let Ok(entries) = fs::read_dir(folder) else {
            return;
        };
        for entry in entries.flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder && let Ok(metadata) = entry.metadata() {
                let path = entry.path();
                self.note(metadata.ino(), &path);
                self.read_folder(&path, depth + 1);
            }
        }
    }

    fn note(&mut self, id: u64, path: &Path) {
        let round = self.round;
        self.known
            .entry(id)
            .and_modify(|entry| entry.last_seen = round)
            .or_insert_with(|| Entry {
                owner: path
                    .to_str()
                    .and_then(parse_cgroup_path)
                    .map_or(Owner::Host, Owner::Container),
                last_seen: round,
            });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "6a6b4d5e-90fa-4d7c-9a44-9a5b3f6f7c11";

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn cgroups_come_go_and_stay_known_for_a_while() {
        let root = tempfile::tempdir().unwrap();
        let host = root.path().join("system.slice/kubelet.service");
        fs::create_dir_all(&host).unwrap();
        let mut tree = CgroupTree::new(root.path().to_owned());
        assert_eq!(tree.owner(inode(&host)), Some(Owner::Host));
        assert_eq!(tree.owner(u64::MAX), None);

        let pod = root.path().join(format!("kubepods/pod{UID}"));
        fs::create_dir_all(&pod).unwrap();
        let id = inode(&pod);
        assert_eq!(
            tree.owner(id),
            None,
            "the folders were read in this round already"
        );
        tree.next_round();
        let Some(Owner::Container(found)) = tree.owner(id) else {
            panic!("pod not found");
        };
        assert_eq!(found.pod_uid, UID);

        fs::remove_dir(&pod).unwrap();
        for _ in 0..ROUNDS_KEPT {
            tree.next_round();
        }
        assert_eq!(tree.owner(u64::MAX), None);
        assert!(tree.owner(id).is_some(), "still within the time");
        for _ in 0..=ROUNDS_KEPT {
            tree.next_round();
        }
        assert_eq!(tree.owner(u64::MAX), None);
        assert_eq!(tree.owner(id), None);
    }
}
