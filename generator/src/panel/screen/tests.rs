use flow::record::Direction::Ingress;
use ratatui::{Terminal, backend::TestBackend};

use super::*;
use crate::{
    policy::{self, Granularity, Namespaces, Options},
    samples::{ledger, record, served},
};

/// Presses keys, and gives what then is on a screen of ten lines, the outcome, and what is selected.
fn press(keys: &[KeyCode]) -> (String, Option<Outcome>, Vec<usize>) {
    let db = || served("shop", "db", "node-2");
    let records = [
        record(Ingress, served("shop", "web", "node-1"), db(), 3306, 5),
        record(Ingress, served("shop", "queue", "node-1"), db(), 3306, 7),
        record(Ingress, served("shop", "web", "node-1"), db(), 9104, 1),
    ];
    let edges = ledger(records).edges();
    let options = Options {
        granularity: Granularity::Namespace,
        ..Options::new(Namespaces::All)
    };
    let plan = policy::plan(&edges, &options);
    let view = View::new(&plan);
    let mut selection = view.selection();
    let mut terminal = Terminal::new(TestBackend::new(100, 7)).unwrap();
    let mut screen = Screen::new(&view, &mut selection);
    terminal.draw(|frame| screen.draw(frame)).unwrap();
    let mut outcome = None;
    for key in keys {
        assert_eq!(outcome, None);
        outcome = screen.press(KeyEvent::new(*key, KeyModifiers::NONE));
        terminal.draw(|frame| screen.draw(frame)).unwrap();
    }
    let text = terminal.backend().to_string();
    let text: Vec<&str> = text
        .lines()
        .map(|line| line.trim_matches('"').trim_end())
        .collect();
    let selected = (0..selection.len()).filter(|number| selection.is_selected(*number));
    (text.join("\n"), outcome, selected.collect())
}

const DOWN: KeyCode = KeyCode::Down;
const SPACE: KeyCode = KeyCode::Char(' ');

fn key(c: char) -> KeyCode {
    KeyCode::Char(c)
}

#[test]
fn the_list_fits_the_screen_and_follows_the_cursor() {
    let (text, _, _) = press(&[]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 7);
    assert_eq!(
        lines[0],
        "    #  DIRECTION  INSIDE  OUTSIDE  PORT      COUNT  SEEN BY  PODS  LAST SEEN             QUIET"
    );
    assert!(
        lines[1].starts_with("[ ] 0  egress     queue   db       3306/TCP      7  server    1/1"),
        "{text}"
    );
    assert!(lines[5].starts_with("[ ] 4  "), "{text}");
    assert!(
        lines[6].starts_with("0 of 6 selected  space select"),
        "{text}"
    );
    let (text, _, _) = press(&[KeyCode::End]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[1].starts_with("[ ] 1  ") && lines[5].starts_with("[ ] 5  "),
        "{text}"
    );
    let (text, _, _) = press(&[
        KeyCode::End,
        KeyCode::Home,
        KeyCode::PageDown,
        KeyCode::PageUp,
    ]);
    assert!(
        text.lines().nth(1).unwrap().starts_with("[ ] 0  "),
        "{text}"
    );
}

#[test]
fn a_key_selects_all_connections_of_the_rule() {
    let (text, outcome, selected) = press(&[SPACE]);
    // Both clients' calls of `db` on this port are one rule of the namespace's policy.
    assert_eq!(selected, [0, 1]);
    assert!(
        text.contains("[*] 0  egress") && text.contains("[*] 1  egress"),
        "{text}"
    );
    assert!(
        text.contains("2 of 6 selected: 2 connections have one rule"),
        "{text}"
    );
    assert_eq!(outcome, None);
    assert_eq!(press(&[SPACE, DOWN, SPACE]).2, [0; 0]);
    assert_eq!(
        press(&[DOWN, DOWN, SPACE, key('g')]).1,
        Some(Outcome::Generate)
    );
    assert_eq!(press(&[SPACE, key('u')]).2, [0; 0]);
}

#[test]
fn nothing_selected_is_nothing_to_generate() {
    let (text, outcome, _) = press(&[key('g')]);
    assert_eq!(outcome, None);
    assert!(
        text.contains("0 of 6 selected: nothing is selected"),
        "{text}"
    );
    let (text, _, _) = press(&[key('u')]);
    assert!(text.contains("nothing to undo"), "{text}");
    assert_eq!(press(&[key('q')]).1, Some(Outcome::Quit));
}

#[test]
fn a_filter_narrows_the_list_while_it_is_typed() {
    let keys = [key('/'), key('9'), key('1')];
    let (text, _, _) = press(&keys);
    assert!(text.ends_with("/91_"), "{text}");
    assert_eq!(text.matches("9104/TCP").count(), 2, "{text}");
    assert_eq!(text.matches("3306/TCP").count(), 0, "{text}");
    let (text, _, selected) = press(&[&keys[..], &[KeyCode::Enter, key('a')]].concat());
    assert_eq!(selected.len(), 2);
    assert!(text.contains("2 of 6 selected, 2 shown: /91"), "{text}");
    let (text, _, selected) = press(&[&keys[..], &[KeyCode::Esc, key('a')]].concat());
    assert_eq!(selected.len(), 6);
    assert!(!text.contains("shown"), "{text}");
    let (text, _, _) = press(
        &[
            &keys[..],
            &[KeyCode::Backspace, KeyCode::Backspace, key('q')],
        ]
        .concat(),
    );
    assert!(text.ends_with("/q_") && text.contains("queue"), "{text}");
}

#[test]
fn a_preview_scrolls_over_the_list() {
    let (text, _, _) = press(&[key('p')]);
    assert!(text.contains("nothing of it is selected"), "{text}");
    let (text, _, _) = press(&[key('a'), key('p')]);
    assert!(
        text.contains("Preview") && text.contains("kind: NetworkPolicy"),
        "{text}"
    );
    let (text, _, _) = press(&[key('a'), key('P'), DOWN, DOWN]);
    assert!(
        !text.contains("kind: NetworkPolicy") && text.contains("labels:"),
        "{text}"
    );
    let (text, outcome, _) = press(&[key('a'), key('p'), key('q')]);
    assert_eq!(outcome, None);
    assert!(text.contains("[*] 0"), "{text}");
}

#[test]
fn help_tells_the_keys() {
    let (text, _, _) = press(&[key('h')]);
    assert!(text.contains("select or clear"), "{text}");
    let (text, _, _) = press(&[key('?'), key('x')]);
    assert!(text.contains("[ ] 0"), "{text}");
}
