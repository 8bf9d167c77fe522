//! The line protocol of MicroShield's panel: one command a line.

use std::io::{self, BufRead, Read as _, Write};

use super::{Outcome, Selection, View};

/// The longest command, in bytes.
const MAX_LINE_BYTES: u64 = 64 << 10;

const HELP: &str = "\
s N        select; also s 1-5,8
c N        clear, likewise
a          select all that is shown
n          clear all that is shown
/TEXT      show what TEXT is found in; / alone shows all
u          undo
p [N]      preview the policies, or the one of connection N
g          generate: write the policies
h          this
q          quit, and write nothing

PODS: how many of the pods inside took part. QUIET: for how long nothing new was seen of the policy, to the end of the
records.
";

/// What to do after a command that cannot be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnBadCommand {
    /// Stop: a script that is wrong in one line must not write policies.
    Refuse,
    /// Say so and go on.
    GoOn,
}

/// Why a session has come to no outcome.
#[derive(Debug, thiserror::Error)]
pub enum LinesError {
    /// The commands have ended.
    #[error("the commands ended without `g`: nothing was written")]
    Ended,
    /// A command cannot be understood.
    #[error("command {number}: {problem}")]
    Command {
        /// Counts from 1.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

enum Command {
    Set(Vec<usize>, bool),
    SetShown(bool),
    Filter(String),
    Undo,
    Preview(Option<usize>),
    Generate,
    Help,
    Quit,
}

/// Takes commands until one of them leaves the panel.
///
/// # Errors
/// If the commands end before, or one cannot be understood and that is not to be passed over.
pub fn run(
    view: &View<'_>,
    selection: &mut Selection,
    mut commands: impl BufRead,
    mut to: impl Write,
    on_bad_command: OnBadCommand,
) -> Result<Outcome, LinesError> {
    list(view, selection, &mut to)?;
    for number in 1.. {
        write!(to, "> ")?;
        to.flush()?;
        let mut line = Vec::new();
        (&mut commands)
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            writeln!(to)?;
            break;
        }
        let command = match parse(&String::from_utf8_lossy(&line), selection.len()) {
            Ok(None) => continue,
            Ok(Some(command)) => command,
            Err(problem) if on_bad_command == OnBadCommand::GoOn => {
                writeln!(to, "{problem}")?;
                continue;
            }
            Err(problem) => return Err(LinesError::Command { number, problem }),
        };
        match command {
            Command::Set(numbers, on) => {
                selection.set(numbers, on);
                list(view, selection, &mut to)?;
            }
            Command::SetShown(on) => {
                selection.set_shown(on);
                list(view, selection, &mut to)?;
            }
            Command::Filter(text) => {
                selection.filter(&text);
                list(view, selection, &mut to)?;
            }
            Command::Undo => {
                if !selection.undo() {
                    writeln!(to, "nothing to undo")?;
                }
                list(view, selection, &mut to)?;
            }
            Command::Preview(of) => {
                let text = view.preview(selection, of).map_err(io::Error::from)?;
                match text.as_str() {
                    "" => writeln!(to, "nothing is selected")?,
                    text => to.write_all(text.as_bytes())?,
                }
            }
            Command::Help => to.write_all(HELP.as_bytes())?,
            Command::Generate => return Ok(Outcome::Generate),
            Command::Quit => return Ok(Outcome::Quit),
        }
    }
    Err(LinesError::Ended)
}

/// `None` for an empty line. `connections` is how many there are.
fn parse(line: &str, connections: usize) -> Result<Option<Command>, String> {
    let line = line.trim();
    if let Some(text) = line.strip_prefix('/') {
        return Ok(Some(Command::Filter(text.to_owned())));
    }
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    let command = match (word, rest) {
        ("", _) => return Ok(None),
        ("s", _) => Command::Set(numbers(rest, connections)?, true),
        ("c", _) => Command::Set(numbers(rest, connections)?, false),
        ("a", "") => Command::SetShown(true),
        ("n", "") => Command::SetShown(false),
        ("u", "") => Command::Undo,
        ("p", "") => Command::Preview(None),
        ("p", _) => Command::Preview(Some(number(rest, connections)?)),
        ("g", "") => Command::Generate,
        ("h" | "?", "") => Command::Help,
        ("q", "") => Command::Quit,
        _ => return Err(format!("`{}` is no command; h lists them", shortened(line))),
    };
    Ok(Some(command))
}

/// Numbers and ranges, with commas or spaces between them.
fn numbers(text: &str, connections: usize) -> Result<Vec<usize>, String> {
    let mut numbers = Vec::new();
    let parts = text.split([',', ' ', '\t']).filter(|part| !part.is_empty());
    for part in parts {
        match part.split_once('-') {
            Some((first, last)) => {
                let (first, last) = (number(first, connections)?, number(last, connections)?);
                if first > last {
                    return Err(format!("`{part}` goes backwards"));
                }
                numbers.extend(first..=last);
            }
            None => numbers.push(number(part, connections)?),
        }
    }
    if numbers.is_empty() {
        return Err("which? for example s 0, s 1-5,8".to_owned());
    }
    Ok(numbers)
}

fn number(text: &str, connections: usize) -> Result<usize, String> {
    let number: usize = text
        .parse()
        .ok()
        .ok_or_else(|| format!("`{}` is not a number", shortened(text)))?;
    if number < connections {
        Ok(number)
    } else {
        Err(match connections {
            0 => "there are no connections".to_owned(),
            _ => format!(
                "there is no connection {number}: the last is {}",
                connections - 1
            ),
        })
    }
}

fn shortened(text: &str) -> String {
    crate::table::printable(&text.chars().take(40).collect::<String>())
}

fn list(view: &View<'_>, selection: &Selection, to: &mut impl Write) -> io::Result<()> {
    writeln!(to, "{}", view.header())?;
    for number in selection.shown() {
        writeln!(to, "{}", view.line(*number, selection))?;
    }
    let (selected, all) = (selection.selected(), selection.len());
    let shown = selection.shown().len();
    match selection.filter_text() {
        "" => writeln!(to, "{selected} of {all} selected"),
        text => writeln!(
            to,
            "{selected} of {all} selected, {shown} shown: /{}",
            shortened(text)
        ),
    }
}

#[cfg(test)]
mod tests;
