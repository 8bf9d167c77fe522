//! What `generate` asks people: what is missing on the command line, and which connections to allow.

use std::{
    collections::BTreeSet,
    io::{self, BufRead, IsTerminal as _, StdinLock, Write},
    path::PathBuf,
};

use anyhow::anyhow;
use clap::ValueEnum as _;

use super::{Failure, PolicyArgs, policy_args::namespace};
use crate::{
    panel::{
        Outcome, View,
        lines::{self, LinesError, OnBadCommand},
        prompt::{self, PromptError},
        screen,
    },
    policy::{Granularity, Plan},
    table,
};

/// The conversation.
pub(super) struct Talk {
    from: StdinLock<'static>,
    to: Box<dyn Write>,
    /// Whether a person answers, who can try again.
    with_person: bool,
    /// Whether there is a whole screen.
    on_screen: bool,
}

impl Talk {
    /// Standard output is for people unless it is for the result as JSON.
    pub(super) fn new(json: bool) -> Self {
        let with_person = io::stdin().is_terminal();
        let is_dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self {
            from: io::stdin().lock(),
            to: if json {
                Box::new(io::stderr())
            } else {
                Box::new(io::stdout())
            },
            with_person,
            on_screen: with_person && io::stdout().is_terminal() && !is_dumb && !json,
        }
    }

    fn on_bad_answer(&self) -> OnBadCommand {
        if self.with_person {
            OnBadCommand::GoOn
        } else {
            OnBadCommand::Refuse
        }
    }

    fn ask<T>(
        &mut self,
        question: &str,
        hint: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<T, Failure> {
        let on_bad_answer = self.on_bad_answer();
        prompt::ask(
            &mut self.from as &mut dyn BufRead,
            &mut self.to,
            on_bad_answer,
            (question, hint),
            parse,
        )
        .map_err(|error| match error {
            PromptError::Io(_) => Failure::other(error),
            PromptError::Ended { .. } | PromptError::Answer { .. } => Failure::input(error),
        })
    }
}

/// Asks for namespace and folder, as far as they are not given; then for granularity and DNS, which have defaults: a person in
/// any case, a script only where it had something else to answer. Returns the folder.
pub(super) fn for_missing(
    talk: &mut Talk,
    policy: &mut PolicyArgs,
    folder: Option<PathBuf>,
    known: &BTreeSet<&str>,
) -> Result<PathBuf, Failure> {
    let mut asked = false;
    if policy.namespaces.is_empty() && !policy.all_namespaces {
        asked = true;
        let shown: Vec<String> = known.iter().map(|name| table::printable(name)).collect();
        let hint = format!("{}; * for all", shown.join(", "));
        policy.namespaces = talk.ask("Namespace", &hint, |answer| match answer {
            "" => Err("a namespace is needed".to_owned()),
            "*" => Ok(Vec::new()),
            names => names
                .split(',')
                .map(|name| match namespace(name.trim())? {
                    name if known.contains(name.as_str()) => Ok(name),
                    name => Err(format!("no connection of {name} was seen")),
                })
                .collect(),
        })?;
        policy.all_namespaces = policy.namespaces.is_empty();
    }
    let folder = match folder {
        Some(folder) => folder,
        None => {
            asked = true;
            let name = match policy.namespaces.as_slice() {
                [namespace] => namespace,
                _ => "all",
            };
            let default = format!("policies/{name}");
            talk.ask("Folder", &default, |answer| match answer {
                "" => Ok(PathBuf::from(&default)),
                folder => Ok(PathBuf::from(folder)),
            })?
        }
    };
    if (asked || talk.with_person) && policy.granularity.is_none() {
        asked = true;
        let hint = "ns, [svc], workload or pod";
        policy.granularity = Some(talk.ask("Granularity", hint, |answer| {
            match answer {
                "" => Ok(Granularity::default()),
                name => Granularity::from_str(name, true)
                    .ok()
                    .ok_or_else(|| format!("`{}` is none of them", table::printable(name))),
            }
        })?);
    }
    if asked && !policy.forbid_dns {
        policy.forbid_dns = talk.ask("Allow DNS", "[y] or n", |answer| match answer {
            "" | "y" | "Y" | "yes" => Ok(false),
            "n" | "N" | "no" => Ok(true),
            _ => Err("y or n".to_owned()),
        })?;
    }
    Ok(folder)
}

/// Lets people choose among the connections of a plan. `None` if nothing is to be written.
pub(super) fn for_selection(
    talk: &mut Talk,
    plan: &Plan<'_>,
) -> Result<Option<Vec<bool>>, Failure> {
    let view = View::new(plan);
    let mut selection = view.selection();
    let outcome = if talk.on_screen {
        screen::run(&view, &mut selection).map_err(Failure::other)?
    } else {
        let on_bad_command = talk.on_bad_answer();
        lines::run(
            &view,
            &mut selection,
            &mut talk.from,
            &mut talk.to,
            on_bad_command,
        )
        .map_err(|error| match error {
            LinesError::Command { .. } => Failure::input(error),
            LinesError::Ended | LinesError::Io(_) => Failure::other(error),
        })?
    };
    match outcome {
        Outcome::Quit => Ok(None),
        Outcome::Generate if selection.selected() == 0 => Err(Failure::other(anyhow!(
            "nothing was selected, and nothing was written"
        ))),
        Outcome::Generate => Ok(Some(selection.chosen().to_vec())),
    }
}
