//! The decoder of all families: embedding, blocks of attention and MLP, final norm, head.
//!
//! One path, f32 on the CPU: the reference that faster paths are held against. Shapes: T new tokens, S columns seen in
//! all, H heads, H_kv key-value heads, G = H / H_kv, D head dimension, C hidden width. No batch axis.
//!
//! The order of columns decides what comes before what; positions decide rotation and the reach of a window. So a cache
//! injected with a gap, or moved, is seen whole, as it would be by a model that had read it there.
//!
//! Papers: Llama (arXiv 2302.13971), RoPE (2104.09864), GQA (2305.13245), Qwen3 (2505.09388), Gemma 3 (2503.19786).

mod tracked;

pub(crate) use tracked::check_adapters;
pub use tracked::{Adapter, Adapters, Projection, TrackedCache};

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::{rms_norm, softmax_last_dim};
use candle_nn::rotary_emb::rope;

use super::config::{LayerConfig, ModelConfig};
use super::context::{Context, LayerBuffers};
use super::family::Activation;
use super::linear::Linear;
use super::names::Part;
use super::table::RowTable;
use super::weights::{WeightError, Weights};

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

/// The weights of a model, ready to run.
#[derive(Debug)]
pub(crate) struct Decoder {
    embedding: RowTable,
    blocks: Vec<Block>,
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
    epsilon: f32,
}

/// What the layers of one pass share.
struct Pass<'a, 'b> {
    /// For each distinct layer setting, its rotation table and mask.
    settings: Vec<Setting>,
    /// Which setting each layer has.
    setting_of: Vec<usize>,
    observer: Option<&'a mut Observer<'b>>,
}

struct Setting {
    layer: LayerConfig,
    /// `[T, D/2]` each.
    cosines: Tensor,
    sines: Tensor,
    /// `[T, S]`, 0 or -inf; None if every column is visible to every token.
    mask: Option<Tensor>,
}

impl Decoder {
    /// Runs `tokens` at `positions` after what `context` holds, and adds them to it.
    ///
    /// Callers have checked ids, positions and that both have the same length, at least 1.
    pub(crate) fn forward(
        &self,
        config: &ModelConfig,
        context: &mut Context,
        tokens: &[u32],
        positions: &[i64],
        logits: Logits,
        observer: Option<&mut Observer<'_>>,
    ) -> Result<Option<Tensor>> {
        let mut pass = Pass::new(config, &context.positions, positions, observer)?;
        let mut x = (self.embedding.lookup(tokens)? * self.embedding_scale)?;
        for (index, (block, buffers)) in self.blocks.iter().zip(&mut context.layers).enumerate() {
            x = block.forward(&x, index, buffers, &mut pass)?;
            pass.show(Tap::Residual, index, &x)?;
        }
        context.positions.extend_from_slice(positions);
        if let Some(known) = &mut context.tokens {
            known.extend_from_slice(tokens);
        }
        let x = match logits {
            Logits::None => return Ok(None),
            Logits::Last => x.narrow(0, tokens.len() - 1, 1)?,
            Logits::All => x,
        };
        let x = self.norm.forward(&x)?;
        self.head.as_ref().unwrap_or(&self.embedding).scores(&x).map(Some)
    }

    /// Size of the vocabulary.
    pub(crate) fn vocabulary(&self) -> usize {
        self.embedding.rows()
    }
}

impl Block {
    fn forward(&self, x: &Tensor, index: usize, buffers: &mut LayerBuffers, pass: &mut Pass<'_, '_>) -> Result<Tensor> {
        let branch = self.attention.forward(&self.attention_norm.forward(x)?, index, buffers, pass)?;
        let x = (x + Norm::optional(self.post_attention_norm.as_ref(), branch)?)?;
        let branch = self.mlp.forward(&self.mlp_norm.forward(&x)?)?;
        &x + Norm::optional(self.post_mlp_norm.as_ref(), branch)?
    }
}

