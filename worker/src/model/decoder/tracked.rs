//! The decoder as a differentiable function of an injected cache and of adapters; the model itself stays frozen.
//!
//! The same computation as `forward`, from operations that keep gradients: a layer each (`layer`), or a step each (`grad`) on
//! cards and where there are adapters. Nothing is written in place and no context grows: prefixes go in as tensors, logits
//! come out. Products are exact on stored weights too, so the gradient is that of the dequantised model while memory stays
//! near the stored size.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::layer::{Layer, Shared};
use super::{Attention, Block, Decoder, Mlp, ModelConfig, Norm, Pass, Setting};
use crate::cache::KvCache;
use crate::model::error::ModelError;
use crate::model::grad;

/// A prefix that gradients may reach: K and V of every layer as tensors, any of which may come from variables.
#[derive(Debug, Clone)]
pub struct TrackedCache {
    /// K and V of each layer, first layer first, both `[H_kv, P, D]` f32. On another device than the
    /// model's they are brought there, with their gradient.
    pub layers: Vec<(Tensor, Tensor)>,
    /// The position of each of the P columns.
    pub positions: Vec<i64>,
    /// True if keys carry the rotation of their positions. Keys that do not are rotated on the way in, with a gradient.
    pub rotated: bool,
}

/// One sequence of a pass with gradients.
#[derive(Debug, Clone)]
pub struct TrackedSegment<'a> {
    /// What its tokens see before them.
    pub prefix: &'a TrackedCache,
    /// Its new tokens, at least one.
    pub tokens: &'a [u32],
    /// The position of each.
    pub positions: &'a [i64],
    /// Those of its tokens whose logits are wanted; may be none.
    pub scored: Range<usize>,
}

/// What a differentiable pass holds of its layers until it has gone back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// What their gradients need.
    Activations,
    /// Their inputs, of which the rest is computed again on the way back: half the memory or less, a third more time. On
    /// processors and without adapters; elsewhere activations are kept.
    Inputs,
}

/// A projection that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Projection {
    /// `[H * D, C]`.
    Query,
    /// `[H_kv * D, C]`.
    Key,
    /// `[H_kv * D, C]`.
    Value,
    /// `[C, H * D]`.
    AttentionOutput,
    /// `[mlp, C]`.
    Gate,
    /// `[mlp, C]`.
    Up,
    /// `[C, mlp]`.
    Down,
}

/// What is added to a frozen projection: y += scale * (x downᵀ) upᵀ (LoRA, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct Adapter {
    /// `[rank, inputs]` f32.
    pub down: Tensor,
    /// `[outputs, rank]` f32.
    pub up: Tensor,
    /// Factor.
    pub scale: f64,
}

/// Adapters by layer and projection.
pub type Adapters = BTreeMap<(usize, Projection), Adapter>;

impl TrackedCache {
    /// The numbers of `cache`, without a gradient until tensors are replaced by variables.
    ///
    /// # Errors
    /// [`ModelError::Cache`] if layers are missing.
    pub fn new(cache: &KvCache) -> std::result::Result<Self, ModelError> {
        cache.check_fits(cache.layout())?;
        let layout = cache.layout();
        let tensor =
            |values: &[f32]| Tensor::from_slice(values, (layout.kv_heads, cache.len(), layout.head_dim), &Device::Cpu);
        let layers =
            cache.layers().map(|(_, layer)| Ok((tensor(&layer.k)?, tensor(&layer.v)?))).collect::<Result<_>>()?;
        Ok(Self { layers, positions: cache.positions().to_vec(), rotated: cache.is_rotated() })
    }

    /// A prefix without columns.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] if memory runs out.
    pub fn empty(config: &ModelConfig) -> std::result::Result<Self, ModelError> {
        let none = Tensor::zeros((config.kv_heads, 0, config.head_dim), candle_core::DType::F32, &Device::Cpu)?;
        let layers = vec![(none.clone(), none); config.layers.len()];
        Ok(Self { layers, positions: Vec::new(), rotated: true })
    }

    /// Refuses tensors of shapes that are not the model's.
    pub(crate) fn check(&self, config: &ModelConfig) -> std::result::Result<(), ModelError> {
        if self.layers.len() != config.layers.len() {
            let layer = self.layers.len().min(config.layers.len());
            return Err(crate::cache::CacheError::MissingLayer { layer }.into());
        }
        let expected = [config.kv_heads, self.positions.len(), config.head_dim];
        for (layer, (k, v)) in self.layers.iter().enumerate() {
            check_shape(format!("keys of layer {layer}"), k, &expected)?;
            check_shape(format!("values of layer {layer}"), v, &expected)?;
        }
        Ok(())
    }
}

impl Projection {
    /// Outputs and inputs.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Self::Query => [q_width, config.hidden],
            Self::Key | Self::Value => [kv_width, config.hidden],
            Self::AttentionOutput => [config.hidden, q_width],
            Self::Gate | Self::Up => [config.mlp, config.hidden],
            Self::Down => [config.hidden, config.mlp],
        }
    }
}

