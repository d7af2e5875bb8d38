//! Sums to weights on made-up caches, where the right answer is known.

use std::sync::Arc;

use protocol::experiment::Spread;
use protocol::experiment::projector::{Corpus, CorpusText, Couriers, LayerMap, Method, RidgeRecipe, Stage, TrainSpec};

use super::solve::{Solved, solve};
use super::statistics::{Accumulator, Pair, Statistics, StatisticsManifest, training_hash};
use crate::cache::{CacheLayout, KvCache, LayerKv};
use crate::projector::align::layers;
use crate::projector::file::Side;
use crate::projector::testing::{cache, layout, spans};
use crate::projector::{Alignment, Projector, ProjectorError, rows};

const SAMPLES: u32 = 40;

fn spec(seed: u64) -> TrainSpec {
    TrainSpec {
        source: "deep".to_owned(),
        target: "shallow".to_owned(),
        corpus: Corpus {
            text: CorpusText::Couriers(Couriers { values: 8, names: 8, wordings: 1, pairs_percent: 0 }),
            samples: SAMPLES,
        },
        layers: LayerMap::Proportional(2),
        method: Method::Ridge(RidgeRecipe { lambdas: vec![1e-6, 1e-2, 1.0], held_out_percent: 20 }),
        stage: Stage::Whole { shards: 1 },
        spread: Spread::Any,
        seed,
    }
}

/// Two models of which one's caches are a linear map of the other's: layer n of the target is the first source layer of its
/// list, keys and values exchanged, keys negated, and 3 added to values.
struct Models {
    source: Arc<CacheLayout>,
    target: Arc<CacheLayout>,
    map: Vec<Vec<usize>>,
}

impl Models {
    fn new() -> Self {
        let (source, target) = (Arc::new(layout("deep", 4)), Arc::new(layout("shallow", 2)));
        let map = layers(&spec(0).layers, &source, &target).unwrap();
        Self { source, target, map }
    }

    /// Both caches of a sample: source tokens are pairs of target tokens.
    fn caches(&self, sample: u32) -> (KvCache, KvCache, Alignment) {
        let columns = 4 + sample as usize % 5;
        let source = cache(&self.source, columns, u64::from(sample));
        let target_spans: Vec<_> = (0..columns as u32).flat_map(|at| [(at, at + 1), (at, at + 1)]).collect();
        let alignment = Alignment::by_spans(&target_spans, &spans(columns)).unwrap();
        let layers = self.map.iter().enumerate().map(|(index, list)| {
            let layer = source.layer(list[0]).unwrap();
            let pick = |values: &[f32], change: fn(f32) -> f32| {
                let rows = rows::of_tensor(values, alignment.columns(), columns, 4);
                rows::to_tensor(&rows.into_iter().map(change).collect::<Vec<_>>(), 2 * columns, 4)
            };
            (index, LayerKv { k: pick(&layer.v, |value| -value), v: pick(&layer.k, |value| value + 3.0) })
        });
        let positions = (0..2 * columns as i64).collect();
        let target = KvCache::new(Arc::clone(&self.target), layers, positions, None, false).unwrap();
        (source, target, alignment)
    }

    fn sums(&self, spec: &TrainSpec, first: u32, count: u32) -> Statistics {
        let manifest = StatisticsManifest {
            training: training_hash(spec),
            source: Side::of(&self.source),
            target: Side::of(&self.target),
            layers: self.map.clone(),
            corpus: "blake3:00".to_owned(),
            samples: vec![(u64::from(first), count)],
        };
        let mut sums = Accumulator::new(manifest, 20);
        for sample in first..first + count {
            let (source, target, alignment) = self.caches(sample);
            let (_, other, _) = self.caches((sample + 1) % SAMPLES);
            let group = u64::from(sample / 2);
            let pair = Pair { source: &source, target: &target, alignment: &alignment, other: &other, group };
            sums.add(&pair).unwrap();
        }
        sums.finish()
    }
}

fn solved(parts: Vec<Statistics>) -> Solved {
    solve(&Statistics::merge(parts).unwrap(), &spec(1)).unwrap()
}

