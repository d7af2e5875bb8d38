//! The one codec: `len u32 LE, type u16 LE, schema u16 LE`, then a bincode body of `len` bytes.
//!
//! This file owns every call of bincode, so that another codec would be one file's change. A length is checked against its
//! class's maximum before anything is read or allocated; a body must be used up to its last byte. Does no I/O.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 8;
/// Schema of every body in this version of the protocol.
pub const SCHEMA: u16 = 1;
/// Types from here on may be ignored by a peer that does not know them.
pub const IGNORABLE_FROM: u16 = 0x8000;

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length in the header is over the class's maximum.
    #[error("frame of {len} bytes is over the limit of {max}")]
    TooLarge {
        /// Length claimed.
        len: usize,
        /// Largest allowed.
        max: usize,
    },
    /// No message of this conversation has this type.
    #[error("unknown message type {kind:#06x}")]
    UnknownType {
        /// The type claimed.
        kind: u16,
    },
    /// The body's schema is newer than this build.
    #[error("message type {kind:#06x} has schema {got}, this build knows {SCHEMA}")]
    Schema {
        /// The type.
        kind: u16,
        /// The schema claimed.
        got: u16,
    },
    /// The body does not decode.
    #[error("message type {kind:#06x} does not decode: {detail}")]
    Body {
        /// The type.
        kind: u16,
        /// What the codec says.
        detail: String,
    },
    /// The body decodes but bytes are left over.
    #[error("message type {kind:#06x} has {extra} bytes too many")]
    Trailing {
        /// The type.
        kind: u16,
        /// Bytes left.
        extra: usize,
    },
}

/// A frame's header, already checked against its class's limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the body.
    pub len: usize,
    /// Which message.
    pub kind: u16,
    /// Version of the body.
    pub schema: u16,
}

impl Header {
    /// Reads a header and refuses a body of more than `max` bytes.
    pub fn parse(bytes: [u8; HEADER_BYTES], max: usize) -> Result<Self, FrameError> {
        let [a, b, c, d, kind_low, kind_high, schema_low, schema_high] = bytes;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > max {
            return Err(FrameError::TooLarge { len, max });
        }
        Ok(Self {
            len,
            kind: u16::from_le_bytes([kind_low, kind_high]),
            schema: u16::from_le_bytes([schema_low, schema_high]),
        })
    }
}

/// A conversation's messages in one direction: an enum whose every variant has a number. Implemented by `messages!`.
pub trait Messages: Sized {
    /// Longest body, bytes.
    const BYTES_MAX: usize;

    /// Header and body, ready to write.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] if the body is over [`Self::BYTES_MAX`].
    fn to_frame(&self) -> Result<Vec<u8>, FrameError>;

    /// Decodes the body of a frame.
    ///
    /// # Errors
    /// Every variant of [`FrameError`] but `TooLarge`.
    fn from_body(header: Header, body: &[u8]) -> Result<Self, FrameError>;
}

/// Encodes one message.
#[doc(hidden)]
pub fn encode<T: Serialize>(kind: u16, body: &T, max: usize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER_BYTES];
    bincode::serde::encode_into_std_write(body, &mut frame, config::<{ usize::MAX }>())
        .map_err(|error| FrameError::Body { kind, detail: error.to_string() })?;
    let len = frame.len() - HEADER_BYTES;
    let claimed = u32::try_from(len).ok().filter(|_| len <= max).ok_or(FrameError::TooLarge { len, max })?;
    frame[..4].copy_from_slice(&claimed.to_le_bytes());
    frame[4..6].copy_from_slice(&kind.to_le_bytes());
    frame[6..8].copy_from_slice(&SCHEMA.to_le_bytes());
    Ok(frame)
}

/// Decodes one message; `LIMIT` bounds what containers may claim.
#[doc(hidden)]
pub fn decode<T: DeserializeOwned, const LIMIT: usize>(header: Header, body: &[u8]) -> Result<T, FrameError> {
    let kind = header.kind;
    if header.schema != SCHEMA {
        return Err(FrameError::Schema { kind, got: header.schema });
    }
    let (value, used) = bincode::serde::decode_from_slice(body, config::<LIMIT>())
        .map_err(|error| FrameError::Body { kind, detail: error.to_string() })?;
    match body.len() - used {
        0 => Ok(value),
        extra => Err(FrameError::Trailing { kind, extra }),
    }
}

fn config<const LIMIT: usize>()
-> bincode::config::Configuration<bincode::config::LittleEndian, bincode::config::Varint, bincode::config::Limit<LIMIT>>
{
    bincode::config::standard().with_little_endian().with_limit::<LIMIT>()
}

/// Declares a conversation's messages: `messages! { /// doc pub enum Name, max = BYTES { 0x0101 Variant(Body), … } }`.
macro_rules! messages {
    ($(#[$doc:meta])* pub enum $name:ident, max = $max:expr, { $($(#[$vdoc:meta])* $number:literal $variant:ident($body:ty),)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub enum $name {
            $($(#[$vdoc])* $variant($body),)*
        }

        impl $crate::frame::Messages for $name {
            const BYTES_MAX: usize = $max;

            fn to_frame(&self) -> Result<Vec<u8>, $crate::frame::FrameError> {
                match self {
                    $(Self::$variant(body) => $crate::frame::encode($number, body, Self::BYTES_MAX),)*
                }
            }

            fn from_body(header: $crate::frame::Header, body: &[u8]) -> Result<Self, $crate::frame::FrameError> {
                match header.kind {
                    $($number => $crate::frame::decode::<$body, { $max }>(header, body).map(Self::$variant),)*
                    kind => Err($crate::frame::FrameError::UnknownType { kind }),
                }
            }
        }

        $(impl From<$body> for $name {
            fn from(body: $body) -> Self {
                Self::$variant(body)
            }
        })*
    };
}
pub(crate) use messages;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::{ToCoordinator, ToWorker};

    #[test]
    fn an_oversized_length_is_refused_before_anything_is_read() {
        let header = [0xff, 0xff, 0xff, 0x7f, 1, 1, 1, 0];
        assert!(matches!(Header::parse(header, 1024), Err(FrameError::TooLarge { len: 0x7fff_ffff, max: 1024 })));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever a peer sends, decoding answers with a value or an error.
        #[test]
        fn decoding_garbage_never_panics(kind in 0u16..0x0400, body in prop::collection::vec(any::<u8>(), 0..512)) {
            let header = Header { len: body.len(), kind, schema: SCHEMA };
            let _ = ToCoordinator::from_body(header, &body);
            let _ = ToWorker::from_body(header, &body);
        }
    }
}
