//! The sums of all layers: made from pairs of caches, merged, written, read.
//!
//! For every target layer: moments of the samples to fit, moments of those held out, and the products of every x with another
//! sample's y, from which the control is solved. Parts name the samples that they are of; parts that overlap, or that are of
//! another training, are refused.

use std::path::Path;

use faer::Mat;
use protocol::experiment::projector::{Samples, TrainSpec};
use serde::{Deserialize, Serialize};

use super::moments::{Cross, Moments};
use crate::cache::KvCache;
use crate::model::team::team;
use crate::projector::corpus::held_out;
use crate::projector::error::ProjectorError;
use crate::projector::file::{self, Side, Stored, Tensors, take_f64};
use crate::projector::rows;
use crate::projector::{Alignment, KEPT};

const KIND: &str = "statistics";
/// Rows of a layer that are multiplied at a time.
const BLOCK: usize = 512;

/// Sums over some samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    pub(super) manifest: StatisticsManifest,
    pub(super) layers: Vec<LayerSums>,
}

/// What sums say about themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatisticsManifest {
    /// Hash of the training's spec without its stage.
    pub training: String,
    /// Whose caches come in.
    pub source: Side,
    /// Whose caches go out.
    pub target: Side,
    /// Source layers of each target layer.
    pub layers: Vec<Vec<usize>>,
    /// [`crate::projector::corpus::Corpus::hash`].
    pub corpus: String,
    /// Samples summed: first place and count, ascending, apart.
    pub samples: Vec<(u64, u32)>,
}

/// One target layer's.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LayerSums {
    pub(super) fit: Moments,
    pub(super) held: Moments,
    /// Of x with another sample's y, over all samples.
    pub(super) shuffled: Cross,
}

/// Two caches of one sample and how they belong together; both un-rotated.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// The source's.
    pub source: &'a KvCache,
    /// The target's.
    pub target: &'a KvCache,
    /// Which source column stands for each target column.
    pub alignment: &'a Alignment,
    /// The target's cache of another sample: the control's.
    pub other: &'a KvCache,
    /// The sample's group.
    pub group: u64,
}

/// Sums that are being made.
#[derive(Debug)]
pub struct Accumulator {
    sums: Statistics,
    percent: u32,
    waiting: Vec<Waiting>,
    rows: usize,
}

/// Rows of one layer that have not been multiplied yet.
#[derive(Debug, Default)]
struct Waiting {
    /// Fit, held out.
    sides: [Rows; 2],
}

#[derive(Debug, Default)]
struct Rows {
    x: Vec<f32>,
    y: Vec<f32>,
    other: Vec<f32>,
}

/// Hash of what two parts of one training have in common.
pub fn training_hash(spec: &TrainSpec) -> String {
    let stated = (&spec.source, &spec.target, &spec.corpus, &spec.layers, &spec.method, spec.seed);
    let stated = serde_json::to_string(&stated).expect("a spec is plain data");
    format!("blake3:{}", blake3::hash(stated.as_bytes()).to_hex())
}

impl Accumulator {
    /// Sums of nothing. `percent` of the groups are held out.
    pub fn new(manifest: StatisticsManifest, percent: u32) -> Self {
        let target = 2 * manifest.target.width();
        let sums = |list: &Vec<usize>| {
            let source = list.len() * 2 * manifest.source.width();
            LayerSums {
                fit: Moments::new(source, target),
                held: Moments::new(source, target),
                shuffled: Cross::new(source, target),
            }
        };
        let layers: Vec<LayerSums> = manifest.layers.iter().map(sums).collect();
        let waiting = layers.iter().map(|_| Waiting::default()).collect();
        Self { sums: Statistics { manifest, layers }, percent, waiting, rows: 0 }
    }

