//! bonepile: the coordinator crate.
//!
//! Layout:
//! - [`scheduler`]: pure, [`sim`]: the same scheduler among virtual workers, pure too; both build alone
//!   (`--no-default-features`); everything else is behind the feature `runtime`.
//! - [`driver`]: the only loop. [`journal`]: every event, durable. [`clock`]: the only wall clock.
//! - [`authority`]: the cluster's keys, and signing workers. [`net`]: the UDP port: joining, sessions, uploads.
//! - [`api`]: what the HTTP API says. [`http`]: saying it on a unix socket.
//! - [`serve`]: all of it, started and stopped in order.
//! - [`cli`]: the command line of operators and researchers. [`demo`]: a whole cluster on one machine.
//! - [`report`]: results as tables and as a page.

pub mod forecast;
pub mod scheduler;
pub mod sim;

#[cfg(feature = "runtime")]
pub mod api;
#[cfg(feature = "runtime")]
pub mod authority;
#[cfg(feature = "runtime")]
pub mod cli;
#[cfg(feature = "runtime")]
pub mod clock;
#[cfg(feature = "runtime")]
pub mod demo;
#[cfg(feature = "runtime")]
pub mod driver;
#[cfg(feature = "runtime")]
pub mod http;
#[cfg(feature = "runtime")]
pub mod journal;
#[cfg(feature = "runtime")]
pub mod net;
#[cfg(feature = "runtime")]
pub mod report;
#[cfg(feature = "runtime")]
pub mod serve;