/// Largest difference of two projectors' weights.
fn apart(a: &Projector, b: &Projector) -> f32 {
    let tensors = |projector: &Projector| -> Vec<f32> {
        let layers = projector.as_ridge().unwrap().layers.iter();
        layers.flat_map(|layer| layer.weight.iter().chain(&layer.bias).copied()).collect()
    };
    let (a, b) = (tensors(a), tensors(b));
    assert_eq!(a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_linear_map_is_found_and_shuffled_pairs_teach_nothing() {
    let models = Models::new();
    let solved = solved(vec![models.sums(&spec(1), 0, SAMPLES)]);
    assert!(
        solved.result.layers.iter().all(|fit| fit.r2_key > 0.999 && fit.r2_value > 0.999 && fit.lambda_key == 1e-6)
    );
    let (source, target, alignment) = models.caches(999);
    let own = target.slice_tokens(0..1).unwrap();
    let error = |projector: &Projector| {
        let projected = projector.project(&source, &alignment, &own).unwrap();
        assert_eq!((projected.positions(), projected.is_rotated()), (target.positions(), false));
        let far = |layer: usize| {
            let (a, b) = (projected.layer(layer).unwrap(), target.layer(layer).unwrap());
            // The first token is the target's own, bit for bit.
            assert_eq!((&a.k[..4], &a.v[..4]), (&b.k[..4], &b.v[..4]));
            a.k.iter().zip(&b.k).chain(a.v.iter().zip(&b.v)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        far(0).max(far(1))
    };
    assert!(error(&solved.projector) < 1e-3, "{}", error(&solved.projector));
    assert!(error(&solved.shuffled) > 1.0, "{}", error(&solved.shuffled));
}

#[test]
fn one_two_and_five_shards_in_any_order_make_one_projector() {
    let models = Models::new();
    let whole = solved(vec![models.sums(&spec(1), 0, SAMPLES)]);
    let cuts: [&[(u32, u32)]; 4] = [
        &[(0, 20), (20, 20)],
        &[(13, 27), (0, 13)],
        &[(0, 8), (8, 8), (16, 8), (24, 8), (32, 8)],
        &[(39, 1), (11, 20), (31, 8), (0, 1), (1, 10)],
    ];
    for cut in cuts {
        let parts = cut.iter().map(|(first, count)| models.sums(&spec(1), *first, *count)).collect();
        let other = solved(parts);
        assert!(apart(&whole.projector, &other.projector) < 1e-5, "{cut:?}");
        assert!(apart(&whole.shuffled, &other.shuffled) < 1e-5, "{cut:?}");
        assert_eq!(whole.result.rows, other.result.rows);
        assert_eq!(other.projector.manifest().samples, u64::from(SAMPLES));
    }
}

#[test]
fn parts_that_overlap_or_are_of_another_training_are_refused() {
    let models = Models::new();
    let text = |parts: Vec<Statistics>| Statistics::merge(parts).unwrap_err().to_string();
    let first = models.sums(&spec(1), 0, 10);
    assert_eq!(
        text(vec![models.sums(&spec(1), 9, 4), first.clone()]),
        "parts of statistics: sample 9 is in two of them"
    );
    assert_eq!(text(vec![first.clone(), first.clone()]), "parts of statistics: sample 0 is in two of them");
    assert!(text(vec![first.clone(), models.sums(&spec(2), 10, 10)]).ends_with("of different trainings"));
    assert!(text(vec![]).ends_with("there are none"));
    assert!(matches!(solve(&first, &spec(2)), Err(ProjectorError::Parts { .. })));
    // One group: nothing is left to fit.
    assert!(matches!(solve(&models.sums(&spec(1), 0, 2), &spec(1)), Err(ProjectorError::Ridge { .. })));
}

#[test]
fn sums_and_projectors_come_back_from_their_files() {
    let models = Models::new();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("statistics.safetensors");
    let sums = models.sums(&spec(1), 0, SAMPLES);
    sums.save(&path).unwrap();
    assert_eq!(Statistics::load(&path).unwrap(), sums);
    assert!(matches!(Projector::load(&path), Err(ProjectorError::File { kind: "projector", .. })));
    let solved = solve(&sums, &spec(1)).unwrap();
    let path = directory.path().join("projector.safetensors");
    solved.projector.save(&path).unwrap();
    assert_eq!(Projector::load(&path).unwrap(), solved.projector);
    assert!(Statistics::load(&path).is_err());
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() - 100;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(matches!(Projector::load(&path), Err(ProjectorError::File { .. })));
    assert!(matches!(Projector::load(&directory.path().join("none")), Err(ProjectorError::Io { .. })));
}

#[test]
fn caches_of_other_models_are_refused_by_side() {
    let models = Models::new();
    let projector = solved(vec![models.sums(&spec(1), 0, SAMPLES)]).projector;
    let (source, target, alignment) = models.caches(3);
    let refused = |source: &KvCache, own: &KvCache| projector.project(source, &alignment, own).unwrap_err();
    let stranger = cache(&Arc::new(layout("stranger", 4)), source.len(), 0);
    assert!(matches!(refused(&stranger, &target), ProjectorError::Fingerprint { side: "source", .. }));
    assert!(matches!(refused(&source, &source), ProjectorError::Fingerprint { side: "target", .. }));
    let mut liar = layout("deep", 4);
    liar.layers.pop();
    let liar = cache(&Arc::new(liar), source.len(), 0);
    assert!(matches!(refused(&liar, &target), ProjectorError::Layout { side: "source", .. }));
    let shorter = source.slice_tokens(0..2).unwrap();
    assert!(matches!(refused(&shorter, &target), ProjectorError::Alignment { .. }));
    assert!(matches!(refused(&source, &target.slice_tokens(0..0).unwrap()), ProjectorError::Alignment { .. }));
}
