//! Where a command's words go: data to stdout, everything else to stderr; for people or as JSON.
//!
//! With `--json` stdout holds exactly one document (one a line for a stream), an error included. Does not format data: each
//! command hands over both forms.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;
use serde_json::{Value, json};

use super::failure::Failure;
use super::table::Style;

/// Data in both forms.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// For programs.
    pub json: Value,
    /// For people, lines ended.
    pub text: String,
}

impl Document {
    /// Pairs `data` with its rendering.
    ///
    /// # Panics
    /// If `data` has no JSON form, which plain data always has.
    pub fn new(data: &impl Serialize, text: String) -> Self {
        Self { json: serde_json::to_value(data).expect("plain data has a JSON form"), text }
    }
}

/// Whoever reads stdout has gone, or it cannot be written.
pub type Written = io::Result<()>;

/// A way to show what a command has to say.
pub trait Output {
    /// The command's answer. Called once.
    fn document(&mut self, document: &Document) -> Written;
    /// One element of a stream, before any [`Output::document`].
    fn element(&mut self, document: &Document) -> Written;
    /// Something beside the data: what was done, what to do next.
    fn note(&mut self, text: &str);
    /// Why the command failed.
    fn failure(&mut self, failure: &Failure) -> Written;
    /// Whether a moving progress bar has a reader.
    fn moving(&self) -> bool;
    /// How tables on stdout may look.
    fn style(&self) -> Style;
}

/// For people.
#[derive(Debug, Clone, Copy)]
pub struct Human {
    /// Only data and errors.
    pub quiet: bool,
}

impl Output for Human {
    fn document(&mut self, document: &Document) -> Written {
        write_all(&document.text)
    }

    fn element(&mut self, document: &Document) -> Written {
        write_all(&document.text)
    }

    fn note(&mut self, text: &str) {
        if !self.quiet {
            complain(text);
        }
    }

    fn failure(&mut self, failure: &Failure) -> Written {
        complain(&format!("error: {}", failure.message));
        if let Some(excerpt) = &failure.excerpt {
            complain(excerpt);
        }
        if let Some(hint) = &failure.hint {
            complain(&format!("hint: {hint}"));
        }
        Ok(())
    }

    fn moving(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    fn style(&self) -> Style {
        Style {
            colour: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
        }
    }
}

/// For programs.
#[derive(Debug, Clone, Copy)]
pub struct Json {
    /// Not even notes on stderr.
    pub quiet: bool,
}

impl Output for Json {
    fn document(&mut self, document: &Document) -> Written {
        write_all(&format!("{:#}\n", document.json))
    }

    fn element(&mut self, document: &Document) -> Written {
        write_all(&format!("{}\n", document.json))
    }

    fn note(&mut self, text: &str) {
        if !self.quiet {
            complain(text);
        }
    }

    fn failure(&mut self, failure: &Failure) -> Written {
        let error = json!({ "code": failure.code, "message": failure.message, "hint": failure.hint });
        write_all(&format!("{}\n", json!({ "error": error })))
    }

    fn moving(&self) -> bool {
        !self.quiet && io::stderr().is_terminal()
    }

    fn style(&self) -> Style {
        Style::default()
    }
}

fn write_all(text: &str) -> Written {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// To stderr; nobody can be told if that fails.
fn complain(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
