//! Samples from files: paragraphs of `.txt`, lines of `.jsonl` that have a `text` or `messages`.
//!
//! A text is cut at a border between words behind two thirds of its words: what is before is read, what is behind follows.
//! Paragraphs end at empty lines; those of fewer than [`WORDS_MIN`] words (headings, signatures) are passed over, and of longer
//! texts the first [`WORDS_MAX`] words are taken. Of a conversation, the last turn of the assistant follows what came before it.
//! Files are read once when they are opened, so that a wrong line is said before anything is computed.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{CorpusError, Sample};
use crate::model::Message;

/// A text has so many words at least.
pub(super) const WORDS_MIN: usize = 6;
/// What is beyond is left out: a context is finite.
pub(super) const WORDS_MAX: usize = 300;
/// A longer line or paragraph is refused rather than held.
const BYTES_MAX: u64 = 4 << 20;

/// Where the samples of some files lie.
#[derive(Debug)]
pub(super) struct Texts {
    files: Vec<(PathBuf, Kind)>,
    entries: Vec<Entry>,
    hash: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Paragraphs,
    Lines,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    file: usize,
    /// First line, from 1.
    line: u64,
    offset: u64,
    bytes: u64,
}

/// One line of a `.jsonl`.
#[derive(Debug, Deserialize)]
struct Line {
    text: Option<String>,
    messages: Option<Vec<Message>>,
}

/// A text and what follows it.
struct Cut {
    text: String,
    answer: String,
    turns: Vec<Message>,
}

impl Texts {
    pub(super) fn open(
        names: &[String],
        samples: u64,
        find: &dyn Fn(&str) -> Option<PathBuf>,
    ) -> Result<Self, CorpusError> {
        let mut texts = Self { files: Vec::new(), entries: Vec::new(), hash: String::new() };
        let mut hasher = blake3::Hasher::new();
        for name in names {
            let kind = kind(name)?;
            let missing = || CorpusError::Spec { what: format!("{name}: no such file is known here") };
            let path = match Path::new(name).is_absolute() {
                true => PathBuf::from(name),
                false => find(name).ok_or_else(missing)?,
            };
            texts.files.push((path, kind));
            texts.index(texts.files.len() - 1, samples, &mut hasher)?;
        }
        if (texts.entries.len() as u64) < samples {
            let what = format!("{samples} samples are asked for, {} are in the files", texts.entries.len());
            return Err(CorpusError::Spec { what });
        }
        texts.hash = hasher.finalize().to_hex().to_string();
        Ok(texts)
    }

    pub(super) fn hash(&self) -> &str {
        &self.hash
    }

    pub(super) fn sample(&self, id: u64) -> Result<Sample, CorpusError> {
        let entry = self.entries[usize::try_from(id).expect("less than the samples")];
        let (path, kind) = &self.files[entry.file];
        let read = || {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(entry.offset))?;
            let mut bytes = vec![0; usize::try_from(entry.bytes).expect("at most BYTES_MAX")];
            file.read_exact(&mut bytes).map(|()| bytes)
        };
        let bytes = read().map_err(|source| CorpusError::Io { path: path.clone(), source })?;
        let wrong = |what: String| CorpusError::Line { path: path.clone(), line: entry.line, what };
        let cut = cut(*kind, &bytes).map_err(wrong)?;
        let cut = cut.ok_or_else(|| wrong("the file changed since it was opened".to_owned()))?;
        let Cut { text, answer, turns } = cut;
        Ok(Sample { id, group: id, text, prompt: String::new(), answer, turns })
    }

    /// Adds the entries of one file, until there are `samples`.
    fn index(&mut self, file: usize, samples: u64, hasher: &mut blake3::Hasher) -> Result<(), CorpusError> {
        let (path, kind) = self.files[file].clone();
        let failed = |source| CorpusError::Io { path: path.clone(), source };
        let mut reader = BufReader::new(File::open(&path).map_err(failed)?);
        let mut at = Entry { file, line: 1, offset: 0, bytes: 0 };
        // What the entry at `at` has so far; a paragraph is several lines.
        let mut held: Vec<u8> = Vec::new();
        loop {
            let mut line = Vec::new();
            let read = reader.by_ref().take(BYTES_MAX + 1).read_until(b'\n', &mut line).map_err(failed)? as u64;
            if read + held.len() as u64 > BYTES_MAX {
                let what = format!("expected at most {BYTES_MAX} bytes of one text");
                return Err(CorpusError::Line { path, line: at.line, what });
            }
            let blank = line.iter().all(u8::is_ascii_whitespace);
            let lines = u64::from(read > 0);
            held.extend_from_slice(&line);
            at.bytes += read;
            let ends = read == 0 || kind == Kind::Lines || blank;
            if ends {
                let wrong = |what| CorpusError::Line { path: path.clone(), line: at.line, what };
                if !held.iter().all(u8::is_ascii_whitespace) && cut(kind, &held).map_err(wrong)?.is_some() {
                    hasher.update(&held);
                    self.entries.push(at);
                }
                if read == 0 || self.entries.len() as u64 >= samples {
                    return Ok(());
                }
                let passed = held.iter().filter(|byte| **byte == b'\n').count() as u64;
                at = Entry { file, line: at.line + passed.max(lines), offset: at.offset + at.bytes, bytes: 0 };
                held.clear();
            }
        }
    }
}

