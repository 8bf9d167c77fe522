//! What container runtimes put around the lines of a log, and how they split long ones.
//!
//! ```text
//! 2026-01-02T03:04:05.678901234Z stderr F <probe> INFO: …          CRI; P instead of F: goes on in the next one
//! {"log":"<probe> INFO: …\n","stream":"stderr","time":"…"}         Docker; without the line feed: goes on
//! <probe> INFO: …                                                  nothing
//! ```
//!
//! Each line is in its own form: what `kubectl logs` or another program has written may stand in one file with others.

use std::borrow::Cow;

use memchr::memmem::Finder;
use serde::Deserialize;

use super::MARK;

/// The longest line of a program, in bytes. The probe's lines about connections have two hundred; runtimes split at 16 KiB.
pub const MAX_LINE_BYTES: usize = 64 << 10;

/// The longest line of a file, in bytes: with Docker's escapes, which may write a byte as six.
pub const MAX_FRAME_BYTES: usize = 6 * MAX_LINE_BYTES + 1024;

/// One line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the program wrote.
    pub text: Cow<'a, [u8]>,
    /// Where it wrote it.
    pub stream: Stream,
    /// Whether the program's line ends here.
    pub is_last: bool,
}

/// A program's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; or not known.
    Out,
    /// Standard error.
    Err,
}

/// A line that is longer than [`MAX_LINE_BYTES`]. It was left out.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

/// Puts together what runtimes have split. Lines that are about no connection are left out.
#[derive(Debug)]
pub struct Assembler {
    mark: Finder<'static>,
    /// Docker's end of a line, after which the stream follows.
    end: Finder<'static>,
    open: [Open; 2],
}

#[derive(Debug, Default)]
struct Open {
    text: Vec<u8>,
    is_too_long: bool,
}

impl Open {
    fn is_empty(&self) -> bool {
        self.text.is_empty() && !self.is_too_long
    }
}

impl Default for Assembler {
    fn default() -> Self {
        Self {
            mark: Finder::new(MARK),
            end: Finder::new(br#"\n","#),
            open: Default::default(),
        }
    }
}

impl Assembler {
    /// Takes the next line of a file, without its line feed; returns the program's line that ends with it, if that may be
    /// about a connection.
    ///
    /// # Errors
    /// If a line that ends here was too long.
    pub fn push<'a>(&mut self, line: &'a [u8]) -> Result<Option<Cow<'a, [u8]>>, TooLong> {
        if !self.is_open() && self.tells_nothing(line) {
            return Ok(None);
        }
        let Frame {
            text,
            stream,
            is_last,
        } = unframe(line);
        let open = &mut self.open[usize::from(stream == Stream::Err)];
        if !open.is_too_long && open.text.len() + text.len() > MAX_LINE_BYTES {
            *open = Open {
                text: Vec::new(),
                is_too_long: true,
            };
        }
        if !is_last {
            if !open.is_too_long {
                open.text.extend_from_slice(&text);
            }
            return Ok(None);
        }
        if open.is_too_long {
            open.is_too_long = false;
            return Err(TooLong);
        }
        let whole = if open.text.is_empty() {
            text
        } else {
            open.text.extend_from_slice(&text);
            Cow::Owned(std::mem::take(&mut open.text))
        };
        Ok(self.mark.find(&whole).is_some().then_some(whole))
    }

    /// Whether a line has begun that has not ended.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.open.iter().any(|open| !open.is_empty())
    }

    /// Whether a line is seen at a glance to be whole, and about no connection.
    fn tells_nothing(&self, line: &[u8]) -> bool {
        let is_whole = match line.first() {
            Some(b'{') => self.end.find(line).is_some(),
            Some(b'0'..=b'9') => cri(line).is_none_or(|frame| frame.is_last),
            _ => true,
        };
        is_whole && self.mark.find(line).is_none()
    }
}

/// What stands in a line of a file.
#[must_use]
pub fn unframe(line: &[u8]) -> Frame<'_> {
    let framed = match line.first() {
        Some(b'{') => docker(line),
        Some(b'0'..=b'9') => cri(line),
        _ => None,
    };
    framed.unwrap_or(Frame {
        text: Cow::Borrowed(line),
        stream: Stream::Out,
        is_last: true,
    })
}

/// `TIME stdout|stderr TAGS TEXT`, the first of the tags, which colons separate, being `P` or `F`
/// (`pkg/kubelet/kuberuntime/logs` in Kubernetes).
fn cri(line: &[u8]) -> Option<Frame<'_>> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time = parts.next()?;
    let is_time = (20..=40).contains(&time.len()) && time[4] == b'-' && time[10] == b'T';
    let stream = match parts.next()? {
        b"stdout" => Stream::Out,
        b"stderr" => Stream::Err,
        _ => return None,
    };
    let tags = parts.next()?;
    let is_last = match tags.split(|byte| *byte == b':').next()? {
        b"F" => true,
        b"P" => false,
        _ => return None,
    };
    is_time.then_some(Frame {
        text: Cow::Borrowed(parts.next().unwrap_or_default()),
        stream,
        is_last,
    })
}

