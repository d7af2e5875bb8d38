//! A small hub of models on loopback: the two requests that a pull makes, over plain HTTP, with the faults that a test orders.
//!
//! Small files are answered at once. Large ones (`lfs`) are answered by a redirect to a second address, as the real hub's are
//! by its store. Every request is noted.

#![allow(dead_code, reason = "several test binaries share this, and none needs all of it")]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::json;

/// A request, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// Whether it came to the store's address.
    pub(crate) to_store: bool,
    /// Path and query.
    pub(crate) target: String,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// A file of a repository.
#[derive(Debug, Clone)]
pub(crate) struct TestFile {
    pub(crate) path: String,
    pub(crate) content: Vec<u8>,
    pub(crate) lfs: bool,
    /// What is said of it instead of the truth.
    pub(crate) claimed_sha256: Option<String>,
    pub(crate) claimed_blob: Option<String>,
    pub(crate) claimed_bytes: Option<u64>,
}

/// What the hub has and how it behaves.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Files by `ORG/NAME@COMMIT`.
    pub(crate) commits: BTreeMap<String, Vec<TestFile>>,
    /// Commits by `ORG/NAME@REVISION`.
    pub(crate) revisions: BTreeMap<String, String>,
    pub(crate) requests: Vec<Request>,
    /// Each of these cuts one file's answer after so many bytes; the last is taken first.
    pub(crate) cuts: Vec<usize>,
    /// The store hangs up before it answers.
    pub(crate) dead_store: bool,
    /// So many answers of the store are that who asks came too late.
    pub(crate) expired: usize,
    /// Files are sent whole, whatever range is asked for.
    pub(crate) ignore_ranges: bool,
    /// Listings tell neither sizes nor digests.
    pub(crate) terse: bool,
    /// Files are given to who has this token only.
    pub(crate) gate: Option<String>,
    /// Status, `X-Error-Code` and body of every listing.
    pub(crate) refuse: Option<(u16, &'static str, &'static str)>,
}

/// A hub that listens until the process ends.
pub(crate) struct TestHub {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl TestHub {
    pub(crate) fn start() -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, store) = (listen(), listen());
        let (address, store_address) = (hub.local_addr().unwrap(), store.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        for (listener, to_store) in [(hub, false), (store, true)] {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&state);
                    // A client that hangs up early is part of some tests.
                    std::thread::spawn(move || drop(answer(stream, &state, to_store, store_address)));
                }
            });
        }
        Self { address, state }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A commit of `repository` with these files, to which `revision` leads from now on.
    pub(crate) fn commit(&self, repository: &str, revision: &str, commit: &str, files: Vec<TestFile>) {
        let mut state = self.state();
        state.commits.insert(format!("{repository}@{commit}"), files);
        state.revisions.insert(format!("{repository}@{revision}"), commit.to_owned());
    }

    /// Requests so far, which are forgotten.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }
}

/// A file that is in git itself.
pub(crate) fn small(path: &str, content: impl Into<Vec<u8>>) -> TestFile {
    let (path, content) = (path.to_owned(), content.into());
    TestFile { path, content, lfs: false, claimed_sha256: None, claimed_blob: None, claimed_bytes: None }
}

/// A file that is in the store.
pub(crate) fn large(path: &str, content: impl Into<Vec<u8>>) -> TestFile {
    TestFile { lfs: true, ..small(path, content) }
}

/// Bytes that are not all alike.
pub(crate) fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(&mut next).take(bytes).collect()
}

pub(crate) fn sha256(content: &[u8]) -> String {
    hex(digest(&SHA256, content).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl TestFile {
    fn sha256(&self) -> String {
        self.claimed_sha256.clone().unwrap_or_else(|| sha256(&self.content))
    }

    fn blob(&self) -> String {
        if let Some(claimed) = &self.claimed_blob {
            return claimed.clone();
        }
        let mut blob = format!("blob {}\0", self.content.len()).into_bytes();
        blob.extend_from_slice(&self.content);
        hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
    }

    fn listed(&self, terse: bool) -> serde_json::Value {
        let bytes = self.claimed_bytes.unwrap_or(self.content.len() as u64);
        match (terse, self.lfs) {
            (true, _) => json!({ "rfilename": self.path }),
            (false, false) => json!({ "rfilename": self.path, "size": bytes, "blobId": self.blob() }),
            (false, true) => json!({
                "rfilename": self.path, "size": bytes, "blobId": "0".repeat(40),
                "lfs": { "sha256": self.sha256(), "size": bytes, "pointerSize": 134 },
            }),
        }
    }
}

fn answer(stream: TcpStream, state: &Mutex<State>, to_store: bool, store: SocketAddr) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let target = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap_or_default();
        headers.insert(name.trim().to_ascii_lowercase(), value.trim().to_owned());
    }
    let request = Request { to_store, target, headers };
    let mut state = state.lock().unwrap();
    state.requests.push(request.clone());
    let reply = if to_store { stored(&mut state, &request) } else { hub(&mut state, &request, store) };
    drop(state);
    let mut stream = stream;
    stream.write_all(&reply)?;
    stream.flush()?;
    stream.shutdown(std::net::Shutdown::Write)?;
    // The client hangs up once it has read: nothing of what was sent is lost.
    let _ = std::io::copy(&mut reader, &mut std::io::sink());
    Ok(())
}

