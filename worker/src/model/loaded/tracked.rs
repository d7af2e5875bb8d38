//! A model as a differentiable function: checks what goes in, and lets the decoder compute.

use std::ops::Range;

use candle_core::Tensor;

use super::Model;
use crate::model::decoder::{Adapters, Keep, TrackedCache, TrackedSegment, check_adapters};
use crate::model::error::ModelError;

impl Model {
    /// Runs `tokens` at `positions` behind `prefix` as a differentiable function: logits `[scored, vocabulary]` of the tokens
    /// that `scored` names, with gradients for whatever of the prefix and of the adapters comes from variables. The model
    /// itself is frozen. The graph holds every layer's activations until it is dropped.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`ModelError::TensorShape`] for a prefix or an adapter of another shape.
    pub fn forward_tracked(
        &self,
        prefix: &TrackedCache,
        adapters: &Adapters,
        tokens: &[u32],
        positions: &[i64],
        scored: Range<usize>,
    ) -> Result<Tensor, ModelError> {
        self.forward_tracked_batch(&[TrackedSegment { prefix, tokens, positions, scored }], adapters, Keep::Activations)
    }

    /// The same for several sequences at once, which see nothing of each other: logits `[Σ scored, vocabulary]`, those of the
    /// first sequence first. Lengths may differ, and no padding is computed. Weights are read once for all, so a step over 8
    /// short sequences takes a fraction of 8 steps. `keep` is what the graph holds of each layer.
    ///
    /// # Errors
    /// As [`Model::forward_tracked`]; [`ModelError::Input`] if there is no sequence, or nothing is scored.
    pub fn forward_tracked_batch(
        &self,
        segments: &[TrackedSegment<'_>],
        adapters: &Adapters,
        keep: Keep,
    ) -> Result<Tensor, ModelError> {
        for TrackedSegment { prefix, tokens, positions, scored } in segments {
            self.check_input(tokens, positions)?;
            self.check_positions(&prefix.positions)?;
            prefix.check(&self.config)?;
            if scored.end > tokens.len() {
                return Err(ModelError::Input { tokens: scored.end, positions: positions.len() });
            }
        }
        if segments.iter().all(|part| part.scored.is_empty()) {
            let positions = segments.iter().map(|part| part.positions.len()).sum();
            return Err(ModelError::Input { tokens: 0, positions });
        }
        check_adapters(adapters, &self.config)?;
        Ok(self.decoder.forward_tracked(&self.config, segments, adapters, keep)?)
    }
}
