//! Finds what this machine lacks and installs it.

use std::{ffi::OsString, fs, path::Path, process::Command, time::Instant};

use anyhow::{Context, Result, bail};

use crate::{
    image::Arch,
    proc::{self, Unmet, find, line, output},
};

const BPF_LINKER: &str = "0.13.0";

const CARGO_FUZZ: &str = "0.13.2";

/// The LLVM versions that this bpf-linker can be built for.
const BPF_LINKER_LLVM: &[u32] = &[21, 22, 23];

/// Programs that are run: for what, of which Debian package, and why.
const PROGRAMS: [(&[Scope], &str, &str, &str); 9] = [
    (
        LAB,
        "ip",
        "iproute2",
        "the lab's pods are network namespaces",
    ),
    (
        LAB,
        "nft",
        "nftables",
        "the lab's service addresses are nftables rules",
    ),
    (LAB, "runc", "runc", "the lab starts images as a node does"),
    (
        &[Scope::Everything],
        "conntrack",
        "conntrack",
        "the lab's Scope probe tells of what its node tracks",
    ),
    (
        &[Scope::Machines],
        "qemu-system-x86_64",
        "qemu-system-x86",
        "the lab's tests run on other kernels too",
    ),
    (
        &[Scope::Machines],
        "xz",
        "xz-utils",
        "those kernels' modules are compressed",
    ),
    (
        &[Scope::Bench],
        "tcpdump",
        "tcpdump",
        "what capturing costs is compared with it",
    ),
    (
        &[Scope::Bench],
        "bpftrace",
        "bpftrace",
        "what capturing costs is compared with it",
    ),
    (
        &[Scope::Bench],
        "valgrind",
        "valgrind",
        "it counts instructions",
    ),
];

/// Where the lab runs.
const LAB: &[Scope] = &[Scope::Lab, Scope::Everything, Scope::Machines, Scope::Bench];

/// What to look for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What the kernel programs are built with.
    Build,
    /// What the fuzz targets are built with.
    Fuzz,
    /// What the kernel programs are built with, and what the lab makes its networks with.
    Lab,
    /// What the lab takes, and what the fuzz targets are built with.
    Everything,
    /// What the lab takes, and what boots other kernels.
    Machines,
    /// What the lab takes, and what costs are measured and compared with.
    Bench,
}

/// Something that is missing.
struct Need {
    what: String,
    why: &'static str,
    install: Install,
}

enum Install {
    /// A Debian package; all of them are installed at once.
    Package(String),
    Command(Command),
}

/// Installs what is missing; does nothing, and says nothing, if nothing is.
///
/// # Errors
/// [`Unmet`] if it cannot be installed from here: the message is the commands to run.
pub(crate) fn run(scope: Scope) -> Result<()> {
    install(&|| missing(scope))
}

/// Installs what programs for a processor are built with.
///
/// # Errors
/// As [`run`].
pub(crate) fn cross(arch: Arch) -> Result<()> {
    install(&|| missing_for(arch))
}

fn install(missing: &dyn Fn() -> Result<Vec<Need>>) -> Result<()> {
    let needs = missing()?;
    if needs.is_empty() {
        return Ok(());
    }
    for need in &needs {
        eprintln!("missing: {} ({})", need.what, need.why);
    }
    let commands = plan(needs);
    let system = commands.iter().any(is_apt);
    if system && (find("apt-get").is_none() || !nix::unistd::geteuid().is_root()) {
        let lines = commands
            .iter()
            .map(|command| {
                let sudo = if is_apt(command) { "sudo " } else { "" };
                format!("\n    {sudo}{}", line(command))
            })
            .collect::<String>();
        bail!(Unmet(format!(
            "only root can install this, and only on Debian or a system like it. What does it there:{lines}"
        )));
    }
    for mut command in commands {
        eprintln!("+ {}", line(&command));
        let start = Instant::now();
        let done = proc::run(&mut command);
        if is_apt(&command) {
            // A list that cannot be fetched is no error to it: only afterwards a package is not known.
            done.context(
                "packages come from the mirrors that apt knows, see what it said of them",
            )?;
        } else {
            done?;
        }
        eprintln!("  {:.1} s", start.elapsed().as_secs_f32());
    }
    let still = missing()?;
    if let Some(need) = still.first() {
        bail!(Unmet(format!("{} is still missing", need.what)));
    }
    Ok(())
}

fn missing(scope: Scope) -> Result<Vec<Need>> {
    let mut needs = Vec::new();
    if matches!(scope, Scope::Fuzz | Scope::Everything) {
        needs.extend(fuzz_needs());
    }
    if scope == Scope::Fuzz {
        return Ok(needs);
    }
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    for (component, file, why) in [
        (
            "rust-src",
            "lib/rustlib/src/rust/library/core/Cargo.toml",
            "the toolchain ships no `core` for the BPF target, it is built from source",
        ),
        ("clippy", "bin/cargo-clippy", "the tests include the lints"),
        (
            "rustfmt",
            "bin/cargo-fmt",
            "the tests include the formatting",
        ),
    ] {
        if !Path::new(sysroot.trim()).join(file).exists() {
            let mut command = Command::new("rustup");
            command.args(["component", "add", component]);
            needs.push(Need {
                what: component.into(),
                why,
                install: Install::Command(command),
            });
        }
    }
    let llvm = rustc_llvm()?;
    if !linker_fits(llvm) {
        needs.extend(linker_needs(llvm)?);
    }
    for (of, program, package, why) in PROGRAMS {
        if of.contains(&scope) && find(program).is_none() {
            needs.push(Need {
                what: program.into(),
                why,
                install: Install::Package(package.into()),
            });
        }
    }
    Ok(needs)
}

