//! Training by sums: the source's seat sends caches, the target's makes sums of them, and one shard solves.
//!
//! The source sends its cache of each sample under [`sample_key`], un-rotated, with where its tokens stand in the text. The
//! target reads the same samples itself, in the same order, and holds one pair of caches at a time. Which samples belong to a
//! shard is all that a shard is told, so any shards in any order make one sum.

use protocol::experiment::projector::{Method, Samples, TrainSpec};
use protocol::results::StatisticsResult;

use crate::cache::KvCache;
use crate::experiment::transfer::{Emit, Fetch, Sent};
use crate::experiment::{ExperimentError, Progress, model_facts};
use crate::model::Model;
use crate::projector::align::layers;
use crate::projector::corpus::{Corpus, places};
use crate::projector::file::Side;
use crate::projector::reading::Reading;
use crate::projector::ridge::statistics::{Accumulator, Pair, Statistics, StatisticsManifest, range, training_hash};
use crate::projector::{Alignment, ProjectorError};

pub use crate::projector::ridge::solve::{Solved, solve};

/// Name of a sample's packet, by its place: `sample-17`.
pub fn sample_key(place: u64) -> String {
    format!("sample-{place}")
}

/// Names of all packets that the source sends, in that order.
pub fn sample_keys(samples: &Samples) -> Vec<String> {
    places(samples).map(sample_key).collect()
}

/// The source's half: its cache of each sample's text.
///
/// # Errors
/// What the corpus or `emit` says, or what failed in the model.
pub fn make_caches(
    model: &Model,
    corpus: &Corpus,
    samples: &Samples,
    emit: &mut Emit<'_>,
    progress: &mut Progress<'_>,
) -> Result<Sent, ExperimentError> {
    let mut sent = Sent::default();
    for (done, sample) in (0..).zip(corpus.range(samples)) {
        let (place, sample) = sample?;
        progress(done, samples.count, &format!("sample {} of {}", done + 1, samples.count))?;
        let cache = Reading::of_sample(model.tokenizer(), &sample)?.cache(model)?;
        sent.packets += 1;
        sent.tokens += cache.len() as u64;
        emit(&sample_key(place), &cache)?;
    }
    progress(samples.count, samples.count, "done")?;
    Ok(sent)
}

/// The alignment of the target's tokens with those of a source's cache, which must know where its tokens stand.
///
/// # Errors
/// [`ProjectorError::Alignment`].
pub fn align(target: &Reading, source: &KvCache) -> Result<Alignment, ProjectorError> {
    let what = "the source's cache does not say where its tokens stand".to_owned();
    let spans = source.spans().ok_or(ProjectorError::Alignment { what })?;
    Alignment::by_spans(&target.spans, spans)
}

/// The target's half: sums over samples. `fetch` gives the source's caches by [`sample_key`].
///
/// # Errors
/// [`ExperimentError::BadSpec`] for another method, no samples, or a corpus of one sample, which cannot be shuffled; what the
/// corpus or `fetch` says; caches of different sources.
pub fn statistics(
    model: &Model,
    spec: &TrainSpec,
    corpus: &Corpus,
    samples: &Samples,
    fetch: &mut Fetch<'_>,
    progress: &mut Progress<'_>,
) -> Result<(Statistics, StatisticsResult), ExperimentError> {
    let bad = |what: &str| ExperimentError::BadSpec { what: what.to_owned() };
    let Method::Ridge(recipe) = &spec.method else { return Err(bad("sums are made for a ridge projector")) };
    if !(5..=50).contains(&recipe.held_out_percent) {
        return Err(bad("between 5 and 50 percent of the groups can be held out"));
    }
    if samples.count == 0 || corpus.len() < 2 {
        return Err(bad("sums need samples, and their control a corpus of two or more"));
    }
    let mut sums: Option<Accumulator> = None;
    let mut ahead: Option<(u64, KvCache)> = None;
    for (done, sample) in (0..).zip(corpus.range(samples)) {
        let (place, sample) = sample?;
        progress(done, samples.count, &format!("sample {} of {}", done + 1, samples.count))?;
        let reading = Reading::of_sample(model.tokenizer(), &sample)?;
        let target = match ahead.take() {
            Some((known, cache)) if known == place => cache,
            _ => reading.clone().cache(model)?,
        };
        let next = next_in_epoch(place, corpus.len());
        let other = Reading::of_sample(model.tokenizer(), &corpus.at(next)?)?.cache(model)?;
        let source = fetch(&sample_key(place))?.unrotated();
        let alignment = align(&reading, &source)?;
        let sums = match &mut sums {
            Some(sums) => sums,
            None => sums.insert(Accumulator::new(
                StatisticsManifest {
                    training: training_hash(spec),
                    source: Side::of(source.layout()),
                    target: Side::of(model.layout()),
                    layers: layers(&spec.layers, source.layout(), model.layout())?,
                    corpus: corpus.hash().to_owned(),
                    samples: vec![range(samples)],
                },
                recipe.held_out_percent,
            )),
        };
        let group = sample.group;
        sums.add(&Pair { source: &source, target: &target, alignment: &alignment, other: &other, group })?;
        ahead = Some((next, other));
    }
    let sums = sums.expect("there are samples").finish();
    progress(samples.count, samples.count, "done")?;
    let result = StatisticsResult {
        target: model_facts(model, &spec.target),
        samples: samples.count,
        rows: sums.rows(),
        rows_held_out: sums.rows_held_out(),
    };
    Ok((sums, result))
}

/// Whose target the control pairs with the sample at `place`: the next one of the epoch, and the first behind the last.
fn next_in_epoch(place: u64, samples: u64) -> u64 {
    place / samples * samples + (place % samples + 1) % samples
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_control_never_pairs_a_sample_with_itself_and_uses_each_once() {
        for samples in 2..9 {
            for epoch in 0..3 {
                let places: Vec<u64> = (epoch * samples..(epoch + 1) * samples).collect();
                let mut others: Vec<u64> = places.iter().map(|place| next_in_epoch(*place, samples)).collect();
                assert!(places.iter().zip(&others).all(|(place, other)| place != other));
                others.sort_unstable();
                assert_eq!(others, places);
            }
        }
    }
}
