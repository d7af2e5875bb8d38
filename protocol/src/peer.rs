//! The conversation of two workers on ALPN `bonepile-peer/1`: cache packets from a source's agent to a target's.
//!
//! On one bidirectional stream a transfer: OFFER, then GRANT, WAIT or REFUSE; chunks on unidirectional streams, each a
//! 64-byte [`ChunkHeader`] and its payload; then DONE and ACCEPT. A peer is known by its certificate: it must be the one that
//! the coordinator named for that seat of that attempt, so no further ticket is needed. Only data here.

use serde::{Deserialize, Serialize};

use crate::frame::messages;
use crate::ids::{AttemptId, Role};
use crate::limits::{KV_CHUNK_BYTES_MAX, PEER_FRAME_BYTES_MAX};

messages! {
    /// Frames on a transfer's stream, either direction.
    pub enum PeerMessage, max = PEER_FRAME_BYTES_MAX, {
        /// Sender: this packet, if you can take it.
        0x0501 Offer(Offer),
        /// Receiver: send what is missing.
        0x0502 Grant(Grant),
        /// Receiver: not yet (the attempt's start has not reached me, or my memory is full); ask again.
        0x0503 Wait(Wait),
        /// Receiver: no.
        0x0504 Refuse(Refuse),
        /// Sender: every chunk is sent.
        0x0505 Done(Done),
        /// Receiver: every chunk is checked and on disk.
        0x0506 Accept(Accept),
    }
}

/// A packet to send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Number of this transfer on this connection; chunk headers name it.
    pub transfer: u64,
    /// The attempt it belongs to.
    pub attempt: AttemptId,
    /// The seat it is for.
    pub to: Role,
    /// Name that both seats derive from the spec.
    pub key: String,
    /// The safetensors header: length prefix, JSON, padding. Says tensors, shapes, dtypes and the packet's own header.
    pub header: Vec<u8>,
    /// Bytes behind the header.
    pub payload_bytes: u64,
    /// Payload of every chunk but the last, bytes.
    pub chunk_bytes: u32,
    /// BLAKE3 over the header and the chunks' hashes in order: the packet's name for resuming and accepting.
    pub root: [u8; 32],
}

/// Send what is missing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The transfer.
    pub transfer: u64,
    /// Bit `i % 8` of byte `i / 8`: chunk `i` is here already. Empty: none is.
    pub have: Vec<u8>,
}

/// Ask again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// The transfer.
    pub transfer: u64,
    /// After this long, milliseconds.
    pub retry_in_ms: u64,
    /// Why, for the log.
    pub reason: String,
    /// The seat is there and works through what it has: worth waiting for however long that takes.
    pub busy: bool,
}

/// No.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text} (code {code})")]
pub struct Refuse {
    /// The transfer.
    pub transfer: u64,
    /// One of [`refuse`].
    pub code: u16,
    /// In words.
    pub text: String,
}

/// Numbers of refusals between workers.
pub mod refuse {
    /// This peer does not sit where it says.
    pub const NOT_THE_SEAT: u16 = 1;
    /// The attempt ended here.
    pub const ATTEMPT_OVER: u16 = 2;
    /// The header does not check, or shapes and bytes disagree.
    pub const BAD_HEADER: u16 = 3;
    /// Larger than this worker takes.
    pub const TOO_LARGE: u16 = 4;
    /// Too many open offers.
    pub const TOO_MANY: u16 = 5;
    /// A chunk or the root does not check.
    pub const CORRUPT: u16 = 6;
    /// The local disk cannot take it.
    pub const LOCAL_DISK: u16 = 7;
}

/// Every chunk is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The transfer.
    pub transfer: u64,
}

/// Every chunk is checked and on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// The transfer.
    pub transfer: u64,
    /// The root, computed by the receiver.
    pub root: [u8; 32],
}

/// What stands before every chunk's payload: 64 bytes, little-endian, packed by hand.
///
/// | offset | 0 | 4 | 5 | 6 | 8 | 16 | 20 | 24 | 32 |
/// |---|---|---|---|---|---|---|---|---|---|
/// | field | magic `BPKV` | version 1 | flags 0 | zero u16 | transfer u64 | chunk index u32 | payload bytes u32 | offset in payload u64 | BLAKE3 of the payload, 32 B |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The transfer.
    pub transfer: u64,
    /// Place in the packet, from 0.
    pub index: u32,
    /// Length of the payload.
    pub payload_bytes: u32,
    /// Where it goes, bytes behind the packet's header.
    pub offset: u64,
    /// BLAKE3 of the payload.
    pub hash: [u8; 32],
}

/// Bytes are not a chunk header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkHeaderError {
    /// The magic is another.
    #[error("a chunk must begin with BPKV")]
    Magic,
    /// Version or flags that this build does not know.
    #[error("chunk of version {version} with flags {flags:#04x} is not known")]
    Version {
        /// Version claimed.
        version: u8,
        /// Flags claimed.
        flags: u8,
    },
    /// The payload is over the limit.
    #[error("chunk of {bytes} bytes is over the limit of {KV_CHUNK_BYTES_MAX}")]
    TooLarge {
        /// Length claimed.
        bytes: u32,
    },
}

impl ChunkHeader {
    /// Bytes of a chunk header.
    pub const BYTES: usize = 64;
    const MAGIC: [u8; 4] = *b"BPKV";
    const VERSION: u8 = 1;

    /// As it goes on the wire.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0..4].copy_from_slice(&Self::MAGIC);
        bytes[4] = Self::VERSION;
        bytes[8..16].copy_from_slice(&self.transfer.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.index.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.offset.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.hash);
        bytes
    }

    /// From the wire.
    ///
    /// # Errors
    /// If the magic, version or length does not check.
    pub fn parse(bytes: &[u8; Self::BYTES]) -> Result<Self, ChunkHeaderError> {
        fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
            bytes[at..at + N].try_into().expect("the range has N bytes")
        }
        if part::<4>(bytes, 0) != Self::MAGIC {
            return Err(ChunkHeaderError::Magic);
        }
        if bytes[4] != Self::VERSION || bytes[5] != 0 {
            return Err(ChunkHeaderError::Version { version: bytes[4], flags: bytes[5] });
        }
        let header = Self {
            transfer: u64::from_le_bytes(part(bytes, 8)),
            index: u32::from_le_bytes(part(bytes, 16)),
            payload_bytes: u32::from_le_bytes(part(bytes, 20)),
            offset: u64::from_le_bytes(part(bytes, 24)),
            hash: part(bytes, 32),
        };
        if header.payload_bytes as usize > KV_CHUNK_BYTES_MAX {
            return Err(ChunkHeaderError::TooLarge { bytes: header.payload_bytes });
        }
        Ok(header)
    }
}