fn kind(name: &str) -> Result<Kind, CorpusError> {
    match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("txt") => Ok(Kind::Paragraphs),
        Some("jsonl") => Ok(Kind::Lines),
        _ => Err(CorpusError::Spec { what: format!("{name}: expected a name that ends in .txt or .jsonl") }),
    }
}

/// What an entry's bytes say; `None`: too short to be a sample.
fn cut(kind: Kind, bytes: &[u8]) -> Result<Option<Cut>, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| format!("expected UTF-8: {error}"))?;
    if kind == Kind::Paragraphs {
        return Ok(cut_text(text));
    }
    let line: Line = serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))?;
    match line {
        Line { text: Some(text), messages: None } => Ok(cut_text(&text)),
        Line { text: None, messages: Some(messages) } => cut_messages(messages).map(Some),
        _ => Err("expected either `text` or `messages`".to_owned()),
    }
}

fn cut_text(text: &str) -> Option<Cut> {
    let text = text.trim();
    // Where each word ends.
    let mut ends: Vec<usize> = text
        .char_indices()
        .zip(text.chars().skip(1))
        .filter(|((_, c), next)| !c.is_whitespace() && next.is_whitespace())
        .map(|((at, c), _)| at + c.len_utf8())
        .collect();
    ends.push(text.len());
    ends.truncate(WORDS_MAX);
    if ends.len() < WORDS_MIN {
        return None;
    }
    let (border, end) = (ends[ends.len() * 2 / 3 - 1], ends[ends.len() - 1]);
    Some(Cut { text: text[..border].to_owned(), answer: text[border..end].to_owned(), turns: Vec::new() })
}

fn cut_messages(mut messages: Vec<Message>) -> Result<Cut, String> {
    let last = messages.iter().rposition(|message| message.role == "assistant");
    let Some(last) = last.filter(|last| *last > 0) else {
        return Err("expected a turn of the `assistant` behind at least one other".to_owned());
    };
    messages.truncate(last + 1);
    let answer = messages.pop().expect("truncated behind it").content;
    if answer.trim().is_empty() || messages.iter().all(|message| message.content.trim().is_empty()) {
        return Err("expected turns with words in them".to_owned());
    }
    let text = plain(&messages);
    Ok(Cut { text, answer: format!("\n{answer}"), turns: messages })
}

/// A conversation as plain text: what was said, a turn a line.
pub(super) fn plain(turns: &[Message]) -> String {
    turns.iter().map(|turn| turn.content.as_str()).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use protocol::experiment::projector::{Corpus as CorpusSpec, CorpusText};

    use super::*;
    use crate::projector::corpus::Corpus;

    fn open(name: &str, content: &str, samples: u32) -> Result<Corpus, CorpusError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        let text = CorpusText::Files(vec![path.to_string_lossy().into_owned()]);
        let corpus = Corpus::open_paths(&CorpusSpec { text, samples }, 1);
        // Texts stay in the files.
        std::mem::forget(directory);
        corpus
    }

    #[test]
    fn paragraphs_are_cut_between_words() {
        let content = "A heading\n\nOne two three four five six\nseven eight nine.\n\n\nä b c d e f\n";
        let corpus = open("a.txt", content, 2).unwrap();
        let (first, second) = (corpus.sample(0).unwrap(), corpus.sample(1).unwrap());
        assert_eq!(
            (first.text.as_str(), first.answer.as_str()),
            ("One two three four five six", "\nseven eight nine.")
        );
        assert_eq!((second.text.as_str(), second.answer.as_str()), ("ä b c d", " e f"));
        assert_eq!((first.group, second.group), (0, 1));
        let error = open("a.txt", content, 3).unwrap_err().to_string();
        assert_eq!(error, "3 samples are asked for, 2 are in the files");
    }

    #[test]
    fn lines_are_texts_or_conversations() {
        let content = concat!(
            "{\"text\": \"One two three four five six\"}\n\n",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"Hello there\"}, ",
            "{\"role\": \"assistant\", \"content\": \"Good day\"}, {\"role\": \"user\", \"content\": \"Bye\"}]}\n",
        );
        let corpus = open("a.jsonl", content, 2).unwrap();
        let chat = corpus.sample(1).unwrap();
        assert_eq!((chat.text.as_str(), chat.answer.as_str(), chat.turns.len()), ("Hello there", "\nGood day", 1));
        assert_eq!(corpus.sample(0).unwrap().text, "One two three four");
    }

    #[test]
    fn a_wrong_line_is_said_with_its_number() {
        let text = |name: &str, content: &str| open(name, content, 2).unwrap_err().to_string();
        let fine = "{\"text\": \"one two three four five six\"}\n";
        assert!(
            text("a.jsonl", &format!("{fine}\n{{\"text\": 3}}\n")).contains("a.jsonl line 3: expected a JSON object")
        );
        assert!(text("a.jsonl", "{}\n").ends_with("line 1: expected either `text` or `messages`"));
        let alone = "{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\"}]}";
        assert!(text("a.jsonl", &format!("{fine}{alone}")).contains("line 2: expected a turn of the `assistant`"));
        assert!(text("a.csv", "").contains("ends in .txt or .jsonl"));
        let missing = CorpusSpec { text: CorpusText::Files(vec!["artifact:00#a.txt".to_owned()]), samples: 1 };
        assert!(
            Corpus::open_paths(&missing, 0).unwrap_err().to_string().starts_with("artifact:00#a.txt: no such file")
        );
    }
}
