//! `microshield serve` and `export`, run as they are, with clients on loopback.
#![forbid(unsafe_code)]
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "in a test, a panic is how a failure is told"
)]

mod access;
mod client;
mod data_dir;
mod exactly_once;
mod export;
mod folder;
mod generator;
mod names;
mod refusals;
