//! What is selected, shown, and can be undone.

/// Steps that can be undone.
const MAX_UNDO: usize = 1_000;

/// A selection among connections. Connections of one rule are selected together: a policy has the rule or has it not.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Of each connection its rule.
    rule_of: Vec<usize>,
    /// Of each connection what it can be found by, in lower case.
    texts: Vec<String>,
    /// Of each rule whether it is selected.
    chosen: Vec<bool>,
    /// The rules that each step changed, the last step last.
    undo: Vec<Vec<usize>>,
    filter: String,
    /// The connections that the filter lets through, by number.
    shown: Vec<usize>,
}

impl Selection {
    /// Nothing is selected, everything shown. Connections are given by their rules and by what they can be found by.
    #[must_use]
    pub fn new(rules: usize, connections: impl IntoIterator<Item = (usize, String)>) -> Self {
        let (rule_of, texts): (Vec<usize>, Vec<String>) = connections
            .into_iter()
            .map(|(rule, text)| (rule, text.to_lowercase()))
            .unzip();
        Self {
            shown: (0..rule_of.len()).collect(),
            rule_of,
            texts,
            chosen: vec![false; rules],
            undo: Vec::new(),
            filter: String::new(),
        }
    }

    /// How many connections there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rule_of.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rule_of.is_empty()
    }

    /// Whether a connection is selected.
    #[must_use]
    pub fn is_selected(&self, connection: usize) -> bool {
        self.rule_of
            .get(connection)
            .is_some_and(|rule| self.chosen[*rule])
    }

    /// How many connections are selected.
    #[must_use]
    pub fn selected(&self) -> usize {
        self.rule_of
            .iter()
            .filter(|rule| self.chosen[**rule])
            .count()
    }

    /// Of each rule whether it is selected.
    #[must_use]
    pub fn chosen(&self) -> &[bool] {
        &self.chosen
    }

    /// The rule of a connection.
    #[must_use]
    pub fn rule_of(&self, connection: usize) -> Option<usize> {
        self.rule_of.get(connection).copied()
    }

    /// Selects connections, and all others of their rules; or, with `on` false, leaves them out. Numbers that are none are
    /// ignored. Returns how many connections changed.
    pub fn set(&mut self, connections: impl IntoIterator<Item = usize>, on: bool) -> usize {
        let before = self.selected();
        let mut changed = Vec::new();
        for connection in connections {
            if let Some(rule) = self.rule_of(connection)
                && self.chosen[rule] != on
            {
                self.chosen[rule] = on;
                changed.push(rule);
            }
        }
        if !changed.is_empty() {
            if self.undo.len() == MAX_UNDO {
                self.undo.remove(0);
            }
            self.undo.push(changed);
        }
        self.selected().abs_diff(before)
    }

    /// Selects, or leaves out, all that is shown.
    pub fn set_shown(&mut self, on: bool) -> usize {
        self.set(self.shown.clone(), on)
    }

    /// Takes the last step back; says whether there was one.
    pub fn undo(&mut self) -> bool {
        let Some(changed) = self.undo.pop() else {
            return false;
        };
        for rule in changed {
            self.chosen[rule] = !self.chosen[rule];
        }
        true
    }

    /// Shows only connections that `text` is found in, in whatever case; all if it is empty. Selection and numbers stay.
    pub fn filter(&mut self, text: &str) {
        self.filter = text.to_owned();
        let wanted = text.to_lowercase();
        let texts = self.texts.iter().enumerate();
        self.shown = texts
            .filter(|(_, text)| text.contains(&wanted))
            .map(|(number, _)| number)
            .collect();
    }

    /// What is filtered by.
    #[must_use]
    pub fn filter_text(&self) -> &str {
        &self.filter
    }

    /// The numbers of the connections that are shown.
    #[must_use]
    pub fn shown(&self) -> &[usize] {
        &self.shown
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Set(Vec<usize>, bool),
        SetShown(bool),
        Undo,
        Filter(String),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (prop::collection::vec(0..25_usize, 0..6), any::<bool>())
                .prop_map(|(numbers, on)| Step::Set(numbers, on)),
            any::<bool>().prop_map(Step::SetShown),
            Just(Step::Undo),
            "[a-cA-C]{0,2}".prop_map(Step::Filter),
        ]
    }

    fn any_connections() -> impl Strategy<Value = Vec<(usize, String)>> {
        prop::collection::vec((0..8_usize, "[a-cA-C]{1,4}"), 0..20)
    }

    fn take(selection: &mut Selection, step: &Step) {
        match step {
            Step::Set(numbers, on) => {
                selection.set(numbers.iter().copied(), *on);
            }
            Step::SetShown(on) => {
                selection.set_shown(*on);
            }
            Step::Undo => {
                selection.undo();
            }
            Step::Filter(text) => selection.filter(text),
        }
    }

    proptest! {
        #[test]
        fn connections_of_one_rule_are_selected_together(
            connections in any_connections(),
            steps in prop::collection::vec(any_step(), 0..12),
        ) {
            let mut selection = Selection::new(8, connections.clone());
            for step in &steps {
                take(&mut selection, step);
                for (number, (rule, _)) in connections.iter().enumerate() {
                    prop_assert_eq!(selection.is_selected(number), selection.chosen()[*rule]);
                }
            }
        }

        #[test]
        fn a_step_does_what_it_says(
            connections in any_connections(),
            before in prop::collection::vec(any_step(), 0..6),
            numbers in prop::collection::vec(0..25_usize, 0..6),
            on: bool,
        ) {
            let mut selection = Selection::new(8, connections.clone());
            before.iter().for_each(|step| take(&mut selection, step));
            let known = selection.clone();
            let changed = selection.set(numbers.clone(), on);
            let rules: Vec<usize> = numbers.iter().filter_map(|number| known.rule_of(*number)).collect();
            for (number, (rule, _)) in connections.iter().enumerate() {
                let expected = if rules.contains(rule) { on } else { known.is_selected(number) };
                prop_assert_eq!(selection.is_selected(number), expected);
            }
            prop_assert_eq!(changed, selection.selected().abs_diff(known.selected()));
            prop_assert!(!selection.is_selected(connections.len()));
        }

        #[test]
        fn everything_can_be_undone(
            connections in any_connections(),
            steps in prop::collection::vec(any_step(), 0..12),
        ) {
            let mut selection = Selection::new(8, connections);
            let mut states = vec![selection.chosen().to_vec()];
            for step in &steps {
                take(&mut selection, step);
                if matches!(step, Step::Undo) {
                    if states.len() > 1 {
                        states.pop();
                    }
                } else if states.last().map(Vec::as_slice) != Some(selection.chosen()) {
                    states.push(selection.chosen().to_vec());
                }
                prop_assert_eq!(states.last().map(Vec::as_slice), Some(selection.chosen()));
            }
            while selection.undo() {
                states.pop();
                prop_assert_eq!(states.last().map(Vec::as_slice), Some(selection.chosen()));
            }
            prop_assert_eq!(states.len(), 1);
        }

        #[test]
        fn a_filter_shows_what_holds_the_text_and_changes_nothing(
            connections in any_connections(),
            text in "[a-cA-C]{0,2}",
        ) {
            let mut selection = Selection::new(8, connections.clone());
            selection.set([0], true);
            let chosen = selection.chosen().to_vec();
            selection.filter(&text);
            let holds = |number: &usize| {
                connections[*number].1.to_lowercase().contains(&text.to_lowercase())
            };
            let expected: Vec<usize> = (0..connections.len()).filter(holds).collect();
            prop_assert_eq!(selection.shown(), expected);
            prop_assert_eq!(selection.chosen(), chosen);
        }
    }
}
