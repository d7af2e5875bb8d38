//! The KV cache as a value: plain numbers with positions, independent of any running model.
//!
//! Every operation gives a new cache; none needs the model, because a cache carries its layout (which model, how each
//! layer rotates). Does not talk to the network: `packet` makes bytes of a cache and refuses bytes that do not fit.
//!
//! Layout:
//! - [`value`]: [`KvCache`], its parts, slices and joins; [`layout`]: what makes two caches compatible.
//! - [`rebase`]: moving a cache to other positions.
//! - [`packet`]: to and from a safetensors file.
//! - [`stats`]: norms, moments, effective ranks; [`noise`]: controls that match a cache's statistics.

pub mod error;
pub mod layout;
pub mod noise;
pub mod packet;
pub mod rebase;
pub mod stats;
pub mod value;

pub use error::CacheError;
pub use layout::CacheLayout;
pub use noise::Matched;
pub use value::{KvCache, LayerKv, Part};