fn missing_for(arch: Arch) -> Result<Vec<Need>> {
    let mut needs = Vec::new();
    let libraries = output(Command::new("rustc").args([
        "--print",
        "target-libdir",
        "--target",
        arch.triple(),
    ]))?;
    if !Path::new(libraries.trim()).is_dir() {
        let mut command = Command::new("rustup");
        command.args(["target", "add", arch.triple()]);
        needs.push(Need {
            what: format!("{} of the toolchain", arch.triple()),
            why: "the images' programs are for that processor",
            install: Install::Command(command),
        });
    }
    if Arch::of_this_machine() != Some(arch) && find(arch.cross_compiler()).is_none() {
        needs.push(Need {
            what: arch.cross_compiler().into(),
            why: "it compiles what is C in the programs, and links them",
            install: Install::Package(arch.cross_package().into()),
        });
        needs.push(Need {
            what: arch.cross_library().into(),
            why: "the programs are linked to a static C library",
            install: Install::Package(arch.cross_library().into()),
        });
    }
    Ok(needs)
}

fn fuzz_needs() -> Vec<Need> {
    let mut needs = Vec::new();
    if find("c++").is_none() {
        needs.push(Need {
            what: "c++".into(),
            why: "the fuzzer's library is written in C++",
            install: Install::Package("g++".into()),
        });
    }
    if find("cargo-fuzz").is_none() {
        let mut command = Command::new("cargo");
        command.args(["install", "cargo-fuzz", "--version", CARGO_FUZZ, "--locked"]);
        needs.push(Need {
            what: format!("cargo-fuzz {CARGO_FUZZ}"),
            why: "it builds the fuzz targets; building it takes about a minute",
            install: Install::Command(command),
        });
    }
    needs
}

/// The major version of the LLVM in rustc: bpf-linker reads rustc's bitcode, and only an LLVM of the same age does.
fn rustc_llvm() -> Result<u32> {
    let text = output(Command::new("rustc").arg("-vV"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .and_then(|version| version.split('.').next())
        .and_then(|major| major.parse().ok())
        .with_context(|| format!("`rustc -vV` names no LLVM version:\n{text}"))
}

/// Whether a bpf-linker of the right version runs here and is not linked to another LLVM than rustc's.
fn linker_fits(llvm: u32) -> bool {
    let Some(linker) = find("bpf-linker") else {
        return false;
    };
    let runs = Command::new(&linker)
        .arg("--version")
        .output()
        .is_ok_and(|output| {
            output.status.success()
                && String::from_utf8_lossy(&output.stdout).trim()
                    == format!("bpf-linker {BPF_LINKER}")
        });
    let bytes = fs::read(&linker).unwrap_or_default();
    runs && linked_llvm(&bytes).is_none_or(|linked| linked == llvm)
}

/// The major version in the name of the shared LLVM library that a program asks for, if it asks for one.
fn linked_llvm(bytes: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"libLLVM.so.";
    let at = bytes
        .windows(NAME.len())
        .position(|window| window == NAME)?;
    let digits = bytes[at + NAME.len()..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit());
    String::from_utf8(digits.copied().collect())
        .ok()?
        .parse()
        .ok()
}

fn linker_needs(llvm: u32) -> Result<Vec<Need>> {
    if !BPF_LINKER_LLVM.contains(&llvm) {
        bail!(Unmet(format!(
            "this rustc carries LLVM {llvm}, and bpf-linker {BPF_LINKER} can be built for LLVM \
             {BPF_LINKER_LLVM:?} only: use the toolchain named by `rust-version`"
        )));
    }
    let prefix = format!("/usr/lib/llvm-{llvm}");
    let mut needs = Vec::new();
    if !Path::new(&prefix).join("bin/llvm-config").exists() {
        needs.push(Need {
            what: format!("LLVM {llvm} development files"),
            why: "bpf-linker is built against the LLVM that rustc carries",
            install: Install::Package(format!("llvm-{llvm}-dev")),
        });
    }
    let mut command = Command::new("cargo");
    command
        .args(["install", "bpf-linker", "--version", BPF_LINKER])
        .args(["--no-default-features", "--features"])
        .arg(format!("llvm-{llvm}"))
        .args(["--locked", "--force"])
        .env("LLVM_PREFIX", prefix);
    needs.push(Need {
        what: format!("bpf-linker {BPF_LINKER} for LLVM {llvm}"),
        why: "it links the kernel programs; building it takes about a minute",
        install: Install::Command(command),
    });
    Ok(needs)
}

/// The commands that install the needs, packages first.
fn plan(needs: Vec<Need>) -> Vec<Command> {
    let mut packages = Vec::new();
    let mut others = Vec::new();
    for need in needs {
        match need.install {
            Install::Package(package) => packages.push(OsString::from(package)),
            Install::Command(command) => others.push(command),
        }
    }
    let mut commands = Vec::new();
    if !packages.is_empty() {
        let mut update = Command::new("apt-get");
        update.args(["update", "-q"]);
        let mut install = Command::new("apt-get");
        install
            .args(["install", "-q", "-y", "--no-install-recommends"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive");
        commands.extend([update, install]);
    }
    commands.extend(others);
    commands
}

fn is_apt(command: &Command) -> bool {
    command.get_program() == "apt-get"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_that_a_program_asks_for() {
        for (program, wanted) in [
            (&b"\0libLLVM.so.22.1\0libc.so.6\0"[..], Some(22)),
            (b"\0libLLVM.so.9\0", Some(9)),
            (b"\0libLLVM.so.\0", None),
            (b"\0libc.so.6\0", None),
            (b"", None),
        ] {
            assert_eq!(linked_llvm(program), wanted, "{program:?}");
        }
    }
}
