//! The only loop: takes what net and HTTP hand in, asks the scheduler, makes its events durable, lets its effects out.
//!
//! Layout: [`handle`] is what others hold.

mod handle;

pub use handle::{COMMANDS_QUEUED_MAX, Command, DriverHandle, Gone, NewRun, TokenRecord};
