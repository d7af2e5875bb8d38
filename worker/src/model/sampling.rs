//! Choosing the next token: the likeliest, or one drawn by chance with a seed.
//!
//! Drawing itself is candle-transformers'. The same settings, seed and logits give the same tokens on every machine, but logits
//! are only the same bits where they were computed alike: see [`Model::generate_batch`](super::Model::generate_batch).

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling as Draw};

use super::error::ModelError;
use super::loaded::argmax;

/// Below this a temperature counts as 0: logits divided by it would overflow.
const TEMPERATURE_MIN: f64 = 1e-7;

/// How tokens are chosen. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sampling {
    /// 0: always the likeliest token. Above: tokens are drawn by softmax(logits / temperature).
    pub temperature: f64,
    /// Draw from this many of the likeliest tokens. None: from all.
    pub top_k: Option<usize>,
    /// Draw from the fewest of the likeliest tokens that hold this much probability, above 0 and at most 1. None: from all.
    /// With `top_k`: the fewer of both.
    pub top_p: Option<f64>,
    /// What chance begins from.
    pub seed: u64,
}

/// Settings that choose nothing.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum SamplingError {
    /// Negative, infinite or no number.
    #[error("a temperature of {value}: it must be 0 (greedy) or a number above")]
    Temperature {
        /// As given.
        value: f64,
    },
    /// None of the tokens.
    #[error("a top-k of 0: at least one token must be left to choose")]
    TopK,
    /// No probability, or more than there is.
    #[error("a top-p of {value}: it must be above 0 and at most 1")]
    TopP {
        /// As given.
        value: f64,
    },
}

/// Chooses the tokens of one sequence. Not shared among sequences: each draw moves it on.
pub struct Sampler {
    settings: Sampling,
    /// None: greedy.
    draw: Option<LogitsProcessor>,
}

impl Sampler {
    /// A sampler at the beginning of its chance.
    ///
    /// # Errors
    /// [`SamplingError`].
    pub fn new(settings: Sampling) -> Result<Self, SamplingError> {
        let Sampling { temperature, top_k, top_p, seed } = settings;
        if !temperature.is_finite() || temperature < 0.0 {
            return Err(SamplingError::Temperature { value: temperature });
        }
        if top_k == Some(0) {
            return Err(SamplingError::TopK);
        }
        if let Some(value) = top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return Err(SamplingError::TopP { value });
        }
        // The library works in f32, where a smaller number would be 0: no token at all.
        let top_p = top_p.map(|p| p.max(f64::from(f32::MIN_POSITIVE)));
        let draw = match (top_k, top_p) {
            _ if temperature < TEMPERATURE_MIN => return Ok(Self { settings, draw: None }),
            (None, None) => Draw::All { temperature },
            (Some(k), None) => Draw::TopK { k, temperature },
            (None, Some(p)) => Draw::TopP { p, temperature },
            (Some(k), Some(p)) => Draw::TopKThenTopP { k, p, temperature },
        };
        Ok(Self { settings, draw: Some(LogitsProcessor::from_sampling(seed, draw)) })
    }

    /// Always the likeliest token.
    pub fn greedy() -> Self {
        Self { settings: Sampling::default(), draw: None }
    }

    /// The settings it was made from.
    pub fn settings(&self) -> Sampling {
        self.settings
    }

    /// The next token after `logits`, `[vocabulary]`.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if no token can be drawn: there are logits that are not numbers.
    ///
    /// # Panics
    /// If there are no logits.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
        match &mut self.draw {
            None => Ok(argmax(logits)),
            Some(draw) => Ok(draw.sample(&Tensor::new(logits, &Device::Cpu)?)?),
        }
    }
}

impl std::fmt::Debug for Sampler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Sampler").field(&self.settings).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.5, 3.0, 1.0, 2.0, -4.0, 2.5];

    fn drawn(settings: Sampling) -> Vec<u32> {
        let mut sampler = Sampler::new(settings).unwrap();
        (0..400).map(|_| sampler.choose(&LOGITS).unwrap()).collect()
    }

    fn kinds(settings: Sampling) -> Vec<u32> {
        let mut kinds = drawn(settings);
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }

    #[test]
    fn seeds_fix_what_is_drawn() {
        let settings = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        assert_eq!(drawn(settings), drawn(settings));
        assert_ne!(drawn(settings), drawn(Sampling { seed: 4, ..settings }));
    }

    #[test]
    fn settings_leave_the_tokens_they_should() {
        let all = Sampling { temperature: 2.0, ..Sampling::default() };
        assert_eq!(kinds(all).len(), 6);
        assert_eq!(kinds(Sampling { top_k: Some(2), ..all }), [1, 5]);
        assert_eq!(kinds(Sampling { top_k: Some(1000), ..all }).len(), 6);
        assert_eq!(kinds(Sampling { top_p: Some(0.5), ..all }), [1, 5]);
        assert_eq!(kinds(Sampling { top_p: Some(1.0), ..all }).len(), 6);
        assert_eq!(kinds(Sampling { top_p: Some(1e-300), ..all }), [1]);
        assert_eq!(kinds(Sampling { top_k: Some(3), top_p: Some(0.3), ..all }), [1]);
        for temperature in [0.0, 1e-12] {
            assert_eq!(kinds(Sampling { temperature, ..Sampling::default() }), [1]);
        }
        assert_eq!(Sampler::greedy().choose(&LOGITS).unwrap(), 1);
        // Shares are softmax's: e^0.5 to 1 between the two likeliest at temperature 1.
        let two = drawn(Sampling { temperature: 1.0, top_k: Some(2), seed: 1, top_p: None });
        let share = two.iter().filter(|id| **id == 1).count() as f64 / two.len() as f64;
        assert!((share - 0.622).abs() < 0.08, "{share}");
    }

    #[test]
    fn settings_that_choose_nothing_are_refused() {
        let refused = |settings| Sampler::new(settings).err().map(|error| error.to_string());
        for temperature in [-0.1, f64::NAN, f64::INFINITY] {
            let said = refused(Sampling { temperature, ..Sampling::default() }).unwrap();
            assert!(said.starts_with("a temperature of"), "{said}");
        }
        for p in [0.0, -1.0, 1.01, f64::NAN] {
            assert!(refused(Sampling { top_p: Some(p), ..Sampling::default() }).unwrap().starts_with("a top-p of"));
        }
        assert_eq!(Sampler::new(Sampling { top_k: Some(0), ..Sampling::default() }).unwrap_err(), SamplingError::TopK);
        let mut sampler = Sampler::new(Sampling { temperature: 1.0, ..Sampling::default() }).unwrap();
        assert!(matches!(sampler.choose(&[f32::NAN; 4]), Err(ModelError::Tensor(_))));
    }
}