    /// Adds one sample's rows: all target columns but those that the target keeps.
    ///
    /// # Errors
    /// [`ProjectorError::Fingerprint`] for caches of other models; [`ProjectorError::Cache`] for missing layers.
    pub fn add(&mut self, pair: &Pair<'_>) -> Result<(), ProjectorError> {
        let manifest = &self.sums.manifest;
        manifest.source.accept("source", pair.source.layout())?;
        manifest.target.accept("target", pair.target.layout())?;
        let columns: Vec<usize> = (KEPT..pair.target.len()).collect();
        let sources = &pair.alignment.columns()[KEPT.min(pair.target.len())..];
        let side = usize::from(held_out(pair.group, self.percent));
        // The other's columns in turn, as often as there are rows.
        let others = pair.other.len().saturating_sub(KEPT).max(1);
        let others: Vec<usize> =
            columns.iter().map(|column| (KEPT + (column - KEPT) % others).min(pair.other.len() - 1)).collect();
        for (index, waiting) in self.waiting.iter_mut().enumerate() {
            let rows = &mut waiting.sides[side];
            rows.x.extend(rows::features(pair.source, &manifest.layers[index], sources)?);
            rows.y.extend(rows::features(pair.target, &[index], &columns)?);
            rows.other.extend(rows::features(pair.other, &[index], &others)?);
        }
        self.rows += columns.len();
        if self.rows >= BLOCK {
            self.flush();
        }
        Ok(())
    }

    /// The sums.
    pub fn finish(mut self) -> Statistics {
        self.flush();
        self.sums
    }

    fn flush(&mut self) {
        let mut work: Vec<_> = self.sums.layers.iter_mut().zip(&mut self.waiting).collect();
        team().chunks(&mut work, 1, |_, pair| {
            let (sums, waiting) = &mut pair[0];
            for (side, rows) in waiting.sides.iter_mut().enumerate() {
                let moments = if side == 0 { &mut sums.fit } else { &mut sums.held };
                moments.add(&rows.x, &rows.y);
                sums.shuffled.add(&rows.x, &rows.other);
                *rows = Rows::default();
            }
        });
        self.rows = 0;
    }
}

impl Statistics {
    /// What they are of.
    pub fn manifest(&self) -> &StatisticsManifest {
        &self.manifest
    }

    /// Rows in all.
    pub fn rows(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.fit.cross.rows + layer.held.cross.rows)
    }

    /// Rows that are held out.
    pub fn rows_held_out(&self) -> u64 {
        self.layers.first().map_or(0, |layer| layer.held.cross.rows)
    }

    /// Samples in all.
    pub fn samples(&self) -> u64 {
        self.manifest.samples.iter().map(|(_, count)| u64::from(*count)).sum()
    }

    /// Adds parts up in the order of their first samples, whatever order they come in.
    ///
    /// # Errors
    /// [`ProjectorError::Parts`] for none, for parts that overlap, and for parts of different trainings.
    pub fn merge(mut parts: Vec<Self>) -> Result<Self, ProjectorError> {
        let wrong = |what: String| ProjectorError::Parts { what };
        parts.sort_by(|a, b| a.manifest.samples.cmp(&b.manifest.samples));
        let mut parts = parts.into_iter();
        let mut sum = parts.next().ok_or_else(|| wrong("there are none".to_owned()))?;
        for part in parts {
            let (a, b) = (&sum.manifest, &part.manifest);
            for (what, same) in [
                ("trainings", a.training == b.training),
                ("sources", a.source == b.source),
                ("targets", a.target == b.target),
                ("layer maps", a.layers == b.layers),
                ("corpora", a.corpus == b.corpus),
            ] {
                if !same {
                    return Err(wrong(format!("they are of different {what}")));
                }
            }
            let mut samples = [a.samples.as_slice(), &b.samples].concat();
            samples.sort_unstable();
            let overlap = samples.windows(2).find(|pair| pair[0].0 + u64::from(pair[0].1) > pair[1].0);
            if let Some(pair) = overlap {
                return Err(wrong(format!("sample {} is in two of them", pair[1].0)));
            }
            sum.manifest.samples = samples;
            let mut work: Vec<_> = sum.layers.iter_mut().zip(&part.layers).collect();
            team().chunks(&mut work, 1, |_, pair| {
                let (mine, theirs) = &mut pair[0];
                mine.fit.merge(&theirs.fit);
                mine.held.merge(&theirs.held);
                mine.shuffled.merge(&theirs.shuffled);
            });
        }
        Ok(sum)
    }

    /// Writes them; returns the bytes.
    ///
    /// # Errors
    /// [`ProjectorError::Io`].
    pub fn save(&self, path: &Path) -> Result<u64, ProjectorError> {
        let mut tensors = Tensors::new();
        for (index, layer) in self.layers.iter().enumerate() {
            for (part, moments) in [("fit", &layer.fit), ("held", &layer.held)] {
                let name = format!("layer.{index}.{part}");
                store_cross(&mut tensors, &name, &moments.cross);
                tensors.insert(format!("{name}.xx"), packed(&moments.xx));
            }
            store_cross(&mut tensors, &format!("layer.{index}.shuffled"), &layer.shuffled);
        }
        file::save(path, KIND, &self.manifest, &tensors)
    }

    /// Reads them.
    ///
    /// # Errors
    /// [`ProjectorError::Io`], [`ProjectorError::File`].
    pub fn load(path: &Path) -> Result<Self, ProjectorError> {
        let (manifest, mut tensors): (StatisticsManifest, Tensors) = file::load(path, KIND)?;
        let wrong = |what: String| ProjectorError::File { kind: KIND, what };
        if manifest.layers.len() != manifest.target.layers || manifest.samples.is_empty() {
            return Err(wrong("its manifest contradicts itself".to_owned()));
        }
        let q = 2 * manifest.target.width();
        let mut layers = Vec::new();
        for (index, list) in manifest.layers.iter().enumerate() {
            let p = list.len() * 2 * manifest.source.width();
            let mut moments = |part: &str| {
                let name = format!("layer.{index}.{part}");
                let cross = take_cross(&mut tensors, &name, (p, q))?;
                let packed = take_f64(&mut tensors, KIND, &format!("{name}.xx"), &[p * (p + 1) / 2])?;
                Ok::<_, ProjectorError>(Moments { cross, xx: unpacked(&packed, p) })
            };
            let (fit, held) = (moments("fit")?, moments("held")?);
            let shuffled = take_cross(&mut tensors, &format!("layer.{index}.shuffled"), (p, q))?;
            layers.push(LayerSums { fit, held, shuffled });
        }
        match tensors.keys().next() {
            None => Ok(Self { manifest, layers }),
            Some(name) => Err(wrong(format!("tensor {name} is not expected"))),
        }
    }
}

