//! What happens to labs when their maker is interrupted.

use std::{
    process,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::remains;

/// Set before the first of this process's programs is killed.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on SIGINT, SIGTERM and SIGHUP remove every lab of this process and end it with 128 plus the signal's
/// number. Must be called while the process has a single thread: threads that exist already would take the signals.
///
/// # Errors
/// If the kernel refuses, which it does not.
pub fn remove_labs_on_interrupt() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
        .into_iter()
        .collect();
    // Children inherit the mask; `lab-pod` empties it.
    signals.thread_block().context("blocking signals")?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let Ok(signal) = signals.wait() else {
                return;
            };
            INTERRUPTED.store(true, Ordering::SeqCst);
            if let Err(error) = remains::remove_own() {
                eprintln!("cannot remove the lab: {error:#}");
            }
            process::exit(128 + signal as i32);
        })
        .context("starting the thread for signals")?;
    Ok(())
}

/// Does not return if the process was interrupted: what failed since then failed because of that, and the process ends
/// when its labs are removed. To be called before `main` returns.
pub fn wait_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}
