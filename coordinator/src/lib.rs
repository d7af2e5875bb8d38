//! bonepile: the coordinator crate.
//!
//! Layout:
//! - [`scheduler`]: pure, builds alone (`--no-default-features`); everything else is behind the feature `runtime`.
//! - [`driver`]: the only loop.
//! - [`authority`]: the cluster's keys, and signing workers. [`net`]: the UDP port: joining, sessions, uploads.
//! - [`api`]: what the HTTP API says.

pub mod scheduler;

#[cfg(feature = "runtime")]
pub mod api;
#[cfg(feature = "runtime")]
pub mod authority;
#[cfg(feature = "runtime")]
pub mod driver;
#[cfg(feature = "runtime")]
pub mod net;
