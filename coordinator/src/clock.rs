//! The only wall clock and the only OS randomness of the coordinator's core.
//!
//! Everything below the driver gets time and random numbers as values. Does not sleep: the driver does, on tokio's timer.

use std::time::SystemTime;

use protocol::ids::hex;
use protocol::time::UnixMillis;
use ring::rand::{SecureRandom, SystemRandom};

/// The time by this box's clock. May jump, also backwards; the scheduler sees to that.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn now() -> UnixMillis {
    UnixMillis::from(SystemTime::now())
}

/// The same as the system gives it, for the life of certificates.
#[expect(clippy::disallowed_methods, reason = "this is the one place")]
pub fn system() -> SystemTime {
    SystemTime::now()
}

/// A random number for a new journal's seed.
///
/// # Panics
/// If the system has no random source.
pub fn random_seed() -> u64 {
    let mut bytes = [0; 8];
    SystemRandom::new().fill(&mut bytes).expect("the system's random source answers");
    u64::from_le_bytes(bytes)
}

/// 16 random bytes in hex: an identity that nobody else has.
///
/// # Panics
/// If the system has no random source.
pub fn random_id() -> String {
    let mut bytes = [0; 16];
    SystemRandom::new().fill(&mut bytes).expect("the system's random source answers");
    hex(&bytes)
}
