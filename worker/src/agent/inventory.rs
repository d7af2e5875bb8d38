//! The devices of this box, what the operator lends of them, and how they are.
//!
//! One plain thread does all the asking, as a sick card may block who asks it; others see its last answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use protocol::hardware::{ComputeCapability, Device, DeviceKind, Speed, Telemetry};
use protocol::ids::DeviceId;
use protocol::limits::GPU_RESERVE_BYTES;
use protocol::size::ByteSize;
use sysinfo::{MemoryRefreshKind, Pid, ProcessRefreshKind, ProcessesToUpdate, System};
use tokio::sync::watch;

use super::nvml::{GpuFacts, Gpus};
use super::question::{self, answer};
use super::supervisor::{ExecutorBuild, Pids, cuda_program};
use crate::support::BuildSupport;

/// Id of the processor as a device.
pub const CPU: &str = "cpu";
/// Share of a box's memory that is lent unless the operator says otherwise, percent: the rest is the operator's.
const CPU_SHARE_PERCENT: u64 = 75;

/// How long an executor may take to say what it supports, or to measure for a second: loading CUDA's libraries from a slow
/// disk takes seconds.
const ANSWER: Duration = Duration::from_secs(20);

/// What the operator lends: `4GB` of the processor's memory, or `GPU-…=6GB`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Of which device.
    pub device: DeviceId,
    /// How much, bytes.
    pub bytes: u64,
}

impl FromStr for MemoryBudget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (device, size) = text.split_once('=').unwrap_or((CPU, text));
        if device.is_empty() {
            return Err(format!("`{text}` names no device; write SIZE, or DEVICE=SIZE"));
        }
        Ok(Self { device: DeviceId(device.to_owned()), bytes: size.parse::<ByteSize>()?.0 })
    }
}

/// What the operator set.
#[derive(Debug, Clone)]
pub struct InventoryConfig {
    /// Budgets; at most one a device counts, the last.
    pub budgets: Vec<MemoryBudget>,
    /// Compute threads on the processor; `None`: all it has.
    pub threads: Option<u32>,
    /// The executor for processors; those for GPUs lie beside it.
    pub executor: PathBuf,
    /// Measure what each device does, about a second each.
    pub measure: bool,
}

/// What was found.
#[derive(Debug)]
pub struct Inventory {
    /// Every device, the processor first.
    pub devices: Vec<Device>,
    /// How to start an executor on each usable one.
    pub builds: BTreeMap<DeviceId, ExecutorBuild>,
}

/// Looks at the box once.
pub fn take(config: &InventoryConfig) -> Inventory {
    let gpus = match Gpus::load() {
        Ok(gpus) => gpus.facts(),
        Err(error) => {
            tracing::debug!("no NVIDIA driver: {error}");
            Vec::new()
        }
    };
    let mut inventory = Inventory { devices: Vec::new(), builds: BTreeMap::new() };
    let threads = config.threads.unwrap_or_else(all_threads).max(1);
    let devices = std::iter::once(processor(config, threads)).chain(gpus.iter().map(|gpu| graphics_card(config, gpu)));
    for (mut device, program) in devices {
        if device.unusable.is_none() {
            let environment = match device.kind {
                DeviceKind::Cpu => Vec::new(),
                DeviceKind::Cuda => vec![("CUDA_VISIBLE_DEVICES".to_owned(), device.id.0.clone())],
            };
            let build = ExecutorBuild { program, threads: device.threads, environment };
            if config.measure {
                device.speed = speed(&device.id, &build);
            }
            inventory.builds.insert(device.id.clone(), build);
        }
        inventory.devices.push(device);
    }
    inventory
}

fn all_threads() -> u32 {
    std::thread::available_parallelism().map_or(1, |threads| u32::try_from(threads.get()).unwrap_or(u32::MAX))
}

fn processor(config: &InventoryConfig, threads: u32) -> (Device, PathBuf) {
    let (mut total, mut model, mut silent) = (0, None, None);
    match System::new() {
        Ok(mut system) => {
            system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
            system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
            total = memory(&system).0;
            model = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).filter(|brand| !brand.is_empty());
        }
        Err(error) => silent = Some(format!("the system does not tell its memory: {error}")),
    }
    let missing = || missing(&config.executor).map(|why| format!("no executor for processors: {why}"));
    let device = Device {
        id: DeviceId(CPU.to_owned()),
        kind: DeviceKind::Cpu,
        model: model.unwrap_or_else(System::cpu_arch),
        compute_capability: None,
        memory_total_bytes: total,
        memory_budget_bytes: budget(config, CPU, total / 100 * CPU_SHARE_PERCENT).min(total),
        threads,
        unusable: silent.or_else(missing),
        speed: None,
    };
    (device, config.executor.clone())
}

