//! `measure`: what this build's device does with f32 products and with its memory, in about a second.
//!
//! A figure to tell devices apart, not a benchmark: the scheduler starts from it until it has seen real work.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use protocol::hardware::{DeviceKind, Speed};

use crate::support::BuildSupport;

/// Time spent on each of the two.
const EACH: Duration = Duration::from_millis(400);
/// Sides of the matrices: large enough to be bound by arithmetic, small enough that a slow processor does several.
const PROCESSOR_SIDE: usize = 512;
const CARD_SIDE: usize = 4096;
/// Memory read by each thread, more than its share of any cache, and by all of them at most.
const THREAD_BYTES_MAX: usize = 64 << 20;
const PROCESSOR_BYTES_MAX: usize = 1 << 30;
/// Memory touched on a card: more than any cache, less than any card.
const CARD_BYTES: usize = 256 << 20;

/// Measures on `threads` threads of the processor, or on the card that this build is for.
///
/// # Errors
/// Of the device.
pub fn measure(threads: usize) -> candle_core::Result<Speed> {
    match BuildSupport::this().backend {
        DeviceKind::Cpu => processor(threads),
        DeviceKind::Cuda => card(&Device::new_cuda(0)?),
    }
}

fn processor(threads: usize) -> candle_core::Result<Speed> {
    // candle multiplies on the thread that calls it, so every thread has matrices of its own.
    let operations: f64 = on_threads(threads, || {
        let side = (PROCESSOR_SIDE, PROCESSOR_SIDE);
        let (a, b) = (Tensor::rand(-1f32, 1.0, side, &Device::Cpu)?, Tensor::rand(-1f32, 1.0, side, &Device::Cpu)?);
        per_second(product_operations(PROCESSOR_SIDE), || a.matmul(&b).map(drop))
    })?;
    let each = THREAD_BYTES_MAX.min(PROCESSOR_BYTES_MAX / threads.max(1));
    let bytes = on_threads(threads, || {
        let words = vec![1u64; each / size_of::<u64>()];
        per_second(each as f64, || {
            black_box(words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)));
            Ok(())
        })
    })?;
    Ok(speed(operations, bytes))
}

fn card(device: &Device) -> candle_core::Result<Speed> {
    let side = (CARD_SIDE, CARD_SIDE);
    let (a, b) = (Tensor::rand(-1f32, 1.0, side, device)?, Tensor::rand(-1f32, 1.0, side, device)?);
    let operations = per_second(product_operations(CARD_SIDE), || {
        a.matmul(&b)?;
        device.synchronize()
    })?;
    let values = Tensor::zeros(CARD_BYTES / DType::F32.size_in_bytes(), DType::F32, device)?;
    // Each is read once and written once.
    let bytes = per_second(2.0 * CARD_BYTES as f64, || {
        values.affine(1.0, 1.0)?;
        device.synchronize()
    })?;
    Ok(speed(operations, bytes))
}

/// The sum of what `work` comes to on each of `threads` threads at once.
fn on_threads(threads: usize, work: impl Fn() -> candle_core::Result<f64> + Sync) -> candle_core::Result<f64> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(&work)).collect();
        running.into_iter().map(|thread| thread.join().expect("measuring does not panic")).sum()
    })
}

/// How many `units` a second `step` does if one call does `units`; its first call only warms up.
fn per_second(units: f64, mut step: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<f64> {
    step()?;
    let begun = Instant::now();
    let mut steps = 0u32;
    while begun.elapsed() < EACH {
        step()?;
        steps += 1;
    }
    Ok(units * f64::from(steps) / begun.elapsed().as_secs_f64())
}

fn product_operations(side: usize) -> f64 {
    2.0 * (side as f64).powi(3)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "rates are positive and far below 2^63")]
fn speed(operations: f64, bytes: f64) -> Speed {
    Speed { f32_mflops: (operations / 1e6) as u64, memory_bytes_per_second: bytes as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_does_something() {
        let speed = processor(2).unwrap();
        assert!(speed.f32_mflops > 0 && speed.memory_bytes_per_second > 0);
    }
}
