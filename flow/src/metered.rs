//! Bounds on what a parser can be made to hold.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

/// What may still be read before the next part of a document begins. It bounds what a parser holds, whatever it reads: a string
/// that does not end, or a map with a million keys.
#[derive(Clone, Debug)]
pub(crate) struct Allowance {
    left: Rc<Cell<usize>>,
    whole: usize,
}

impl Allowance {
    /// A new part begins.
    pub(crate) fn renew(&self) {
        self.left.set(self.whole);
    }
}

/// A reader that fails when more has been read than may.
pub(crate) struct Metered<R> {
    inner: R,
    /// The part, with its article.
    what: &'static str,
    allowance: Allowance,
}

impl<R: Read> Metered<R> {
    /// At most `most` bytes from one [`Allowance::renew`] to the next, or in all.
    pub(crate) fn new(inner: R, what: &'static str, most: usize) -> (Self, Allowance) {
        let allowance = Allowance {
            left: Rc::new(Cell::new(most)),
            whole: most,
        };
        let metered = Self {
            inner,
            what,
            allowance: allowance.clone(),
        };
        (metered, allowance)
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        let Allowance { left, whole } = &self.allowance;
        let rest = left.get().checked_sub(length);
        let what = self.what;
        left.set(
            rest.ok_or_else(|| io::Error::other(format!("{what} of more than {whole} bytes")))?,
        );
        Ok(length)
    }
}
