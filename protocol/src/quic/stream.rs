//! Messages of [`crate::frame`] on QUIC streams.
//!
//! A frame's length is checked before memory is taken for it. Reading may be cancelled at any await and goes on where it was.

use std::marker::PhantomData;

use quinn::{Connection, ReadError, RecvStream, SendStream, VarInt, WriteError};

use crate::control::close;
use crate::frame::{FrameError, HEADER_BYTES, Header, IGNORABLE_FROM, Messages};

/// A message could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadFrameError {
    /// The bytes are not a frame.
    #[error("frame does not check")]
    Frame(#[from] FrameError),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, {have} bytes into it")]
    Truncated {
        /// Bytes read of it.
        have: usize,
    },
    /// The stream or connection broke.
    #[error("the stream broke")]
    Stream(#[from] ReadError),
}

impl ReadFrameError {
    /// The code with which a connection is closed for this; `None` if the connection itself failed.
    pub fn close_code(&self) -> Option<u32> {
        match self {
            Self::Frame(FrameError::TooLarge { .. }) => Some(close::LIMIT),
            Self::Frame(_) | Self::Truncated { .. } => Some(close::PROTOCOL),
            Self::Stream(_) => None,
        }
    }
}

/// A message could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteFrameError {
    /// It is over its limit.
    #[error("message does not fit a frame")]
    Frame(#[from] FrameError),
    /// The stream or connection broke.
    #[error("the stream broke")]
    Stream(#[from] WriteError),
}

/// What a peer said.
#[derive(Debug, Clone, PartialEq)]
pub enum Received<M> {
    /// A message.
    Message(M),
    /// A message of a type that this build does not know; to be answered with a refusal, the connection goes on.
    Unknown {
        /// The type.
        kind: u16,
    },
}

/// Reads the messages of one direction of a stream.
#[derive(Debug)]
pub struct FrameReader<M> {
    stream: RecvStream,
    /// Bytes of the frame under way, its header included.
    buffer: Vec<u8>,
    messages: PhantomData<fn() -> M>,
}

impl<M: Messages> FrameReader<M> {
    /// Reads from `stream`.
    pub fn new(stream: RecvStream) -> Self {
        Self { stream, buffer: Vec::new(), messages: PhantomData }
    }

    /// The next message; `None` when the peer has ended the stream between two frames. Messages of ignorable types are
    /// skipped. Cancel-safe.
    ///
    /// # Errors
    /// [`ReadFrameError`]; the stream is of no more use then.
    pub async fn next(&mut self) -> Result<Option<Received<M>>, ReadFrameError> {
        loop {
            if !self.fill(HEADER_BYTES).await? {
                return match self.buffer.len() {
                    0 => Ok(None),
                    have => Err(ReadFrameError::Truncated { have }),
                };
            }
            let header = self.buffer.first_chunk().expect("a header was just read");
            let header = Header::parse(*header, M::BYTES_MAX)?;
            if !self.fill(HEADER_BYTES + header.len).await? {
                return Err(ReadFrameError::Truncated { have: self.buffer.len() });
            }
            let message = M::from_body(header, &self.buffer[HEADER_BYTES..]);
            self.buffer.clear();
            match message {
                Ok(message) => return Ok(Some(Received::Message(message))),
                Err(FrameError::UnknownType { kind }) if kind >= IGNORABLE_FROM => {}
                Err(FrameError::UnknownType { kind }) => return Ok(Some(Received::Unknown { kind })),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The stream, for the raw bytes behind the last message.
    pub fn into_stream(self) -> RecvStream {
        self.stream
    }

    /// Reads until `want` bytes are here; `false` if the stream ends before.
    async fn fill(&mut self, want: usize) -> Result<bool, ReadError> {
        while self.buffer.len() < want {
            match self.stream.read_chunk(want - self.buffer.len(), true).await? {
                // Memory grows with what has arrived, not with what a header claims.
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Writes one message.
///
/// # Errors
/// [`WriteFrameError`].
pub async fn write_frame<M: Messages>(stream: &mut SendStream, message: &M) -> Result<(), WriteFrameError> {
    let frame = message.to_frame()?;
    stream.write_chunk(frame.into()).await?;
    Ok(())
}

/// Writes several messages at once: one turn at the connection and as few packets as they fit into.
///
/// # Errors
/// [`WriteFrameError`].
pub async fn write_frames<M: Messages>(stream: &mut SendStream, messages: &[M]) -> Result<(), WriteFrameError> {
    let mut frames = Vec::new();
    for message in messages {
        frames.extend_from_slice(&message.to_frame()?);
    }
    stream.write_chunk(frames.into()).await?;
    Ok(())
}

/// Closes a connection whose peer sent what does not check, with the code of the error and its text.
pub fn close_with(connection: &Connection, error: &ReadFrameError) {
    if let Some(code) = error.close_code() {
        let text = match error {
            ReadFrameError::Frame(cause) => cause.to_string(),
            other => other.to_string(),
        };
        connection.close(VarInt::from_u32(code), text.as_bytes());
    }
}
