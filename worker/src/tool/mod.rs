//! One model by hand, without a cluster: what it is, what it says, how fast it is.
//!
//! Reached as `bonepile-executor model …`, and as `bonepile-worker model …`, which starts the executor's binary for it: the
//! agent has no ML inside. Data goes to stdout, everything else to stderr.
//!
//! Layout:
//! - [`args`]: the command line, and finding the model.
//! - [`show`]: architecture, tensors, memory, shape. [`run`]: prompts. [`mod@bench`]: rates and peak memory.
//! - [`projector`]: a projector between two models, trained and measured in one process; [`fuser`]: by gradient descent.

pub mod args;
pub mod bench;
pub mod fuser;
pub mod measure;
pub mod projector;
pub mod run;
pub mod show;

use std::process::ExitCode;

pub use args::{ModelCommand, ToolError};
pub use projector::ProjectorCommand;

use crate::executor::failure::chain;

impl ModelCommand {
    /// Does it; says on stderr what went wrong, with a hint where there is one. A reader that goes away is no failure.
    pub fn run_to_exit(&self) -> ExitCode {
        let done = match self {
            Self::Show(args) => show::show(args),
            Self::Shape(args) => show::shape_of(args),
            Self::Run(args) => run::run(args),
            Self::Bench(args) => bench::bench(args),
        };
        exit_code(done)
    }
}

/// Says what went wrong, if anything did. A reader that went away is no failure of ours.
#[expect(clippy::print_stderr, reason = "the error of a command line")]
fn exit_code(done: Result<(), ToolError>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(ToolError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            if let Some(hint) = error.hint() {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}
