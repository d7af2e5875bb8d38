//! Asks an executor's binary a question: one that it answers on stdout and ends.
//!
//! Not the conversation with a running executor: that is the supervisor's.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use protocol::limits::clean_text;

/// What `program` prints on stdout when started with `arguments`; it must fit into a pipe, 64 KiB. One that takes longer than
/// `limit` is killed.
///
/// # Errors
/// In words: it does not start, does not end, or complains.
pub(super) fn answer(
    program: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    limit: Duration,
) -> Result<Vec<u8>, String> {
    let mut command = Command::new(program);
    run(command.args(arguments), limit)
}

/// The same for a command with an environment of its own.
///
/// # Errors
/// As [`answer`].
pub(super) fn run(command: &mut Command, limit: Duration) -> Result<Vec<u8>, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| error.to_string())?;
    // What it says fits into the pipes, so that it need not be read before it ends.
    let asked = Instant::now();
    while child.try_wait().map_err(|error| error.to_string())?.is_none() {
        if asked.elapsed() > limit {
            // It may have ended by itself by now; either way it is gone.
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("no answer within {} s", limit.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().map_err(|error| error.to_string())?;
    if !output.status.success() {
        // A missing CUDA library is told here, by the system's loader.
        let words = clean_text(String::from_utf8_lossy(&output.stderr).trim());
        return Err(format!("{}: {words}", output.status));
    }
    Ok(output.stdout)
}
