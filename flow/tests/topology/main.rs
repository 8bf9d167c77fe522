//! The topology index against recorded API responses, files, and a brute-force model.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod file;
mod model;
mod recorded;
mod truth;
