//! The evaluator against the verdicts of others.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests are not seen as tests by clippy"
)]

mod cluster;
mod corpus;
mod oracle;
mod random;
