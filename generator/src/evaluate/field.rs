//! Where in a policy a value stands.

use flow::locate::{FieldPath, Segment};

/// A [`FieldPath`] while its object is walked through: it allocates nothing until something is wrong.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Field(&'a str),
    Index(usize),
}

impl<'a> At<'a> {
    pub(super) fn root(field: &'a str) -> Self {
        Self {
            parent: None,
            step: Step::Field(field),
        }
    }

    pub(super) fn field<'b>(&'b self, field: &'b str) -> At<'b> {
        At {
            parent: Some(self),
            step: Step::Field(field),
        }
    }

    pub(super) fn index(&self, index: usize) -> At<'_> {
        At {
            parent: Some(self),
            step: Step::Index(index),
        }
    }

    pub(super) fn path(&self) -> FieldPath {
        let mut path = self
            .parent
            .map_or_else(FieldPath::default, |parent| parent.path());
        path.0.push(match self.step {
            Step::Field(field) => Segment::Key(field.to_owned()),
            Step::Index(index) => Segment::Item(index),
        });
        path
    }
}
