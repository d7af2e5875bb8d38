//! Cache inspection: what a model's cache looks like, and that it is what we think.
//!
//! Prefills courier facts and describes each layer's keys and values. Three checks come with the description: the bytes
//! of the storage against the formula, the same text computed twice, and logits after the cache went through a packet.
//! Statistics of keys are taken before RoPE and without the first token; ranks use one number of tokens for all texts.

use protocol::experiment::{InspectSpec, LayerSelection};
use protocol::results::{EffectiveRank, InspectResult, LayerProfile, TensorStats};

use super::error::ExperimentError;
use super::facts::Fact;
use super::{Progress, model_facts};
use crate::cache::KvCache;
use crate::cache::stats::LayerStats;
use crate::model::{Model, argmax};

/// Texts that one shard prefills at most.
const TEXTS_MAX: u32 = 256;

/// What one text contributes.
struct Inspected {
    cache: KvCache,
    reload_logit_max_abs: f64,
    recompute_max_abs: f64,
}

/// Runs an inspection.
///
/// # Errors
/// [`ExperimentError::BadSpec`] for no texts, too many, or a selection without layers; otherwise what failed.
pub fn inspect(
    model: &Model,
    spec: &InspectSpec,
    progress: &mut Progress<'_>,
) -> Result<InspectResult, ExperimentError> {
    if spec.texts == 0 || spec.texts > TEXTS_MAX {
        let what = format!("{} texts are asked for, 1 to {TEXTS_MAX} are possible", spec.texts);
        return Err(ExperimentError::BadSpec { what });
    }
    let layers = selected(model, spec.layers)?;
    let mut inspected = Vec::new();
    for index in 0..spec.texts {
        progress(index, spec.texts, &format!("text {} of {}", index + 1, spec.texts))?;
        inspected.push(inspect_text(model, &Fact::new(spec.seed, index)?.text(), &layers)?);
    }
    // The same number of tokens for every text, or ranks could not be compared.
    let rank_tokens = inspected.iter().map(|text| text.cache.len() - 1).min().expect("there is a text");
    let stats: Vec<Vec<LayerStats>> =
        inspected.iter().map(|text| text.cache.stats(rank_tokens)).collect::<Result<_, _>>()?;
    let tokens: usize = inspected.iter().map(|text| text.cache.len()).sum();
    let largest = |measure: fn(&Inspected) -> f64| inspected.iter().map(measure).fold(0.0, f64::max);
    progress(spec.texts, spec.texts, "done")?;
    Ok(InspectResult {
        model: model_facts(model, &spec.model),
        texts: spec.texts,
        tokens: tokens as u64,
        bytes_per_token_measured: storage_bytes(&inspected) as f64 / tokens as f64,
        bytes_per_token_formula: formula_bytes(model, layers.len()),
        reload_logit_max_abs: largest(|text| text.reload_logit_max_abs),
        recompute_max_abs: largest(|text| text.recompute_max_abs),
        profile: profile(model, &inspected[0].cache, &stats),
    })
}

/// The layers that a selection means in this model.
fn selected(model: &Model, selection: LayerSelection) -> Result<Vec<usize>, ExperimentError> {
    let layers = model.config().layers.iter().enumerate();
    let wanted = layers.filter(|(_, layer)| match selection {
        LayerSelection::All => true,
        LayerSelection::Full => layer.window.is_none(),
        LayerSelection::Sliding => layer.window.is_some(),
    });
    let wanted: Vec<usize> = wanted.map(|(index, _)| index).collect();
    if wanted.is_empty() {
        let what = format!("layers = \"{selection}\" selects none of this model's layers");
        return Err(ExperimentError::BadSpec { what });
    }
    Ok(wanted)
}

fn inspect_text(model: &Model, text: &str, layers: &[usize]) -> Result<Inspected, ExperimentError> {
    let ids = model.tokenizer().encode_start(text)?;
    let mut context = model.start()?;
    let logits = model.prefill(&mut context, &ids)?;
    let cache = model.extract(&context)?;

    let mut again = model.start()?;
    model.prefill(&mut again, &ids)?;
    let recompute_max_abs = values_max_abs(&cache, &model.extract(&again)?);

    // What follows a cache from a packet must equal what follows the cache in place.
    let next = [argmax(&logits)];
    let reloaded = KvCache::from_bytes(&cache.to_bytes(), model.layout())?;
    let there = model.prefill(&mut model.inject(&reloaded)?, &next)?;
    let here = model.prefill(&mut context, &next)?;
    let cache = cache.select_layers(layers)?;
    Ok(Inspected { cache, reload_logit_max_abs: max_abs(&here, &there), recompute_max_abs })
}

fn values_max_abs(a: &KvCache, b: &KvCache) -> f64 {
    let pairs = a.layers().zip(b.layers());
    pairs.map(|((_, x), (_, y))| max_abs(&x.k, &y.k).max(max_abs(&x.v, &y.v))).fold(0.0, f64::max)
}

/// Largest difference of corresponding numbers.
pub(super) fn max_abs(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).abs()).fold(0.0, f64::max)
}

fn storage_bytes(inspected: &[Inspected]) -> usize {
    let layers = inspected.iter().flat_map(|text| text.cache.layers());
    layers.map(|(_, layer)| size_of_val(&layer.k[..]) + size_of_val(&layer.v[..])).sum()
}

/// 2 x layers x H_kv x D x 4.
fn formula_bytes(model: &Model, layers: usize) -> u64 {
    let config = model.config();
    (2 * layers * config.kv_heads * config.head_dim * size_of::<f32>()) as u64
}

/// One row a layer, averaged over texts.
fn profile(model: &Model, first: &KvCache, stats: &[Vec<LayerStats>]) -> Vec<LayerProfile> {
    let number = |value: usize| u32::try_from(value).expect("sizes of models and texts fit 32 bits");
    let config = model.config();
    let row = |place: usize| {
        let layer = stats[0][place].layer;
        let of = |tensor: fn(&LayerStats) -> &TensorStats| {
            mean(&stats.iter().map(|text| tensor(&text[place])).collect::<Vec<_>>())
        };
        LayerProfile {
            layer: number(layer),
            sliding_window: config.layers[layer].window.map(number),
            shape: [config.kv_heads, first.len(), config.head_dim].map(number),
            key: of(|stats| &stats.key),
            value: of(|stats| &stats.value),
        }
    };
    (0..stats[0].len()).map(row).collect()
}

/// Each field's mean over texts.
fn mean(stats: &[&TensorStats]) -> TensorStats {
    let of = |field: fn(&TensorStats) -> f64| stats.iter().map(|one| field(one)).sum::<f64>() / stats.len() as f64;
    TensorStats {
        norm_mean: of(|one| one.norm_mean),
        norm_sd: of(|one| one.norm_sd),
        sink_ratio: of(|one| one.sink_ratio),
        mean: of(|one| one.mean),
        sd: of(|one| one.sd),
        kurtosis: of(|one| one.kurtosis),
        rank: EffectiveRank {
            tokens: stats[0].rank.tokens,
            energy_90: of(|one| one.rank.energy_90),
            entropy: of(|one| one.rank.entropy),
            participation: of(|one| one.rank.participation),
            stable: of(|one| one.rank.stable),
        },
    }
}
