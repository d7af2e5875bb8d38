//! What ends programs when the agent is killed: a small process beside it that does nothing until then.
//!
//! Executors ask the kernel to end them with the agent, which takes a fork; for programs that last a millisecond a fork is
//! too much. So the agent writes the numbers of their process groups into a memory file, and holds one end of a pipe; when
//! the pipe breaks, whatever broke it, the warden ends the groups in the file. A program that was just being started then is
//! found by its working directory when the next agent starts.

use std::fs::File;
use std::io::{self, PipeWriter, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::fs::MemfdFlags;
use rustix::process::{Pid, Signal};

/// The subcommand of `bonepile-worker` that is the warden.
pub const SUBCOMMAND: &str = "warden";
/// Bytes of a slot in the file: one process number.
const SLOT_BYTES: u64 = 4;

/// The agent's side.
#[derive(Debug)]
pub struct Warden {
    groups: File,
    slots: Mutex<Slots>,
    /// Open for as long as the agent lives.
    _leash: PipeWriter,
    /// Never waited for: it outlives the agent by design.
    _process: Child,
}

#[derive(Debug, Default)]
struct Slots {
    free: Vec<u64>,
    used: u64,
}

/// A place in the file.
#[derive(Debug)]
pub struct Slot(u64);

impl Warden {
    /// Starts the warden from `program`, the agent's own.
    ///
    /// # Errors
    /// Of the system.
    pub fn start(program: &Path) -> io::Result<Self> {
        let groups = File::from(rustix::fs::memfd_create("bonepile-groups", MemfdFlags::CLOEXEC)?);
        let (breaks, leash) = io::pipe()?;
        let process = Command::new(program)
            .arg(SUBCOMMAND)
            .stdin(breaks)
            .stdout(groups.try_clone()?)
            .stderr(Stdio::inherit())
            // What a terminal sends to the agent is not for the warden.
            .process_group(0)
            .spawn()?;
        Ok(Self { groups, slots: Mutex::default(), _leash: leash, _process: process })
    }

    /// A program's group is to end with the agent.
    ///
    /// # Errors
    /// Of the system, where there is no memory for the file.
    pub fn guard(&self, group: u32) -> io::Result<Slot> {
        let slot = {
            let mut slots = self.slots();
            slots.free.pop().unwrap_or_else(|| {
                slots.used += 1;
                slots.used - 1
            })
        };
        self.groups.write_all_at(&group.to_le_bytes(), slot * SLOT_BYTES)?;
        Ok(Slot(slot))
    }

    /// A program's group has ended.
    pub fn release(&self, Slot(slot): Slot) {
        // A slot that cannot be cleared is not used again; its group is gone, so there is nobody to end.
        if self.groups.write_all_at(&[0; SLOT_BYTES as usize], slot * SLOT_BYTES).is_ok() {
            self.slots().free.push(slot);
        }
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The warden itself: waits for the pipe on its standard input to break, then ends the groups in the file that is its
/// standard output.
///
/// # Errors
/// If it was not started by an agent.
pub fn watch() -> io::Result<()> {
    io::stdin().read_to_end(&mut Vec::new())?;
    let groups: OwnedFd = io::stdout().as_fd().try_clone_to_owned()?;
    end_groups(&File::from(groups))
}

fn end_groups(groups: &File) -> io::Result<()> {
    let mut slot = [0; SLOT_BYTES as usize];
    for index in 0..groups.metadata()?.len() / SLOT_BYTES {
        groups.read_exact_at(&mut slot, index * SLOT_BYTES)?;
        kill_group(u32::from_le_bytes(slot));
    }
    Ok(())
}

fn kill_group(group: u32) {
    // Group 1 is the system's, and 0 a free slot.
    if let Some(group) = i32::try_from(group).ok().filter(|group| *group > 1).and_then(Pid::from_raw) {
        // One that is gone need not be told.
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
}

/// Ends programs that an earlier agent left behind: whoever works below `work` that this process has not started.
pub fn end_leftovers(work: &Path) {
    let (Ok(work), Ok(processes)) = (std::fs::canonicalize(work), std::fs::read_dir("/proc")) else { return };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // Processes of others do not tell where they work.
        let works_here = std::fs::read_link(process.path().join("cwd")).is_ok_and(|place| place.starts_with(&work));
        if let Some(pid) = Pid::from_raw(pid)
            && works_here
        {
            tracing::warn!(pid = pid.as_raw_nonzero().get(), "ending a program that an earlier agent left behind");
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_groups_in_the_file_are_ended() {
        let groups = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        let mut child = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
        groups.write_all_at(&0u32.to_le_bytes(), 0).unwrap();
        groups.write_all_at(&child.id().to_le_bytes(), SLOT_BYTES).unwrap();
        end_groups(&groups).unwrap();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn a_program_left_behind_is_found_by_where_it_works() {
        let work = tempfile::tempdir().unwrap();
        let seat = work.path().join("r1.0-f1-main");
        std::fs::create_dir(&seat).unwrap();
        let mut child = Command::new("sleep").arg("1000").current_dir(&seat).spawn().unwrap();
        end_leftovers(work.path());
        assert!(!child.wait().unwrap().success());
    }
}
