//! Debian's packages of any release, unpacked and installed nowhere.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::proc::{self, Unmet, output, target_dir};

/// Who signs Debian's releases.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// apt with lists of its own, so that this machine's are neither used nor changed.
pub(crate) struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// For a release of Debian, from wherever this machine's apt gets Debian from, with the lists of now.
    ///
    /// # Errors
    /// If there is no apt, it knows no archive of Debian, or one cannot be reached.
    pub(crate) fn updated(release: &str) -> Result<Self> {
        let apt = Self::new(release)?;
        proc::run(apt.command("apt-get").arg("update").arg("-q"))?;
        Ok(apt)
    }

    fn new(release: &str) -> Result<Self> {
        let folder = target_dir().join("apt").join(release);
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
                "apt has no source of Debian's packages, of which the tests take some".to_owned()
            ));
        }
        fs::write(folder.join("sources.list"), sources)?;
        Ok(Self { folder })
    }

    /// A program of apt that goes by these lists.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = |name: &str| self.folder.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::SourceList={}", path("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", path("lists")),
            // What is installed here, and from where, decides nothing.
            "Dir::State::Status=/dev/null".to_owned(),
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

    /// Makes a folder of the files of a package. One that is half unpacked must not be taken for a whole one, so it gets its
    /// name last.
    ///
    /// # Errors
    /// If there is no such package, or it cannot be fetched or unpacked.
    pub(crate) fn unpack(&self, package: &str, folder: &Path) -> Result<()> {
        let partial = folder.with_extension("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        proc::run(
            self.command("apt-get")
                .args(["download", "-q", package])
                .current_dir(&partial),
        )?;
        let mut files = fs::read_dir(&partial)?;
        let archive = files.next().context("apt downloaded nothing")??.path();
        proc::run(
            Command::new("dpkg-deb")
                .arg("-x")
                .args([&archive, &partial]),
        )?;
        fs::remove_file(archive)?;
        replace(&partial, folder).with_context(|| folder.display().to_string())
    }
}

/// Gives a folder another's name. That one goes first, because a folder takes the place of empty ones only.
fn replace(new: &Path, old: &Path) -> io::Result<()> {
    match fs::remove_dir_all(old) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::rename(new, old),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_replaced_whether_it_is_there_or_not() {
        let here = target_dir().join(format!("replace-{}", std::process::id()));
        let (new, old) = (here.join("new"), here.join("old"));
        for content in ["first", "second"] {
            fs::create_dir_all(&new).unwrap();
            fs::write(new.join("file"), content).unwrap();
            replace(&new, &old).unwrap();
            assert_eq!(fs::read_to_string(old.join("file")).unwrap(), content);
        }
        fs::remove_dir_all(here).unwrap();
    }

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
