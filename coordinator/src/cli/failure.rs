//! Why a command failed: exit code, stable code for programs, message and hint for people, and the line of a file if one is
//! to blame.
//!
//! Does not print: [`super::output`] does.

use std::error::Error;
use std::fmt::Write;
use std::path::Path;

use protocol::error::SourceError;
use protocol::models::ModelError;
use protocol::store::StoreError;

use super::exit;
use crate::api::{ApiError, ErrorCode};
use crate::authority::AuthorityError;
use crate::report::ReportError;

/// An expected failure of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// One of [`exit`].
    pub exit: u8,
    /// Stable, for programs.
    pub code: &'static str,
    /// For people: a lowercase fragment, causes included.
    pub message: String,
    /// What to try.
    pub hint: Option<String>,
    /// The line to blame with a caret below, ready to print.
    pub excerpt: Option<String>,
}

impl Failure {
    /// The work was not done.
    pub fn failed(code: &'static str, message: impl Into<String>) -> Self {
        Self { exit: exit::FAILED, code, message: message.into(), hint: None, excerpt: None }
    }

    /// The request is wrong.
    pub fn usage(code: &'static str, message: impl Into<String>) -> Self {
        Self { exit: exit::USAGE, ..Self::failed(code, message) }
    }

    /// The coordinator does not answer.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self { exit: exit::UNREACHABLE, ..Self::failed("unreachable", message) }
    }

    /// The work was not done because of `error`: its causes become part of the message.
    pub fn because(code: &'static str, error: &dyn Error) -> Self {
        Self::failed(code, chain(error))
    }

    /// A file could not be read or written.
    pub fn file(operation: &str, path: &Path, error: &std::io::Error) -> Self {
        Self::failed("io", format!("failed to {operation} {}: {error}", path.display()))
    }

    /// The same failure with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A complaint about `text`, with the line in question.
    pub fn in_source(code: &'static str, error: &SourceError, text: &str) -> Self {
        Self { hint: error.hint.clone(), excerpt: excerpt(error, text), ..Self::usage(code, error.to_string()) }
    }

    /// An answer of the coordinator; `text` is the file that was sent, if one was.
    pub fn from_api(error: ApiError, text: Option<&str>) -> Self {
        let (exit, code) = match error.code {
            ErrorCode::BadSweep => (exit::USAGE, "bad-sweep"),
            ErrorCode::BadRequest => (exit::USAGE, "bad-request"),
            ErrorCode::NotFound => (exit::USAGE, "not-found"),
            ErrorCode::TooLarge => (exit::USAGE, "too-large"),
            ErrorCode::Conflict => (exit::FAILED, "conflict"),
            ErrorCode::JournalUnavailable => (exit::FAILED, "journal-unavailable"),
            ErrorCode::Stopping => (exit::UNREACHABLE, "stopping"),
            ErrorCode::Internal => (exit::FAILED, "internal"),
        };
        let excerpt = error.source_error.as_ref().zip(text).and_then(|(source, text)| excerpt(source, text));
        Self { exit, code, message: error.message, hint: error.hint, excerpt }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let hint = error.hint();
        Self { hint, ..Self::because("store", &error) }
    }
}

impl From<ModelError> for Failure {
    fn from(error: ModelError) -> Self {
        let exit = if error.is_of_usage() { exit::USAGE } else { exit::FAILED };
        let hint = error.hint();
        Self { exit, hint, ..Self::because("model", &error) }
    }
}

impl From<AuthorityError> for Failure {
    fn from(error: AuthorityError) -> Self {
        Self::because("authority", &error)
    }
}

impl From<ReportError> for Failure {
    fn from(error: ReportError) -> Self {
        Self::because("report", &error)
    }
}

/// An error with its causes: `failed to write x: no space left on device`.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, ": {error}").expect("writing to a String cannot fail");
        cause = error.source();
    }
    text
}

/// The line of `text` that the error points at, with its number and a caret.
fn excerpt(error: &SourceError, text: &str) -> Option<String> {
    let line = text.lines().nth((error.line as usize).checked_sub(1)?)?;
    let line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let number = error.line.to_string();
    let gutter = " ".repeat(number.len());
    let mut excerpt = format!("{gutter} |\n{number} | {line}\n{gutter} |");
    if error.column > 0 {
        // Columns count bytes; a person's caret counts characters.
        let before = line.char_indices().take_while(|(at, _)| at + 1 < error.column as usize).count();
        write!(excerpt, " {}^", " ".repeat(before)).expect("writing to a String cannot fail");
    }
    Some(excerpt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_shows_the_line_with_a_caret() {
        let text = "name = \"café\"\nkind = \"inspect\" # é\nmodle = 3\n";
        let error = SourceError::at("s.toml", text, text.find("modle").unwrap(), "modle", "unknown key").hint("model?");
        let failure = Failure::in_source("bad-sweep", &error, text);
        assert_eq!(failure.message, "s.toml:3:1: key \"modle\": unknown key");
        assert_eq!(failure.excerpt.unwrap(), "  |\n3 | modle = 3\n  | ^");
        let error = SourceError::at("s.toml", text, text.find('#').unwrap(), "", "no");
        assert_eq!(excerpt(&error, text).unwrap(), "  |\n2 | kind = \"inspect\" # é\n  |                  ^");
        assert_eq!(excerpt(&SourceError::whole("s.toml", "empty"), text), None);
    }

    #[test]
    fn causes_are_told() {
        let error = StoreError::Full {
            operation: protocol::store::Operation::Write,
            path: "/s/x".into(),
            source: std::io::Error::other("no space"),
        };
        let failure = Failure::from(error);
        assert_eq!(failure.message, "the store is full: write /s/x: no space");
        assert!(failure.hint.is_some());
    }
}
