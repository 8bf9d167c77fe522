//! Reading files of flow records: one JSON object a line, MicroShield's form or ours, and among them what was lost.

use std::{
    convert::Infallible,
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    str::FromStr,
};

use flow::{lost::Lost, parser::Parser, record::FlowRecord};

/// The longest line that is read, in bytes. A record is a few hundred bytes, one of a pod with the most labels that
/// Kubernetes accepts less than 300 KiB.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// Of the lines that were skipped, this many are described.
pub(crate) const MAX_DESCRIBED: usize = 10;

/// Where records come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Standard input, on the command line `-`.
    Stdin,
    /// A file.
    File(PathBuf),
}

/// What to do with a line that is not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBadLine {
    /// Stop and report it.
    Refuse,
    /// Go on without it and count it.
    Skip,
}

/// How many lines were read.
#[derive(Debug, Default)]
pub struct Summary {
    /// Lines that held a record.
    pub records: u64,
    /// What was lost, as some lines said.
    pub losses: Vec<Lost>,
    /// Lines that held neither.
    pub skipped: u64,
    /// What was wrong with the first of these.
    pub problems: Vec<FlowsError>,
}

/// Why records could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FlowsError {
    /// The file cannot be opened or read.
    #[error("{input}: {error}")]
    Io {
        /// The file.
        input: String,
        /// What the system said.
        error: io::Error,
    },
    /// A line is longer than [`MAX_LINE_BYTES`].
    #[error("{input}: line {line}: longer than {MAX_LINE_BYTES} bytes")]
    TooLong {
        /// The file.
        input: String,
        /// The line's number, from 1.
        line: u64,
    },
    /// A line is not a flow record.
    #[error("{input}: line {line}{}: {}{message}", at(*.column), field_prefix(.field))]
    Malformed {
        /// The file.
        input: String,
        /// The line's number, from 1.
        line: u64,
        /// The byte of the line at which the error was found, from 1; 0 if it concerns the whole line.
        column: usize,
        /// The field, as a path from the record: `dst.pod.labels`; `.` is the record itself.
        field: String,
        /// What is wrong.
        message: String,
    },
}

fn at(column: usize) -> String {
    match column {
        0 => String::new(),
        column => format!(", column {column}"),
    }
}

fn field_prefix(field: &str) -> String {
    match field {
        "." => String::new(),
        field => format!("field `{field}`: "),
    }
}

/// Reads all records of an input and hands them to `sink`, in their order. Empty lines are ignored.
///
/// # Errors
/// If the input cannot be read, or at the first line that is not a record unless such lines are skipped. The records of
/// earlier lines were handed over by then.
pub fn read(
    input: &Input,
    on_bad_line: OnBadLine,
    sink: impl FnMut(FlowRecord),
) -> Result<Summary, FlowsError> {
    match input {
        Input::Stdin => read_lines(io::stdin().lock(), &input.to_string(), on_bad_line, sink),
        Input::File(path) => {
            let name = input.to_string();
            let file = match File::open(path) {
                Ok(file) => file,
                Err(error) => return Err(FlowsError::Io { input: name, error }),
            };
            read_lines(
                BufReader::with_capacity(1 << 16, file),
                &name,
                on_bad_line,
                sink,
            )
        }
    }
}

/// Reads all records of something that is open and is called `input`.
///
/// # Errors
/// As [`read`].
pub fn read_lines(
    mut reader: impl BufRead,
    input: &str,
    on_bad_line: OnBadLine,
    mut sink: impl FnMut(FlowRecord),
) -> Result<Summary, FlowsError> {
    let failed = |error| FlowsError::Io {
        input: input.to_owned(),
        error,
    };
    let mut summary = Summary::default();
    let mut parser = Parser::default();
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let length = (&mut reader)
            .take(limit)
            .read_until(b'\n', &mut text)
            .map_err(failed)?;
        if length == 0 {
            break;
        }
        let result = if length > MAX_LINE_BYTES && text.last() != Some(&b'\n') {
            Err(FlowsError::TooLong {
                input: input.to_owned(),
                line,
            })
        } else if text.trim_ascii().is_empty() {
            continue;
        } else if let Some(lost) = Lost::parse_line(&text) {
            summary.losses.push(lost);
            continue;
        } else {
            let text = text.trim_ascii_end();
            match parser.parse(text) {
                Some(record) => Ok(record),
                // A second time, slowly, for what is wrong with it.
                None => parse(text, input, line),
            }
        };
        match result {
            Ok(record) => {
                summary.records += 1;
                sink(record);
            }
            Err(problem) if on_bad_line == OnBadLine::Refuse => return Err(problem),
            Err(problem) => {
                if matches!(problem, FlowsError::TooLong { .. }) {
                    reader.skip_until(b'\n').map_err(failed)?;
                }
                summary.skipped += 1;
                if summary.problems.len() < MAX_DESCRIBED {
                    summary.problems.push(problem);
                }
            }
        }
    }
    Ok(summary)
}

fn parse(text: &[u8], input: &str, line: u64) -> Result<FlowRecord, FlowsError> {
    let malformed = |field: String, error: &serde_json::Error| FlowsError::Malformed {
        input: input.to_owned(),
        line,
        column: error.column(),
        field,
        message: without_position(error),
    };
    if !text.trim_ascii_start().starts_with(b"{") {
        return Err(FlowsError::Malformed {
            input: input.to_owned(),
            line,
            column: 1,
            field: ".".to_owned(),
            message: "no JSON object; each flow record is one, on a line of its own".to_owned(),
        });
    }
    let mut json = serde_json::Deserializer::from_slice(text);
    let record = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| malformed(known_path(error.path()), error.inner()))?;
    json.end()
        .map_err(|error| malformed(".".to_owned(), &error))?;
    Ok(record)
}

