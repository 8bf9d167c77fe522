//! Builds the kernel programs with the stable toolchain.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
};

use anyhow::{Context, Result};

use crate::proc::{cargo, find, remapped_prefixes, run, workspace};

/// Builds package `agent-ebpf` and copies the object to where the agent's build script looks for it.
///
/// The copy is left alone if cargo had nothing to build, so that the agent is not built again for nothing; and where cargo
/// had, it is written even if it is the same, because by its age the agent's build script tells whether it fits the sources.
pub(crate) fn build() -> Result<()> {
    run(&mut command("build")?)?;
    let built = target_dir().join(triple()).join("release/agent-ebpf");
    let wanted = target_dir().join("microshield.bpf.o");
    let mut made = built.clone();
    if let Some(strip) = strip() {
        let stripped = target_dir().join("stripped.bpf.o");
        // What debuggers read is many times the size of the rest; the kernel's BTF is made of it, and stays.
        run(Command::new(strip)
            .args(["--strip-debug", "-o"])
            .args([&stripped, &made]))?;
        made = stripped;
    } else {
        eprintln!("no llvm-strip: the object keeps what debuggers read, which makes it larger");
    }
    let object = fs::read(&made).with_context(|| made.display().to_string())?;
    let ages = (modified(&built), modified(&wanted));
    let up_to_date = matches!(ages, (Ok(built), Ok(wanted)) if built <= wanted);
    if up_to_date && fs::read(&wanted).is_ok_and(|present| present == object) {
        return Ok(());
    }
    fs::write(&wanted, object).with_context(|| wanted.display().to_string())?;
    eprintln!("{} is new", wanted.display());
    Ok(())
}

fn modified(file: &Path) -> io::Result<SystemTime> {
    fs::metadata(file)?.modified()
}

/// Lints package `agent-ebpf` as the kernel will see it, warnings denied.
pub(crate) fn clippy() -> Result<()> {
    run(command("clippy")?.args(["--", "-D", "warnings"]))
}

/// `cargo WORD` for package `agent-ebpf` and the BPF target of this machine's byte order.
///
/// `core` is built along because the toolchain ships none for BPF, which takes `-Z build-std` and hence the variable
/// that lets a stable compiler accept it. The flags of the host's build, in whatever variable or configuration file
/// they are, do not reach the BPF target: `CARGO_ENCODED_RUSTFLAGS` has precedence over all of them.
fn command(word: &str) -> Result<Command> {
    // aya-ebpf chooses the layout of `pt_regs` by this cfg; it knows one RISC-V only.
    let arch = match env::consts::ARCH {
        "riscv64gc" | "riscv64a23" => "riscv64",
        arch => arch,
    };
    let arch = format!("--cfg=bpf_target_arch=\"{arch}\"");
    // The types that the kernel is told of name files: not by where they lie on this machine. LLVM copies lines of those that
    // it finds by their new names into the object, such as `/microshield/…` where the workspace is just there; below a device
    // it finds none anywhere.
    let flags = remapped_prefixes("/dev/null")?
        .into_iter()
        .map(|remap| format!("--remap-path-prefix={remap}"))
        .chain([arch, "-Cdebuginfo=2".into(), "-Clink-arg=--btf".into()])
        .collect::<Vec<_>>();
    let mut command = cargo();
    command
        .args([word, "--package", "agent-ebpf", "--bins", "--release"])
        .args(["-Z", "build-std=core", "--target", triple(), "--target-dir"])
        .arg(target_dir())
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    for variable in ["RUSTC", "RUSTC_WORKSPACE_WRAPPER"] {
        command.env_remove(variable);
    }
    for (variable, _) in env::vars_os() {
        if variable
            .to_string_lossy()
            .starts_with("CARGO_PROFILE_RELEASE_")
        {
            command.env_remove(variable);
        }
    }
    if let Some(linker) = find("bpf-linker") {
        let triple = triple().to_uppercase().replace('-', "_");
        command.env(format!("CARGO_TARGET_{triple}_LINKER"), linker);
    }
    Ok(command)
}

/// LLVM's `llvm-strip`, which knows BPF: that in the path, or of the LLVM that bpf-linker is built against.
fn strip() -> Option<PathBuf> {
    let beside = PathBuf::from("/usr/lib/llvm-22/bin/llvm-strip");
    find("llvm-strip").or_else(|| beside.is_file().then_some(beside))
}

fn triple() -> &'static str {
    if cfg!(target_endian = "big") {
        "bpfeb-unknown-none"
    } else {
        "bpfel-unknown-none"
    }
}

/// Apart from the host's, so that the two builds never wait for each other's lock.
fn target_dir() -> PathBuf {
    workspace().join("target/bpf")
}
