//! Finds what has a label.

use std::collections::HashMap;

use flow::endpoint::Labels;

/// Numbers of labelled things, by each of their labels.
#[derive(Clone, Debug, Default)]
pub(crate) struct LabelIndex {
    /// Key → value → numbers, in the order in which they were added.
    by_key: HashMap<String, HashMap<String, Vec<usize>>>,
}

impl LabelIndex {
    pub(crate) fn add(&mut self, number: usize, labels: &Labels) {
        for (key, value) in labels {
            let values = self.by_key.entry(key.clone()).or_default();
            values.entry(value.clone()).or_default().push(number);
        }
    }

    /// What has that label of `pairs` which the fewest have; `None` if there are no pairs.
    pub(crate) fn rarest<'a>(
        &self,
        pairs: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Option<&[usize]> {
        let with = |(key, value)| -> &[usize] {
            let values = self.by_key.get(key);
            values
                .and_then(|values| values.get(value))
                .map_or(&[], Vec::as_slice)
        };
        pairs.map(with).min_by_key(|numbers| numbers.len())
    }
}
