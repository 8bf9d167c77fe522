//! The initramfs: our programs, the libraries that they need, `ip` and `nft`, and the kernel's modules.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use cpio::newc::{self, Builder};

use super::modules::Module;
use crate::proc::{self, cargo, find, output, target_dir};

/// Folders that programs expect, and where file systems are mounted.
const FOLDERS: [&str; 7] = ["proc", "sys", "dev", "run", "tmp", "etc", "root"];

/// The certificate authorities that everybody trusts: a client of the API server looks for some, whatever it then needs.
const TRUSTED: &str = "etc/ssl/certs/ca-certificates.crt";

/// Where our programs are in it.
const OWN: &str = "lab";

/// What runs in the machine.
pub(crate) struct Programs {
    /// Where each is now, and where it will be.
    files: Vec<(PathBuf, PathBuf)>,
}

impl Programs {
    /// Builds our own programs and finds all others.
    ///
    /// # Errors
    /// If one cannot be built or is not there.
    pub(crate) fn build() -> Result<Self> {
        let tests = build()?;
        let stripped = target_dir().join("vm/bin");
        fs::create_dir_all(&stripped)?;
        let own = |name: &str| target_dir().join("debug").join(name);
        let mut programs = Vec::new();
        for (name, from) in [
            ("init", own("vm-init")),
            ("e2e", tests),
            ("lab-pod", own("lab-pod")),
            ("microshield-agent", own("microshield-agent")),
            ("microshield", own("microshield")),
        ] {
            let to = stripped.join(name);
            strip(&from, &to)?;
            let place = match name {
                "init" => PathBuf::from(name),
                _ => Path::new(OWN).join(name),
            };
            programs.push((to, place));
        }
        for name in ["ip", "nft"] {
            let from = find(name).with_context(|| format!("no program {name}"))?;
            programs.push((from, Path::new("bin").join(name)));
        }
        let mut libraries = BTreeSet::new();
        for (program, _) in &programs {
            libraries.extend(needed(program)?);
        }
        let mut files = programs;
        files.push((PathBuf::from("/").join(TRUSTED), PathBuf::from(TRUSTED)));
        for library in libraries {
            let place = library.strip_prefix("/").unwrap_or(&library).to_owned();
            files.push((library, place));
        }
        Ok(Self { files })
    }
}

/// Builds everything, as all other steps of the tests do, and says where the program of the end-to-end tests is.
fn build() -> Result<PathBuf> {
    let build = ["build", "--workspace", "--all-targets"];
    let messages = output(
        cargo()
            .args(build)
            .arg("--message-format=json-render-diagnostics"),
    )?;
    // One line is the message about this program; its field names and values are distinct enough to be found by themselves.
    messages
        .lines()
        .filter(|line| line.contains(r#""name":"e2e""#))
        .find_map(|line| line.split_once(r#""executable":""#)?.1.split('"').next())
        .map(PathBuf::from)
        .context("cargo does not say where it put the program of the end-to-end tests")
}

/// Without its symbols a program is a third of its size, which all has to be unpacked by the emulated machine.
fn strip(from: &Path, to: &Path) -> Result<()> {
    proc::run(
        Command::new("strip")
            .arg("--strip-all")
            .arg("-o")
            .args([to, from]),
    )
}

/// The libraries that a program is linked with, and their loader.
fn needed(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let text = output(Command::new("ldd").arg(program))?;
    let libraries = libraries(&text);
    ensure!(
        !libraries.is_empty() && !text.contains("not found"),
        "{}: {text}",
        program.display()
    );
    Ok(libraries)
}

/// Lines are `name => /path (address)`, or `/path (address)` for the loader.
fn libraries(ldd: &str) -> BTreeSet<PathBuf> {
    ldd.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once(" => ").map_or(line, |(_, path)| path);
            path.starts_with('/')
                .then(|| PathBuf::from(path.split(" (").next().unwrap_or(path)))
        })
        .collect()
}

/// Writes the archive (`newc`, `Documentation/driver-api/early-userspace/buffer-format.rst`).
///
/// # Errors
/// If it cannot be written, or something in it not read.
pub(crate) fn write(archive: &Path, programs: &Programs, modules: &[Module]) -> Result<()> {
    let file = File::create(archive).with_context(|| archive.display().to_string())?;
    let mut archive = Archive {
        out: BufWriter::new(file),
        folders: BTreeSet::new(),
    };
    for folder in FOLDERS {
        archive.folder(Path::new(folder))?;
    }
    for (from, to) in &programs.files {
        let contents = fs::read(from).with_context(|| from.display().to_string())?;
        archive.file(to, &contents)?;
    }
    for (place, module) in modules.iter().enumerate() {
        let name = format!("modules/{place:02}-{}.ko", module.name);
        archive.file(Path::new(&name), &module.object)?;
    }
    let mut out = newc::trailer(archive.out)?;
    Ok(out.flush()?)
}

struct Archive {
    out: BufWriter<File>,
    folders: BTreeSet<PathBuf>,
}

impl Archive {
    fn folder(&mut self, path: &Path) -> Result<()> {
        if path == Path::new("") || !self.folders.insert(path.to_owned()) {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        self.entry(path, 0o040_755, &[])
    }

    fn file(&mut self, path: &Path, contents: &[u8]) -> Result<()> {
        if let Some(parent) = path.parent() {
            self.folder(parent)?;
        }
        self.entry(path, 0o100_755, contents)
    }

    fn entry(&mut self, path: &Path, mode: u32, contents: &[u8]) -> Result<()> {
        let size = u32::try_from(contents.len()).context("a file of 4 GiB")?;
        let mut entry = Builder::new(&path.to_string_lossy())
            .mode(mode)
            .write(&mut self.out, size);
        entry.write_all(contents)?;
        entry.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_of_a_program() {
        let text = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibgcc_s.so.1 => /lib/x/libgcc_s.so.1 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let wanted = ["/lib/x/libgcc_s.so.1", "/lib64/ld-linux-x86-64.so.2"];
        assert_eq!(libraries(text), wanted.map(PathBuf::from).into());
        assert!(libraries("\tstatically linked\n").is_empty());
    }
}
