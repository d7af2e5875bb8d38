//! The executor: the child process that computes. One device, one seat at a time, models kept warm in between.
//!
//! Speaks `protocol::exec` with its agent over stdin and stdout; stderr is the log. Knows files below the directory of an
//! attempt and the models it is told of, nothing else: no store, no network, no keys. It may crash or be killed at any
//! moment without harm to the agent; when the agent is gone (stdin ends) it stops.
//!
//! Layout:
//! - [`wire`]: frames over blocking pipes. [`inbox`]: what the agent has said, for the thread that computes.
//! - [`seat`]: one seat's part, from spec to files, at its `desk`; `projector` for projectors' many stages. [`warm`]: the model in memory.
//! - [`failure`]: errors as the types that retry policies know.

mod desk;
pub mod failure;
pub mod inbox;
mod projector;
pub mod seat;
pub mod warm;
pub mod wire;

use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use protocol::control::{Failure, FailureKind};
use protocol::exec::{Failed, Finished, FromExecutor, Ready, RunSeat};

use self::inbox::Inbox;
use self::warm::Warm;
use self::wire::{Outbox, WireError};
use crate::support::BuildSupport;

/// The executor could not go on. Failures of a seat are not among these: they are told to the agent.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    /// The compute threads could not be started.
    #[error("start compute threads")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// The agent cannot be told anything any more.
    #[error("speak with the agent")]
    Wire(#[from] WireError),
}

/// Serves an agent until `input` ends.
///
/// `threads` compute threads are started before any tensor exists; None: as many as the environment says
/// (`RAYON_NUM_THREADS`), or the machine has.
///
/// # Errors
/// [`ExecutorError`]; the process should end then.
pub fn serve(
    threads: Option<usize>,
    input: impl Read + Send + 'static,
    output: impl Write,
) -> Result<(), ExecutorError> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0));
    pool.build_global().map_err(ExecutorError::Threads)?;
    let outbox = Outbox::new(output);
    let threads = u32::try_from(rayon::current_num_threads()).unwrap_or(u32::MAX);
    outbox.say(Ready {
        build: protocol::BUILD.to_owned(),
        backend: BuildSupport::this().backend.to_string(),
        threads,
    })?;
    let inbox = Arc::new(Inbox::default());
    let reader = Arc::clone(&inbox);
    std::thread::spawn(move || reader.listen(input));
    let mut warm = Warm::default();
    while let Some(order) = inbox.next_seat() {
        let attempt = order.attempt;
        tracing::info!(%attempt, role = %order.role, spec = order.spec.summary(), "seat started");
        match run_guarded(&order, &mut warm, &inbox, &outbox) {
            Ok(finished) => outbox.say(finished)?,
            Err(failure) => {
                tracing::warn!(%attempt, %failure, "seat failed");
                outbox.say(Failed { attempt, failure })?;
            }
        }
        inbox.done(attempt);
    }
    Ok(())
}

/// A seat's part, with a panic in it turned into a failure: the next seat may fare better, and the agent learns why.
fn run_guarded<W: Write>(
    order: &RunSeat,
    warm: &mut Warm,
    inbox: &Inbox,
    outbox: &Outbox<W>,
) -> Result<Finished, Failure> {
    let run = AssertUnwindSafe(|| seat::run(order, warm, inbox, outbox));
    match catch_unwind(run) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let text = text.unwrap_or("without a message");
            Err(Failure::new(FailureKind::Internal, format!("the executor panicked: {text}")))
        }
    }
}

impl<W: Write> Outbox<W> {
    /// Tells the agent something.
    ///
    /// # Errors
    /// [`WireError`] if the pipe is gone.
    pub fn say(&self, message: impl Into<FromExecutor>) -> Result<(), WireError> {
        self.send(&message.into())
    }
}