fn graphics_card(config: &InventoryConfig, gpu: &GpuFacts) -> (Device, PathBuf) {
    let total = gpu.memory_total_bytes.unwrap_or(0);
    let program = gpu.compute_capability.map(|capability| build_for(&config.executor, capability));
    let unusable = match (&gpu.sick, gpu.memory_total_bytes, gpu.compute_capability, &program) {
        (Some(sick), ..) => Some(format!("the driver cannot use it: {sick}")),
        (None, None, ..) => Some("the driver does not tell its memory".to_owned()),
        (None, Some(_), Some(capability), Some(program)) => missing(program)
            .map(|why| format!("no executor build for compute capability {capability}: {why}"))
            .or_else(|| refusal(program, capability)),
        (None, Some(_), ..) => Some("the driver does not tell its compute capability".to_owned()),
    };
    let device = Device {
        id: gpu.id.clone(),
        kind: DeviceKind::Cuda,
        model: gpu.name.clone().unwrap_or_else(|| "NVIDIA GPU".to_owned()),
        compute_capability: gpu.compute_capability,
        memory_total_bytes: total,
        memory_budget_bytes: budget(config, &gpu.id.0, total.saturating_sub(GPU_RESERVE_BYTES)).min(total),
        // The card computes; its executor feeds it.
        threads: 1,
        unusable,
        speed: None,
    };
    (device, program.unwrap_or_else(|| config.executor.clone()))
}

fn budget(config: &InventoryConfig, device: &str, default: u64) -> u64 {
    config.budgets.iter().rev().find(|budget| budget.device.0 == device).map_or(default, |budget| budget.bytes)
}

fn missing(program: &Path) -> Option<String> {
    (!program.is_file()).then(|| format!("{} is not there", program.display()))
}

/// The build for a card, or of those for older ones of its generation the newest, if one is there; some run on it.
fn build_for(executor: &Path, card: ComputeCapability) -> PathBuf {
    let named = |minor| cuda_program(executor, card.major, minor);
    (0..=card.minor).rev().map(named).find(|program| program.is_file()).unwrap_or_else(|| named(card.minor))
}

/// Why a build cannot compute on a card: it does not start, or has no kernels for it.
fn refusal(program: &Path, card: ComputeCapability) -> Option<String> {
    match support(program) {
        Ok(support) => {
            tracing::debug!(program = %program.display(), %support, "an executor build for cards");
            support.refuses(card)
        }
        Err(why) => Some(format!("{} does not say what it supports: {why}", program.display())),
    }
}

/// What an executor says it can compute on.
fn support(program: &Path) -> Result<BuildSupport, String> {
    let said = answer(program, ["support", "--json"], ANSWER)?;
    serde_json::from_slice(&said).map_err(|error| error.to_string())
}

/// What an executor measures; a device whose executor cannot is lent all the same.
fn speed(device: &DeviceId, build: &ExecutorBuild) -> Option<Speed> {
    let mut command = Command::new(&build.program);
    let environment = build.environment.iter().map(|(name, value)| (name, value));
    command.envs(environment).args(["--threads", &build.threads.to_string(), "measure", "--json"]);
    let measured = question::run(&mut command, ANSWER)
        .and_then(|said| serde_json::from_slice(&said).map_err(|error| error.to_string()));
    if let Err(why) = &measured {
        tracing::warn!(%device, "the device was not measured: {why}");
    }
    measured.ok()
}

/// Total and free memory of the box, or of the control group that this process is confined to.
fn memory(system: &System) -> (u64, u64) {
    let (total, free) = (system.total_memory(), system.available_memory());
    match system.cgroup_limits() {
        Some(limits) if limits.total_memory > 0 => (total.min(limits.total_memory), free.min(limits.free_memory)),
        _ => (total, free),
    }
}

/// Asks every `every` how the devices are; the last answers are in the channel. The thread ends when nobody looks.
///
/// # Errors
/// If the system has no thread left.
pub fn watch_devices(
    devices: Vec<Device>,
    pids: Pids,
    every: Duration,
) -> std::io::Result<watch::Receiver<Vec<Telemetry>>> {
    let (answers, seen) = watch::channel(Vec::new());
    std::thread::Builder::new().name("telemetry".to_owned()).spawn(move || {
        let gpus = Gpus::load().ok();
        let mut system = System::new().ok();
        while !answers.is_closed() {
            let telemetry = devices.iter().map(|device| match device.kind {
                DeviceKind::Cpu => match &mut system {
                    Some(system) => processor_now(system, device, &pids),
                    None => silent(device),
                },
                DeviceKind::Cuda => match &gpus {
                    Some(gpus) => {
                        let (telemetry, held) = gpus.telemetry(&device.id, &pids.of(&device.id));
                        pids.note_memory(&held);
                        telemetry
                    }
                    None => silent(device),
                },
            });
            answers.send_replace(telemetry.collect());
            std::thread::sleep(every);
        }
    })?;
    Ok(seen)
}

fn processor_now(system: &mut System, device: &Device, pids: &Pids) -> Telemetry {
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    system.refresh_cpu_usage();
    let ours: Vec<Pid> = pids.of(&device.id).into_iter().map(Pid::from_u32).collect();
    let what = ProcessRefreshKind::nothing().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&ours), true, what);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 100")]
    let busy = system.global_cpu_usage().clamp(0.0, 100.0) as u32;
    Telemetry {
        device: device.id.clone(),
        memory_free_bytes: memory(system).1,
        memory_ours_bytes: ours.iter().filter_map(|pid| system.process(*pid)).map(sysinfo::Process::memory).sum(),
        utilisation_percent: Some(busy),
        temperature_celsius: None,
        power_milliwatts: None,
        sick: None,
    }
}

