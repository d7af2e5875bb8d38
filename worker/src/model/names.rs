//! What each weight is called, in each kind of file: the one place where names of tensors stand.
//!
//! Does not know which family has which weights: `decoder` asks for what its family uses.

use super::family::Family;

/// A weight of the decoder. Those of a layer come with the layer's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// `[vocabulary, C]`.
    Embedding,
    /// `[C]`.
    OutputNorm,
    /// `[vocabulary, C]`; absent where tied to the embedding.
    Head,
    /// `[D/2]`; in GGUF only, other files state the formula.
    RopeDivisors,
    /// `[C]`.
    AttentionNorm(usize),
    /// `[H * D, C]`.
    Query(usize),
    /// `[H_kv * D, C]`.
    Key(usize),
    /// `[H_kv * D, C]`.
    Value(usize),
    /// `[C, H * D]`.
    AttentionOutput(usize),
    /// `[D]`.
    QueryNorm(usize),
    /// `[D]`.
    KeyNorm(usize),
    /// `[C]`.
    PostAttentionNorm(usize),
    /// `[C]`.
    MlpNorm(usize),
    /// `[mlp, C]`.
    Gate(usize),
    /// `[mlp, C]`.
    Up(usize),
    /// `[C, mlp]`.
    Down(usize),
    /// `[C]`.
    PostMlpNorm(usize),
}

/// Whose names a file uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// llama.cpp's.
    Gguf,
    /// Those of Hugging Face's models.
    HuggingFace,
}

impl Part {
    /// The tensor's name without `.weight` or `.bias`.
    pub(crate) fn name(self, naming: Naming, family: &Family) -> String {
        // Gemma 3 has a norm behind attention, so there the norm before the MLP goes by another name.
        let mlp_norm = if family.post_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        let (gguf, hugging_face, layer) = match self {
            Self::Embedding => ("token_embd", "model.embed_tokens", None),
            Self::OutputNorm => ("output_norm", "model.norm", None),
            Self::Head => ("output", "lm_head", None),
            Self::RopeDivisors => ("rope_freqs", "rope_freqs", None),
            Self::AttentionNorm(layer) => ("attn_norm", "input_layernorm", Some(layer)),
            Self::Query(layer) => ("attn_q", "self_attn.q_proj", Some(layer)),
            Self::Key(layer) => ("attn_k", "self_attn.k_proj", Some(layer)),
            Self::Value(layer) => ("attn_v", "self_attn.v_proj", Some(layer)),
            Self::AttentionOutput(layer) => ("attn_output", "self_attn.o_proj", Some(layer)),
            Self::QueryNorm(layer) => ("attn_q_norm", "self_attn.q_norm", Some(layer)),
            Self::KeyNorm(layer) => ("attn_k_norm", "self_attn.k_norm", Some(layer)),
            Self::PostAttentionNorm(layer) => ("post_attention_norm", "post_attention_layernorm", Some(layer)),
            Self::MlpNorm(layer) => ("ffn_norm", mlp_norm, Some(layer)),
            Self::Gate(layer) => ("ffn_gate", "mlp.gate_proj", Some(layer)),
            Self::Up(layer) => ("ffn_up", "mlp.up_proj", Some(layer)),
            Self::Down(layer) => ("ffn_down", "mlp.down_proj", Some(layer)),
            Self::PostMlpNorm(layer) => ("post_ffw_norm", "post_feedforward_layernorm", Some(layer)),
        };
        match (naming, layer) {
            (Naming::Gguf, None) => gguf.to_owned(),
            (Naming::Gguf, Some(layer)) => format!("blk.{layer}.{gguf}"),
            (Naming::HuggingFace, None) => hugging_face.to_owned(),
            (Naming::HuggingFace, Some(layer)) => format!("model.layers.{layer}.{hugging_face}"),
        }
    }
}
