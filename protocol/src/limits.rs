//! Every limit with its name, unit and reason. What happens at a limit is told where it is enforced.

/// Longest body of a control frame, bytes: room for a greeting with 64 devices and 1,000 held attempts.
pub const CONTROL_FRAME_BYTES_MAX: usize = 1 << 20;
/// Longest body of a join frame, bytes: a certificate request is under 1 KiB; before admission nobody gets more.
pub const JOIN_FRAME_BYTES_MAX: usize = 16 << 10;
/// Longest body of a frame between an agent and its executor, bytes: results of a shard are JSON of this size at most.
pub const EXEC_FRAME_BYTES_MAX: usize = 64 << 20;
/// Longest body of a frame between two workers, bytes: an OFFER carries one packet header with one i64 and one u32 a token.
pub const PEER_FRAME_BYTES_MAX: usize = 4 << 20;
/// Payload of a cache chunk, bytes: 64 bytes of header and one hash are noise, a cut link costs 8 ms at 1 GbE.
pub const KV_CHUNK_BYTES: usize = 1 << 20;
/// Largest payload a receiver takes in one chunk, bytes.
pub const KV_CHUNK_BYTES_MAX: usize = 4 << 20;
/// Largest packet a receiver takes, bytes; an OFFER above it is refused.
pub const KV_TRANSFER_BYTES_MAX: u64 = 16 << 30;
/// Offers open at once from one peer; the next is refused.
pub const OFFERS_OPEN_MAX: usize = 64;
/// Largest packet header, bytes (safetensors header included): positions and ids of a 128k-token cache fit.
pub const PACKET_HEADER_BYTES_MAX: usize = 4 << 20;
/// Largest sweep file, bytes.
pub const SWEEP_BYTES_MAX: usize = 1 << 20;
/// Most shards a sweep may expand to: a matrix typed wrong should be told, not queued.
pub const SHARDS_PER_RUN_MAX: usize = 100_000;
/// Largest text taken from a worker (host name, error, note), bytes; longer is cut.
pub const WORKER_TEXT_BYTES_MAX: usize = 4096;
/// Most names of models that a worker reports: with names of usual length they take a third of a greeting.
pub const MODEL_NAMES_MAX: usize = 1_000;
/// Longest piece of a program's output in one message, bytes: a heartbeat behind it waits a millisecond at most.
pub const OUTPUT_PIECE_BYTES_MAX: usize = 16 << 10;
/// Newest output of a running shard that the coordinator keeps at hand, bytes.
pub const OUTPUT_TAIL_BYTES_MAX: usize = 256 << 10;
/// Texts of files in one `command` spec, bytes in all: each shard carries its own.
pub const COMMAND_FILES_BYTES_MAX: usize = 64 << 10;
/// Most seats that may be sent ahead to a device, whatever its worker offers.
pub const SEATS_AHEAD_MAX: u32 = 512;
/// Most labels of a worker.
pub const LABELS_MAX: usize = 64;
/// Most devices a worker may report.
pub const DEVICES_PER_WORKER_MAX: usize = 64;
/// Most shapes of models that a worker reports: those of the catalogue are known anyway, and asking for one reads a header.
pub const MODEL_SHAPES_MAX: usize = 64;
/// What a GPU keeps for its driver and a desktop unless the operator says otherwise, bytes.
pub const GPU_RESERVE_BYTES: u64 = 512 << 20;

/// Time between heartbeats of a worker, milliseconds.
pub const HEARTBEAT_INTERVAL_MS: u64 = 2_000;
/// A worker not heard of for this long gets no new work, milliseconds: three heartbeats and jitter.
pub const SUSPECT_AFTER_MS: u64 = 7_000;
/// An attempt whose worker was not heard of for this long is given up, milliseconds.
pub const LEASE_TTL_MS: u64 = 30_000;
/// Tries of a shard before it fails for good.
pub const ATTEMPTS_PER_SHARD_MAX: u32 = 4;
/// Default life of a join token, milliseconds.
pub const TOKEN_TTL_MS: u64 = 3_600_000;

/// `text` cut to [`WORKER_TEXT_BYTES_MAX`] at a character boundary, control and escape characters replaced by spaces: what
/// comes from a worker may end on a terminal.
pub fn clean_text(text: &str) -> String {
    let mut end = text.len().min(WORKER_TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}