fn hub(state: &mut State, request: &Request, store: SocketAddr) -> Vec<u8> {
    let path = request.target.split('?').next().unwrap_or_default();
    if let Some(rest) = path.strip_prefix("/api/models/") {
        return listing(state, rest);
    }
    let Some((repository, rest)) = path[1..].split_once("/resolve/") else { return status(404, "") };
    let (commit, file) = rest.split_once('/').unwrap_or_default();
    let files = state.commits.get(&format!("{repository}@{commit}"));
    let Some(file) = files.and_then(|files| files.iter().find(|one| escaped(&one.path) == file)).cloned() else {
        return status(404, "X-Error-Code: EntryNotFound\r\n");
    };
    let bearer = state.gate.as_ref().map(|token| format!("Bearer {token}"));
    if bearer.is_some() && request.header("authorization") != bearer.as_deref() {
        let words = "X-Error-Code: GatedRepo\r\nX-Error-Message: Access to this model is restricted.\r\n";
        return status(if request.header("authorization").is_some() { 403 } else { 401 }, words);
    }
    if !file.lfs {
        return content(state, request, &file.content);
    }
    let location = format!("http://{store}/{repository}@{commit}/{}", escaped(&file.path));
    let etag = file.sha256();
    status(302, &format!("Location: {location}\r\nX-Repo-Commit: {commit}\r\nX-Linked-Etag: \"{etag}\"\r\n"))
}

fn stored(state: &mut State, request: &Request) -> Vec<u8> {
    if state.dead_store {
        return Vec::new();
    }
    if state.expired > 0 {
        state.expired -= 1;
        return status(403, "");
    }
    let found = state.commits.iter().find_map(|(commit, files)| {
        let path = request.target.strip_prefix(&format!("/{commit}/"))?;
        files.iter().find(|file| escaped(&file.path) == path)
    });
    match found.cloned() {
        Some(file) => content(state, request, &file.content),
        None => status(404, ""),
    }
}

fn listing(state: &State, rest: &str) -> Vec<u8> {
    if let Some((code, error, body)) = state.refuse {
        return with_body(code, &format!("X-Error-Code: {error}\r\n"), body.as_bytes());
    }
    let Some((repository, revision)) = rest.split_once("/revision/") else { return status(404, "") };
    let revision = revision.replace("%2F", "/");
    let named = state.revisions.get(&format!("{repository}@{revision}"));
    let commit = named.cloned().unwrap_or(revision);
    let Some(files) = state.commits.get(&format!("{repository}@{commit}")) else {
        let known = state.commits.keys().any(|key| key.starts_with(&format!("{repository}@")));
        let code = if known { "RevisionNotFound" } else { "RepoNotFound" };
        return status(404, &format!("X-Error-Code: {code}\r\n"));
    };
    let siblings: Vec<_> = files.iter().map(|file| file.listed(state.terse)).collect();
    let body = json!({ "id": repository, "sha": commit, "siblings": siblings, "tags": ["license:apache-2.0"] });
    with_body(200, "Content-Type: application/json\r\n", body.to_string().as_bytes())
}

/// A file's bytes from where the request wants them, cut if a cut is due.
fn content(state: &mut State, request: &Request, content: &[u8]) -> Vec<u8> {
    let range = request.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from: usize = range.filter(|_| !state.ignore_ranges).unwrap_or(0);
    if from > 0 && from >= content.len() {
        return status(416, &format!("Content-Range: bytes */{}\r\n", content.len()));
    }
    let mut reply = match from {
        0 => with_body(200, "", content),
        from => {
            let range = format!("Content-Range: bytes {from}-{}/{}\r\n", content.len() - 1, content.len());
            with_body(206, &range, &content[from..])
        }
    };
    if let Some(cut) = state.cuts.pop() {
        let head = reply.len() - (content.len() - from);
        reply.truncate(head + cut);
    }
    reply
}

fn status(code: u16, headers: &str) -> Vec<u8> {
    with_body(code, headers, b"")
}

fn with_body(code: u16, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut reply =
        format!("HTTP/1.1 {code} -\r\n{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n").into_bytes();
    reply.extend_from_slice(body);
    reply
}

fn escaped(path: &str) -> String {
    path.replace('%', "%25").replace(' ', "%20").replace('#', "%23")
}
