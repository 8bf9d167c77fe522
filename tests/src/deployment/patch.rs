//! Changes of an object as RFC 6902 (JSON Patch) has them.

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::Value;

/// One change.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operation {
    /// What is done.
    pub op: Op,
    /// Where (RFC 6901).
    path: String,
    /// What with.
    #[serde(default)]
    pub value: Value,
}

/// What is done. What the deployment does not use is not known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// A new element of a list, at its end; a field of an object.
    Add,
    /// Another value for what is there.
    Replace,
}

impl Operation {
    /// The steps from the root to the place.
    #[must_use]
    pub fn steps(&self) -> Vec<String> {
        let steps = self.path.split('/').skip(1);
        steps
            .map(|step| step.replace("~1", "/").replace("~0", "~"))
            .collect()
    }

    /// Changes an object.
    ///
    /// # Errors
    /// If there is no such place in it.
    pub fn apply(&self, object: &mut Value) -> Result<()> {
        let steps = self.steps();
        let (last, way) = steps.split_last().context("the root is not replaced")?;
        let mut place = &mut *object;
        for step in way {
            place = match place {
                Value::Object(map) => map.get_mut(step),
                Value::Array(list) => step.parse().ok().and_then(|at: usize| list.get_mut(at)),
                _ => None,
            }
            .with_context(|| format!("{}: nothing is at {step}", self.path))?;
        }
        match (self.op, place) {
            (Op::Add, Value::Array(list)) if last == "-" => list.push(self.value.clone()),
            (Op::Add, Value::Object(map)) => {
                map.insert(last.clone(), self.value.clone());
            }
            (Op::Replace, Value::Array(list)) => {
                let old = last.parse().ok().and_then(|at: usize| list.get_mut(at));
                *old.with_context(|| self.path.clone())? = self.value.clone();
            }
            (Op::Replace, Value::Object(map)) => {
                let old = map.get_mut(last);
                *old.with_context(|| self.path.clone())? = self.value.clone();
            }
            _ => bail!("{}: this cannot be done there", self.path),
        }
        Ok(())
    }
}
