//! What bonepile's coordinator and workers agree on.
//!
//! Pure by default: no tokio, no quinn, no candle, no SQLite. Optional features add what both sides would otherwise write
//! twice: `quic` (endpoint settings, certificates, framed streams), `models` (the models on a box, bringing known ones) and
//! `hub` (bringing others from Hugging Face's hub).
//!
//! Layout:
//! - [`ids`], [`time`], [`limits`], [`error`]: the words everything else is made of.
//! - [`experiment`], [`sweep`], [`results`]: what researchers submit and what they get.
//! - [`hardware`], [`catalogue`], [`model_name`]: devices, the models and cards known by name, and how any model is named.
//! - [`memory`]: what a model takes on a device, phase by phase.
//! - [`frame`], [`control`], [`peer`], [`exec`]: the three conversations and their one codec.
//! - [`packet`]: a cache on the wire or on disk.
//! - [`identity`]: roles, join tokens, names in certificates. [`private_file`]: where their secrets lie.
//! - [`store`]: the results store: layout, manifests, publishing, checking.
//! - [`config`]: `cluster.toml`. [`source`]: reading TOML with errors that point into the text.

pub mod catalogue;
pub mod config;
pub mod control;
pub mod error;
pub mod exec;
pub mod experiment;
pub mod frame;
pub mod group;
pub mod hardware;
pub mod identity;
pub mod ids;
pub mod limits;
pub mod memory;
pub mod model_name;
#[cfg(feature = "models")]
pub mod models;
pub mod packet;
pub mod peer;
pub mod private_file;
#[cfg(feature = "quic")]
pub mod quic;
pub mod results;
pub mod size;
pub mod source;
pub mod store;
pub mod sweep;
pub mod time;

/// Version of this build, as it appears in manifests and greetings: the package version and the source commit if known.
pub const BUILD: &str = match option_env!("BONEPILE_COMMIT") {
    Some(commit) => commit,
    None => env!("CARGO_PKG_VERSION"),
};
