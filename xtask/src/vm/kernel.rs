//! Debian's kernels, unpacked from their packages and installed nowhere.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::Set;
use crate::proc::{self, Unmet, output, target_dir};

/// A kernel to test on.
pub(crate) struct Kernel {
    /// Its version, as far as it does not change.
    pub(crate) series: &'static str,
    /// The package that depends on the newest of it.
    package: &'static str,
    /// The release of Debian that has it.
    release: &'static str,
    /// The smallest set that it is tested in.
    pub(crate) set: Set,
    /// Tests, by parts of their names, of what it does not have.
    pub(crate) lacks: &'static [&'static str],
}

/// The kernels for clouds have what the lab needs and are half as large as the others.
pub(crate) const KERNELS: [Kernel; 3] = [
    Kernel {
        series: "6.12",
        package: "linux-image-6.12-cloud-amd64",
        release: "bookworm",
        set: Set::Core,
        lacks: &[],
    },
    Kernel {
        series: "6.1",
        package: "linux-image-cloud-amd64",
        release: "bookworm",
        set: Set::Core,
        lacks: &[],
    },
    Kernel {
        series: "5.10",
        package: "linux-image-cloud-amd64",
        release: "bullseye",
        set: Set::All,
        // No multipath TCP in this build of it, and no iterator over the sockets of processes: who spoke first on a UDP socket
        // that is older than the agent is not known then.
        lacks: &["edge_cases::multipath", "before::answers"],
    },
];

/// Who signs Debian's releases.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A kernel on this machine.
pub(crate) struct Unpacked {
    /// The kernel's image.
    pub(crate) image: PathBuf,
    /// The folder of its modules.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// Finds it below `target/vm`, or has apt fetch it. What is there is not asked for again.
    ///
    /// # Errors
    /// If apt has no source of it, or it is not what it should be.
    pub(crate) fn unpacked(&self) -> Result<Unpacked> {
        let folder = target_dir().join("vm").join(self.series);
        if !folder.exists() {
            self.fetch(&folder)?;
        }
        let image = only_file(&folder.join("boot"), "vmlinuz-")?;
        let modules = only_file(&folder.join("lib/modules"), "")?;
        let name = modules.file_name().unwrap_or_default().to_string_lossy();
        ensure!(
            name.starts_with(&format!("{}.", self.series)),
            "{} is not Linux {}: remove {}",
            name,
            self.series,
            folder.display()
        );
        Ok(Unpacked { image, modules })
    }

    /// A package that is half unpacked must not be taken for a whole one, so it gets its name last.
    fn fetch(&self, folder: &Path) -> Result<()> {
        let apt = Apt::new(self.release)?;
        proc::run(apt.command("apt-get").arg("update").arg("-q")).with_context(|| {
            format!(
                "Linux {} is not below {} yet, and comes from Debian's mirrors",
                self.series,
                folder.display()
            )
        })?;
        let depends = output(apt.command("apt-cache").args(["depends", self.package]))?;
        let package = depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
            .map(|rest| format!("linux-image-{rest}"))
            .with_context(|| format!("{} depends on no kernel:\n{depends}", self.package))?;
        let partial = folder.with_extension("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        proc::run(
            apt.command("apt-get")
                .args(["download", "-q", &package])
                .current_dir(&partial),
        )?;
        let archive = only_file(&partial, &package)?;
        proc::run(
            Command::new("dpkg-deb")
                .arg("-x")
                .args([&archive, &partial]),
        )?;
        fs::remove_file(archive)?;
        fs::rename(&partial, folder).with_context(|| folder.display().to_string())
    }
}

/// apt with lists of its own, so that this machine's are neither used nor changed.
struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// For a release of Debian, from wherever this machine's apt gets Debian from.
    fn new(release: &str) -> Result<Self> {
        let folder = target_dir().join("vm/apt").join(release);
        for sub in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(sub))?;
        }
        let known = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(CODENAME) $(REPO_URI)",
            "Identifier: Packages",
        ]))?;
        let sources = sources(&known, release);
        if sources.is_empty() {
            bail!(Unmet(
                "apt has no source of Debian's packages, of which kernels are taken for the tests"
                    .to_owned()
            ));
        }
        fs::write(folder.join("sources.list"), sources)?;
        Ok(Self { folder })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = |name: &str| self.folder.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::SourceList={}", path("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", path("lists")),
            format!("Dir::Cache={}", path("cache")),
            // Else a mirror that cannot be reached is no error.
            "APT::Update::Error-Mode=any".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            // Root may write below the target folder where `_apt` may not.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// A line for `release` of each archive of Debian that apt knows: the main one, and that of security updates.
fn sources(known: &str, release: &str) -> String {
    known
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (origin, codename, uri) = (fields.next()?, fields.next()?, fields.next()?);
            let suffix = match codename.split_once('-') {
                None => "",
                Some((_, "security")) => "-security",
                Some(_) => return None,
            };
            (origin == "Debian")
                .then(|| format!("deb [signed-by={KEYS}] {uri} {release}{suffix} main\n"))
        })
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect()
}

/// The one file in a folder whose name begins so.
fn only_file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match found.pop() {
        Some(file) if found.is_empty() => Ok(file),
        _ => bail!("{} has not one file `{prefix}…`", folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_another_release() {
        let known = "Debian bookworm-security http://mirror/security/\nDebian bookworm http://mirror/debian/\n\
                     Debian bookworm http://mirror/debian/\nDebian bookworm-updates http://mirror/debian/\n\
                     Somebody bookworm http://elsewhere/\n";
        assert_eq!(
            sources(known, "bullseye"),
            format!(
                "deb [signed-by={KEYS}] http://mirror/debian/ bullseye main\n\
                 deb [signed-by={KEYS}] http://mirror/security/ bullseye-security main\n"
            )
        );
        assert_eq!(sources("", "bullseye"), "");
    }
}
