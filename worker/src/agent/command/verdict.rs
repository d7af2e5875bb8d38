//! How a program failed: its exit code, told apart from what the device or the box did to it.
//!
//! Programs say what happened to them in words: the texts here are those of CUDA's runtime, of PyTorch, of Python and of
//! llama.cpp. Only a program that failed is read, and only its last words.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use protocol::control::{Failure, FailureKind};

/// Bytes of a program's last words in its failure: with what is said around them they fit what travels.
const WORDS_BYTES_MAX: usize = 3000;
/// Lines of them.
const WORDS_LINES_MAX: usize = 30;
/// What a shell makes of a child that was killed.
const KILLED_IN_SHELL: i32 = 128 + 9;

const OUT_OF_MEMORY: [&str; 10] = [
    "CUDA out of memory",
    "torch.OutOfMemoryError",
    "torch.cuda.OutOfMemoryError",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "cudaErrorMemoryAllocation",
    "cudaMalloc failed: out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MemoryError",
    "std::bad_alloc",
];
const NO_KERNEL: [&str; 3] =
    ["no kernel image is available", "CUDA_ERROR_NO_BINARY_FOR_GPU", "cudaErrorNoKernelImageForDevice"];
const DEVICE_SICK: [&str; 6] = [
    "uncorrectable ECC",
    "CUDA_ERROR_ECC_UNCORRECTABLE",
    "GPU is lost",
    "fallen off the bus",
    "CUDA_ERROR_DEVICE_UNAVAILABLE",
    "Unable to determine the device handle for",
];

/// Why a program was ended by its runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    /// The coordinator asked for it.
    Cancel,
    /// It took longer than it may, milliseconds.
    Timeout(u64),
}

/// What became of a program; `None`: it did what it was asked to.
///
/// `tail` are its last words; `kernel_short`, asked only if it matters, says that the kernel killed something for lack of
/// memory while it ran.
pub fn failure(
    status: ExitStatus,
    ended_by: Option<EndedBy>,
    tail: &[u8],
    kernel_short: impl FnOnce() -> bool,
) -> Option<Failure> {
    match ended_by {
        Some(EndedBy::Cancel) => return Some(Failure::new(FailureKind::Cancelled, "the program was stopped")),
        Some(EndedBy::Timeout(ms)) => {
            let message = format!("the program took longer than {} s and was ended", ms as f64 / 1e3);
            let failure = Failure::new(FailureKind::TimedOut, with_words(message, tail));
            return Some(failure.hint("`timeout_s` of the sweep says how long it may take"));
        }
        None if status.success() => return None,
        None => {}
    }
    let killed = status.signal() == Some(libc::SIGKILL) || status.code() == Some(KILLED_IN_SHELL);
    if killed && kernel_short() {
        let message = with_words("the kernel killed the program: the box had no memory left".to_owned(), tail);
        return Some(Failure::new(FailureKind::OutOfMemory, message).hint("declare more `memory` in the sweep"));
    }
    Some(from_words(describe(status), tail))
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("the program ended with exit code {code}"),
        (None, Some(signal)) => format!("the program was killed by {}", signal_name(signal)),
        (None, None) => "the program ended, nobody knows how".to_owned(),
    }
}

/// What its last words say of the device.
fn from_words(message: String, tail: &[u8]) -> Failure {
    let words = String::from_utf8_lossy(tail);
    let says = |texts: &[&str]| texts.iter().any(|text| words.contains(text));
    let (kind, hint) = if says(&DEVICE_SICK) {
        (FailureKind::DeviceSick, "the card needs its operator: `nvidia-smi -q`, `dmesg`")
    } else if says(&NO_KERNEL) {
        (FailureKind::NoKernel, "the program was not built for this card's compute capability")
    } else if says(&OUT_OF_MEMORY) {
        (FailureKind::OutOfMemory, "declare more `memory` in the sweep, or let the program take less")
    } else {
        (FailureKind::CommandFailed, "")
    };
    Failure::new(kind, with_words(message, tail)).hint(hint)
}

