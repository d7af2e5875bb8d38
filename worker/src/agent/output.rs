//! What commands print: data on stdout, everything else on stderr; `--json` prints one document, errors included.

use std::io::{self, Write};

use serde::Serialize;

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It did what was asked.
    Ok = 0,
    /// It failed.
    Failed = 1,
    /// What was asked makes no sense, or a setting is wrong.
    Usage = 2,
    /// The coordinator was not reached.
    Unreachable = 3,
}

/// A failure for a person: what, a hint, and how the command ends.
#[derive(Debug)]
pub struct Complaint {
    /// Exit code.
    pub exit: Exit,
    /// What happened, with its causes.
    pub message: String,
    /// What to try.
    pub hint: Option<String>,
}

impl Complaint {
    /// A complaint about `error`, causes included.
    pub fn new(exit: Exit, error: &dyn std::error::Error, hint: Option<impl Into<String>>) -> Self {
        Self { exit, message: super::way::chain(error), hint: hint.map(Into::into) }
    }
}

/// Where commands write.
#[derive(Debug, Clone, Copy)]
pub struct Printer {
    /// One JSON document instead of text.
    pub json: bool,
}

impl Printer {
    /// Prints a result: `value` as JSON, or `text`.
    pub fn result(self, value: &impl Serialize, text: &str) -> Exit {
        let line = match self.json {
            true => serde_json::to_string_pretty(value).expect("results are plain data"),
            false => text.to_owned(),
        };
        put(&mut io::stdout().lock(), &line)
    }

    /// Says something on the way; silent with `--json`.
    pub fn note(self, text: &str) {
        if !self.json {
            put(&mut io::stderr().lock(), text);
        }
    }

    /// Prints a complaint and returns how to end.
    pub fn complain(self, complaint: &Complaint) -> Exit {
        if self.json {
            let error = serde_json::json!({
                "code": complaint.exit as u8, "message": complaint.message, "hint": complaint.hint,
            });
            put(&mut io::stdout().lock(), &serde_json::json!({ "error": error }).to_string());
        } else {
            put(&mut io::stderr().lock(), &format!("error: {}", complaint.message));
            if let Some(hint) = &complaint.hint {
                put(&mut io::stderr().lock(), &format!("hint: {hint}"));
            }
        }
        complaint.exit
    }
}

/// A reader that has gone away is no failure.
fn put(to: &mut dyn Write, line: &str) -> Exit {
    match writeln!(to, "{line}").and_then(|()| to.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Exit::Failed,
        _ => Exit::Ok,
    }
}
