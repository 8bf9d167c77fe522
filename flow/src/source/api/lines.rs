//! The lines of a watch.

use futures_util::{AsyncBufRead, AsyncBufReadExt as _};

use super::trouble::Trouble;

/// Splits a stream into lines of bounded length.
pub(super) struct Lines<R> {
    stream: R,
    line: Vec<u8>,
    longest: usize,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    pub(super) fn new(stream: R, longest: usize) -> Self {
        Self {
            stream,
            line: Vec::new(),
            longest,
        }
    }

    /// The next line, without its end; `None` at the end of the stream. What stands after the last line's end is no line:
    /// the stream broke off there.
    ///
    /// When the future is dropped nothing is lost.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        loop {
            let chunk = self.stream.fill_buf().await?;
            if chunk.is_empty() {
                return Ok(None);
            }
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(chunk.len());
            if self.line.len() + taken > self.longest {
                return Err(Trouble::EventTooLong(self.longest));
            }
            self.line.extend_from_slice(&chunk[..taken]);
            let consumed = taken + usize::from(end.is_some());
            self.stream.consume_unpin(consumed);
            if end.is_some() {
                return Ok(Some(std::mem::take(&mut self.line)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use futures_util::{TryStreamExt as _, stream};

    use super::*;

    fn lines(chunks: &'static [&'static str], longest: usize) -> Vec<Result<String, String>> {
        let chunks = chunks
            .iter()
            .map(|chunk| Ok::<_, io::Error>(chunk.as_bytes()));
        let mut lines = Lines::new(stream::iter(chunks).into_async_read(), longest);
        let mut found = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            loop {
                match lines.next().await {
                    Ok(Some(line)) => found.push(Ok(String::from_utf8(line).unwrap())),
                    Ok(None) => break,
                    Err(error) => {
                        found.push(Err(error.to_string()));
                        break;
                    }
                }
            }
        });
        found
    }

    #[test]
    fn lines_do_not_depend_on_how_they_arrive() {
        let expected = vec![
            Ok("one".to_owned()),
            Ok(String::new()),
            Ok("two".to_owned()),
        ];
        assert_eq!(lines(&["one\n\ntwo\nthr"], 10), expected);
        assert_eq!(
            lines(&["o", "ne", "\n\n", "tw", "o\nt", "h", "r"], 10),
            expected
        );
    }

    #[test]
    fn a_line_that_is_too_long_is_no_line() {
        assert_eq!(lines(&["abc", "\n"], 3), vec![Ok("abc".to_owned())]);
        let error = Err("an event of more than 3 bytes".to_owned());
        assert_eq!(lines(&["abc", "d\n"], 3), vec![error]);
    }
}
