//! The kernel modules that the lab needs, in the order in which they can be loaded.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::kernel::Unpacked;
use crate::proc::line;

/// What the lab's networks are made of, and SCTP. What a kernel has built in, or does not have, is left out.
const WANTED: [&str; 15] = [
    "veth",
    "bridge",
    "sctp",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_numgen",
    "nft_fib_ipv4",
    "nft_fib_ipv6",
    "nft_fib_inet",
    "nft_reject_ipv4",
    "nft_reject_ipv6",
    "nft_reject_inet",
];

/// A module, ready to be loaded.
pub(crate) struct Module {
    /// Its name, without an ending.
    pub(crate) name: String,
    /// What the kernel loads.
    pub(crate) object: Vec<u8>,
}

/// Reads the wanted modules of a kernel and those that they need, which come first.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn in_order(kernel: &Unpacked) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(&kernel.modules.join("kernel"), &mut files)?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in WANTED {
        add(name, &files, &mut seen, &mut order)?;
    }
    // Without them tests would be left out in silence. Debian's kernels have both as modules.
    for needed in ["nf_tables", "sctp"] {
        ensure!(
            order.iter().any(|module| module.name == needed),
            "{} has no {needed}",
            kernel.modules.display()
        );
    }
    Ok(order)
}

/// The files of all modules below a folder by their names, in which `-` and `_` are the same.
fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some((name, "ko" | "ko.xz")) =
            entry.file_name().to_string_lossy().split_once('.')
        {
            files.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<Module>,
) -> Result<()> {
    let Some(file) = files.get(name) else {
        return Ok(());
    };
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let object = read(file)?;
    for needed in needs(&object) {
        add(&needed, files, seen, order)?;
    }
    order.push(Module {
        name: name.to_owned(),
        object,
    });
    Ok(())
}

fn read(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|ending| ending != "xz") {
        return fs::read(file).with_context(|| file.display().to_string());
    }
    let mut command = Command::new("xz");
    command.args(["--decompress", "--stdout"]).arg(file);
    let output = command.output().with_context(|| line(&command))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        line(&command),
        output.status
    );
    Ok(output.stdout)
}

/// The names in the string `depends=a,b` of a module's section `.modinfo`, which is made of strings that end with a zero
/// byte.
fn needs(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let list = object[at + KEY.len()..].split(|byte| *byte == 0).next();
    String::from_utf8_lossy(list.unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs() {
        let object =
            |list: &str| format!("ELF\0license=GPL\0depends={list}\0name=x\0").into_bytes();
        assert_eq!(needs(&object("nf_nat,nf-tables")), ["nf_nat", "nf_tables"]);
        assert_eq!(needs(&object("")), [""; 0]);
        assert_eq!(needs(b"ELF"), [""; 0]);
    }
}
