//! What a cache looks like and which model it belongs to: the part that all caches of one model share.

use super::error::CacheError;
use crate::model::config::{LayerConfig, ModelConfig};

/// The shape of a model's caches. Two caches can be mixed exactly if their layouts are equal.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheLayout {
    /// `sha256:` and the digest of the weights' file.
    pub fingerprint: String,
    /// `general.architecture` of the file.
    pub architecture: &'static str,
    /// Rotation and window of each layer of the model.
    pub layers: Vec<LayerConfig>,
    /// H_kv.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
}

impl CacheLayout {
    /// The layout of the model with these settings and fingerprint.
    pub fn new(config: &ModelConfig, fingerprint: String) -> Self {
        Self {
            fingerprint,
            architecture: config.family.architecture,
            layers: config.layers.clone(),
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        }
    }

    /// Numbers in K (and as many in V) of one layer with `columns` columns.
    pub fn layer_len(&self, columns: usize) -> usize {
        self.kv_heads * columns * self.head_dim
    }

    /// Refuses a cache of layout `other`.
    ///
    /// # Errors
    /// [`CacheError::Fingerprint`] or [`CacheError::Layout`].
    pub fn accept(&self, other: &Self) -> Result<(), CacheError> {
        if self.fingerprint != other.fingerprint {
            return Err(CacheError::Fingerprint { expected: self.fingerprint.clone(), got: other.fingerprint.clone() });
        }
        let check = |what: &str, expected: String, got: String| {
            if expected == got { Ok(()) } else { Err(CacheError::Layout { what: what.to_owned(), expected, got }) }
        };
        check("the architecture", self.architecture.to_owned(), other.architecture.to_owned())?;
        check("the number of layers", self.layers.len().to_string(), other.layers.len().to_string())?;
        check("the number of heads", self.kv_heads.to_string(), other.kv_heads.to_string())?;
        check("the head dimension", self.head_dim.to_string(), other.head_dim.to_string())?;
        if self.layers != other.layers {
            return Err(CacheError::Mismatch { what: "rotation or window of a layer" });
        }
        Ok(())
    }
}
