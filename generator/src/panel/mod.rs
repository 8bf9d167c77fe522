//! The panel in which people choose which connections to allow.
//!
//! [`Selection`] is what they do, and knows no terminal. Above it are two front ends: [`lines`], the line protocol of
//! MicroShield's panel, for pipes and plain terminals, and [`screen`], for the rest. What is missing on the command line is
//! asked for by [`prompt`].

pub mod lines;
pub mod prompt;
pub mod screen;
mod selection;
mod view;

pub use self::{selection::Selection, view::View};

/// How the panel was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Write what is selected.
    Generate,
    /// Write nothing.
    Quit,
}
