//! The lab's tests on other kernels than this machine's: Debian's, in qemu, with the tests in an initramfs.

mod console;
mod image;
mod kernel;
mod machine;
mod modules;

use std::{fs, time::Instant};

use anyhow::{Result, bail};

use self::kernel::{KERNELS, Kernel};
use crate::proc::{Unmet, target_dir};

/// The tests that run there, by parts of their names: everything that captures. What is not the kernel's matter, such as the
/// uplink, is tested here only.
const TESTS: [&str; 7] = [
    "capture::",
    "before::",
    "udp::",
    "edge::",
    "failures::",
    "identity::",
    "pairs::",
];

/// Boots each kernel that is asked for, by its series such as `6.1`, or all of them, and runs the tests in it.
///
/// # Errors
/// If a kernel cannot be had or booted, or a test fails in it; the others have run all the same.
pub(crate) fn run(series: &[String], filter: &[String]) -> Result<()> {
    let kernels = chosen(series)?;
    let tests: Vec<&str> = if filter.is_empty() {
        TESTS.to_vec()
    } else {
        filter.iter().map(String::as_str).collect()
    };
    let programs = image::Programs::build()?;
    let mut failed = Vec::new();
    for kernel in kernels {
        let start = Instant::now();
        let result = test(kernel, &programs, &tests);
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(summary) => eprintln!("── Linux {}: {summary}, {seconds:.0} s", kernel.series),
            Err(error) => {
                eprintln!("── Linux {}: {error:#}, {seconds:.0} s", kernel.series);
                failed.push(kernel.series);
            }
        }
    }
    if !failed.is_empty() {
        bail!("failed on Linux {}", failed.join(", "));
    }
    Ok(())
}

fn chosen(series: &[String]) -> Result<Vec<&'static Kernel>> {
    if series.is_empty() {
        return Ok(KERNELS.iter().collect());
    }
    series
        .iter()
        .map(|wanted| {
            let found = KERNELS.iter().find(|kernel| kernel.series == wanted);
            found.ok_or_else(|| {
                let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.series).collect();
                Unmet(format!(
                    "no kernel {wanted}: there are {}",
                    known.join(", ")
                ))
                .into()
            })
        })
        .collect()
}

fn test(kernel: &Kernel, programs: &image::Programs, tests: &[&str]) -> Result<console::Summary> {
    let unpacked = kernel.unpacked()?;
    let modules = modules::in_order(&unpacked)?;
    let initramfs = target_dir().join(format!("vm/{}.cpio", kernel.series));
    image::write(&initramfs, programs, &modules)?;
    let result = machine::boot(&unpacked.image, &initramfs, tests);
    // It is as large as all programs together, and made in a second.
    fs::remove_file(&initramfs)?;
    result
}
