//! One file: brought piece by piece over as many connections as it takes, then checked.
//!
//! hf-hub 0.5 would append whatever a server answers to a request for a range, checks no digest, and cannot finish a file
//! that is here whole; so the loop is written out here. What came lies in a part file named after what it must become, so
//! that any later pull of the same content goes on with it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use ureq::Body;
use ureq::http::Response;

use super::client::{Client, Refusal, text};
use super::plan::{Digest, Wanted};
use super::{HubError, HubEvent};
use crate::ids::hex;
use crate::model_name::HubName;
use crate::models::pulled::Content;
use crate::models::{ModelError, digest_of};

/// Tries in a row that bring nothing before a file is given up.
const TRIES_MAX: u32 = 5;
/// Connections for one file in all: one that is cut every few bytes comes to an end, too.
const CONNECTIONS_MAX: u32 = 1_000;
/// Read at once, bytes.
const BUFFER_BYTES: usize = 1 << 18;

/// Where one file comes from and what is told of it.
pub(super) struct Fetch<'a> {
    pub(super) client: &'a Client,
    pub(super) name: &'a HubName,
    pub(super) commit: &'a str,
    pub(super) file: &'a Wanted,
    /// From 1, and of how many.
    pub(super) place: (usize, usize),
    /// Directory of part files.
    pub(super) parts: &'a Path,
}

/// How one connection ended, if not well.
enum Ended {
    /// Something may come on the next.
    Cut(String),
    /// The hub said that it is busy.
    Busy(HubError),
    /// Nothing more will come.
    Failed(ModelError),
}

