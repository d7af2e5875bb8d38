//! `bonepile`: the coordinator, and the command line of operators and researchers.

use std::process::ExitCode;

fn main() -> ExitCode {
    coordinator::cli::main()
}
