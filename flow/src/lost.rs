//! What was lost, and the line that says so in a file of flow records.

use std::{
    fmt,
    io::{self, Write},
};

use serde::{Deserialize, Serialize};

/// Observations of a node that were lost for one reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// The node.
    pub node: String,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
}

/// How such a line begins.
const START: &str = "{\"lost\":";

/// How it ends: MicroShield's `generator.py`, which takes every line for a flow, finds one between no services there, of which
/// no policy comes.
const END: &str = r#","src":{"pod":{},"service":{}},"dst":{"pod":{},"service":{}},"tuple":{}}"#;

impl Lost {
    /// Writes it as a line among flow records.
    ///
    /// # Errors
    /// If `to` cannot be written.
    pub fn write_line(&self, mut to: impl Write) -> io::Result<()> {
        to.write_all(START.as_bytes())?;
        serde_json::to_writer(&mut to, self)?;
        to.write_all(END.as_bytes())?;
        to.write_all(b"\n")
    }

    /// Reads such a line. Whatever else is in it does not matter.
    #[must_use]
    pub fn parse_line(line: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Line {
            lost: Lost,
        }
        // Of a file of flow records hardly any line is one of these.
        if !line.starts_with(&START.as_bytes()[..START.len() - 1]) {
            return None;
        }
        let line: Line = serde_json::from_slice(line).ok()?;
        Some(line.lost)
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            node,
            reason,
            count,
        } = self;
        write!(f, "node {node}: {count} observations lost: {reason}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_is_written() {
        let lost = Lost {
            node: "node-1".to_owned(),
            reason: "ring_full".to_owned(),
            count: 3,
        };
        let mut line = Vec::new();
        lost.write_line(&mut line).unwrap();
        assert_eq!(line.last(), Some(&b'\n'));
        assert_eq!(Lost::parse_line(&line), Some(lost.clone()));
        let by_hand = br#"{"lost": {"node": "node-1", "reason": "ring_full", "count": 3}}"#;
        assert_eq!(Lost::parse_line(by_hand), Some(lost));
        for other in [&b"{}"[..], b"{\"lost\":{}}", b"", &line[..9]] {
            assert_eq!(Lost::parse_line(other), None);
        }
    }
}
