//! AdamW on one flat vector, learning rates over a training, and the clipping of gradients.
//!
//! Plain loops on f32 in memory of the processor, in a fixed order: the same gradients give the same bits. A card's memory holds
//! weights and gradients only; moments stay here. Does not know what is trained.

use std::ops::Range;

use protocol::experiment::projector::Schedule;

use crate::model::team::team;

/// Numbers that a task takes.
const NUMBERS_PER_TASK: usize = 1 << 16;

/// AdamW (arXiv 1711.05101) with decay of some ranges only.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Decay of the first moment, β₁.
    pub first_decay: f32,
    /// Decay of the second moment, β₂.
    pub second_decay: f32,
    /// ε under the step.
    pub epsilon: f32,
    /// λ: each step takes `learning rate · λ` of a decayed weight.
    pub weight_decay: f32,
    decayed: Vec<Range<usize>>,
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

impl AdamW {
    /// With zero moments over `count` weights, of which `decayed` are decayed (ascending ranges).
    pub fn new(count: usize, weight_decay: f64, decayed: Vec<Range<usize>>) -> Self {
        Self {
            first_decay: 0.9,
            second_decay: 0.999,
            epsilon: 1e-8,
            weight_decay: weight_decay as f32,
            decayed,
            first: vec![0.0; count],
            second: vec![0.0; count],
            steps: 0,
        }
    }

    /// One step: w ← w (1 - η λ) - η m̂ / (√v̂ + ε), with m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ).
    ///
    /// # Panics
    /// If there is not one gradient a weight.
    pub fn step(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        assert_eq!((weights.len(), gradient.len()), (self.first.len(), self.first.len()), "one gradient a weight");
        self.steps += 1;
        let keep = (1.0 - learning_rate * f64::from(self.weight_decay)) as f32;
        if keep < 1.0 {
            for range in &self.decayed {
                team().chunks(&mut weights[range.clone()], NUMBERS_PER_TASK, |_, part| {
                    part.iter_mut().for_each(|weight| *weight *= keep);
                });
            }
        }
        let (b1, b2, epsilon) = (self.first_decay, self.second_decay, self.epsilon);
        let step = (learning_rate / (1.0 - f64::from(b1).powi(self.steps))) as f32;
        let root = (1.0 - f64::from(b2).powi(self.steps)).sqrt() as f32;
        let second = SharedParts::of(&mut self.second);
        let first = SharedParts::of(&mut self.first);
        team().chunks(weights, NUMBERS_PER_TASK, |task, weights| {
            let gradient = &gradient[task * NUMBERS_PER_TASK..][..weights.len()];
            let (mut first, mut second) = (first.part(task), second.part(task));
            for (((weight, g), m), v) in weights.iter_mut().zip(gradient).zip(first.iter_mut()).zip(second.iter_mut()) {
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *weight -= step * *m / (v.sqrt() / root + epsilon);
            }
        });
    }
}

/// Parts of a vector that tasks take by number, each once.
struct SharedParts<'a>(Vec<std::sync::Mutex<&'a mut [f32]>>);

impl<'a> SharedParts<'a> {
    fn of(values: &'a mut [f32]) -> Self {
        Self(values.chunks_mut(NUMBERS_PER_TASK).map(std::sync::Mutex::new).collect())
    }

