//! Memory of this process as the kernel counts it. Linux only; elsewhere the answer is 0: not known.

/// Most resident memory so far, bytes (`VmHWM`).
pub fn peak_bytes() -> u64 {
    status_kib("VmHWM:") * 1024
}

/// Resident memory now, bytes (`VmRSS`).
pub fn resident_bytes() -> u64 {
    status_kib("VmRSS:") * 1024
}

fn status_kib(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg(target_os = "linux")]
    fn touched_memory_shows() {
        let before = super::peak_bytes();
        let block = vec![1u8; 256 << 20];
        assert!(std::hint::black_box(&block).iter().all(|byte| *byte == 1));
        assert!(super::peak_bytes() >= before.max(256 << 20), "256 MiB were touched");
        assert!(super::resident_bytes() <= super::peak_bytes());
    }
}