fn docker(line: &[u8]) -> Option<Frame<'_>> {
    #[derive(Deserialize)]
    struct Entry<'a> {
        #[serde(borrow)]
        log: Cow<'a, str>,
        #[serde(borrow, default)]
        stream: Cow<'a, str>,
    }
    let Entry { log, stream } = serde_json::from_slice(line).ok()?;
    let (text, is_last) = match log {
        Cow::Borrowed(text) => match text.strip_suffix('\n') {
            Some(text) => (Cow::Borrowed(text.as_bytes()), true),
            None => (Cow::Borrowed(text.as_bytes()), false),
        },
        Cow::Owned(mut text) => {
            let is_last = text.ends_with('\n');
            if is_last {
                text.pop();
            }
            (Cow::Owned(text.into_bytes()), is_last)
        }
    };
    Some(Frame {
        text,
        stream: if stream == "stderr" {
            Stream::Err
        } else {
            Stream::Out
        },
        is_last,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "<probe> INFO: 2022/08/18 03:24:11.696728 [CONN] [eBPF] {a|b|c}";
    const TIME: &str = "2022-08-18T03:24:11.696728123Z";

    fn lines(assembler: &mut Assembler, lines: &[&str]) -> Vec<Result<String, TooLong>> {
        let mut whole = Vec::new();
        for line in lines {
            match assembler.push(line.as_bytes()) {
                Ok(None) => {}
                Ok(Some(text)) => whole.push(Ok(String::from_utf8(text.into_owned()).unwrap())),
                Err(error) => whole.push(Err(error)),
            }
        }
        whole
    }

    fn docker_line(text: &str) -> String {
        let log = serde_json::to_string(text).unwrap();
        // As Go writes it.
        let log = log.replace('<', "\\u003c").replace('>', "\\u003e");
        format!(r#"{{"log":{log},"stream":"stderr","time":"{TIME}"}}"#)
    }

    #[test]
    fn each_form_is_told_from_the_others() {
        for line in [
            RECORD,
            &format!("{TIME} stderr F {RECORD}"),
            &format!("2022-08-18T05:24:11.6+02:00 stdout F:x {RECORD}"),
            &docker_line(&format!("{RECORD}\n")),
        ] {
            let whole = lines(&mut Assembler::default(), &[line]);
            assert_eq!(whole, [Ok(RECORD.to_owned())], "{line}");
        }
    }

    #[test]
    fn what_is_split_is_put_together_by_stream() {
        let (start, end) = RECORD.split_at(40);
        let cri = [
            &format!("{TIME} stderr P {start}"),
            &format!("{TIME} stdout F other"),
            &format!("{TIME} stderr P "),
            &format!("{TIME} stderr F {end}"),
        ];
        let docker = [&docker_line(start), &docker_line(&format!("{end}\n"))];
        for parts in [&cri[..], &docker[..]] {
            let parts: Vec<&str> = parts.iter().map(|part| part.as_str()).collect();
            let mut assembler = Assembler::default();
            let whole = lines(&mut assembler, &parts);
            assert_eq!(whole, [Ok(RECORD.to_owned())], "{parts:?}");
            assert!(!assembler.is_open());
            lines(&mut assembler, &parts[..1]);
            assert!(assembler.is_open());
        }
    }

    #[test]
    fn other_lines_are_left_out() {
        for line in [
            "",
            "<probe> INFO: 2022/08/18 publishing to: 10.0.0.1:4040",
            &format!("{TIME} stderr F <probe> WARN: x"),
            &docker_line("<probe> WARN: x\n"),
            "{",
            "{\"log\":1}",
            "1",
            "2022-08-18T03 stderr F",
        ] {
            assert_eq!(lines(&mut Assembler::default(), &[line]), [], "{line}");
        }
    }

    #[test]
    fn a_long_line_takes_no_more_room_than_it_may() {
        let part = format!("{TIME} stderr P {}", "x".repeat(16 << 10));
        let mut assembler = Assembler::default();
        for _ in 0..100 {
            assert_eq!(assembler.push(part.as_bytes()), Ok(None));
            assert!(assembler.open[1].text.len() <= MAX_LINE_BYTES);
        }
        let end = format!("{TIME} stderr F {RECORD}");
        assert_eq!(assembler.push(end.as_bytes()), Err(TooLong));
        assert_eq!(
            lines(&mut assembler, &[&end]),
            [Ok(RECORD.to_owned())],
            "the next one is whole again"
        );
    }
}
