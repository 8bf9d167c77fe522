//! The files of an image: as a layer, or as a folder.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use tar::{EntryType, Header};

use super::layout::Digest;

/// A file of an image.
pub(super) struct Entry {
    /// From the image's root, without a leading slash.
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) bytes: Vec<u8>,
}

/// A compressed tar archive.
pub(super) struct Layer {
    pub(super) packed: Vec<u8>,
    /// Its digest before it was compressed, which is how an image's configuration names it.
    pub(super) diff_id: Digest,
    /// Its size before it was compressed.
    pub(super) unpacked: usize,
}

/// Packs entries in their order, with the folders that they lie in before them. All belong to user and group 0 and were
/// changed at `epoch`.
pub(super) fn pack(entries: &[Entry], epoch: u64) -> Result<Layer> {
    let mut archive = tar::Builder::new(Vec::new());
    let header = |kind, mode, size: usize| {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(epoch);
        header.set_size(size as u64);
        header
    };
    for folder in folders(entries) {
        let mut header = header(EntryType::Directory, 0o755, 0);
        archive.append_data(&mut header, folder, &[][..])?;
    }
    for entry in entries {
        let mut header = header(EntryType::Regular, entry.mode, entry.bytes.len());
        archive.append_data(&mut header, &entry.path, entry.bytes.as_slice())?;
    }
    let tar = archive.into_inner()?;
    // The header of the compressed file has neither a name nor a time.
    let mut gzip = GzBuilder::new()
        .mtime(0)
        .write(Vec::new(), Compression::default());
    gzip.write_all(&tar)?;
    Ok(Layer {
        packed: gzip.finish()?,
        diff_id: Digest::of(&tar),
        unpacked: tar.len(),
    })
}

/// Writes entries below a folder.
pub(super) fn write_tree(root: &Path, entries: &[Entry]) -> Result<()> {
    for entry in entries {
        let path = root.join(&entry.path);
        let context = || path.display().to_string();
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(context)?;
        }
        fs::write(&path, &entry.bytes).with_context(context)?;
        let permissions = fs::Permissions::from_mode(entry.mode);
        fs::set_permissions(&path, permissions).with_context(context)?;
    }
    Ok(())
}

/// Every folder once, those further up first.
fn folders(entries: &[Entry]) -> BTreeSet<PathBuf> {
    entries
        .iter()
        .flat_map(|entry| Path::new(&entry.path).ancestors().skip(1))
        .filter(|folder| !folder.as_os_str().is_empty())
        .map(Path::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn entries() -> Vec<Entry> {
        let entry = |path: &str, mode, bytes: &[u8]| Entry {
            path: path.to_owned(),
            mode,
            bytes: bytes.to_vec(),
        };
        vec![
            entry("licenses/LICENSE", 0o644, b"as is"),
            entry("usr/bin/program", 0o755, b"\x7fELF"),
        ]
    }

    #[test]
    fn the_same_files_are_the_same_layer() {
        let (one, other) = (pack(&entries(), 0).unwrap(), pack(&entries(), 0).unwrap());
        assert_eq!(one.packed, other.packed);
        let later = pack(&entries(), 1).unwrap();
        assert_ne!(one.diff_id.to_string(), later.diff_id.to_string());
    }

    #[test]
    fn a_layer_is_what_goes_into_it() {
        let layer = pack(&entries(), 1_000_000_000).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(layer.packed.as_slice()));
        let mut seen = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let header = entry.header();
            assert_eq!(header.mtime().unwrap(), 1_000_000_000);
            assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
            let mode = header.mode().unwrap();
            let path = entry.path().unwrap().display().to_string();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            seen.push((path, mode, bytes));
        }
        let of = |path: &str, mode, bytes: &[u8]| (path.to_owned(), mode, bytes.to_vec());
        assert_eq!(
            seen,
            [
                of("licenses", 0o755, b""),
                of("usr", 0o755, b""),
                of("usr/bin", 0o755, b""),
                of("licenses/LICENSE", 0o644, b"as is"),
                of("usr/bin/program", 0o755, b"\x7fELF"),
            ]
        );
    }
}
