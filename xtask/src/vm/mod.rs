//! The lab's tests on other kernels than this machine's: Debian's, in qemu, with the tests in an initramfs.

mod console;
mod image;
mod kernel;
mod machine;
mod modules;

use std::{fs, thread, time::Instant};

use anyhow::{Result, bail};

use self::kernel::{KERNELS, Kernel, Unpacked};
use crate::proc::{Unmet, target_dir};

/// Machines that run at the same time: much of a test's time is waiting.
const AT_ONCE: usize = 2;

/// Which tests run, and on which kernels where none is named.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Set {
    /// Every program in every form through the verifier, and what it counts.
    Core,
    /// All that is the kernel's matter and does not depend on what a machine does in a second.
    All,
}

impl Set {
    /// The tests, by parts of their names.
    fn tests(self) -> &'static [&'static str] {
        match self {
            Self::Core => &[
                "capture::counts_are_exact",
                "capture::an_accept",
                "capture::overflow",
                "connections::each",
                "before::edges",
                "before::answers",
                "sctp::associations",
                "sctp::a_service",
                "sctp::in_user_space",
                "udp::resolvers",
                "udp::whose",
                "udp::a_service_address_from",
                "failures::",
            ],
            Self::All => &[
                "capture::",
                "connections::",
                "before::edges",
                "before::owners",
                "before::answers",
                "before::what",
                "before::no_room",
                "before::none_twice",
                "before::the_whole",
                "sctp::",
                "udp::",
                "failures::",
                "identity::",
                "pairs::",
                "edge_cases::multipath",
                "edge_cases::simultaneous",
                "edge_cases::a_connect",
                "edge_cases::fast_open",
                "edge_cases::a_listener",
                "edge_cases::one_port",
                "edge_cases::ports",
                "edge_cases::more_calls",
                "edge_cases::sockets",
                "edge_cases::processes",
                "agent::no_program",
            ],
        }
    }
}

/// Boots each kernel that is asked for, by its series such as `6.1`, or those of the set, and runs the tests in it.
///
/// # Errors
/// If a kernel cannot be had or booted, or a test fails in it; the others have run all the same.
pub(crate) fn run(set: Set, series: &[String], filter: &[String]) -> Result<()> {
    let kernels = chosen(set, series)?;
    let tests: Vec<&str> = if filter.is_empty() {
        set.tests().to_vec()
    } else {
        filter.iter().map(String::as_str).collect()
    };
    let unpacked = kernels
        .into_iter()
        .map(|kernel| Ok((kernel, kernel.unpacked()?)))
        .collect::<Result<Vec<_>>>()?;
    let programs = image::Programs::build()?;
    let mut failed = Vec::new();
    for some in unpacked.chunks(AT_ONCE) {
        thread::scope(|scope| {
            let running: Vec<_> = some
                .iter()
                .map(|(kernel, unpacked)| {
                    let tests = tests.iter().map(|&test| test.to_owned());
                    let lacks = kernel.lacks.iter().map(|test| format!("!{test}"));
                    let tests: Vec<_> = tests.chain(lacks).collect();
                    let programs = &programs;
                    let series = kernel.series;
                    let thread = scope.spawn(move || test(series, unpacked, programs, &tests));
                    (series, thread)
                })
                .collect();
            for (series, thread) in running {
                if !thread.join().unwrap_or(false) {
                    failed.push(series);
                }
            }
        });
    }
    if !failed.is_empty() {
        bail!("failed on Linux {}", failed.join(", "));
    }
    Ok(())
}

fn chosen(set: Set, series: &[String]) -> Result<Vec<&'static Kernel>> {
    if series.is_empty() {
        let kernels = KERNELS.iter();
        return Ok(kernels
            .filter(|kernel| kernel.set == Set::Core || set == Set::All)
            .collect());
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

/// Whether all tests pass on a kernel; says how many, or what failed.
fn test(series: &str, kernel: &Unpacked, programs: &image::Programs, tests: &[String]) -> bool {
    let start = Instant::now();
    let result = boot(series, kernel, programs, tests);
    let seconds = start.elapsed().as_secs_f32();
    match &result {
        Ok(summary) => eprintln!("── Linux {series}: {summary}, {seconds:.0} s"),
        Err(error) => eprintln!("── Linux {series}: {error:#}, {seconds:.0} s"),
    }
    result.is_ok()
}

fn boot(
    series: &str,
    kernel: &Unpacked,
    programs: &image::Programs,
    tests: &[String],
) -> Result<console::Summary> {
    let modules = modules::in_order(kernel)?;
    let initramfs = target_dir().join(format!("vm/{series}.cpio"));
    image::write(&initramfs, programs, &modules)?;
    let result = machine::boot(series, &kernel.image, &initramfs, tests);
    // It is as large as all programs together, and made in a second.
    fs::remove_file(&initramfs)?;
    result
}
