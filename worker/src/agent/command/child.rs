//! One process: started without a fork, watched by a descriptor, stopped and buried with its group.
//!
//! The standard library starts a process by `posix_spawn` as long as nothing has to happen between fork and exec, and that
//! is what makes a short program cheap; so the program is looked up here, and its death with the agent is [`super::warden`]'s.

use std::ffi::OsString;
use std::io::{self, PipeReader};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use protocol::control::StartSeat;
use protocol::experiment::CommandSpec;
use protocol::hardware::DeviceKind;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;

/// Variables of the agent that a program sees, too.
const KEPT_VARIABLES: [&str; 5] = ["PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH"];
/// Where programs are looked for if the agent itself has no `PATH`.
const PATH_DEFAULT: &str = "/usr/local/bin:/usr/bin:/bin";
/// How often a process is looked at where the kernel has no descriptors for processes.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A started process, not yet buried.
#[derive(Debug)]
pub struct Running {
    pid: Pid,
    /// Readable once it has ended; `None` where the kernel has none.
    ended: Option<AsyncFd<OwnedFd>>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// Most memory that it, or a child it waited for, had resident, bytes. The kernel counts the agent's own from before the
    /// program was loaded, so that it is never less than that.
    pub memory_peak_bytes: u64,
}

/// The environment of a program on a device.
pub fn environment(start: &StartSeat, spec: &CommandSpec, device: DeviceKind) -> Vec<(OsString, OsString)> {
    let kept = KEPT_VARIABLES.into_iter().filter_map(|name| Some((name.into(), std::env::var_os(name)?)));
    let attempt = start.attempt;
    let visible = match device {
        DeviceKind::Cuda => start.device.0.clone(),
        DeviceKind::Cpu => String::new(),
    };
    let mut own = vec![
        // What it writes is wanted while it runs; the sweep may say otherwise.
        ("PYTHONUNBUFFERED", "1".to_owned()),
        ("CUDA_VISIBLE_DEVICES", visible),
        ("BONEPILE_RUN", attempt.shard.run.to_string()),
        ("BONEPILE_SHARD", attempt.shard.to_string()),
        ("BONEPILE_ATTEMPT", attempt.to_string()),
        ("BONEPILE_DEVICE", start.device.to_string()),
        ("BONEPILE_MEMORY_BYTES", start.reserved_bytes.to_string()),
    ];
    if device == DeviceKind::Cpu {
        own.push(("OMP_NUM_THREADS", spec.threads.to_string()));
    }
    let own = own.into_iter().map(|(name, value)| (name.into(), value.into()));
    let sweeps = spec.env.iter().map(|(name, value)| (name.into(), value.into()));
    // A later one of a name replaces an earlier one.
    kept.chain(own).chain(sweeps).collect()
}

/// Where the program `name` is: itself if it names a path, else the first on `PATH` that may be run.
pub fn find_program(name: &str, environment: &[(OsString, OsString)]) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name));
    }
    let path = environment.iter().rev().find(|(variable, _)| variable == "PATH").map(|(_, value)| value.clone());
    std::env::split_paths(&path.unwrap_or_else(|| PATH_DEFAULT.into()))
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|place| place.is_file() && rustix::fs::access(place, rustix::fs::Access::EXEC_OK).is_ok())
}

/// Starts `program` with `argv` in `directory`; what it writes comes out of the pipe.
///
/// # Errors
/// Of the system: no such program, no processes left.
pub fn spawn(
    program: &Path,
    argv: &[String],
    environment: &[(OsString, OsString)],
    directory: &Path,
) -> io::Result<(Running, PipeReader)> {
    let (reader, writer) = io::pipe()?;
    let (name, arguments) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let child = Command::new(program)
        .arg0(name)
        .args(arguments)
        .current_dir(directory)
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((Running { pid, ended: descriptor(pid) }, reader))
}

/// A descriptor that becomes readable with the end of a process; `None` where the kernel has none.
#[expect(unsafe_code, reason = "the safe way of registering is deprecated: it takes types that may change descriptors")]
fn descriptor(pid: Pid) -> Option<AsyncFd<OwnedFd>> {
    let descriptor = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // SAFETY: an OwnedFd is the same open descriptor for as long as it lives, and here nobody else has it.
    unsafe { AsyncFd::register(descriptor) }.ok()
}

impl Running {
    /// Its process id, which is its group's.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Waits for its end. It is not buried by this, so that its group's number is nobody else's.
    pub async fn ended(&self) {
        match &self.ended {
            // The only error is that of a runtime that winds down.
            Some(ended) => drop(ended.readable().await),
            None => {
                let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
                while let Ok(None) = rustix::process::waitid(WaitId::Pid(self.pid), options) {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
        }
    }

    /// Asks it and all that it started to end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    /// Ends it and all that it started.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        // A group that is gone need not be told.
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    /// Buries it; what it left behind of its group is killed before. Call it after [`Self::ended`].
    ///
    /// # Errors
    /// Of the system, if it is not this process's child any more.
    #[expect(unsafe_code, reason = "no safe wrapper of wait4 tells what a child used")]
    pub fn bury(self) -> io::Result<Ended> {
        self.kill();
        let mut status = 0;
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        let pid = self.pid.as_raw_nonzero().get();
        // SAFETY: both pointers are to memory of their type that outlives the call; a zeroed rusage is a valid one.
        let (waited, usage) = unsafe {
            let waited = libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr());
            (waited, usage.assume_init())
        };
        if waited != pid {
            return Err(io::Error::last_os_error());
        }
        // Linux counts in KiB.
        let memory_peak_bytes = u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024;
        Ok(Ended { status: ExitStatus::from_raw(status), memory_peak_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_where_the_sweep_says() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("tool");
        std::fs::write(&place, "#!/bin/sh\n").unwrap();
        let path = |text: &Path| vec![(OsString::from("PATH"), OsString::from(text))];
        let here = path(directory.path());
        assert_eq!(find_program("tool", &here), None, "it may not be run");
        std::fs::set_permissions(&place, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(find_program("tool", &here), Some(place));
        assert_eq!(find_program("./tool", &here), Some(PathBuf::from("./tool")));
        assert!(find_program("sh", &[]).is_some_and(|place| place.is_absolute()));
    }
}
