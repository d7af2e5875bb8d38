//! What a shard's program wrote, in the API's words: from the tails while it runs, from the store (whoever reads that) later.

use protocol::ids::{AttemptId, Role, ShardId, WorkerId};

use super::view::{View, failure_row, output_rows};
use crate::api::{ApiError, ErrorCode, ShardLog};
use crate::scheduler::ShardState;

/// Name of the artifact that holds a program's output.
const OUTPUT_NAME: &str = "output.log";

impl View<'_> {
    pub(super) fn log(&self, id: ShardId, offset: u64) -> Result<ShardLog, ApiError> {
        let shard = self.scheduler.state().shard(id);
        let shard = shard.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("no shard {id}")))?;
        let failure = failure_row(id, shard);
        let named = |fence| AttemptId { shard: id, fence };
        let mut log = ShardLog {
            shard: id,
            state: shard.state,
            attempt: failure.as_ref().map(|failure| failure.attempt.clone()).unwrap_or_default(),
            offset,
            text: String::new(),
            next: offset,
            ended: matches!(shard.state, ShardState::Committed | ShardState::Failed | ShardState::Cancelled),
            failure,
            note: String::new(),
            artifact: None,
        };
        if let Some(attempt) = shard.committed_attempt() {
            log.attempt = named(attempt.fence).to_string();
            log.artifact = attempt.seats.iter().flat_map(output_rows).find(|output| output.name == OUTPUT_NAME);
            if log.artifact.is_none() {
                format!("{} wrote nothing", shard.spec.summary()).clone_into(&mut log.note);
            }
        } else if let Some(attempt) = shard.open_attempt() {
            let attempt = named(attempt.fence);
            log.attempt = attempt.to_string();
            let (begin, bytes) = self.tails.from(attempt, offset);
            let (text, used) = whole_characters(&bytes);
            (log.offset, log.text, log.next) = (begin, text, begin + used as u64);
            if log.text.is_empty() && offset == 0 {
                "nothing written yet".clone_into(&mut log.note);
            }
        } else if !log.ended {
            "waits to be placed".clone_into(&mut log.note);
        }
        Ok(log)
    }

    /// Whether `worker` has the seat of an open attempt.
    pub(super) fn sits(&self, worker: WorkerId, attempt: AttemptId, role: Role) -> bool {
        let open = self.scheduler.state().shard(attempt.shard).and_then(|shard| shard.open_attempt());
        open.filter(|open| open.fence == attempt.fence)
            .is_some_and(|open| open.seats.iter().any(|seat| seat.role == role && seat.device.worker == worker))
    }
}

/// `bytes` as text without a character that is cut at their end, and how many of them that is.
pub(crate) fn whole_characters(bytes: &[u8]) -> (String, usize) {
    let cut_short = |tail: &[u8]| {
        std::str::from_utf8(tail).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
    };
    // A character has four bytes at most, so one that is cut begins among the last three.
    let cut = (1..=bytes.len().min(3)).find(|back| cut_short(&bytes[bytes.len() - back..]));
    let used = bytes.len() - cut.unwrap_or(0);
    (String::from_utf8_lossy(&bytes[..used]).into_owned(), used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut() {
        let text = "a\u{e9}\u{20ac}\u{1f600}".as_bytes();
        for end in 0..=text.len() {
            let (whole, used) = whole_characters(&text[..end]);
            assert!(!whole.contains('\u{fffd}') && used <= end && end - used < 4, "{end}: {whole}");
        }
        assert_eq!(whole_characters(text).1, text.len());
        assert_eq!(whole_characters(b"\xff\xfe ").1, 3, "what is no text is not waited for");
    }
}