fn silent(device: &Device) -> Telemetry {
    Telemetry {
        device: device.id.clone(),
        memory_free_bytes: 0,
        memory_ours_bytes: 0,
        utilisation_percent: None,
        temperature_celsius: None,
        power_milliwatts: None,
        sick: Some("the system does not answer".to_owned()),
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    fn config(executor: &Path, budgets: &[&str]) -> InventoryConfig {
        let budgets = budgets.iter().map(|text| text.parse().unwrap()).collect();
        InventoryConfig { budgets, threads: Some(3), executor: executor.to_owned(), measure: false }
    }

    fn gpu(capability: Option<(u16, u16)>) -> GpuFacts {
        GpuFacts {
            id: DeviceId("GPU-1".into()),
            name: Some("GTX 1080".into()),
            memory_total_bytes: Some(8_000_000_000),
            compute_capability: capability.map(|(major, minor)| ComputeCapability { major, minor }),
            sick: None,
        }
    }

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("4GB", 4_000_000_000),
            ("1.5GiB", 1_610_612_736),
            ("512 MB", 512_000_000),
            ("1000", 1000),
            ("2g", 2_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "GB", "4TB", "-1GB", "1..5GB", "four"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        let budget: MemoryBudget = "GPU-1=6GB".parse().unwrap();
        assert_eq!((budget.device.0.as_str(), budget.bytes), ("GPU-1", 6_000_000_000));
        assert_eq!("4GB".parse::<MemoryBudget>().unwrap().device.0, CPU);
        assert!("=4GB".parse::<MemoryBudget>().is_err());
    }

    #[test]
    fn the_processor_is_lent_within_its_memory() {
        let directory = tempfile::tempdir().unwrap();
        let executor = directory.path().join("bonepile-executor");
        std::fs::write(&executor, "").unwrap();
        let (device, _) = processor(&config(&executor, &["64MB"]), 3);
        assert_eq!((device.memory_budget_bytes, device.threads, device.unusable), (64_000_000, 3, None));
        assert!(device.memory_total_bytes > 64_000_000 && !device.model.is_empty());
        let (greedy, _) = processor(&config(&executor, &["1000000GB"]), 3);
        assert_eq!(greedy.memory_budget_bytes, greedy.memory_total_bytes);
        let (bare, _) = processor(&config(&directory.path().join("none"), &[]), 3);
        assert!(bare.unusable.unwrap().contains("none is not there"));
    }

    #[test]
    fn a_card_without_a_build_for_it_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let executor = directory.path().join("bonepile-executor");
        let (device, _) = graphics_card(&config(&executor, &["GPU-1=6GB"]), &gpu(Some((6, 1))));
        let why = device.unusable.unwrap();
        assert!(why.starts_with("no executor build for compute capability 6.1: "), "{why}");
        assert_eq!(device.memory_budget_bytes, 6_000_000_000);
        let unusable = |script: &str, card| {
            use std::os::unix::fs::PermissionsExt;
            let program = directory.path().join("bonepile-executor-cuda-61");
            // Renamed into its place: a program that is open for writing anywhere cannot be started.
            std::fs::write(directory.path().join("new"), format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(directory.path().join("new"), PermissionsExt::from_mode(0o755)).unwrap();
            std::fs::rename(directory.path().join("new"), &program).unwrap();
            let (device, found) = graphics_card(&config(&executor, &[]), &gpu(Some(card)));
            assert_eq!((found, device.memory_budget_bytes), (program, 8_000_000_000 - GPU_RESERVE_BYTES));
            device.unusable
        };
        let built_for = |capability| {
            let support = BuildSupport::of("b", capability);
            format!("echo '{}'", serde_json::to_string(&support).unwrap())
        };
        let sm = |major, minor| ComputeCapability { major, minor };
        assert_eq!(unusable(&built_for(Some(sm(6, 1))), (6, 1)), None);
        assert_eq!(unusable(&built_for(Some(sm(6, 1))), (6, 2)), None);
        let no_kernel = "no kernel for this card: its compute capability is 6.1, this executor build";
        let wrong = unusable(&built_for(Some(sm(7, 5))), (6, 1)).unwrap();
        assert_eq!(wrong, format!("{no_kernel}'s kernels are for 7.5"));
        let none = unusable(&built_for(None), (6, 1)).unwrap();
        assert_eq!(none, format!("{no_kernel} has kernels for processors only"));
        let broken = unusable("echo libcublas.so.12: not found >&2; exit 127", (6, 1)).unwrap();
        assert!(broken.ends_with("exit status: 127: libcublas.so.12: not found"), "{broken}");
        assert!(unusable("echo cuda", (6, 1)).unwrap().contains("does not say what it supports"));
        assert!(graphics_card(&config(&executor, &[]), &gpu(None)).0.unusable.is_some());
    }
}
