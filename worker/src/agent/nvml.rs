//! NVIDIA GPUs through the driver's own library, loaded at run time: no driver, no GPUs, no error.
//!
//! Every reading may be missing: old cards and old drivers support only some. Calls may block when a card is sick; they
//! belong on the inventory's thread.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use protocol::hardware::{ComputeCapability, Telemetry};
use protocol::ids::DeviceId;

/// Environment variable that names another library than the driver's, for tests.
pub const LIBRARY_VARIABLE: &str = "BONEPILE_NVML";

/// The driver's library.
#[derive(Debug)]
pub struct Gpus {
    nvml: Nvml,
}

/// What a GPU says of itself; `None` where it or the driver does not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuFacts {
    /// Its UUID; `gpu-<index>` for one that has none.
    pub id: DeviceId,
    /// Product name.
    pub name: Option<String>,
    /// All memory, bytes.
    pub memory_total_bytes: Option<u64>,
    /// What its kernels must be built for.
    pub compute_capability: Option<ComputeCapability>,
    /// The driver's error, if it did not answer at all.
    pub sick: Option<String>,
}

impl Gpus {
    /// Loads the library; the error is only of interest to `doctor`.
    ///
    /// # Errors
    /// If there is no library or no driver.
    pub fn load() -> Result<Self, NvmlError> {
        let path: Option<OsString> = std::env::var_os(LIBRARY_VARIABLE);
        Self::load_from(path.as_deref())
    }

    /// Loads the library at `path`, or the driver's.
    ///
    /// # Errors
    /// If there is no library or no driver.
    pub fn load_from(path: Option<&std::ffi::OsStr>) -> Result<Self, NvmlError> {
        let mut builder = Nvml::builder();
        if let Some(path) = path {
            builder.lib_path(path);
        }
        Ok(Self { nvml: builder.init()? })
    }

    /// The driver's version, if it says.
    pub fn driver(&self) -> Option<String> {
        self.nvml.sys_driver_version().ok()
    }

    /// Every GPU, in the driver's order.
    pub fn facts(&self) -> Vec<GpuFacts> {
        let count = self.nvml.device_count().unwrap_or_default();
        (0..count).map(|index| self.fact(index)).collect()
    }

    fn fact(&self, index: u32) -> GpuFacts {
        let unknown = DeviceId(format!("gpu-{index}"));
        let device = match self.nvml.device_by_index(index) {
            Ok(device) => device,
            Err(error) => {
                let sick = Some(error.to_string());
                return GpuFacts { id: unknown, name: None, memory_total_bytes: None, compute_capability: None, sick };
            }
        };
        GpuFacts {
            id: device.uuid().map_or(unknown, DeviceId),
            name: device.name().ok(),
            memory_total_bytes: device.memory_info().ok().map(|memory| memory.total),
            compute_capability: device.cuda_compute_capability().ok().and_then(|capability| {
                let (major, minor) = (capability.major.try_into().ok()?, capability.minor.try_into().ok()?);
                Some(ComputeCapability { major, minor })
            }),
            sick: None,
        }
    }

    /// How a GPU is now, and what each of `ours`, its executors' and programs' processes, holds of its memory, bytes. What a
    /// process started counts as its own if it is in its group.
    pub fn telemetry(&self, id: &DeviceId, ours: &BTreeSet<u32>) -> (Telemetry, BTreeMap<u32, u64>) {
        let mut held = BTreeMap::new();
        let mut telemetry = Telemetry {
            device: id.clone(),
            memory_free_bytes: 0,
            memory_ours_bytes: 0,
            utilisation_percent: None,
            temperature_celsius: None,
            power_milliwatts: None,
            sick: None,
        };
        let device = match self.nvml.device_by_uuid(id.0.as_str()) {
            Ok(device) => device,
            Err(error) => {
                telemetry.sick = Some(error.to_string());
                return (telemetry, held);
            }
        };
        match device.memory_info() {
            Ok(memory) => telemetry.memory_free_bytes = memory.free,
            Err(error) => telemetry.sick = Some(error.to_string()),
        }
        for process in device.running_compute_processes().unwrap_or_default() {
            let UsedGpuMemory::Used(bytes) = process.used_gpu_memory else { continue };
            let of_ours =
                [Some(process.pid), group_of(process.pid)].into_iter().flatten().find(|pid| ours.contains(pid));
            if let Some(pid) = of_ours {
                *held.entry(pid).or_default() += bytes;
            }
        }
        telemetry.memory_ours_bytes = held.values().sum();
        telemetry.utilisation_percent = device.utilization_rates().ok().map(|rates| rates.gpu);
        telemetry.temperature_celsius = device.temperature(TemperatureSensor::Gpu).ok();
        telemetry.power_milliwatts = device.power_usage().ok().map(u64::from);
        (telemetry, held)
    }
}

