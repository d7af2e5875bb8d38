//! The sizes of a model on which memory depends.

use serde::{Deserialize, Serialize};

use super::{product, sum};

/// Sizes of a decoder of the Llama kind: grouped-query attention, and an MLP with gate, up and down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// L.
    pub layers: u32,
    /// C, the width of the residual stream.
    pub hidden: u32,
    /// H, query heads.
    pub heads: u32,
    /// J, key-value heads.
    pub kv_heads: u32,
    /// D, the dimension of a head. H · D need not be C.
    pub head_dim: u32,
    /// F, the width of the MLP.
    pub ffn: u32,
    /// V, rows of the embedding.
    pub vocabulary: u32,
    /// The output head is the embedding.
    pub tied: bool,
    /// Layers that see only a window.
    pub sliding_layers: u32,
    /// Columns that those layers see. Executors keep all columns, so it changes masks, not caches.
    pub window: Option<u32>,
    /// Positions that the model was made for.
    pub context_length: u32,
    /// What the model's own file holds, if there is one.
    pub stored: Option<StoredBytes>,
}

/// Bytes of a model's weights as its file holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBytes {
    /// All tensors.
    pub all: u64,
    /// Embedding and head.
    pub tables: u64,
}

impl ModelShape {
    /// A model without windows and without a file.
    #[must_use]
    pub const fn new(
        [layers, hidden, heads, kv_heads, head_dim, ffn]: [u32; 6],
        vocabulary: u32,
        tied: bool,
        context_length: u32,
    ) -> Self {
        let (sliding_layers, window, stored) = (0, None, None);
        Self {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn,
            vocabulary,
            tied,
            sliding_layers,
            window,
            context_length,
            stored,
        }
    }

    /// The same with sliding layers.
    #[must_use]
    pub const fn sliding(mut self, layers: u32, window: u32) -> Self {
        (self.sliding_layers, self.window) = (layers, Some(window));
        self
    }

    /// The same with a file.
    #[must_use]
    pub const fn stored(mut self, all: u64, tables: u64) -> Self {
        self.stored = Some(StoredBytes { all, tables });
        self
    }

    /// Whether the sizes could be a model's: none is zero, none beyond what executors load. Others are refused where they come
    /// from a peer.
    pub fn is_plausible(&self) -> bool {
        let within = |size: u32, bits: u32| size > 0 && size <= 1 << bits;
        within(self.layers, 10)
            && within(self.hidden, 20)
            && within(self.heads, 12)
            && within(self.kv_heads, 12)
            && within(self.head_dim, 10)
            && within(self.ffn, 22)
            && within(self.vocabulary, 24)
            && within(self.context_length, 30)
            && self.sliding_layers <= self.layers
            && self.heads.is_multiple_of(self.kv_heads)
            && self.stored.is_none_or(|stored| stored.tables <= stored.all && stored.all < 1 << 50)
    }

    /// H · D.
    pub fn q_width(&self) -> u64 {
        u64::from(self.heads) * u64::from(self.head_dim)
    }

    /// J · D: width of the keys of one token in one layer, and of its values.
    pub fn kv_width(&self) -> u64 {
        u64::from(self.kv_heads) * u64::from(self.head_dim)
    }

    /// Weights of the matrices of all layers: L · (2 C (H + J) D + 3 C F).
    pub fn projections(&self) -> u64 {
        product(&[u64::from(self.layers), self.layer_projections()])
    }

    /// The same of one layer.
    pub fn layer_projections(&self) -> u64 {
        let (hidden, ffn) = (u64::from(self.hidden), u64::from(self.ffn));
        hidden * (2 * self.q_width() + 2 * self.kv_width()) + 3 * hidden * ffn
    }

    /// Weights of the embedding: V · C.
    pub fn embedding(&self) -> u64 {
        u64::from(self.vocabulary) * u64::from(self.hidden)
    }

    /// Weights of embedding and head; once if they are one.
    pub fn tables(&self) -> u64 {
        if self.tied { self.embedding() } else { 2 * self.embedding() }
    }

    /// Weights of norms: C, twice a layer and once behind the last. Biases, and norms of single heads, are left out: less
    /// than 0.1 % of any model.
    pub fn norms(&self) -> u64 {
        (2 * u64::from(self.layers) + 1) * u64::from(self.hidden)
    }

    /// All weights.
    pub fn parameters(&self) -> u64 {
        sum(&[self.projections(), self.tables(), self.norms()])
    }

    /// Numbers that keys and values of one token take in all layers: 2 L J D.
    pub fn kv_numbers_per_token(&self) -> u64 {
        product(&[2, u64::from(self.layers), self.kv_width()])
    }

    /// Kinds of layers that a pass makes rotations and masks for.
    pub(super) fn settings(&self) -> u64 {
        1 + u64::from(self.sliding_layers > 0 && self.sliding_layers < self.layers)
    }
}
