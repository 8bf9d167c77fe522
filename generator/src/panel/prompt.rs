//! Asks for what is missing on the command line.

use std::io::{self, BufRead, Read as _, Write};

use super::lines::OnBadCommand;

/// The longest answer, in bytes.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    /// The input has ended.
    #[error("the input ended at the question `{question}`")]
    Ended {
        /// What was asked.
        question: String,
    },
    /// The answer cannot be taken.
    #[error("{question}: {problem}")]
    Answer {
        /// What was asked.
        question: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Asks until there is an answer that `parse` takes; `hint` says what it may be.
///
/// # Errors
/// If the input ends, or an answer is wrong and that is not to be passed over.
pub fn ask<T>(
    mut answers: impl BufRead,
    mut to: impl Write,
    on_bad_answer: OnBadCommand,
    (question, hint): (&str, &str),
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<T, PromptError> {
    loop {
        write!(to, "{question} ({hint}): ")?;
        to.flush()?;
        let mut line = Vec::new();
        (&mut answers)
            .take(MAX_ANSWER_BYTES)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            writeln!(to)?;
            return Err(PromptError::Ended {
                question: question.to_owned(),
            });
        }
        match parse(String::from_utf8_lossy(&line).trim()) {
            Ok(answer) => return Ok(answer),
            Err(problem) if on_bad_answer == OnBadCommand::GoOn => writeln!(to, "{problem}")?,
            Err(problem) => {
                return Err(PromptError::Answer {
                    question: question.to_owned(),
                    problem,
                });
            }
        }
    }
}