/// The group of a process, which has the number of the process that heads it.
fn group_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it, in parentheses, may hold anything; then come state, parent and group.
    stat.rsplit_once(") ")?.1.split(' ').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use super::*;

    /// A driver's library with one card that knows everything and one old card that knows little.
    const STUB: &str = r#"
        #include <string.h>
        typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2;
        typedef struct { unsigned int gpu, memory; } rates;
        typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } process;
        static int cards[2];
        static int index_of(void *device) { return (int)((int *)device - cards); }
        int nvmlInit_v2(void) { return 0; }
        int nvmlShutdown(void) { return 0; }
        int nvmlSystemGetDriverVersion(char *text, unsigned int length) { strncpy(text, "470.256.02", length); return 0; }
        int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return 0; }
        int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
            if (index > 1) return 15; /* lost */
            *device = &cards[index]; return 0;
        }
        int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
            if (strcmp(uuid, "GPU-full") == 0) { *device = &cards[0]; return 0; }
            if (strcmp(uuid, "GPU-bare") == 0) { *device = &cards[1]; return 0; }
            return 6; /* not found */
        }
        int nvmlDeviceGetUUID(void *device, char *text, unsigned int length) {
            strncpy(text, index_of(device) ? "GPU-bare" : "GPU-full", length); return 0;
        }
        int nvmlDeviceGetName(void *device, char *text, unsigned int length) {
            if (index_of(device)) return 3; /* not supported */
            strncpy(text, "NVIDIA GeForce GTX 1080", length); return 0;
        }
        int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
            if (index_of(device)) return 3;
            *major = 6; *minor = 1; return 0;
        }
        int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory) {
            if (index_of(device)) return 3;
            memory->total = 8589934592ULL; memory->free = 8000000000ULL; memory->used = 589934592ULL; return 0;
        }
        int nvmlDeviceGetUtilizationRates(void *device, rates *out) {
            if (index_of(device)) return 3;
            out->gpu = 37; out->memory = 5; return 0;
        }
        int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *out) {
            if (index_of(device) || sensor != 0) return 3;
            *out = 61; return 0;
        }
        int nvmlDeviceGetPowerUsage(void *device, unsigned int *out) {
            if (index_of(device)) return 3;
            *out = 151000; return 0;
        }
        int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, process *out) {
            if (index_of(device)) return 3;
            if (*count < 2) { *count = 2; return 7; /* insufficient size */ }
            *count = 2;
            out[0].pid = 42; out[0].used = 1000; out[1].pid = 43; out[1].used = 500;
            return 0;
        }
    "#;

    fn stub() -> Option<(tempfile::TempDir, PathBuf)> {
        let directory = tempfile::tempdir().unwrap();
        let (source, library) = (directory.path().join("nvml.c"), directory.path().join("libnvidia-ml.so.1"));
        std::fs::write(&source, STUB).unwrap();
        let built = Command::new("cc").args(["-shared", "-fPIC", "-w", "-o"]).arg(&library).arg(&source).status();
        match built {
            Ok(status) => {
                assert!(status.success(), "the stub does not compile");
                Some((directory, library))
            }
            Err(_) => {
                eprintln!("skipped: no C compiler");
                None
            }
        }
    }

    #[test]
    fn readings_are_mapped_and_may_be_missing() {
        let Some((_directory, library)) = stub() else { return };
        let gpus = Gpus::load_from(Some(library.as_os_str())).unwrap();
        assert_eq!(gpus.driver().as_deref(), Some("470.256.02"));
        let facts = gpus.facts();
        assert_eq!(facts.len(), 3);
        assert_eq!(
            facts[0],
            GpuFacts {
                id: DeviceId("GPU-full".into()),
                name: Some("NVIDIA GeForce GTX 1080".into()),
                memory_total_bytes: Some(8 << 30),
                compute_capability: Some(ComputeCapability { major: 6, minor: 1 }),
                sick: None,
            }
        );
        assert_eq!(
            (facts[1].name.clone(), facts[1].memory_total_bytes, facts[1].compute_capability),
            (None, None, None)
        );
        assert!(facts[2].sick.is_some());

        let (full, held) = gpus.telemetry(&facts[0].id, &BTreeSet::from([42]));
        assert_eq!((full.memory_free_bytes, full.memory_ours_bytes), (8_000_000_000, 1000));
        assert_eq!(held, BTreeMap::from([(42, 1000)]));
        assert_eq!(
            (full.utilisation_percent, full.temperature_celsius, full.power_milliwatts, full.sick),
            (Some(37), Some(61), Some(151_000), None)
        );
        let (bare, _) = gpus.telemetry(&facts[1].id, &BTreeSet::new());
        assert_eq!((bare.utilisation_percent, bare.temperature_celsius, bare.power_milliwatts), (None, None, None));
        assert!(bare.sick.is_some(), "a card that does not tell its memory is sick");
        assert!(gpus.telemetry(&DeviceId("GPU-gone".into()), &BTreeSet::new()).0.sick.is_some());
    }

    #[test]
    fn no_library_is_an_error_to_tell_and_nothing_else() {
        assert!(Gpus::load_from(Some("/nonexistent/libnvidia-ml.so".as_ref())).is_err());
    }
}