impl Fetch<'_> {
    /// Brings the file; returns where it lies, checked, and what it holds.
    ///
    /// # Errors
    /// [`ModelError::Hub`], [`ModelError::Corrupt`] with the damaged file put aside, [`ModelError::Io`].
    pub(super) fn run(&self, progress: &mut dyn FnMut(HubEvent<'_>)) -> Result<(PathBuf, Content), ModelError> {
        let part = self.parts.join(part_name(self.name, self.commit, self.file));
        // Of the hub's answers; one that is here whole from an earlier pull is held against the listing alone.
        let mut named = None;
        let (mut in_vain, mut connections) = (0, 0);
        while !self.is_whole(&part) {
            let before = length(&part);
            let ended = match self.connect(&part, before, &mut named, progress) {
                Ok(()) => break,
                Err(Ended::Failed(error)) => return Err(error),
                Err(ended) => ended,
            };
            connections += 1;
            in_vain = if length(&part) > before { 1 } else { in_vain + 1 };
            let over = in_vain >= TRIES_MAX || connections >= CONNECTIONS_MAX;
            let detail = match ended {
                Ended::Busy(error) if over => return Err(error.into()),
                Ended::Cut(detail) if over => return Err(self.cut(&part, detail).into()),
                Ended::Busy(error) => error.to_string(),
                Ended::Cut(detail) => detail,
                Ended::Failed(error) => return Err(error),
            };
            progress(HubEvent::Again { file: &self.file.path, why: &detail });
            std::thread::sleep(self.client.config().retry_wait * (1 << (in_vain - 1)));
        }
        let content = self.check(&part, named)?;
        Ok((part, content))
    }

    /// Whether all of it is here from an earlier pull. A part that is too long is of something else and goes.
    fn is_whole(&self, part: &Path) -> bool {
        let Some(bytes) = self.file.bytes else { return false };
        let here = length(part);
        if here > bytes {
            // If it stays, the digest will tell.
            let _ = fs::remove_file(part);
        }
        here == bytes && part.exists()
    }

    /// One connection: asks for what is missing and writes what comes.
    fn connect(
        &self,
        part: &Path,
        from: u64,
        named: &mut Option<String>,
        progress: &mut dyn FnMut(HubEvent<'_>),
    ) -> Result<(), Ended> {
        let asked = self.client.get(self.name, self.commit, &self.file.path, from);
        let (answer, sha256) = asked.map_err(|refusal| match refusal {
            Refusal::Network(detail) => Ended::Cut(detail),
            Refusal::Busy(error) => Ended::Busy(error),
            Refusal::Final(error) => Ended::Failed(error.into()),
        })?;
        *named = named.take().or(sha256);
        let status = answer.status().as_u16();
        if status == 416 {
            // There is nothing after what is here: it is whole, or of something else. From the beginning next time.
            fs::remove_file(part).or_else(gone).map_err(|source| failed("remove", part, source))?;
            return Err(Ended::Cut("the hub has nothing after what is here".to_owned()));
        }
        let range = text(&answer, "content-range").and_then(content_range);
        // A server may ignore what was asked for and send all of it.
        let begin = if status == 206 { range.map_or(from, |(begin, _)| begin) } else { 0 };
        if begin > from {
            let detail = format!("asked for byte {from}, it sends from byte {begin}");
            return Err(Ended::Failed(HubError::Answer { what: self.file.path.clone(), detail }.into()));
        }
        let total = self.file.bytes.or(match status {
            206 => range.and_then(|(_, total)| total),
            _ => answer.body().content_length(),
        });
        self.receive(part, begin, total, answer, progress)
    }

    fn receive(
        &self,
        part: &Path,
        begin: u64,
        total: Option<u64>,
        answer: Response<Body>,
        progress: &mut dyn FnMut(HubEvent<'_>),
    ) -> Result<(), Ended> {
        let opened = OpenOptions::new().write(true).create(true).truncate(false).open(part);
        let mut file = opened.map_err(|source| failed("open", part, source))?;
        let place = |file: &mut File| {
            file.set_len(begin)?;
            io::Seek::seek(file, io::SeekFrom::Start(begin))
        };
        place(&mut file).map_err(|source| failed("write", part, source))?;
        let (index, count) = self.place;
        let mut here = begin;
        let mut reader = answer.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        let end = loop {
            progress(HubEvent::Fetching { index, count, file: &self.file.path, bytes: here, total });
            match reader.read(&mut buffer) {
                Ok(0) => break None,
                Ok(got) if total.is_some_and(|total| here + got as u64 > total) => {
                    let detail = format!("it is longer than {} bytes", total.unwrap_or_default());
                    return Err(Ended::Failed(HubError::Answer { what: self.file.path.clone(), detail }.into()));
                }
                Ok(got) => {
                    file.write_all(&buffer[..got]).map_err(|source| failed("write", part, source))?;
                    here += got as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error.to_string()),
            }
        };
        file.sync_all().map_err(|source| failed("sync", part, source))?;
        match end {
            Some(detail) => Err(Ended::Cut(detail)),
            None if total.is_some_and(|total| here < total) => Err(Ended::Cut("the connection ended".to_owned())),
            None => Ok(()),
        }
    }

    /// Holds the part file against all that the hub told of its content.
    fn check(&self, part: &Path, named: Option<String>) -> Result<Content, ModelError> {
        let sha256 = digest_of(part)?;
        let (expected, got) = match self.file.digest.clone().or(named.map(Digest::Sha256)) {
            None => (String::new(), String::new()),
            Some(Digest::Sha256(expected)) => (format!("sha256 {expected}"), format!("sha256 {sha256}")),
            Some(Digest::Git(expected)) => (format!("git blob {expected}"), format!("git blob {}", git_digest(part)?)),
        };
        if expected == got {
            return Ok(Content { bytes: length(part), sha256 });
        }
        let path = part.with_extension("corrupt");
        fs::rename(part, &path).map_err(ModelError::io("rename", part))?;
        Err(ModelError::Corrupt { path, expected, got })
    }

    fn cut(&self, part: &Path, detail: String) -> HubError {
        match length(part) {
            0 => HubError::Unreachable { endpoint: self.client.config().endpoint.clone(), detail },
            bytes => HubError::Cut { file: self.file.path.clone(), bytes, detail },
        }
    }
}

/// Name of the part file: what the content must be, or where it comes from; and its path, since two files of a model may
/// have the same content.
pub(super) fn part_name(name: &HubName, commit: &str, file: &Wanted) -> String {
    let hash = |text: &str| hex(digest(&SHA256, text.as_bytes()).as_ref());
    match &file.digest {
        Some(digest) => format!("{}-{}.part", digest.text(), &hash(&file.path)[..8]),
        None => format!("{}.part", hash(&format!("{}@{commit}:{}", name.repository(), file.path))),
    }
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> Ended {
    Ended::Failed(ModelError::Io { operation, path: path.to_owned(), source })
}

fn gone(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// Length of a file, 0 if there is none.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

/// First byte and length of the whole, from `bytes 5-9/10`.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
}

/// What git calls the file's content, hex.
fn git_digest(path: &Path) -> Result<String, ModelError> {
    let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", length(path)).as_bytes());
    let mut file = File::open(path).map_err(ModelError::io("open", path))?;
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer).map_err(ModelError::io("read", path))? {
            0 => return Ok(hex(context.finish().as_ref())),
            got => context.update(&buffer[..got]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 0-0/*"), Some((0, None)));
        assert_eq!(content_range("items 5-9/10"), None);
        assert_eq!(content_range("bytes */10"), None);
    }

    #[test]
    fn a_blob_is_called_what_git_calls_it() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "hello\n").unwrap();
        // `printf 'hello\n' | git hash-object --stdin`
        assert_eq!(git_digest(file.path()).unwrap(), "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}
