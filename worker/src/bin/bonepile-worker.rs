//! `bonepile-worker`: the agent of a box. Everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::agent::cli::main()
}
