//! Connections and policies as text.

use std::time::Duration;

use crate::{
    panel::Selection,
    policy::{Connection, Plan},
    table,
};

/// What is told of each connection.
const COLUMNS: [&str; 9] = [
    "DIRECTION",
    "INSIDE",
    "OUTSIDE",
    "PORT",
    "COUNT",
    "SEEN BY",
    "PODS",
    "LAST SEEN",
    "QUIET",
];

/// A connection, column by column.
type Row = [String; COLUMNS.len()];

/// What there is to choose from.
#[derive(Debug)]
pub struct View<'a> {
    plan: &'a Plan<'a>,
    rows: Vec<Row>,
    rules: Vec<usize>,
    /// Of each column the width of its longest text, in characters.
    widths: [usize; COLUMNS.len()],
}

impl<'a> View<'a> {
    /// The connections of a plan. Inside stands the namespace too, if there are several.
    #[must_use]
    pub fn new(plan: &'a Plan<'a>) -> Self {
        let connections = plan.connections();
        let namespaces = plan
            .policies()
            .chunk_by(|one, other| one.namespace() == other.namespace());
        let qualified = namespaces.count() > 1;
        let rows: Vec<Row> = connections
            .iter()
            .map(|connection| {
                let policy = plan.rules()[connection.rule].policy;
                row(connection, qualified, plan.quiet(&plan.policies()[policy]))
            })
            .collect();
        let mut widths = COLUMNS.map(str::len);
        for row in &rows {
            for (width, text) in widths.iter_mut().zip(row) {
                *width = text.chars().count().max(*width);
            }
        }
        Self {
            plan,
            rules: connections
                .iter()
                .map(|connection| connection.rule)
                .collect(),
            rows,
            widths,
        }
    }

    /// A selection among them, of nothing yet.
    #[must_use]
    pub fn selection(&self) -> Selection {
        let texts = self.rows.iter().map(|row| row.join(" "));
        Selection::new(
            self.plan.rules().len(),
            self.rules.iter().copied().zip(texts),
        )
    }

    /// The names of the columns, placed as in [`line`](Self::line).
    #[must_use]
    pub fn header(&self) -> String {
        self.columns("   ", "#", &COLUMNS.map(String::from))
    }

    /// A connection and whether it is selected.
    #[must_use]
    pub fn line(&self, number: usize, selection: &Selection) -> String {
        let mark = if selection.is_selected(number) {
            "[*]"
        } else {
            "[ ]"
        };
        self.columns(mark, &number.to_string(), &self.rows[number])
    }

    /// Text to the left, counts to the right.
    fn columns(&self, mark: &str, number: &str, row: &Row) -> String {
        let digits = self.rows.len().saturating_sub(1).to_string().len();
        let mut text = format!("{mark} {number:>digits$}");
        for ((column, width), value) in COLUMNS.iter().zip(self.widths).zip(row) {
            match *column {
                "COUNT" | "PODS" | "QUIET" => text.push_str(&format!("  {value:>width$}")),
                _ => text.push_str(&format!("  {value:<width$}")),
            }
        }
        text.truncate(text.trim_end().len());
        text
    }

    /// The policies that the selection makes; of one connection the policy that has it, if a number is given.
    ///
    /// # Errors
    /// If a policy cannot be expressed in YAML; none made here cannot.
    pub fn preview(&self, selection: &Selection, of: Option<usize>) -> serde_json::Result<String> {
        let policies = match of.and_then(|connection| selection.rule_of(connection)) {
            Some(rule) => {
                let policy = self.plan.rules()[rule].policy;
                policy..policy + 1
            }
            None => 0..self.plan.policies().len(),
        };
        let mut texts = Vec::new();
        for policy in policies {
            texts.extend(self.plan.text(policy, selection.chosen())?);
        }
        Ok(texts.join("---\n"))
    }
}

fn row(connection: &Connection, qualified: bool, quiet: Duration) -> Row {
    let Connection {
        direction,
        namespace,
        inside,
        outside,
        protocol,
        port,
        evidence,
        ..
    } = connection;
    let inside = if qualified {
        format!("{namespace}/{inside}")
    } else {
        inside.clone()
    };
    let pods = match evidence.pods {
        0 => "-".to_owned(),
        pods => format!("{pods}/{}", evidence.of_pods),
    };
    [
        match direction {
            flow::record::Direction::Egress => "egress".to_owned(),
            flow::record::Direction::Ingress => "ingress".to_owned(),
        },
        table::printable(&inside),
        table::printable(outside),
        format!("{port}/{protocol}"),
        evidence.count.to_string(),
        evidence.seen_by.name().to_owned(),
        pods,
        table::time(evidence.last_seen),
        table::rounded(quiet),
    ]
}
