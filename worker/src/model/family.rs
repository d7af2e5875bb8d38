//! What tells one model family from another: data, not code paths.
//!
//! One decoder serves them all; a row of [`FAMILIES`] says which optional parts it uses. Values that a file states
//! (sizes, RoPE base, window) are not here: they are read in `config`.

/// The gate's nonlinearity in the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x).
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

/// The traits of a family that its files do not state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// `general.architecture`, and the prefix of its keys.
    pub architecture: &'static str,
    /// GGUF files store rows of q and k for rotation of adjacent pairs (2i, 2i + 1); put back to halves at load.
    pub permuted: bool,
    /// What files in Hugging Face's layout leave out of the factors of their norms.
    pub norm_offset: f32,
    /// q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// q and k are RMS-normed over the head dimension before RoPE.
    pub qk_norm: bool,
    /// Attention and MLP branches are RMS-normed once more before they join the residual stream.
    pub post_norms: bool,
    /// The gate's nonlinearity.
    pub activation: Activation,
    /// Embeddings are multiplied by sqrt(hidden).
    pub scaled_embedding: bool,
    /// Every how many layers one sees everything, if the file has a window and no pattern. 0: the window is for all.
    pub window_pattern: usize,
    /// RoPE base of layers with a window, where the file does not state one. None: as the other layers.
    pub local_rope_base: Option<f64>,
}

/// The families we run. Sources: the published architectures and llama.cpp's loader for the same files.
pub const FAMILIES: [Family; 4] =
    [LLAMA, Family { architecture: "qwen2", permuted: false, qkv_bias: true, ..LLAMA }, QWEN3, GEMMA3];

/// Llama 1 to 3, SmolLM, TinyLlama, Mistral.
const LLAMA: Family = Family {
    architecture: "llama",
    permuted: true,
    norm_offset: 0.0,
    qkv_bias: false,
    qk_norm: false,
    post_norms: false,
    activation: Activation::Silu,
    scaled_embedding: false,
    window_pattern: 0,
    local_rope_base: None,
};

const QWEN3: Family = Family { architecture: "qwen3", permuted: false, qk_norm: true, ..LLAMA };

const GEMMA3: Family = Family {
    architecture: "gemma3",
    permuted: false,
    norm_offset: 1.0,
    qk_norm: true,
    post_norms: true,
    activation: Activation::GeluTanh,
    scaled_embedding: true,
    window_pattern: 6,
    local_rope_base: Some(1e4),
    ..LLAMA
};

/// The family of that architecture name.
pub fn family(architecture: &str) -> Option<Family> {
    FAMILIES.into_iter().find(|family| family.architecture == architecture)
}
