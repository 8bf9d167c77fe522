use std::io::Cursor;

use flow::record::Direction::Ingress;

use super::*;
use crate::{
    ledger::Edge,
    policy::{self, Granularity, Namespaces, Options},
    samples::{ledger, record, served},
};

/// Two clients of one database, all in one namespace.
fn edges() -> Vec<Edge> {
    let db = || served("shop", "db", "node-2");
    let web = served("shop", "web", "node-1");
    let queue = served("shop", "queue", "node-1");
    ledger([
        record(Ingress, web, db(), 3306, 5),
        record(Ingress, queue, db(), 3306, 7),
    ])
    .edges()
}

fn options(granularity: Granularity) -> Options {
    Options {
        granularity,
        ..Options::new(Namespaces::Only(["shop".to_owned()].into()))
    }
}

/// What the session comes to, what is printed after the first list, and the numbers selected at its end.
fn session(
    granularity: Granularity,
    commands: &str,
    on_bad_command: OnBadCommand,
) -> (Result<Outcome, LinesError>, String, Vec<usize>) {
    let edges = edges();
    let options = options(granularity);
    let plan = policy::plan(&edges, &options);
    let view = View::new(&plan);
    let mut selection = view.selection();
    let mut output = Vec::new();
    let outcome = run(
        &view,
        &mut selection,
        Cursor::new(commands),
        &mut output,
        on_bad_command,
    );
    let output = String::from_utf8(output).unwrap();
    let (_, after) = output.split_once("> ").unwrap();
    let selected = (0..selection.len()).filter(|number| selection.is_selected(*number));
    (outcome, after.to_owned(), selected.collect())
}

fn check(granularity: Granularity, commands: &str, expected: &[usize]) {
    let (outcome, output, selected) = session(granularity, commands, OnBadCommand::Refuse);
    assert_eq!(outcome.unwrap(), Outcome::Generate, "{output}");
    assert_eq!(selected, expected, "{commands}: {output}");
}

#[test]
fn commands_do_what_they_say() {
    for (commands, expected) in [
        ("g\n", &[][..]),
        ("s 0\ng\n", &[0]),
        ("s 0\r\n g \r\n", &[0]),
        ("s 0-2\nc 1\ng\n", &[0, 2]),
        ("s 3,0-1\ng\n", &[0, 1, 3]),
        ("s 1 3\n\ng\n", &[1, 3]),
        ("a\nc 0\ng\n", &[1, 2, 3]),
        ("a\nn\ng\n", &[]),
        ("s 1\ns 2\nu\ng\n", &[1]),
        ("/EGRESS\na\ng\n", &[2, 3]),
        ("a\n/queue\nn\n/\ng\n", &[1, 3]),
        ("p\nh\np 0\ng", &[]),
    ] {
        check(Granularity::Service, commands, expected);
    }
}

#[test]
fn connections_of_one_rule_go_together() {
    check(Granularity::Service, "s 0\ng\n", &[0]);
    // Both clients' calls of `db` are one rule of the namespace's policy.
    check(Granularity::Namespace, "s 0\ng\n", &[0, 1]);
    check(Granularity::Namespace, "s 0\nc 1\ng\n", &[]);
    // That each of them is let in is a rule of its own.
    check(Granularity::Namespace, "s 2\ng\n", &[2]);
}

#[test]
fn the_list_shows_what_is_selected() {
    let expected = "    #  DIRECTION  INSIDE  OUTSIDE  PORT      COUNT  SEEN BY  PODS  LAST SEEN             QUIET
[*] 1  ingress    db      web      3306/TCP      5  server    1/1  1970-01-01T00:01:40Z     0s
[ ] 3  egress     web     db       3306/TCP      5  server    1/1  1970-01-01T00:01:40Z     0s
1 of 4 selected, 2 shown: /web
";
    let (_, output, _) = session(Granularity::Service, "/web\ns 1\nq\n", OnBadCommand::Refuse);
    assert_eq!(output.split("> ").nth(1).unwrap(), expected);
}

#[test]
fn a_preview_is_what_would_be_written() {
    let edges = edges();
    let options = options(Granularity::Service);
    let plan = policy::plan(&edges, &options);
    let files = plan.files(&plan.all()).unwrap();
    let (_, output, _) = session(Granularity::Service, "a\np\nq\n", OnBadCommand::Refuse);
    let all = files.into_values().collect::<Vec<_>>();
    assert!(
        output.contains(&format!("> {}> ", all.join("---\n"))),
        "{output}"
    );
    let (_, output, _) = session(
        Granularity::Service,
        "s 1\np\np 0\np 3\nq\n",
        OnBadCommand::Refuse,
    );
    let previews: Vec<&str> = output.split("> ").skip(1).collect();
    assert!(
        previews[0].contains("name: policy-db") && !previews[0].contains("queue"),
        "{output}"
    );
    assert_eq!(previews[1], previews[0]);
    assert_eq!(previews[2], "nothing is selected\n");
}

#[test]
fn a_wrong_command_is_named() {
    for (command, problem) in [
        ("s 4", "there is no connection 4: the last is 3"),
        ("s 2-1", "`2-1` goes backwards"),
        ("s", "which? for example s 0, s 1-5,8"),
        ("c x", "`x` is not a number"),
        ("s -1", "`` is not a number"),
        (
            "s 0-99999999999999999999",
            "`99999999999999999999` is not a number",
        ),
        ("p 4", "there is no connection 4: the last is 3"),
        ("g now", "`g now` is no command; h lists them"),
        ("s0", "`s0` is no command; h lists them"),
        ("\u{7}", "`\u{fffd}` is no command; h lists them"),
    ] {
        let commands = format!("s 0\n{command}\ng\n");
        let (outcome, _, _) = session(Granularity::Service, &commands, OnBadCommand::Refuse);
        let error = outcome.unwrap_err().to_string();
        assert_eq!(error, format!("command 2: {problem}"));
        let (outcome, output, selected) =
            session(Granularity::Service, &commands, OnBadCommand::GoOn);
        assert_eq!(outcome.unwrap(), Outcome::Generate);
        assert!(output.contains(&format!("> {problem}\n")), "{output}");
        assert_eq!(selected, [0]);
    }
}

#[test]
fn commands_that_end_without_an_outcome_write_nothing() {
    for commands in ["", "s 0\n", "s 0"] {
        let (outcome, _, _) = session(Granularity::Service, commands, OnBadCommand::GoOn);
        assert!(matches!(outcome, Err(LinesError::Ended)), "{outcome:?}");
    }
}
