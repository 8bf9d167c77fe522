//! Label selectors.

use std::collections::BTreeSet;

use flow::endpoint::Labels;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use super::{
    error::{Flaw, Problem},
    field::At,
};
use crate::syntax;

/// A value that hardly any selector names.
const OTHER: &str = "any-other";

/// A selector of labels: all its requirements must hold. Without any it selects everything.
///
/// Two selectors that were written differently but require the same are equal.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Selector {
    requirements: BTreeSet<Requirement>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Test {
    In(BTreeSet<String>),
    /// Holds as well where there is no such key.
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

impl Selector {
    /// Whether it selects an object that has these labels.
    pub(super) fn selects(&self, labels: &Labels) -> bool {
        self.requirements.iter().all(|Requirement { key, test }| {
            let value = labels.get(key);
            match test {
                Test::In(values) => value.is_some_and(|value| values.contains(value)),
                Test::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
                Test::Exists => value.is_some(),
                Test::DoesNotExist => value.is_none(),
            }
        })
    }

    /// The labels that an object must have to be selected, as far as there is but one value for a key.
    pub(super) fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.requirements
            .iter()
            .filter_map(|Requirement { key, test }| match test {
                Test::In(values) if values.len() == 1 => {
                    values.first().map(|value| (key.as_str(), value.as_str()))
                }
                _ => None,
            })
    }

    /// The keys of the labels that it looks at.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.requirements
            .iter()
            .map(|requirement| requirement.key.as_str())
    }

    /// Sets of labels that tell this selector from others: the smallest that it selects, if it selects any, and what
    /// becomes of that when one of its labels is another one.
    pub(super) fn samples(&self) -> Vec<Labels> {
        let Some(smallest) = self.smallest() else {
            return Vec::new();
        };
        let mut samples = vec![smallest.clone()];
        for Requirement { key, test } in &self.requirements {
            let others: Vec<&str> = match test {
                Test::In(values) => values.iter().map(String::as_str).collect(),
                Test::NotIn(values) => values.iter().map(String::as_str).chain([OTHER]).collect(),
                Test::Exists | Test::DoesNotExist => vec![OTHER],
            };
            for value in others {
                let mut labels = smallest.clone();
                labels.insert(key.clone(), value.to_owned());
                samples.push(labels);
            }
        }
        samples.sort_unstable();
        samples.dedup();
        samples
    }

    fn smallest(&self) -> Option<Labels> {
        let mut labels = Labels::new();
        for Requirement { key, test } in &self.requirements {
            let of_key = |value: &&str| {
                let labels = [(key.clone(), (*value).to_owned())].into();
                let same = self.requirements.iter().filter(|other| other.key == *key);
                Self {
                    requirements: same.cloned().collect(),
                }
                .selects(&labels)
            };
            let value = match test {
                Test::In(values) => values.iter().map(String::as_str).find(of_key)?,
                Test::Exists => self.values(key).chain([OTHER]).find(of_key)?,
                Test::NotIn(_) | Test::DoesNotExist => continue,
            };
            labels.insert(key.clone(), value.to_owned());
        }
        self.selects(&labels).then_some(labels)
    }

    /// The values that it requires of a key.
    fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.requirements
            .iter()
            .filter(move |requirement| requirement.key == key)
            .filter_map(|requirement| match &requirement.test {
                Test::In(values) => Some(values),
                _ => None,
            })
            .flatten()
            .map(String::as_str)
    }

    pub(super) fn compile(selector: &LabelSelector, at: &At<'_>) -> Result<Self, Flaw> {
        let mut requirements = BTreeSet::new();
        let labels_at = at.field("matchLabels");
        for (key, value) in selector.match_labels.iter().flatten() {
            let at = labels_at.field(key);
            check_key(key, &at)?;
            check_value(value, &at)?;
            requirements.insert(Requirement {
                key: key.clone(),
                test: Test::In([value.clone()].into()),
            });
        }
        let expressions_at = at.field("matchExpressions");
        for (i, expression) in selector.match_expressions.iter().flatten().enumerate() {
            let at = expressions_at.index(i);
            check_key(&expression.key, &at.field("key"))?;
            let values_at = at.field("values");
            let values = expression.values.as_deref().unwrap_or_default();
            for (i, value) in values.iter().enumerate() {
                check_value(value, &values_at.index(i))?;
            }
            let operator = expression.operator.as_str();
            let some = || match values {
                [] => Err(Problem::ValuesMissing(operator.to_owned()).at(&values_at)),
                values => Ok(values.iter().cloned().collect()),
            };
            let none = |test| match values {
                [] => Ok(test),
                _ => Err(Problem::ValuesForbidden(operator.to_owned()).at(&values_at)),
            };
            let test = match operator {
                "In" => Test::In(some()?),
                "NotIn" => Test::NotIn(some()?),
                "Exists" => none(Test::Exists)?,
                "DoesNotExist" => none(Test::DoesNotExist)?,
                _ => return Err(Problem::Operator(operator.to_owned()).at(&at.field("operator"))),
            };
            requirements.insert(Requirement {
                key: expression.key.clone(),
                test,
            });
        }
        Ok(Self { requirements })
    }
}

fn check_key(key: &str, at: &At<'_>) -> Result<(), Flaw> {
    if syntax::is_label_key(key) {
        Ok(())
    } else {
        Err(Problem::LabelKey(key.to_owned()).at(at))
    }
}

fn check_value(value: &str, at: &At<'_>) -> Result<(), Flaw> {
    if syntax::is_label_value(value) {
        Ok(())
    } else {
        Err(Problem::LabelValue(value.to_owned()).at(at))
    }
}
