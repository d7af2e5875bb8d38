//! Time as a value. Does not read any clock: `now` comes in with every input.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970-01-01T00:00:00Z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// The moment `duration_ms` later; saturates at the end of time.
    #[must_use]
    pub fn plus_ms(self, duration_ms: u64) -> Self {
        Self(self.0.saturating_add(duration_ms))
    }

    /// How long ago `earlier` was, 0 if it lies ahead.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl From<std::time::SystemTime> for UnixMillis {
    fn from(time: std::time::SystemTime) -> Self {
        let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// `1h 02m`, `3m 20s`, `4.2 s`, `17 ms`: a duration for people.
#[derive(Debug, Clone, Copy)]
pub struct Human(pub Duration);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            3600.. => write!(f, "{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
            60.. => write!(f, "{}m {:02}s", seconds / 60, seconds % 60),
            1.. => write!(f, "{:.1} s", self.0.as_secs_f64()),
            0 => write!(f, "{} ms", self.0.as_millis()),
        }
    }
}