/// Refuses adapters whose layers or shapes are not the model's.
pub(crate) fn check_adapters(adapters: &Adapters, config: &ModelConfig) -> std::result::Result<(), ModelError> {
    for ((layer, projection), adapter) in adapters {
        let name = |what| format!("{what} of the adapter of {projection:?} in layer {layer}");
        if *layer >= config.layers.len() {
            let (expected, got) = (vec![config.layers.len()], vec![*layer]);
            return Err(ModelError::TensorShape { name: name("layer"), expected, got });
        }
        let [outputs, inputs] = projection.shape(config);
        let rank = adapter.down.dims().first().copied().unwrap_or(0);
        check_shape(name("down"), &adapter.down, &[rank, inputs])?;
        check_shape(name("up"), &adapter.up, &[outputs, rank])?;
    }
    Ok(())
}

fn check_shape(name: String, tensor: &Tensor, expected: &[usize]) -> std::result::Result<(), ModelError> {
    if tensor.dims() == expected {
        return Ok(());
    }
    Err(ModelError::TensorShape { name, expected: expected.to_vec(), got: tensor.dims().to_vec() })
}

/// What the layers of one tracked pass share.
struct Tracked<'a> {
    pass: Pass<'a, 'a>,
    segments: &'a [TrackedSegment<'a>],
    /// For each sequence, rotations of its prefix's columns, one for each distinct layer setting; empty if its keys are rotated.
    prefix_turns: Vec<Vec<Setting>>,
    adapters: &'a Adapters,
}

