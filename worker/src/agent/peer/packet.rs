//! A packet file as the sender sees it: header, chunks, their hashes, and the root that names them all.
//!
//! Reads local disk and hashes: belongs on a blocking thread.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use protocol::limits::{KV_CHUNK_BYTES, PACKET_HEADER_BYTES_MAX};

/// The root of a packet: BLAKE3 over its header and its chunks' hashes in order.
pub fn root(header: &[u8], hashes: impl IntoIterator<Item = [u8; 32]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    for hash in hashes {
        hasher.update(&hash);
    }
    *hasher.finalize().as_bytes()
}

/// Number of chunks of a payload.
pub fn chunk_count(payload_bytes: u64, chunk_bytes: u32) -> u32 {
    u32::try_from(payload_bytes.div_ceil(u64::from(chunk_bytes.max(1)))).unwrap_or(u32::MAX)
}

/// Where chunk `index` begins in the payload, and its length.
pub fn chunk_span(payload_bytes: u64, chunk_bytes: u32, index: u32) -> (u64, u32) {
    let offset = u64::from(index) * u64::from(chunk_bytes);
    let left = payload_bytes.saturating_sub(offset).min(u64::from(chunk_bytes));
    (offset, u32::try_from(left).unwrap_or(chunk_bytes))
}

/// A packet file, hashed.
#[derive(Debug)]
pub struct PacketSource {
    file: File,
    /// The safetensors header, its length prefix included.
    pub header: Vec<u8>,
    /// Bytes behind the header.
    pub payload_bytes: u64,
    /// Payload of every chunk but the last.
    pub chunk_bytes: u32,
    /// Hash of each chunk.
    pub hashes: Vec<[u8; 32]>,
    /// The packet's name.
    pub root: [u8; 32],
}

impl PacketSource {
    /// Opens and hashes a safetensors file.
    ///
    /// # Errors
    /// If it cannot be read or its header is cut short or over the limit.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let total = file.metadata()?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let header_bytes = u64::from_le_bytes(length).saturating_add(8);
        if header_bytes > PACKET_HEADER_BYTES_MAX as u64 || header_bytes > total {
            return Err(io::Error::other(format!("a header of {header_bytes} bytes in a file of {total}")));
        }
        let mut header = vec![0; usize::try_from(header_bytes).expect("checked against a small limit")];
        file.read_exact_at(&mut header, 0)?;
        let payload_bytes = total - header_bytes;
        let chunk_bytes = u32::try_from(KV_CHUNK_BYTES).expect("a chunk is small");
        let mut source = Self { file, header, payload_bytes, chunk_bytes, hashes: Vec::new(), root: [0; 32] };
        for index in 0..chunk_count(payload_bytes, chunk_bytes) {
            let hash = *blake3::hash(&source.chunk(index)?).as_bytes();
            source.hashes.push(hash);
        }
        source.root = root(&source.header, source.hashes.iter().copied());
        Ok(source)
    }

    /// The payload of a chunk.
    ///
    /// # Errors
    /// If the file has become shorter.
    pub fn chunk(&self, index: u32) -> io::Result<Vec<u8>> {
        let (offset, length) = chunk_span(self.payload_bytes, self.chunk_bytes, index);
        let mut payload = vec![0; length as usize];
        self.file.read_exact_at(&mut payload, self.header.len() as u64 + offset)?;
        Ok(payload)
    }
}
