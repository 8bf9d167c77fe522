//! The panel on a whole terminal.

use std::io;

use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Modifier, Style},
    text::{Line, Text},
    widgets::{Block, Clear, Paragraph},
};

use super::{Outcome, Selection, View};

const HELP: &str = "\
 up down pgup pgdn home end   move
 space enter                  select or clear, with all others of the rule
 a  n                         select or clear all that is shown
 /                            show only what a text is found in
 u                            undo
 p                            preview the policy of this connection; P of all
 g                            generate: write the policies
 q                            quit, and write nothing";

const KEYS: &str =
    "space select  a all  n none  / filter  p preview  u undo  g generate  h help  q quit";

/// Shows the panel until it is left.
///
/// # Errors
/// If the terminal fails.
pub fn run(view: &View<'_>, selection: &mut Selection) -> io::Result<Outcome> {
    let mut terminal = ratatui::try_init()?;
    let outcome = events(&mut terminal, view, selection);
    ratatui::try_restore()?;
    outcome
}

fn events(
    terminal: &mut DefaultTerminal,
    view: &View<'_>,
    selection: &mut Selection,
) -> io::Result<Outcome> {
    let mut screen = Screen::new(view, selection);
    loop {
        terminal.draw(|frame| screen.draw(frame))?;
        if let Event::Key(key) = event::read()?
            && key.kind != KeyEventKind::Release
            && let Some(outcome) = screen.press(key)
        {
            return Ok(outcome);
        }
    }
}

/// What is on the screen besides the list.
enum Mode {
    List,
    /// A filter is being typed; the one before comes back if it is given up.
    Filter {
        before: String,
    },
    /// Text over the list, scrolled by that many lines.
    Preview {
        text: String,
        scroll: u16,
    },
    Help,
}

/// The state of the screen.
struct Screen<'a> {
    view: &'a View<'a>,
    selection: &'a mut Selection,
    mode: Mode,
    /// Place among what is shown.
    cursor: usize,
    /// Place of the first line on the screen among what is shown.
    top: usize,
    /// Lines of the list that the screen has room for.
    height: usize,
    /// What the last key came to, if it is not plain to see.
    message: String,
}

impl<'a> Screen<'a> {
    fn new(view: &'a View<'a>, selection: &'a mut Selection) -> Self {
        Self {
            view,
            selection,
            mode: Mode::List,
            cursor: 0,
            top: 0,
            height: 1,
            message: String::new(),
        }
    }

