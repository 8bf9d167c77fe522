//! Bounds on what a parser can be made to hold.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

/// What may still be read before the next node is done. It bounds what a parser holds, whatever it reads: a string that does
/// not end, or a map with a million keys.
#[derive(Clone, Debug)]
pub(super) struct Allowance {
    left: Rc<Cell<usize>>,
    whole: usize,
}

impl Allowance {
    /// A new node begins.
    pub(super) fn renew(&self) {
        self.left.set(self.whole);
    }
}

/// A reader that fails when more has been read than may.
pub(super) struct Metered<R> {
    inner: R,
    left: u64,
    most: u64,
    node: Allowance,
}

impl<R: Read> Metered<R> {
    /// At most `most` bytes in all, and `node` bytes from one [`Allowance::renew`] to the next.
    pub(super) fn new(inner: R, most: u64, node: usize) -> (Self, Allowance) {
        let node = Allowance {
            left: Rc::new(Cell::new(node)),
            whole: node,
        };
        let metered = Self {
            inner,
            left: most,
            most,
            node: node.clone(),
        };
        (metered, node)
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(length as u64)
            .ok_or_else(|| too_much("report", self.most))?;
        let left = self.node.left.get().checked_sub(length);
        let whole = self.node.whole as u64;
        self.node
            .left
            .set(left.ok_or_else(|| too_much("node", whole))?);
        Ok(length)
    }
}

fn too_much(what: &str, most: u64) -> io::Error {
    io::Error::other(format!("a {what} of more than {most} bytes"))
}