impl Decoder {
    /// Logits `[scored, vocabulary]` of the tokens that the segments' `scored` name, segment after segment. Callers have checked
    /// ids, positions and shapes, and that a token is scored.
    pub(crate) fn forward_tracked(
        &self,
        config: &ModelConfig,
        segments: &[TrackedSegment<'_>],
        adapters: &Adapters,
        keep: Keep,
    ) -> Result<Tensor> {
        let compute = &self.compute;
        let places: Vec<_> = segments.iter().map(|part| (&part.prefix.positions[..], part.positions)).collect();
        let pass = Pass::new(config, &places, compute, None)?;
        let turns = |prefix: &TrackedCache| {
            let turn = |setting: &Setting| Setting::new(&setting.layer, &[(&[], &prefix.positions[..])], compute);
            if prefix.rotated { Ok(Vec::new()) } else { pass.settings.iter().map(turn).collect() }
        };
        let prefix_turns = segments.iter().map(|part| turns(part.prefix)).collect::<Result<_>>()?;
        let tracked = Tracked { pass, segments, prefix_turns, adapters };
        let tokens: Vec<u32> = segments.iter().flat_map(|part| part.tokens).copied().collect();
        let mut x = self.embedded(&tokens)?;
        if adapters.is_empty() && !compute.is_card() {
            let lengths: Vec<_> = places.iter().map(|(prefix, new)| (prefix.len(), new.len())).collect();
            let shared = Arc::new(Shared::new(&tracked.pass, &lengths)?);
            for (index, block) in self.blocks.iter().enumerate() {
                let (k, v) = tracked.prefixes(index)?;
                x = x.contiguous()?.apply_op3(&k, &v, Layer::new(block, &shared, index, keep))?;
            }
        } else {
            for (index, block) in self.blocks.iter().enumerate() {
                x = block.tracked(&x, index, &tracked)?;
            }
        }
        let rows = Tensor::new(scored(segments), compute.device())?;
        let x = self.norm.tracked(&x.index_select(&rows, 0)?)?;
        self.head.as_ref().unwrap_or(&self.embedding).tracked_scores(&x)
    }
}

/// The rows of all tokens whose logits are wanted.
fn scored(segments: &[TrackedSegment<'_>]) -> Vec<u32> {
    let (mut rows, mut first) = (Vec::new(), 0);
    for part in segments {
        rows.extend(part.scored.clone().map(|row| (first + row) as u32));
        first += part.tokens.len();
    }
    rows
}

impl Tracked<'_> {
    /// What the adapter of a projection adds to `y`.
    fn adapted(&self, layer: usize, projection: Projection, x: &Tensor, y: Tensor) -> Result<Tensor> {
        match self.adapters.get(&(layer, projection)) {
            None => Ok(y),
            Some(adapter) => {
                let (down, up) = (self.here(&adapter.down)?, self.here(&adapter.up)?);
                y + (x.matmul(&down.t()?)?.matmul(&up.t()?)? * adapter.scale)?
            }
        }
    }

    /// A tensor on the device that computes, with its gradient.
    fn here(&self, tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(self.pass.compute.device())
    }

    /// K (rotated) and V of one sequence's prefix in one layer.
    fn prefix(&self, sequence: usize, layer: usize) -> Result<(Tensor, Tensor)> {
        let (k, v) = &self.segments[sequence].prefix.layers[layer];
        let (k, v) = (self.here(k)?, self.here(v)?);
        match self.prefix_turns[sequence].get(self.pass.setting_of[layer]) {
            Some(setting) => Ok((setting.tracked(&k)?, v)),
            None => Ok((k, v)),
        }
    }

    /// The same of all sequences, `[H_kv, ΣP, D]` each.
    fn prefixes(&self, layer: usize) -> Result<(Tensor, Tensor)> {
        let all = (0..self.segments.len()).map(|sequence| self.prefix(sequence, layer)).collect::<Result<Vec<_>>>()?;
        let (k, v): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        Ok((beside(&k, 1)?, beside(&v, 1)?))
    }
}

/// Tensors after each other along an axis, contiguous; one is itself.
fn beside(tensors: &[Tensor], axis: usize) -> Result<Tensor> {
    match tensors {
        [tensor] => tensor.contiguous(),
        tensors => Tensor::cat(tensors, axis)?.contiguous(),
    }
}

impl Setting {
    /// As [`Setting::rotate`], with a gradient.
    fn tracked(&self, x: &Tensor) -> Result<Tensor> {
        grad::rotate(x, &self.cosines, &self.sines, self.card)
    }
}

impl Block {
    fn tracked(&self, x: &Tensor, index: usize, tracked: &Tracked<'_>) -> Result<Tensor> {
        let branch = self.attention.tracked(&self.attention_norm.tracked(x)?, index, tracked)?;
        let x = (x + Norm::tracked_optional(self.post_attention_norm.as_ref(), branch)?)?;
        let branch = self.mlp.tracked(&self.mlp_norm.tracked(&x)?, index, tracked)?;
        &x + Norm::tracked_optional(self.post_mlp_norm.as_ref(), branch)?
    }
}

impl Attention {
    fn tracked(&self, x: &Tensor, index: usize, tracked: &Tracked<'_>) -> Result<Tensor> {
        let (length, _) = x.dims2()?;
        let heads = |y: Tensor, heads: usize, norm: Option<&Norm>| {
            let y = Norm::tracked_optional(norm, y.reshape((length, heads, self.head_dim))?)?;
            y.transpose(0, 1)?.contiguous()
        };
        let q = tracked.adapted(index, Projection::Query, x, self.q.tracked(x)?)?;
        let k = tracked.adapted(index, Projection::Key, x, self.k.tracked(x)?)?;
        let v = tracked.adapted(index, Projection::Value, x, self.v.tracked(x)?)?;
        let (q, k) = (heads(q, self.heads, self.q_norm.as_ref())?, heads(k, self.kv_heads, self.k_norm.as_ref())?);
        let v = heads(v, self.kv_heads, None)?;
        let setting = tracked.pass.setting(index);
        let (q, k) = (setting.tracked(&q)?, setting.tracked(&k)?);
        let mut mixed = Vec::with_capacity(tracked.segments.len());
        let mut start = 0;
        for (sequence, part) in tracked.segments.iter().enumerate() {
            let length = part.tokens.len();
            let of = |x: &Tensor| x.narrow(1, start, length)?.contiguous();
            let (before_k, before_v) = tracked.prefix(sequence, index)?;
            let (k, v) = match part.prefix.positions.is_empty() {
                true => (of(&k)?, of(&v)?),
                false => (Tensor::cat(&[before_k, of(&k)?], 1)?, Tensor::cat(&[before_v, of(&v)?], 1)?),
            };
            let columns = k.dim(1)?;
            let grouped = (self.kv_heads, self.heads / self.kv_heads * length, self.head_dim);
            let scores = of(&q)?.reshape(grouped)?.matmul(&k.transpose(1, 2)?)?;
            let scores = scores.reshape((self.heads, length, columns))?;
            let mask = setting.masks[sequence].as_ref();
            let shares = grad::softmax(&scores, self.scale, mask, tracked.pass.compute.is_card())?;
            let heads = shares.reshape((grouped.0, grouped.1, columns))?.matmul(&v)?;
            let heads = heads.reshape((self.heads, length, self.head_dim))?.transpose(0, 1)?;
            mixed.push(heads.reshape((length, self.heads * self.head_dim))?);
            start += length;
        }
        let mixed = beside(&mixed, 0)?;
        tracked.adapted(index, Projection::AttentionOutput, &mixed, self.output.tracked(&mixed)?)
    }
}

impl Mlp {
    fn tracked(&self, x: &Tensor, index: usize, tracked: &Tracked<'_>) -> Result<Tensor> {
        let gate = tracked.adapted(index, Projection::Gate, x, self.gate.tracked(x)?)?;
        let up = tracked.adapted(index, Projection::Up, x, self.up.tracked(x)?)?;
        let inner = grad::gated(&gate, &up, self.activation)?;
        tracked.adapted(index, Projection::Down, &inner, self.down.tracked(&inner)?)
    }
}

impl Norm {
    fn tracked(&self, x: &Tensor) -> Result<Tensor> {
        grad::rms_norm(x, &self.weight, self.epsilon, self.card)
    }

    fn tracked_optional(norm: Option<&Self>, x: Tensor) -> Result<Tensor> {
        match norm {
            Some(norm) => norm.tracked(&x),
            None => Ok(x),
        }
    }
}
