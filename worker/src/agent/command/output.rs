//! What a program writes: all of it to a file, the newest of it to whoever watches, its last words to its failure.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::control::SeatWrote;
use protocol::limits::OUTPUT_PIECE_BYTES_MAX;

use crate::agent::core::SeatId;

/// Name of the artifact.
pub const OUTPUT_NAME: &str = "output.log";
/// Where it lies in the seat's directory until then; nothing that a program would call a file of its own.
pub const OUTPUT_FILE: &str = ".bonepile-output";
/// Longest output kept, bytes: what is longer is a program gone wild, and the store is for results.
pub const OUTPUT_BYTES_MAX: u64 = 64 << 20;
/// Last words kept at hand, bytes: room for a Python traceback and what comes before it.
const TAIL_BYTES_MAX: usize = 32 << 10;
/// Time between two pieces of one seat: often enough to read along, too rare to be a load.
pub const PIECE_EVERY: Duration = Duration::from_millis(250);
/// Output that waits to be told, bytes; beyond it the oldest is not told, only kept.
const UNTOLD_BYTES_MAX: usize = 4 * OUTPUT_PIECE_BYTES_MAX;

/// The output of one program.
#[derive(Debug)]
pub struct Output {
    seat: SeatId,
    path: PathBuf,
    bytes_max: u64,
    /// Made with the first byte: a program that writes nothing has no file.
    file: Option<File>,
    /// Bytes written so far, those beyond the limit too.
    total: u64,
    tail: Vec<u8>,
    untold: Vec<u8>,
    /// When the next piece may be told, once there was one.
    next_piece: Option<Instant>,
    told: bool,
}

impl Output {
    /// Nothing yet, by a seat that works in `directory`.
    pub fn new(seat: SeatId, directory: &Path, bytes_max: u64) -> Self {
        let path = directory.join(OUTPUT_FILE);
        let (tail, untold) = (Vec::new(), Vec::new());
        Self { seat, path, bytes_max, file: None, total: 0, tail, untold, next_piece: None, told: false }
    }

    /// Takes what the program has just written.
    ///
    /// # Errors
    /// If it cannot be kept.
    pub fn take(&mut self, bytes: &[u8], now: Instant) -> io::Result<()> {
        let room = usize::try_from(self.bytes_max.saturating_sub(self.total)).unwrap_or(usize::MAX);
        if room > 0 {
            let file = match &mut self.file {
                Some(file) => file,
                None => self.file.insert(File::create(&self.path)?),
            };
            file.write_all(&bytes[..bytes.len().min(room)])?;
        }
        self.total += bytes.len() as u64;
        push_newest(&mut self.tail, bytes, TAIL_BYTES_MAX);
        push_newest(&mut self.untold, bytes, UNTOLD_BYTES_MAX);
        self.next_piece.get_or_insert(now + PIECE_EVERY);
        Ok(())
    }

    /// When there is something to tell; `None`: not until more is written.
    pub fn next_piece(&self) -> Option<Instant> {
        self.next_piece.filter(|_| !self.untold.is_empty())
    }

    /// The next piece, if it is time.
    pub fn piece(&mut self, now: Instant) -> Option<SeatWrote> {
        if self.next_piece()? > now {
            return None;
        }
        self.next_piece = Some(now + PIECE_EVERY);
        self.any_piece()
    }

    /// What is left to tell of a program that has ended, if anyone was told anything: a short one's output is an artifact
    /// before anyone could ask.
    pub fn last_piece(&mut self) -> Option<SeatWrote> {
        if self.told { self.any_piece() } else { None }
    }

    fn any_piece(&mut self) -> Option<SeatWrote> {
        if self.untold.is_empty() {
            return None;
        }
        self.told = true;
        let offset = self.total - self.untold.len() as u64;
        let length = self.untold.len().min(OUTPUT_PIECE_BYTES_MAX);
        let bytes = self.untold.drain(..length).collect();
        Some(SeatWrote { attempt: self.seat.attempt, role: self.seat.role, offset, bytes })
    }

    /// Its last words.
    pub fn tail(&self) -> &[u8] {
        &self.tail
    }

    /// Nothing more comes: the file with all of it, if there is any.
    ///
    /// # Errors
    /// If it cannot be kept.
    pub fn finish(mut self) -> io::Result<Option<PathBuf>> {
        let Some(file) = &mut self.file else { return Ok(None) };
        if self.total > self.bytes_max {
            let more = self.total - self.bytes_max;
            writeln!(file, "\n[bonepile: cut here after {} bytes; {more} more were written]", self.bytes_max)?;
        }
        Ok(Some(self.path))
    }
}

fn push_newest(kept: &mut Vec<u8>, bytes: &[u8], max: usize) {
    let bytes = &bytes[bytes.len().saturating_sub(max)..];
    let over = (kept.len() + bytes.len()).saturating_sub(max);
    kept.drain(..over);
    kept.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use protocol::ids::{AttemptId, Fence, Role, RunId, ShardId};

    use super::*;

    fn output(directory: &Path, bytes_max: u64) -> Output {
        let attempt = AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(1) };
        Output::new(SeatId { attempt, role: Role::Main }, directory, bytes_max)
    }

    #[test]
    fn silence_leaves_no_file_and_words_leave_one() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(output(directory.path(), 100).finish().unwrap(), None);
        let mut output = output(directory.path(), 10);
        let now = Instant::now();
        output.take(b"hello ", now).unwrap();
        output.take(b"world, and more", now).unwrap();
        output.take(b"!", now).unwrap();
        assert_eq!(output.tail(), b"hello world, and more!");
        let text = std::fs::read_to_string(output.finish().unwrap().unwrap()).unwrap();
        assert_eq!(text, "hello worl\n[bonepile: cut here after 10 bytes; 12 more were written]\n");
    }

    #[test]
    fn pieces_come_one_at_a_time_and_say_where_they_stand() {
        let directory = tempfile::tempdir().unwrap();
        let mut output = output(directory.path(), 1 << 30);
        let now = Instant::now();
        output.take(b"a", now).unwrap();
        assert_eq!(output.piece(now), None, "a short program is not told of");
        assert_eq!(output.next_piece(), Some(now + PIECE_EVERY));
        let later = now + PIECE_EVERY;
        let piece = output.piece(later).unwrap();
        assert_eq!((piece.offset, piece.bytes.as_slice()), (0, &b"a"[..]));
        assert_eq!(output.next_piece(), None);
        let flood = vec![b'x'; 10 * UNTOLD_BYTES_MAX];
        output.take(&flood, later).unwrap();
        assert_eq!(output.piece(later), None, "not so soon");
        let piece = output.piece(later + PIECE_EVERY).unwrap();
        assert_eq!(piece.offset, 1 + (flood.len() - UNTOLD_BYTES_MAX) as u64, "the oldest is only kept");
        assert_eq!(piece.bytes.len(), OUTPUT_PIECE_BYTES_MAX);
        assert_eq!(output.last_piece().unwrap().offset, piece.offset + OUTPUT_PIECE_BYTES_MAX as u64);
    }
}