impl Attention {
    /// `[T, C]` to `[T, C]`; K (rotated) and V of the new columns go into `buffers`.
    fn forward(&self, x: &Tensor, index: usize, buffers: &mut LayerBuffers, pass: &mut Pass<'_, '_>) -> Result<Tensor> {
        let (length, _) = x.dims2()?;
        let q = self.heads_of(&self.q.forward(x)?, self.heads, self.q_norm.as_ref())?;
        let k = self.heads_of(&self.k.forward(x)?, self.kv_heads, self.k_norm.as_ref())?;
        let v = self.heads_of(&self.v.forward(x)?, self.kv_heads, None)?;
        pass.show(Tap::KeyPlain, index, &k)?;
        let setting = pass.setting(index);
        let q = setting.rotate(&q)?;
        let k = setting.rotate(&k)?;
        buffers.append(&k, &v)?;
        let (all_k, all_v) = buffers.views()?;
        let columns = all_k.dim(1)?;

        // The G query heads of a key-value head follow each other, so [H, T, D] is [H_kv, G * T, D].
        let grouped = (self.kv_heads, self.heads / self.kv_heads * length, self.head_dim);
        let scores = (q.reshape(grouped)? * self.scale)?.matmul(&all_k.transpose(1, 2)?)?;
        let scores = scores.reshape((self.heads, length, columns))?;
        let scores = match &setting.mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        let probabilities = softmax_last_dim(&scores)?;
        pass.show(Tap::Key, index, &k)?;
        pass.show(Tap::Value, index, &v)?;
        pass.show(Tap::Attention, index, &probabilities)?;
        let mixed = probabilities.reshape((grouped.0, grouped.1, columns))?.matmul(&all_v)?;
        let mixed = mixed.reshape((self.heads, length, self.head_dim))?.transpose(0, 1)?;
        self.output.forward(&mixed.reshape((length, self.heads * self.head_dim))?)
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
    fn new(config: &ModelConfig, before: &[i64], new: &[i64], observer: Option<&'a mut Observer<'b>>) -> Result<Self> {
        let mut settings: Vec<Setting> = Vec::new();
        let mut setting_of = Vec::with_capacity(config.layers.len());
        for layer in &config.layers {
            let known = settings.iter().position(|setting| setting.layer == *layer);
            setting_of.push(known.unwrap_or(settings.len()));
            if known.is_none() {
                settings.push(Setting::new(layer, before, new)?);
            }
        }
        Ok(Self { settings, setting_of, observer })
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
    fn new(layer: &LayerConfig, before: &[i64], new: &[i64]) -> Result<Self> {
        let (cosines, sines) = layer.rope.table(new);
        let shape = (new.len(), layer.rope.frequencies.len());
        Ok(Self {
            layer: layer.clone(),
            cosines: Tensor::from_vec(cosines, shape, &Device::Cpu)?,
            sines: Tensor::from_vec(sines, shape, &Device::Cpu)?,
            mask: mask(layer.window, before, new)?,
        })
    }

    /// `[heads, T, D]`, each column turned to its position.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        rope(&x.unsqueeze(0)?, &self.cosines, &self.sines)?.squeeze(0)
    }
}

/// Column j is visible to new token i if it does not come later, and is less than `window` positions behind.
fn mask(window: Option<usize>, before: &[i64], new: &[i64]) -> Result<Option<Tensor>> {
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
    Tensor::from_vec(values, (new.len(), columns), &Device::Cpu).map(Some)
}

impl Decoder {
    /// Takes the weights of `config`'s family out of `weights`, which must hold no others.
    pub(crate) fn load(config: &ModelConfig, mut weights: Weights<'_>) -> std::result::Result<Self, WeightError> {
        let epsilon = config.epsilon;
        let blocks = (0..config.layers.len())
            .map(|layer| Block::load(config, &mut weights, layer))
            .collect::<std::result::Result<_, _>>()?;
        let decoder = Self {
            embedding: weights.embedding(config.hidden)?,
            blocks,
            norm: Norm { weight: weights.norm(Part::OutputNorm, config.hidden)?, epsilon },
            head: weights.head(config.hidden)?,
            embedding_scale: f64::from(config.embedding_scale),
        };
        weights.finish()?;
        Ok(decoder)
    }
}

impl Block {
    fn load(config: &ModelConfig, weights: &mut Weights<'_>, layer: usize) -> std::result::Result<Self, WeightError> {
        let (family, hidden, epsilon) = (config.family, config.hidden, config.epsilon);
        let mut norm = |part, size: usize| -> std::result::Result<Norm, WeightError> {
            Ok(Norm { weight: weights.norm(part, size)?, epsilon })
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
