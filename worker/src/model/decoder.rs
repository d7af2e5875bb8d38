//! The decoder of all families: embedding, blocks of attention and MLP, final norm, head.
//!
//! Two paths over the same weights. Here, tensors in f32: the reference that faster paths are held against, and what runs on
//! cards, where weights, keys and values may be halves. In `stored`, plain slices and weights as stored. Shapes: T new tokens, S columns seen in all, H heads, H_kv key-value heads, G = H / H_kv, D
//! head dimension, C hidden width. No batch axis: new tokens of several sequences follow each other in T, each sequence with
//! the number it has, and only attention tells them apart.
//!
//! The order of columns decides what comes before what; positions decide rotation and the reach of a window. So a cache
//! injected with a gap, or moved, is seen whole, as it would be by a model that had read it there.
//!
//! Papers: Llama (arXiv 2302.13971), RoPE (2104.09864), GQA (2305.13245), Qwen3 (2505.09388), Gemma 3 (2503.19786).

mod layer;
mod stored;
mod tracked;

pub(crate) use tracked::check_adapters;
pub use tracked::{Adapter, Adapters, Keep, Projection, TrackedCache, TrackedSegment};

use std::sync::Arc;

use candle_core::{Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use candle_nn::rotary_emb::rope;

use super::config::{LayerConfig, ModelConfig};
use super::context::{Context, LayerBuffers};
use super::family::Activation;
use super::linear::Linear;
use super::names::Part;
use super::place::Compute;
use super::table::RowTable;
use super::weights::{Precision, WeightError, Weights};

/// A tensor that a pass can show while it computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tap {
    /// Keys of the new columns before RoPE, after bias and norm: `[H_kv, T, D]`.
    KeyPlain,
    /// Keys of the new columns after RoPE: `[H_kv, T, D]`.
    Key,
    /// Values of the new columns: `[H_kv, T, D]`.
    Value,
    /// Attention probabilities: `[H, T, S]`.
    Attention,
    /// The residual stream after the layer: `[T, C]`.
    Residual,
}

/// Sees tensors as they are computed: which, of which layer.
pub type Observer<'a> = dyn FnMut(Tap, usize, &Tensor) -> Result<()> + 'a;

/// Which of the new tokens' logits are wanted. The head is most of the work in small models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// None: the pass only fills the context.
    None,
    /// The last token's: `[1, vocabulary]`.
    Last,
    /// All: `[T, vocabulary]`.
    All,
}

/// The new columns of one sequence.
#[derive(Debug)]
pub(crate) struct Segment<'a> {
    pub(crate) context: &'a mut Context,
    /// Their ids. None: what comes in are hidden states of unknown text.
    pub(crate) tokens: Option<&'a [u32]>,
    pub(crate) positions: &'a [i64],
}

/// What a pass gives.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// The residual stream behind the last layer run, `[T, C]`, if that is not the model's last.
    pub(crate) hidden: Option<Vec<f32>>,
    /// A row a token asked for, `[vocabulary]` each; none if the pass stops before the model's last layer.
    pub(crate) logits: Vec<Vec<f32>>,
}

/// The weights of a model, ready to run.
#[derive(Debug)]
pub(crate) struct Decoder {
    precision: Precision,
    compute: Compute,
    embedding: RowTable,
    /// Shared with the graphs of passes that keep gradients.
    blocks: Vec<Arc<Block>>,
    norm: Norm,
    /// None: tied to the embedding.
    head: Option<RowTable>,
    embedding_scale: f64,
}

#[derive(Debug)]
struct Block {
    attention_norm: Norm,
    attention: Attention,
    post_attention_norm: Option<Norm>,
    mlp_norm: Norm,
    mlp: Mlp,
    post_mlp_norm: Option<Norm>,
}

#[derive(Debug)]
struct Attention {
    q: Linear,
    k: Linear,
    v: Linear,
    output: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
}

