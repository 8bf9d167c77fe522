//! Who is at the other end: TLS from files, and bearer tokens from files. And how to get there: a host's addresses in turn, and
//! the listener for those who watch a process.
//!
//! Behind the feature `transport`. Files are read anew whenever they are needed, so what is replaced on disk is used from
//! the next connection on.

mod dial;
mod tls;
mod token;
mod watchers;

pub use self::{
    dial::dial,
    tls::{ClientFiles, ServerFiles, ServerTls, TlsError},
    token::{Secret, TokenError, TokenFile},
    watchers::answer_watchers,
};
