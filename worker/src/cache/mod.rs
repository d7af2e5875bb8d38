//! The KV cache as a value: plain numbers with positions, independent of any running model.
//!
//! Every operation gives a new cache; none needs the model, because a cache carries its layout (which model, how each
//! layer rotates). Does not talk to the network: `packet` makes bytes of a cache and refuses bytes that do not fit.
//!
//! Layout:
//! - [`value`]: [`KvCache`], its parts, slices and joins; [`layout`]: what makes two caches compatible.
//! - [`rebase`]: moving a cache to other positions.
//! - [`packet`]: to and from a safetensors file.
//! - [`mix`]: caches between two caches; [`packed`]: caches in few bits; [`drift`]: how far two lie apart.
//! - [`stats`]: norms, moments, effective ranks; [`noise`]: controls that match a cache's statistics.

pub mod drift;
pub mod error;
pub mod layout;
pub mod mix;
pub mod noise;
pub mod packed;
pub mod packet;
pub mod rebase;
pub mod stats;
pub mod value;

pub use error::CacheError;
pub use layout::CacheLayout;
pub use mix::Path;
pub use noise::Matched;
pub use packed::{PackedCache, Packing};
pub use value::{KvCache, LayerKv, Part, Span};