#[derive(Debug)]
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
}

#[derive(Debug)]
struct Norm {
    weight: Tensor,
    /// The same numbers.
    values: Vec<f32>,
    epsilon: f32,
    card: bool,
}

/// What the layers of one pass share.
struct Pass<'a, 'b> {
    /// For each distinct layer setting, its rotation table and mask.
    settings: Vec<Setting>,
    /// Which setting each layer has.
    setting_of: Vec<usize>,
    compute: &'a Compute,
    observer: Option<&'a mut Observer<'b>>,
}

struct Setting {
    layer: LayerConfig,
    /// `[T, D/2]` each.
    cosines: Tensor,
    sines: Tensor,
    /// One a sequence: `[T, S]` of its own tokens, 0 or -inf; None if every column is visible to every token.
    masks: Vec<Option<Tensor>>,
    card: bool,
}

impl Decoder {
    /// Runs the new tokens of each segment after what its context holds, through the layers that the contexts hold, and adds
    /// them to the contexts. `hidden`: the residual stream that enters the first of these layers, `[T, C]`; None for the
    /// tokens' embeddings.
    ///
    /// Callers have checked ids, positions, lengths (at least 1 each), and that all contexts hold the same layers. With an
    /// observer there is one segment.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        segments: &mut [Segment<'_>],
        hidden: Option<&[f32]>,
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Passed> {
        let passed = match self.precision {
            Precision::Stored if !self.compute.is_card() => {
                self.forward_stored(config, segments, hidden, logits, observer)?
            }
            _ => self.forward_tensors(config, segments, hidden, logits, observer)?,
        };
        for segment in segments {
            segment.context.positions.extend_from_slice(segment.positions);
            match (&mut segment.context.tokens, segment.tokens) {
                (Some(known), Some(tokens)) => known.extend_from_slice(tokens),
                (known, _) => *known = None,
            }
        }
        Ok(passed)
    }