    fn press(&mut self, key: KeyEvent) -> Option<Outcome> {
        self.message.clear();
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Some(Outcome::Quit);
        }
        match &mut self.mode {
            Mode::List => return self.press_in_list(key.code),
            Mode::Help => self.mode = Mode::List,
            Mode::Filter { before } => {
                let mut text = self.selection.filter_text().to_owned();
                match key.code {
                    KeyCode::Char(c) => text.push(c),
                    KeyCode::Backspace => {
                        text.pop();
                    }
                    KeyCode::Esc => {
                        text = std::mem::take(before);
                        self.mode = Mode::List;
                    }
                    KeyCode::Enter => self.mode = Mode::List,
                    _ => {}
                }
                self.selection.filter(&text);
                self.cursor = 0;
            }
            Mode::Preview { text, scroll } => {
                let last = u16::try_from(text.lines().count()).unwrap_or(u16::MAX);
                let page = u16::try_from(self.height).unwrap_or(u16::MAX);
                *scroll = match key.code {
                    KeyCode::Up => scroll.saturating_sub(1),
                    KeyCode::Down => scroll.saturating_add(1),
                    KeyCode::PageUp => scroll.saturating_sub(page),
                    KeyCode::PageDown => scroll.saturating_add(page),
                    KeyCode::Home => 0,
                    KeyCode::End => last,
                    _ => {
                        self.mode = Mode::List;
                        return None;
                    }
                }
                .min(last.saturating_sub(1));
            }
        }
        None
    }

    fn press_in_list(&mut self, key: KeyCode) -> Option<Outcome> {
        let last = self.selection.shown().len().saturating_sub(1);
        match key {
            KeyCode::Up => self.cursor = self.cursor.saturating_sub(1),
            KeyCode::Down => self.cursor = (self.cursor + 1).min(last),
            KeyCode::PageUp => self.cursor = self.cursor.saturating_sub(self.height),
            KeyCode::PageDown => self.cursor = (self.cursor + self.height).min(last),
            KeyCode::Home => self.cursor = 0,
            KeyCode::End => self.cursor = last,
            KeyCode::Char(' ') | KeyCode::Enter => {
                if let Some(number) = self.current() {
                    let on = !self.selection.is_selected(number);
                    let changed = self.selection.set([number], on);
                    if changed > 1 {
                        self.message = format!("{changed} connections have one rule");
                    }
                }
            }
            KeyCode::Char('a') => {
                self.selection.set_shown(true);
            }
            KeyCode::Char('n') => {
                self.selection.set_shown(false);
            }
            KeyCode::Char('u') => {
                let undone = self.selection.undo();
                self.message = if undone { "" } else { "nothing to undo" }.to_owned();
            }
            KeyCode::Char('/') => {
                self.mode = Mode::Filter {
                    before: self.selection.filter_text().to_owned(),
                };
            }
            KeyCode::Char('p') => self.preview(self.current()),
            KeyCode::Char('P') => self.preview(None),
            KeyCode::Char('g') if self.selection.selected() == 0 => {
                self.message = "nothing is selected".to_owned();
            }
            KeyCode::Char('g') => return Some(Outcome::Generate),
            KeyCode::Char('h' | '?') => self.mode = Mode::Help,
            KeyCode::Char('q') | KeyCode::Esc => return Some(Outcome::Quit),
            _ => {}
        }
        None
    }

    /// The number of the connection under the cursor.
    fn current(&self) -> Option<usize> {
        self.selection.shown().get(self.cursor).copied()
    }

    fn preview(&mut self, of: Option<usize>) {
        match self.view.preview(self.selection, of) {
            Ok(text) if text.is_empty() => {
                self.message = "nothing of it is selected".to_owned();
            }
            Ok(text) => self.mode = Mode::Preview { text, scroll: 0 },
            Err(error) => self.message = error.to_string(),
        }
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [head, list, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Min(1),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        self.height = usize::from(list.height).max(1);
        self.top = self
            .top
            .min(self.cursor)
            .max((self.cursor + 1).saturating_sub(self.height));

        let bold = Style::new().add_modifier(Modifier::BOLD);
        frame.render_widget(Line::styled(self.view.header(), bold), head);
        let shown = self.selection.shown().iter().enumerate();
        let lines = shown
            .skip(self.top)
            .take(self.height)
            .map(|(place, number)| {
                let text = self.view.line(*number, self.selection);
                let style = if place == self.cursor {
                    Style::new().add_modifier(Modifier::REVERSED)
                } else {
                    Style::new()
                };
                Line::styled(text, style)
            });
        let lines: Vec<Line<'_>> = lines.collect();
        frame.render_widget(Text::from(lines), list);
        frame.render_widget(Line::raw(self.status()), foot);
        match &self.mode {
            Mode::Help => over(frame, list, " Keys ", HELP, 0),
            Mode::Preview { text, scroll } => over(frame, list, " Preview ", text, *scroll),
            Mode::List | Mode::Filter { .. } => {}
        }
    }

    fn status(&self) -> String {
        let (selected, all) = (self.selection.selected(), self.selection.len());
        let counts = format!("{selected} of {all} selected");
        let filter = self.selection.filter_text();
        match &self.mode {
            Mode::Filter { .. } => format!("/{filter}_"),
            Mode::Preview { .. } | Mode::Help => "any other key closes this".to_owned(),
            Mode::List if !self.message.is_empty() => format!("{counts}: {}", self.message),
            Mode::List if !filter.is_empty() => {
                let shown = self.selection.shown().len();
                format!("{counts}, {shown} shown: /{filter}")
            }
            Mode::List => format!("{counts}  {KEYS}"),
        }
    }
}

fn over(frame: &mut Frame<'_>, area: Rect, title: &str, text: &str, scroll: u16) {
    frame.render_widget(Clear, area);
    let text = Paragraph::new(text).scroll((scroll, 0));
    frame.render_widget(text.block(Block::bordered().title(title)), area);
}

#[cfg(test)]
mod tests;
