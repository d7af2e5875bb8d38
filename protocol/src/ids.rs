//! Identifiers: one newtype a thing, one spelling everywhere (log, journal, command line, wire).
//!
//! Does not hand ids out: the scheduler does, from counters in its journaled state.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An id could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct ParseIdError {
    /// What was given.
    pub text: String,
    /// What it should look like.
    pub expected: &'static str,
}

macro_rules! counter_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.strip_prefix($prefix)
                    .and_then(|digits| digits.parse().ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError { text: text.to_owned(), expected: $expected })
            }
        }
    };
}

counter_id!(
    /// A worker, for the life of the cluster: `w3`. Named by the coordinator when the box joins.
    WorkerId, "w", "a worker id such as w3"
);
counter_id!(
    /// An accepted sweep: `r12`.
    RunId, "r", "a run id such as r12"
);
counter_id!(
    /// Fencing number of an attempt: `f40`. Grows over the life of the journal, so a later attempt always has a larger one.
    Fence, "f", "a fencing number such as f40"
);
counter_id!(
    /// A join token: `t2`. Not the secret, only its name.
    TokenId, "t", "a token id such as t2"
);

/// The smallest unit placed: shard `index` of a run, written `r12.3`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId {
    /// The run it belongs to.
    pub run: RunId,
    /// Its place in the run, from 0.
    pub index: u32,
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.run, self.index)
    }
}

impl fmt::Debug for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ShardId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseIdError { text: text.to_owned(), expected: "a shard id such as r12.3" };
        let (run, index) = text.split_once('.').ok_or_else(error)?;
        Ok(Self { run: run.parse().map_err(|_| error())?, index: index.parse().map_err(|_| error())? })
    }
}

/// One try of a shard: the shard and its fencing number, written `r12.3#f40`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttemptId {
    /// The shard tried.
    pub shard: ShardId,
    /// The number that fences older tries.
    pub fence: Fence,
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.shard, self.fence)
    }
}

impl fmt::Debug for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A device of one worker: a GPU's UUID, or `cpu` for the box's processor.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceId(pub String);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A device of the cluster, written `w3/cpu`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeviceRef {
    /// The worker that has it.
    pub worker: WorkerId,
    /// Its id there.
    pub device: DeviceId,
}

impl fmt::Display for DeviceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.worker, self.device)
    }
}

/// A seat in a shard. A shard on one device has the single role `main`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The only seat of a shard that needs one device.
    Main,
    /// Makes caches and streams them to the target.
    Source,
    /// Receives caches and computes on them.
    Target,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Main => "main",
            Role::Source => "source",
            Role::Target => "target",
        })
    }
}

/// The name of an artifact: BLAKE3 of its bytes, 64 lower-case hex digits in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ArtifactHash(pub [u8; 32]);

impl ArtifactHash {
    /// Names `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for ArtifactHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for ArtifactHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ArtifactHash {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        unhex(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| ParseIdError { text: text.to_owned(), expected: "64 lower-case hex digits" })
    }
}

impl Serialize for ArtifactHash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ArtifactHash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Lower-case hex of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

/// The bytes that `text`, lower-case hex, stands for; `None` if it is anything else.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks(2).map(|pair| Some(value(pair[0])? << 4 | value(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_through_text() {
        let shard: ShardId = "r12.3".parse().unwrap();
        assert_eq!(shard.to_string(), "r12.3");
        assert_eq!("w7".parse::<WorkerId>().unwrap(), WorkerId(7));
        for bad in ["", "r", "r1", "r1.", "w1.2", "r1.2.3", "r-1.2"] {
            assert!(bad.parse::<ShardId>().is_err(), "{bad}");
        }
        let hash = ArtifactHash::of(b"bonepile");
        assert_eq!(hash.to_string().parse::<ArtifactHash>().unwrap(), hash);
        assert!("AB".repeat(32).parse::<ArtifactHash>().is_err());
    }
}
