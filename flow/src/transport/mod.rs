//! Who is at the other end: TLS from files, and bearer tokens from files.
//!
//! Behind the feature `transport`. Files are read anew whenever they are needed, so what is replaced on disk is used from
//! the next connection on.

mod tls;
mod token;

pub use self::{
    tls::{ClientFiles, ServerFiles, ServerTls, TlsError},
    token::{Secret, TokenError, TokenFile},
};