/// The path as far as it is known: text that ends within a key has `?` for it.
fn known_path(path: &serde_path_to_error::Path) -> String {
    match path.to_string().trim_end_matches('?').trim_end_matches('.') {
        "" => ".".to_owned(),
        path => path.to_owned(),
    }
}

/// The position in the message counts lines from the start of this line, so it would always say line 1.
fn without_position(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    match message.strip_suffix(&position) {
        Some(message) => message.to_owned(),
        None => message,
    }
}

impl FromStr for Input {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "-" => Self::Stdin,
            path => Self::File(path.into()),
        })
    }
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use flow::record::Direction;

    use super::*;
    use crate::samples::{record, served};

    fn sample() -> String {
        let record = record(
            Direction::Ingress,
            served("shop", "web", "node-1"),
            served("shop", "db", "node-2"),
            3306,
            1,
        );
        serde_json::to_string(&record).unwrap()
    }

    fn read_text(text: &str, on_bad_line: OnBadLine) -> Result<Summary, FlowsError> {
        // A reader that hands out few bytes at a time: lines span its buffers.
        read_lines(
            BufReader::with_capacity(7, text.as_bytes()),
            "flows.json",
            on_bad_line,
            drop,
        )
    }

    #[test]
    fn a_bad_line_is_named_with_its_field() {
        let good = sample();
        for (bad, expected) in [
            (
                good.replace("\"protocol\":\"TCP\"", "\"protocol\":\"TPC\""),
                "field `protocol`: unknown variant `TPC`, expected one of `TCP`, `UDP`, `SCTP`",
            ),
            (
                good.replacen("\"namespace\":\"shop\",", "", 1),
                "field `src.pod`: missing field `namespace`",
            ),
            (
                good.replacen("\"src_port\":40000", "\"src_port\":400000", 1),
                "field `tuple.src_port`: invalid value: integer `400000`, expected u16",
            ),
            (
                good.replacen("\"app\":\"web\"", "\"app\":7", 1),
                "field `src.pod.labels.app`: invalid type: integer `7`, expected a string",
            ),
            (
                good[..good.len() - 1].to_owned(),
                "EOF while parsing an object",
            ),
            (format!("{good} {good}"), "trailing characters"),
            (
                "nonsense".to_owned(),
                "no JSON object; each flow record is one, on a line of its own",
            ),
        ] {
            assert_ne!(bad, good, "{expected}");
            let text = format!("{good}\n\n{bad}\n{good}\n");
            let error = read_text(&text, OnBadLine::Refuse).unwrap_err().to_string();
            assert!(error.starts_with("flows.json: line 3, column "), "{error}");
            assert!(error.ends_with(expected), "{error}\nnot: {expected}");
            let summary = read_text(&text, OnBadLine::Skip).unwrap();
            assert_eq!((summary.records, summary.skipped), (2, 1));
            assert_eq!(summary.problems[0].to_string(), error);
        }
    }

    #[test]
    fn a_line_may_say_what_was_lost() {
        let good = sample();
        let lost = r#"{"lost": {"node": "node-1", "reason": "ring_full", "count": 3}}"#;
        let summary = read_text(&format!("{good}\n{lost}\n"), OnBadLine::Refuse).unwrap();
        assert_eq!(summary.records, 1);
        let counts: Vec<u64> = summary.losses.iter().map(|lost| lost.count).collect();
        assert_eq!(counts, [3]);
        let broken = lost.replace("count", "many");
        assert!(read_text(&broken, OnBadLine::Refuse).is_err());
    }

    #[test]
    fn a_truncated_last_line_is_refused() {
        let good = sample();
        let text = format!("{good}\n{}", &good[..good.len() / 2]);
        let error = read_text(&text, OnBadLine::Refuse).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
    }

    #[test]
    fn a_line_may_be_as_long_as_the_limit_but_not_longer() {
        let good = sample();
        let padded = |length: usize| format!("{good}{}", " ".repeat(length - good.len()));
        let text = format!("{}\n{good}\n", padded(MAX_LINE_BYTES));
        assert_eq!(read_text(&text, OnBadLine::Refuse).unwrap().records, 2);

        let text = format!("{}\n{good}\n", padded(MAX_LINE_BYTES + 1));
        let error = read_text(&text, OnBadLine::Refuse).unwrap_err();
        assert_eq!(
            error.to_string(),
            "flows.json: line 1: longer than 1048576 bytes"
        );
        let summary = read_text(&text, OnBadLine::Skip).unwrap();
        assert_eq!((summary.records, summary.skipped), (1, 1));
    }

    #[test]
    fn an_endless_line_is_not_held_in_memory() {
        let endless = BufReader::new(io::repeat(b'x').take(1 << 30));
        let error = read_lines(endless, "x", OnBadLine::Refuse, drop).unwrap_err();
        assert!(matches!(error, FlowsError::TooLong { line: 1, .. }));
    }

    #[test]
    fn a_missing_file_is_named() {
        let input: Input = "/nonexistent/flows.json".parse().unwrap();
        let error = read(&input, OnBadLine::Skip, drop).unwrap_err().to_string();
        assert!(error.starts_with("/nonexistent/flows.json: "), "{error}");
    }
}
