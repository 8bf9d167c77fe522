//! `cargo xtask image`: the programs' images, without a container engine.
//!
//! Of each program an OCI image layout is written (image-spec 1.1, `image-layout.md`): a folder that `skopeo copy --all
//! oci:FOLDER:TAG docker://…`, `crane push` and other tools take to a registry. The same sources are to give the same
//! bytes: times are `SOURCE_DATE_EPOCH` or 0, owners are 0, paths of the building machine are in nothing.

mod layer;
mod layout;
mod programs;

use std::{
    env, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::proc::{target_dir, workspace};

use self::{
    layer::Entry,
    layout::{Instance, Layout},
};

/// What to build, and where to put it.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// For which processors; may be given more than once [default: amd64 and arm64].
    #[arg(long, value_enum)]
    arch: Vec<Arch>,
    /// Folder for the image layouts, one folder each [default: target/images].
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Take the programs from this folder and build none; they are for the one --arch.
    #[arg(long, value_name = "DIR", requires = "arch")]
    programs: Option<PathBuf>,
    /// Write the files of the images as plain folders, for one --arch: what a Dockerfile copies.
    #[arg(long, requires = "arch")]
    tree: bool,
    /// How large the files of an image may be together, in MiB: one that is larger is not written.
    #[arg(long, value_name = "MIB", default_value_t = 25)]
    limit: usize,
}

/// A processor architecture, as Go and so the image specification name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

/// A program, and what its image says beside it.
struct Program {
    name: &'static str,
    title: &'static str,
    /// Who it runs as unless the pod says otherwise.
    user: &'static str,
    port: u16,
    /// Below which licences: the kernel programs that the agent carries have their own.
    licences: &'static [(&'static str, &'static str)],
}

const PROGRAMS: [Program; 2] = [
    Program {
        name: "microshield-agent",
        title: "MicroShield's node agent",
        // What a container adds to its capabilities is effective for root only.
        user: "0:0",
        port: 9465,
        licences: &[
            ("LICENSE", "LICENSE"),
            ("agent-ebpf/LICENSE-GPL-2.0", "LICENSE-GPL-2.0.agent-ebpf"),
            ("agent-ebpf/LICENSE-MIT", "LICENSE-MIT.agent-ebpf"),
        ],
    },
    Program {
        name: "microshield",
        title: "MicroShield's generator and its command line",
        // Nobody's number in distroless images too.
        user: "65532:65532",
        port: 8765,
        licences: &[("LICENSE", "LICENSE")],
    },
];

impl Arch {
    /// Its name in the image specification.
    fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// Builds the programs where none are given, and writes their images.
///
/// # Errors
/// If something cannot be built, read or written.
pub(crate) fn run(args: &Args) -> Result<()> {
    let arches = match args.arch.as_slice() {
        [] => &[Arch::Amd64, Arch::Arm64][..],
        arches => arches,
    };
    if let (true, [_, _, ..]) = (args.tree || args.programs.is_some(), arches) {
        bail!("--tree and --programs are for one --arch");
    }
    let output = args.output.clone();
    let output = output.unwrap_or_else(|| target_dir().join("images"));
    let epoch = source_date_epoch()?;
    let mut built = Vec::new();
    for &arch in arches {
        let folder = match &args.programs {
            Some(folder) => folder.clone(),
            None => programs::build(arch)?,
        };
        built.push((arch, folder));
    }
    for program in &PROGRAMS {
        let folder = output.join(program.name);
        if args.tree {
            for (arch, programs) in &built {
                layer::write_tree(&folder, &contents(program, *arch, programs, args.limit)?)?;
            }
            continue;
        }
        let mut instances = Vec::new();
        for (arch, programs) in &built {
            let contents = contents(program, *arch, programs, args.limit)?;
            let layer = layer::pack(&contents, epoch)?;
            eprintln!(
                "{} {}: {:.1} MiB, {:.1} MiB unpacked",
                program.name,
                arch.name(),
                mebibytes(layer.packed.len()),
                mebibytes(layer.unpacked),
            );
            let config = program.config(*arch, &layer, epoch)?;
            instances.push(Instance {
                arch: arch.name(),
                config,
                layer,
            });
        }
        let mut layout = Layout::create(&folder)?;
        let digest = layout.finish(&instances, env!("CARGO_PKG_VERSION"), program.title)?;
        writeln!(io::stdout(), "{}@{digest}", folder.display())?;
    }
    Ok(())
}

/// The whole file system of an image, which has `limit` MiB at most.
fn contents(program: &Program, arch: Arch, programs: &Path, limit: usize) -> Result<Vec<Entry>> {
    let mut entries = vec![Entry {
        path: format!("usr/bin/{}", program.name),
        mode: 0o755,
        bytes: read(&programs.join(program.name))?,
    }];
    for (file, name) in program.licences {
        entries.push(Entry {
            path: format!("licenses/{name}"),
            mode: 0o644,
            bytes: read(&workspace().join(file))?,
        });
    }
    entries.sort_by(|one, other| one.path.cmp(&other.path));
    let size = entries.iter().map(|entry| entry.bytes.len()).sum();
    ensure!(
        size <= limit << 20,
        "{} for {} has {:.1} MiB, and {limit} are allowed (--limit)",
        program.name,
        arch.name(),
        mebibytes(size),
    );
    Ok(entries)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| file.display().to_string())
}

/// Seconds since 1970 that stand for "now" (reproducible-builds.org/specs/source-date-epoch).
fn source_date_epoch() -> Result<u64> {
    match env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text
            .parse()
            .with_context(|| format!("SOURCE_DATE_EPOCH={text}")),
        Err(_) => Ok(0),
    }
}

#[expect(clippy::cast_precision_loss, reason = "it is rounded for a reader")]
fn mebibytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