fn store_cross(tensors: &mut Tensors, name: &str, cross: &Cross) {
    let (p, q) = (cross.mean_x.len(), cross.mean_y.len());
    let xy = (0..q).flat_map(|column| cross.xy.col(column).iter().copied()).collect();
    tensors.insert(format!("{name}.rows"), Stored::f64([1], vec![cross.rows as f64]));
    tensors.insert(format!("{name}.mean_x"), Stored::f64([p], cross.mean_x.clone()));
    tensors.insert(format!("{name}.mean_y"), Stored::f64([q], cross.mean_y.clone()));
    tensors.insert(format!("{name}.yy"), Stored::f64([q], cross.yy.clone()));
    // Column after column.
    tensors.insert(format!("{name}.xy"), Stored::f64([q, p], xy));
}

fn take_cross(tensors: &mut Tensors, name: &str, (p, q): (usize, usize)) -> Result<Cross, ProjectorError> {
    let mut take = |part: &str, shape: &[usize]| take_f64(tensors, KIND, &format!("{name}.{part}"), shape);
    let rows = take("rows", &[1])?[0];
    if !(0.0..=9e15).contains(&rows) || rows.fract() != 0.0 {
        return Err(ProjectorError::File { kind: KIND, what: format!("{name} has {rows} rows") });
    }
    let xy = take("xy", &[q, p])?;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number within range")]
    Ok(Cross {
        rows: rows as u64,
        mean_x: take("mean_x", &[p])?,
        mean_y: take("mean_y", &[q])?,
        xy: Mat::from_fn(p, q, |row, column| xy[column * p + row]),
        yy: take("yy", &[q])?,
    })
}

/// The lower triangle, column after column.
fn packed(square: &Mat<f64>) -> Stored {
    let size = square.nrows();
    let values = (0..size).flat_map(|column| (column..size).map(move |row| square[(row, column)]));
    Stored::f64([size * (size + 1) / 2], values.collect())
}

fn unpacked(values: &[f64], size: usize) -> Mat<f64> {
    let mut square = Mat::zeros(size, size);
    let mut values = values.iter();
    for column in 0..size {
        for row in column..size {
            square[(row, column)] = *values.next().expect("as many as the shape says");
        }
    }
    square
}

/// A range as parts name it.
pub fn range(samples: &Samples) -> (u64, u32) {
    (samples.first, samples.count)
}
