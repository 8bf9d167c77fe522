//! Images as `cargo xtask image` writes them, read back as a container runtime does.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use flate2::read::GzDecoder;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::process::binary;

/// Where image layouts are found that are not to be built anew, such as those of a release.
pub const LAYOUTS: &str = "MICROSHIELD_IMAGES";

/// An image of one architecture, unpacked.
#[derive(Debug)]
pub struct Image {
    /// Its root folder.
    pub root: PathBuf,
    /// Its configuration, as the image specification has it.
    pub config: Value,
}

/// The folder with the image layouts: the one that was named, or a new one below `folder`, of the programs that the tests
/// run, made by the same code.
///
/// # Errors
/// If they cannot be made.
pub fn layouts(folder: &Path) -> Result<PathBuf> {
    if let Some(layouts) = of_a_release() {
        return Ok(layouts);
    }
    let layouts = folder.join("images");
    build(&layouts, DEBUG_LIMIT)?;
    Ok(layouts)
}

/// The image layouts of a release, if they were named.
#[must_use]
pub fn of_a_release() -> Option<PathBuf> {
    env::var_os(LAYOUTS).map(PathBuf::from)
}

/// More than programs that are not optimised take, in MiB.
pub const DEBUG_LIMIT: u32 = 1024;

/// Makes image layouts of the programs that the tests run, of so many MiB at most, and returns what is printed: their
/// digests.
///
/// # Errors
/// If they cannot be made.
pub fn build(layouts: &Path, limit: u32) -> Result<String> {
    // Without what debuggers read, as those of a release.
    let programs = layouts.with_extension("programs");
    fs::create_dir_all(&programs)?;
    for name in ["microshield-agent", "microshield"] {
        let mut strip = Command::new("strip");
        run(strip.arg("-o").arg(programs.join(name)).arg(binary(name)?))?;
    }
    let mut command = Command::new(binary("xtask")?);
    command.args(["image", "--arch", architecture(), "--programs"]);
    command.arg(programs).arg("--output").arg(layouts);
    run(command.arg("--limit").arg(limit.to_string()))
}

/// Runs a program and returns what it prints.
fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?}: {}: {said}",
        output.status
    );
    Ok(String::from_utf8(output.stdout)?)
}

impl Image {
    /// Unpacks the image of a layout for this machine to a folder. Every digest and size on the way is checked.
    ///
    /// # Errors
    /// If the layout is not what it should be, or has no image for this machine.
    pub fn unpack(layout: &Path, root: &Path) -> Result<Self> {
        Self::unpack_for(architecture(), layout, root)
    }

    /// The same, for another architecture, as Go names it.
    ///
    /// # Errors
    /// As [`Self::unpack`].
    pub fn unpack_for(architecture: &str, layout: &Path, root: &Path) -> Result<Self> {
        let marker: Value = document(&fs::read(layout.join("oci-layout"))?)?;
        ensure!(marker["imageLayoutVersion"] == "1.0.0", "{marker}");
        let entry: Value = document(&fs::read(layout.join("index.json"))?)?;
        let index: Value = document(&blob(layout, only(&entry["manifests"])?)?)?;
        let instances = index["manifests"].as_array().context("no images")?;
        let instance = instances.iter().find(|instance| {
            let platform = &instance["platform"];
            platform["architecture"] == architecture && platform["os"] == "linux"
        });
        let instance = instance.with_context(|| format!("none for {architecture} in {index}"))?;
        let manifest: Value = document(&blob(layout, instance)?)?;
        let config: Value = document(&blob(layout, &manifest["config"])?)?;
        let layer = blob(layout, only(&manifest["layers"])?)?;
        let mut tar = Vec::new();
        std::io::Read::read_to_end(&mut GzDecoder::new(layer.as_slice()), &mut tar)?;
        let wanted = only(&config["rootfs"]["diff_ids"])?;
        ensure!(*wanted == digest(&tar), "the layer is not {wanted}");
        fs::create_dir_all(root)?;
        tar::Archive::new(tar.as_slice()).unpack(root)?;
        Ok(Self {
            root: root.to_owned(),
            config,
        })
    }

    /// The program that is started.
    ///
    /// # Errors
    /// If it is not one word.
    pub fn entry_point(&self) -> Result<&str> {
        let word = only(&self.config["config"]["Entrypoint"])?;
        word.as_str().context("the entry point is no text")
    }

    /// Its files by their paths, with their sizes.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn files(&self) -> Result<BTreeMap<String, u64>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else {
                    let path = entry.path();
                    let name = path.strip_prefix(&self.root)?.display().to_string();
                    files.insert(name, entry.metadata()?.len());
                }
            }
        }
        Ok(files)
    }
}

/// This machine's architecture, as Go names it.
fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn document(bytes: &[u8]) -> Result<Value> {
    Ok(serde_json::from_slice(bytes)?)
}

fn only(list: &Value) -> Result<&Value> {
    match list.as_array().map(Vec::as_slice) {
        Some([only]) => Ok(only),
        _ => anyhow::bail!("one is expected: {list}"),
    }
}

/// The bytes that a descriptor stands for.
fn blob(layout: &Path, descriptor: &Value) -> Result<Vec<u8>> {
    let name = descriptor["digest"].as_str().context("no digest")?;
    let hex = name.strip_prefix("sha256:").context("not by SHA-256")?;
    let bytes = fs::read(layout.join("blobs/sha256").join(hex)).with_context(|| name.to_owned())?;
    ensure!(digest(&bytes) == name, "{name} is something else");
    ensure!(descriptor["size"] == bytes.len(), "{descriptor}");
    Ok(bytes)
}

fn digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