    fn forward_tensors(
        &self,
        config: &ModelConfig,
        segments: &mut [Segment<'_>],
        hidden: Option<&[f32]>,
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Passed> {
        let places: Vec<_> =
            segments.iter().map(|segment| (&segment.context.positions[..], segment.positions)).collect();
        let mut pass = Pass::new(config, &places, &self.compute, observer)?;
        let mut x = match hidden {
            Some(hidden) => self.compute.tensor(hidden, (hidden.len() / config.hidden, config.hidden))?,
            None => self.embedded(&ids(segments))?,
        };
        let layers = segments[0].context.layers();
        for index in layers.clone() {
            x = self.blocks[index].forward(&x, index, segments, &mut pass)?;
            pass.show(Tap::Residual, index, &x)?;
        }
        if layers.end < self.blocks.len() {
            return Ok(Passed { hidden: Some(x.flatten_all()?.to_vec1()?), logits: Vec::new() });
        }
        let rows = scored(segments, logits);
        if rows.is_empty() {
            return Ok(Passed::default());
        }
        let x = x.index_select(&Tensor::new(rows, self.compute.device())?, 0)?;
        let x = self.norm.forward(&x)?;
        Ok(Passed { hidden: None, logits: self.head.as_ref().unwrap_or(&self.embedding).scores(&x)?.to_vec2()? })
    }

    /// Embeddings of these ids, `[T, C]`, where the layers are.
    fn embedded(&self, ids: &[u32]) -> Result<Tensor> {
        self.embedding.lookup(ids)?.to_device(self.compute.device())? * self.embedding_scale
    }

    /// Size of the vocabulary.
    pub(crate) fn vocabulary(&self) -> usize {
        self.embedding.rows()
    }
}

/// Ids of all new tokens, sequence after sequence.
fn ids(segments: &[Segment<'_>]) -> Vec<u32> {
    segments.iter().flat_map(|segment| segment.tokens.unwrap_or_default()).copied().collect()
}

/// Which rows of `[T, C]` logits are asked for.
fn scored(segments: &[Segment<'_>], logits: Logits) -> Vec<u32> {
    let mut rows = Vec::new();
    let mut end = 0;
    for segment in segments {
        let start = end;
        end += segment.positions.len();
        match logits {
            Logits::None => {}
            Logits::Last => rows.push(end - 1),
            Logits::All => rows.extend(start..end),
        }
    }
    rows.into_iter().map(|row| row as u32).collect()
}

impl Block {
    fn forward(
        &self,
        x: &Tensor,
        index: usize,
        segments: &mut [Segment<'_>],
        pass: &mut Pass<'_, '_>,
    ) -> Result<Tensor> {
        let branch = self.attention.forward(&self.attention_norm.forward(x)?, index, segments, pass)?;
        let x = (x + Norm::optional(self.post_attention_norm.as_ref(), branch)?)?;
        let branch = self.mlp.forward(&self.mlp_norm.forward(&x)?)?;
        &x + Norm::optional(self.post_mlp_norm.as_ref(), branch)?
    }
}

impl Attention {
    /// `[T, C]` to `[T, C]`; K (rotated) and V of the new columns go into the contexts.
    fn forward(
        &self,
        x: &Tensor,
        index: usize,
        segments: &mut [Segment<'_>],
        pass: &mut Pass<'_, '_>,
    ) -> Result<Tensor> {
        let q = self.heads_of(&self.q.forward(x)?, self.heads, self.q_norm.as_ref())?;
        let k = self.heads_of(&self.k.forward(x)?, self.kv_heads, self.k_norm.as_ref())?;
        let v = self.heads_of(&self.v.forward(x)?, self.kv_heads, None)?;
        pass.show(Tap::KeyPlain, index, &k)?;
        let setting = pass.setting(index);
        let q = setting.rotate(&q)?;
        let k = setting.rotate(&k)?;
        let masks = setting.masks.clone();
        pass.show(Tap::Key, index, &k)?;
        pass.show(Tap::Value, index, &v)?;
        let mut mixed = Vec::with_capacity(segments.len());
        let mut start = 0;
        for (segment, mask) in segments.iter_mut().zip(masks) {
            let length = segment.positions.len();
            let of = |x: &Tensor| x.narrow(1, start, length)?.contiguous();
            let first = segment.context.first_layer;
            let LayerBuffers::Tensors(buffers) = &mut segment.context.layers[index - first] else {
                candle_core::bail!("a context on slices met the path on tensors");
            };
            buffers.append(&of(&k)?, &of(&v)?)?;
            let probabilities = self.probabilities(&of(&q)?, &buffers.views()?.0, mask.as_ref(), pass.compute)?;
            pass.show(Tap::Attention, index, &probabilities)?;
            let (_, all_v) = buffers.views()?;
            let grouped = (self.kv_heads, self.heads / self.kv_heads * length, all_v.dim(1)?);
            let heads = pass.compute.matmul(&probabilities.reshape(grouped)?, &all_v)?;
            let heads = heads.reshape((self.heads, length, self.head_dim))?.transpose(0, 1)?;
            mixed.push(heads.reshape((length, self.heads * self.head_dim))?);
            start += length;
        }
        self.output.forward(&Tensor::cat(&mixed, 0)?)
    }

    /// softmax(scale q kᵀ + mask), `[H, T, S]`, of one sequence: `q` `[H, T, D]`, `k` `[H_kv, S, D]`.
    fn probabilities(&self, q: &Tensor, k: &Tensor, mask: Option<&Tensor>, compute: &Compute) -> Result<Tensor> {
        let (length, columns) = (q.dim(1)?, k.dim(1)?);
        // The G query heads of a key-value head follow each other, so [H, T, D] is [H_kv, G * T, D].
        let grouped = (self.kv_heads, self.heads / self.kv_heads * length, self.head_dim);
        let scores = compute.matmul(&(q.reshape(grouped)? * self.scale)?, &k.transpose(1, 2)?)?;
        let scores = scores.reshape((self.heads, length, columns))?;
        match mask {
            Some(mask) => softmax_last_dim(&scores.broadcast_add(mask)?),
            None => softmax_last_dim(&scores),
        }
    }

    /// `[T, heads * D]` to `[heads, T, D]`, normed over D where there is a norm.
    fn heads_of(&self, x: &Tensor, heads: usize, norm: Option<&Norm>) -> Result<Tensor> {
        let (length, _) = x.dims2()?;
        let x = Norm::optional(norm, x.reshape((length, heads, self.head_dim))?)?;
        x.transpose(0, 1)?.contiguous()
    }
}

impl Mlp {
    /// `[T, C]` to `[T, C]`: down(act(gate(x)) * up(x)).
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let gate = self.gate.forward(x)?;
        let gate = match self.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        self.down.forward(&(gate * self.up.forward(x)?)?)
    }
}

impl Norm {
    fn new(values: Vec<f32>, epsilon: f32, compute: &Compute) -> Result<Self> {
        Ok(Self { weight: compute.tensor(&values, values.len())?, values, epsilon, card: compute.is_card() })
    }

    /// x / rms(x) * weight over the last axis.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(&x.contiguous()?, &self.weight, self.epsilon)
    }

    fn optional(norm: Option<&Self>, x: Tensor) -> Result<Tensor> {
        match norm {
            Some(norm) => norm.forward(&x),
            None => Ok(x),
        }
    }
}

impl<'a, 'b> Pass<'a, 'b> {
    /// `places`: for each sequence, the positions of the columns held and of the new ones.
    fn new(
        config: &ModelConfig,
        places: &[(&[i64], &[i64])],
        compute: &'a Compute,
        observer: Option<&'a mut Observer<'b>>,
    ) -> Result<Self> {
        let mut settings: Vec<Setting> = Vec::new();
        let mut setting_of = Vec::with_capacity(config.layers.len());
        for layer in &config.layers {
            let known = settings.iter().position(|setting| setting.layer == *layer);
            setting_of.push(known.unwrap_or(settings.len()));
            if known.is_none() {
                settings.push(Setting::new(layer, places, compute)?);
            }
        }
        Ok(Self { settings, setting_of, compute, observer })
    }

    fn setting(&self, layer: usize) -> &Setting {
        &self.settings[self.setting_of[layer]]
    }

    fn show(&mut self, tap: Tap, layer: usize, tensor: &Tensor) -> Result<()> {
        match &mut self.observer {
            Some(observer) => observer(tap, layer, tensor),
            None => Ok(()),
        }
    }
}

impl Setting {
    fn new(layer: &LayerConfig, places: &[(&[i64], &[i64])], compute: &Compute) -> Result<Self> {
        let new: Vec<i64> = places.iter().flat_map(|(_, new)| *new).copied().collect();
        let (cosines, sines) = layer.rope.table(&new);
        let shape = (new.len(), layer.rope.frequencies.len());
        Ok(Self {
            layer: layer.clone(),
            cosines: compute.tensor(&cosines, shape)?,
            sines: compute.tensor(&sines, shape)?,
            masks: places
                .iter()
                .map(|(before, new)| mask(layer.window, before, new, compute))
                .collect::<Result<_>>()?,
            card: compute.is_card(),
        })
    }

    /// `[heads, T, D]`, each column turned to its position.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        rope(&x.unsqueeze(0)?, &self.cosines, &self.sines)?.squeeze(0)
    }
}

/// Column j is visible to new token i if it does not come later, and is less than `window` positions behind.
fn mask(window: Option<usize>, before: &[i64], new: &[i64], compute: &Compute) -> Result<Option<Tensor>> {
    let columns = before.len() + new.len();
    let mut values = Vec::with_capacity(new.len() * columns);
    for (row, position) in new.iter().enumerate() {
        for (column, other) in before.iter().chain(new).enumerate() {
            let near = window.is_none_or(|window| position.saturating_sub(*other) < window as i64);
            let visible = column <= before.len() + row && near;
            values.push(if visible { 0.0 } else { f32::NEG_INFINITY });
        }
    }
    if values.iter().all(|value| *value == 0.0) {
        return Ok(None);
    }
    compute.tensor(&values, (new.len(), columns)).map(Some)
}

impl Decoder {
    /// Takes the weights of `config`'s family out of `weights`, which must hold no others.
    pub(crate) fn load(config: &ModelConfig, mut weights: Weights<'_>) -> std::result::Result<Self, WeightError> {
        let (precision, compute) = (weights.precision(), weights.compute().clone());
        let blocks = (0..config.layers.len())
            .map(|layer| Block::load(config, &mut weights, layer).map(Arc::new))
            .collect::<std::result::Result<_, _>>()?;
        let embedding = weights.embedding(config.hidden)?;
        let norm = Norm::new(weights.norm(Part::OutputNorm, config.hidden)?, config.epsilon, &compute)?;
        // Rows are looked up here; only the table that makes logits is a card's.
        let (embedding, head) = match weights.head(config.hidden)? {
            None => (embedding.on(precision, &compute)?, None),
            Some(head) => (embedding, Some(head.on(precision, &compute)?)),
        };
        weights.finish()?;
        let embedding_scale = f64::from(config.embedding_scale);
        Ok(Self { precision, compute, embedding, blocks, norm, head, embedding_scale })
    }
}

impl Block {
    fn load(config: &ModelConfig, weights: &mut Weights<'_>, layer: usize) -> std::result::Result<Self, WeightError> {
        let (family, hidden, epsilon) = (config.family, config.hidden, config.epsilon);
        let compute = weights.compute().clone();
        let mut norm = |part, size: usize| -> std::result::Result<Norm, WeightError> {
            Ok(Norm::new(weights.norm(part, size)?, epsilon, &compute)?)
        };
        let attention_norm = norm(Part::AttentionNorm(layer), hidden)?;
        let mlp_norm = norm(Part::MlpNorm(layer), hidden)?;
        let mut optional = |part, wanted: bool, size| if wanted { norm(part, size).map(Some) } else { Ok(None) };
        let post_attention_norm = optional(Part::PostAttentionNorm(layer), family.post_norms, hidden)?;
        let post_mlp_norm = optional(Part::PostMlpNorm(layer), family.post_norms, hidden)?;
        let q_norm = optional(Part::QueryNorm(layer), family.qk_norm, config.head_dim)?;
        let k_norm = optional(Part::KeyNorm(layer), family.qk_norm, config.head_dim)?;

        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let (bias, rotated) = (family.qkv_bias, Some(config.head_dim));
        let attention = Attention {
            q: weights.linear(Part::Query(layer), [q_width, hidden], bias, rotated)?,
            k: weights.linear(Part::Key(layer), [kv_width, hidden], bias, rotated)?,
            v: weights.linear(Part::Value(layer), [kv_width, hidden], bias, None)?,
            output: weights.linear(Part::AttentionOutput(layer), [hidden, q_width], false, None)?,
            q_norm,
            k_norm,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            scale: f64::from(config.attention_scale),
        };
        let mlp = Mlp {
            gate: weights.linear(Part::Gate(layer), [config.mlp, hidden], false, None)?,
            up: weights.linear(Part::Up(layer), [config.mlp, hidden], false, None)?,
            down: weights.linear(Part::Down(layer), [hidden, config.mlp], false, None)?,
            activation: family.activation,
        };
        Ok(Self { attention_norm, attention, post_attention_norm, mlp_norm, mlp, post_mlp_norm })
    }
}
