//! A cache packet: one safetensors file whose `__metadata__` carries a [`PacketHeader`] as JSON under [`METADATA_KEY`].
//!
//! Tensors are `layer.{i}.k` and `layer.{i}.v`, each `[H, T, D]`, row-major, RoPE pairs `(i, i + D/2)`, in layer order. Any
//! safetensors reader opens it. Here is the header and the check that a file's claims agree; tensors are the worker's.

use serde::{Deserialize, Serialize};

/// Key of the header in the safetensors metadata.
pub const METADATA_KEY: &str = "bonepile.packet";
/// Version of the header.
pub const FORMAT: u32 = 1;

/// What a receiver must know about a cache before it injects it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PacketHeader {
    /// [`FORMAT`].
    pub format: u32,
    /// `sha256:…` of the weights that made it: a cache fits no other file, not even another quantisation.
    pub model_fingerprint: String,
    /// `llama`, `gemma3`, ….
    pub architecture: String,
    /// Layers of the model.
    pub model_layers: u32,
    /// Layers in this packet, ascending.
    pub layers: Vec<u32>,
    /// Key-value heads.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// `F32` or `F16`.
    pub dtype: String,
    /// `true`: keys carry RoPE for their positions. `false`: as before RoPE.
    pub rotated: bool,
    /// RoPE of each layer in this packet.
    pub rope: Vec<RopeFacts>,
    /// Sliding window of each layer in this packet, positions; `None`: full attention.
    pub sliding_window: Vec<Option<u32>>,
    /// Position of each token.
    pub positions: Vec<i64>,
    /// Token ids, one a position.
    pub token_ids: Vec<u32>,
    /// How many of the last tokens were generated rather than read.
    pub generated: u32,
    /// Where each token stands in its text, [begin, end) in bytes; equal for tokens that are no text. Empty where not known.
    #[serde(default)]
    pub spans: Vec<(u32, u32)>,
    /// What the source says about it, in a form that the two seats agree on; mostly empty.
    #[serde(default)]
    pub note: String,
}

/// RoPE of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeFacts {
    /// Base θ.
    pub base: f64,
    /// Dimensions rotated.
    pub dims: u32,
    /// Divisor of every frequency (linear scaling); 1 if none.
    pub linear_factor: f64,
    /// Divisors a frequency (`rope_freqs`), empty if none.
    pub divisors: Vec<f32>,
}
