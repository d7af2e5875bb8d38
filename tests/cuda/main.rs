//! What needs a card: `cargo test --features worker/cuda --test cuda`. On the first card that the process sees; without one
//! every check says that it skips.
//!
//! `card` holds a card's path against the referee, which runs on the processor beside it; the referee's own checks come along
//! with the helpers and show that the processor of this box computes right.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "tests panic, and say on stderr what they skip and measure"
)]
#![allow(dead_code, reason = "shared with the tests of the model layer")]

#[path = "../model/card.rs"]
mod card;
#[path = "../model/checkpoints.rs"]
mod checkpoints;
#[path = "../model/reference.rs"]
mod reference;
#[path = "../model/stored.rs"]
mod stored;
#[path = "../model/tiny.rs"]
mod tiny;

use worker::model::DeviceChoice;
use worker::support::BuildSupport;

/// The card to check, if there is one that this build has kernels for.
fn card() -> Option<DeviceChoice> {
    match candle_core::Device::new_cuda(0) {
        Ok(_) => Some(DeviceChoice::Cuda(0)),
        Err(error) => {
            eprintln!("SKIPPED: no card for this build ({}): {error}", BuildSupport::this());
            None
        }
    }
}
