//! Flow records from JSON, many of them.
//!
//! A cluster has some thousand endpoints, and its records name them again and again. Their text is most of a record's: it is
//! parsed once for each endpoint, and their records share what came of it.

use std::collections::HashMap;

use serde_json::value::RawValue;

use crate::{
    endpoint::{Endpoint, EndpointJson},
    record::{FlowRecord, RecordJson},
};

/// How much text of endpoints is kept, in bytes: that of some ten thousand.
const MAX_KEPT_BYTES: usize = 16 << 20;

/// Parses records.
#[derive(Debug, Default)]
pub struct Parser {
    /// Ends by their text; `None` for the external one, whose address stands elsewhere in the record.
    ends: HashMap<Box<str>, Option<Endpoint>>,
    kept_bytes: usize,
}

impl Parser {
    /// The record that a text is, as [`serde_json::from_slice`] gives it. `None` if it is none: that function then says why.
    pub fn parse(&mut self, text: &[u8]) -> Option<FlowRecord> {
        let json: RecordJson<&RawValue> = serde_json::from_slice(text).ok()?;
        let record: Result<_, Refused> = json.with_ends(|end, address| {
            let end = self.end(end.get())?;
            Ok(end.unwrap_or(Endpoint::External(address)))
        });
        record.ok()
    }

    fn end(&mut self, text: &str) -> Result<Option<Endpoint>, Refused> {
        if let Some(known) = self.ends.get(text) {
            return Ok(known.clone());
        }
        let json: EndpointJson = serde_json::from_str(text).map_err(|_error| Refused)?;
        let end = json.into_known();
        if self.kept_bytes + text.len() > MAX_KEPT_BYTES {
            self.ends.clear();
            self.kept_bytes = 0;
        }
        self.kept_bytes += text.len();
        self.ends.insert(text.into(), end.clone());
        Ok(end)
    }
}

/// The text is no record.
struct Refused;

impl From<&'static str> for Refused {
    fn from(_: &'static str) -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const POD: &str = r#"{"pod": {"id": "1;<pod>", "labels": {"a": "b"}, "namespace": "n", "name": "p"}, "service": {}}"#;
    const EXTERNAL: &str = r#"{"pod": {}, "service": {}, "external": true}"#;
    const NODE: &str = r#"{"pod": {}, "service": {}, "node": {"name": "m"}}"#;

    fn record(src: &str, dst: &str, port: u16) -> String {
        format!(
            r#"{{"timestamp": 1.5, "hostname": "n", "tuple": {{"src_addr": "10.0.0.1", "src_port": 1,
            "dst_addr": "192.0.2.1", "dst_port": {port}}}, "src": {src}, "dst": {dst}, "unknown": [1]}}"#
        )
    }

    #[test]
    fn a_record_is_what_serde_makes_of_it_whatever_was_read_before() {
        let mut parser = Parser::default();
        let ends = [
            POD,
            EXTERNAL,
            NODE,
            "{}",
            r#"{"pod": {"id": "1"}}"#,
            "[]",
            "7",
            "{",
        ];
        for _ in 0..2 {
            for (src, dst) in ends.iter().flat_map(|src| ends.map(|dst| (*src, dst))) {
                for port in [0, 80] {
                    let text = record(src, dst, port);
                    let expected = serde_json::from_str::<FlowRecord>(&text).ok();
                    assert_eq!(parser.parse(text.as_bytes()), expected, "{text}");
                }
            }
        }
        assert_eq!(parser.parse(b"\xff"), None);
    }

    #[test]
    fn records_share_their_ends() {
        let mut parser = Parser::default();
        let mut pod = || {
            let record = parser.parse(record(POD, EXTERNAL, 80).as_bytes()).unwrap();
            match record.src {
                Endpoint::Pod { pod, .. } => pod,
                other => panic!("{other:?}"),
            }
        };
        assert!(Arc::ptr_eq(&pod(), &pod()));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut parser = Parser::default();
        for number in 0..40 {
            let name = format!("{number}{}", "x".repeat(1 << 20));
            let text = record(&POD.replace("\"p\"", &format!("\"{name}\"")), POD, 80);
            assert!(parser.parse(text.as_bytes()).is_some());
            assert!(parser.kept_bytes <= MAX_KEPT_BYTES);
            let kept: usize = parser.ends.keys().map(|text| text.len()).sum();
            assert_eq!(kept, parser.kept_bytes);
        }
    }
}