/// `message` with the program's last lines.
fn with_words(message: String, tail: &[u8]) -> String {
    let words = String::from_utf8_lossy(&tail[tail.len().saturating_sub(WORDS_BYTES_MAX)..]);
    let lines: Vec<_> = words.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    match lines.as_slice() {
        [] => message,
        lines => {
            format!("{message}; its last words:\n{}", lines[lines.len().saturating_sub(WORDS_LINES_MAX)..].join("\n"))
        }
    }
}

fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        _ => return format!("signal {signal}"),
    };
    name.to_owned()
}

/// How often the kernel has killed a process for lack of memory, in this control group or else on the box; `None` if it does
/// not say.
pub fn kernel_kills() -> Option<u64> {
    let count = |text: String| {
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")).and_then(|count| count.trim().parse().ok())
    };
    let group = || {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
        std::fs::read_to_string(format!("/sys/fs/cgroup{path}/memory.events")).ok().and_then(count)
    };
    group().or_else(|| std::fs::read_to_string("/proc/vmstat").ok().and_then(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    fn killed(signal: i32) -> ExitStatus {
        ExitStatus::from_raw(signal)
    }

    #[test]
    fn words_tell_a_full_device_from_a_failed_program() {
        for (words, kind) in [
            ("RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB", FailureKind::OutOfMemory),
            ("torch.OutOfMemoryError: CUDA out of memory.", FailureKind::OutOfMemory),
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", FailureKind::OutOfMemory),
            ("ggml_cuda: cudaMalloc failed: out of memory", FailureKind::OutOfMemory),
            ("Traceback (most recent call last):\n  x = [0] * 10**12\nMemoryError", FailureKind::OutOfMemory),
            ("CUDA error: no kernel image is available for execution on the device", FailureKind::NoKernel),
            ("RuntimeError: CUDA error: uncorrectable ECC error encountered", FailureKind::DeviceSick),
            ("Unable to determine the device handle for GPU: GPU is lost", FailureKind::DeviceSick),
            ("CUDA error: device-side assert triggered", FailureKind::CommandFailed),
            ("ValueError: lr", FailureKind::CommandFailed),
        ] {
            let failure = failure(exit(1), None, words.as_bytes(), || false).unwrap();
            assert_eq!(failure.kind, kind, "{words}");
            assert!(failure.message.starts_with("the program ended with exit code 1; its last words:\n"), "{failure}");
            assert!(failure.message.ends_with(words), "{failure}");
        }
        assert_eq!(failure(exit(0), None, b"CUDA out of memory, but caught", || true), None);
    }

    #[test]
    fn a_kill_is_out_of_memory_only_if_the_kernel_was_short() {
        for status in [killed(9), exit(137)] {
            assert_eq!(failure(status, None, b"", || true).unwrap().kind, FailureKind::OutOfMemory);
            assert_eq!(failure(status, None, b"", || false).unwrap().kind, FailureKind::CommandFailed);
        }
        assert_eq!(failure(killed(9), None, b"", || false).unwrap().message, "the program was killed by SIGKILL");
        assert_eq!(failure(killed(11), None, b"", || true).unwrap().message, "the program was killed by SIGSEGV");
    }

    #[test]
    fn a_long_farewell_is_cut_to_what_travels() {
        let words = "line of output\n".repeat(10_000);
        let failure = failure(exit(2), None, words.as_bytes(), || false).unwrap();
        assert_eq!(failure.message.lines().count(), 1 + WORDS_LINES_MAX);
        assert!(failure.message.len() < protocol::limits::WORKER_TEXT_BYTES_MAX);
    }

    #[test]
    fn what_the_runner_ended_is_told_as_that() {
        let late = failure(killed(15), Some(EndedBy::Timeout(1500)), b"step 3", || false).unwrap();
        assert_eq!(late.kind, FailureKind::TimedOut);
        assert_eq!(late.message, "the program took longer than 1.5 s and was ended; its last words:\nstep 3");
        assert_eq!(failure(exit(0), Some(EndedBy::Cancel), b"", || false).unwrap().kind, FailureKind::Cancelled);
    }
}
