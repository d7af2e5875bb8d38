//! The newest output of running programs, as their workers tell it: best effort, in memory, gone with the attempt.
//!
//! Knows nothing of shards; the driver lets in only what the seat's own worker says of an open attempt.

use std::collections::{BTreeMap, VecDeque};

use protocol::control::SeatWrote;
use protocol::ids::{AttemptId, Role};
use protocol::limits::{OUTPUT_PIECE_BYTES_MAX, OUTPUT_TAIL_BYTES_MAX};

/// Tails kept at once: with longest tails, 256 MiB. Beyond it the one that was longest without news goes.
const TAILS_MAX: usize = 1024;

/// One entry a seat that has told anything.
#[derive(Debug, Default)]
pub(super) struct Tails {
    all: BTreeMap<(AttemptId, Role), Tail>,
    /// Counts pieces, to tell which tail is oldest.
    clock: u64,
}

/// The newest output of a seat.
#[derive(Debug, Default)]
struct Tail {
    /// Where the first byte stands in all that was written.
    begin: u64,
    bytes: VecDeque<u8>,
    heard: u64,
}

impl Tails {
    /// A seat wrote something. What is missing between two pieces was dropped on the way.
    pub(super) fn take(&mut self, wrote: &SeatWrote) {
        if wrote.bytes.len() > OUTPUT_PIECE_BYTES_MAX {
            return;
        }
        let key = (wrote.attempt, wrote.role);
        if !self.all.contains_key(&key) && self.all.len() >= TAILS_MAX {
            let oldest = self.all.iter().min_by_key(|(_, tail)| tail.heard).map(|(key, _)| *key);
            oldest.into_iter().for_each(|key| drop(self.all.remove(&key)));
        }
        self.clock += 1;
        let tail = self.all.entry(key).or_default();
        tail.heard = self.clock;
        if tail.end() != wrote.offset {
            tail.bytes.clear();
            tail.begin = wrote.offset;
        }
        tail.bytes.extend(&wrote.bytes);
        let over = tail.bytes.len().saturating_sub(OUTPUT_TAIL_BYTES_MAX);
        tail.bytes.drain(..over);
        tail.begin += over as u64;
    }

    /// What is at hand of an attempt from byte `offset` on, and where that begins.
    pub(super) fn from(&self, attempt: AttemptId, offset: u64) -> (u64, Vec<u8>) {
        let roles = (attempt, Role::Main)..=(attempt, Role::Target);
        let Some((_, tail)) = self.all.range(roles).next() else { return (offset, Vec::new()) };
        if offset >= tail.end() {
            return (offset, Vec::new());
        }
        let begin = offset.max(tail.begin);
        let skipped = usize::try_from(begin - tail.begin).unwrap_or(usize::MAX);
        (begin, tail.bytes.iter().skip(skipped).copied().collect())
    }

    /// A seat's outcome is known: its output is an artifact, or its last words are in its failure.
    pub(super) fn forget(&mut self, attempt: AttemptId, role: Role) {
        self.all.remove(&(attempt, role));
    }

    /// Forgets everything, as the scheduler that knew the attempts is dropped.
    pub(super) fn clear(&mut self) {
        self.all.clear();
    }
}

impl Tail {
    fn end(&self) -> u64 {
        self.begin + self.bytes.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use protocol::ids::{Fence, RunId, ShardId};

    use super::*;

    fn attempt(fence: u64) -> AttemptId {
        AttemptId { shard: ShardId { run: RunId(1), index: 0 }, fence: Fence(fence) }
    }

    fn wrote(fence: u64, offset: u64, bytes: &[u8]) -> SeatWrote {
        SeatWrote { attempt: attempt(fence), role: Role::Main, offset, bytes: bytes.to_vec() }
    }

    #[test]
    fn a_tail_is_what_was_written_last() {
        let mut tails = Tails::default();
        tails.take(&wrote(1, 0, b"hello "));
        tails.take(&wrote(1, 6, b"world"));
        assert_eq!(tails.from(attempt(1), 0), (0, b"hello world".to_vec()));
        assert_eq!(tails.from(attempt(1), 6), (6, b"world".to_vec()));
        assert_eq!(tails.from(attempt(1), 11), (11, vec![]));
        assert_eq!(tails.from(attempt(2), 5), (5, vec![]));
        // Something was dropped on the way.
        tails.take(&wrote(1, 100, b"again"));
        assert_eq!(tails.from(attempt(1), 11), (100, b"again".to_vec()));
        tails.forget(attempt(1), Role::Main);
        assert_eq!(tails.from(attempt(1), 0), (0, vec![]));
    }

    #[test]
    fn tails_are_bounded_in_length_and_number() {
        let mut tails = Tails::default();
        let piece = vec![b'x'; OUTPUT_PIECE_BYTES_MAX];
        (0..100u64).for_each(|index| tails.take(&wrote(1, index * piece.len() as u64, &piece)));
        let (begin, bytes) = tails.from(attempt(1), 0);
        assert_eq!(
            (begin, bytes.len()),
            (100 * piece.len() as u64 - OUTPUT_TAIL_BYTES_MAX as u64, OUTPUT_TAIL_BYTES_MAX)
        );
        (2..2000).for_each(|fence| tails.take(&wrote(fence, 0, b"x")));
        assert_eq!(tails.all.len(), TAILS_MAX);
        tails.take(&wrote(3000, 0, &vec![0; OUTPUT_PIECE_BYTES_MAX + 1]));
        assert_eq!(tails.from(attempt(3000), 0).1.len(), 0, "longer than a piece may be");
    }
}