    fn part(&self, task: usize) -> std::sync::MutexGuard<'_, &'a mut [f32]> {
        self.0[task].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Learning rates over a training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// The largest.
    pub peak: f64,
    /// Share of the steps that it takes to get there, 0–1.
    pub warmup: f64,
    /// How it goes down from there.
    pub schedule: Schedule,
    /// Steps in all.
    pub total: u64,
}

impl Rates {
    /// Of step `step`, from 0: up in a straight line over the warm-up's steps, down over the others. Beyond the last step: of it.
    pub fn at(&self, step: u64) -> f64 {
        let total = self.total.max(1) as f64;
        let (step, warm) = ((step as f64).min(total - 1.0), (self.warmup * total).floor());
        if step < warm {
            return self.peak * (step + 1.0) / warm;
        }
        let done = (step - warm) / (total - warm).max(1.0);
        self.peak
            * match self.schedule {
                Schedule::Constant => 1.0,
                Schedule::Linear => 1.0 - done,
                Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

/// Temperature of the gates at `step` of `total`: from 1 to `end` along a geometric curve, as published:
/// τ = end^min(step / total, 1).
pub fn temperature(end: f64, step: u64, total: u64) -> f64 {
    end.powf((step as f64 / total.max(1) as f64).min(1.0))
}

/// L2 norm, summed in f64 in order.
pub fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

/// Shortens a gradient to `longest`, unless that is 0; returns its norm before.
pub fn clip(gradient: &mut [f32], longest: f64) -> f64 {
    let length = norm(gradient);
    if longest > 0.0 && length > longest {
        let factor = (longest / (length + 1e-6)) as f32;
        gradient.iter_mut().for_each(|value| *value *= factor);
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, for w = 1, g = 0.5 then -0.25, η = 0.1, λ = 0.01: the first step moves by η exactly (m̂ / √v̂ = 1).
    #[test]
    fn steps_are_those_computed_by_hand() {
        let mut weights = [1.0_f32, 1.0];
        let mut adam = AdamW::new(2, 0.01, vec![0..1; 1]);
        adam.step(&mut weights, &[0.5, 0.5], 0.1);
        assert!((weights[0] - (0.999 - 0.1)).abs() < 1e-6 && (weights[1] - 0.9).abs() < 1e-6, "{weights:?}");
        adam.step(&mut weights, &[-0.25, -0.25], 0.1);
        // m = 0.9 · 0.05 - 0.1 · 0.25 = 0.02, m̂ = 0.02 / 0.19; v = 0.999 · 0.00025 + 0.001 · 0.0625, v̂ = v / 0.001999.
        let moved = 0.1 * (0.02 / 0.19) / (0.000_312_25_f64 / 0.001_999).sqrt();
        assert!((f64::from(weights[1]) - (0.9 - moved)).abs() < 1e-6, "{weights:?}");
        assert!(
            (f64::from(weights[0]) - (0.899 * 0.999 - moved)).abs() < 1e-6,
            "only the first is decayed: {weights:?}"
        );
    }

    #[test]
    fn long_vectors_step_as_short_ones() {
        let count = 2 * NUMBERS_PER_TASK + 5;
        let gradient: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut long = vec![0.5_f32; count];
        let mut adam = AdamW::new(count, 0.1, vec![0..count; 1]);
        adam.step(&mut long, &gradient, 0.01);
        adam.step(&mut long, &gradient, 0.01);
        for place in [0, NUMBERS_PER_TASK - 1, NUMBERS_PER_TASK, count - 1] {
            let mut short = [0.5_f32];
            let mut adam = AdamW::new(1, 0.1, vec![0..1; 1]);
            adam.step(&mut short, &gradient[place..=place], 0.01);
            adam.step(&mut short, &gradient[place..=place], 0.01);
            assert_eq!(short[0], long[place]);
        }
    }

    #[test]
    fn rates_rise_and_fall() {
        let rates = |schedule| Rates { peak: 2.0, warmup: 0.2, schedule, total: 10 };
        let at = |schedule| (0..10).map(|step| rates(schedule).at(step)).collect::<Vec<_>>();
        assert_eq!(at(Schedule::Constant), [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]);
        assert_eq!(at(Schedule::Linear)[..4], [1.0, 2.0, 2.0, 1.75]);
        assert!((at(Schedule::Cosine)[6] - 1.0).abs() < 1e-12);
        assert_eq!(rates(Schedule::Linear).at(99), 0.25);
        assert_eq!(temperature(0.01, 5, 10), 0.1);
        assert_eq!(temperature(0.01, 50, 10), 0.01);
    }

    #[test]
    fn gradients_are_shortened_only_if_too_long() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip(&mut gradient, 0.0), 5.0);
        assert_eq!(clip(&mut gradient, 6.0), 5.0);
        assert_eq!(gradient, [3.0, 4.0]);
        assert_eq!(clip(&mut gradient, 1.0), 5.0);
        assert!((norm(&gradient) - 1.0).abs() < 1e-5);
    }
}
