//! A fuser as a projector: what it refines, its columns, its file.
//!
//! The file is projector and checkpoint at once: beside the weights lie the outer step's momentum and the base, so that a round
//! starts, and a cache is projected, from this one file.

use std::sync::OnceLock;

use candle_core::{Device, Tensor};
use protocol::experiment::projector::{FuserRecipe, Precision, Regime};
use serde::{Deserialize, Serialize};

use super::net::{Mode, Net, initial};
use super::outer::OuterStep;
use super::shape::FuserShape;
use super::step::{Prefix, fused_columns};
use crate::cache::{CacheError, KvCache, LayerKv};
use crate::projector::file::{KIND, Manifest, Stored, Tensors, take_f32};
use crate::projector::ridge::Ridge;
use crate::projector::{Alignment, FUSER, KEPT, Own, Projector, ProjectorError, rows};

/// Before the names of the base's tensors.
const BASE: &str = "base.";
/// The outer step's momentum.
const MOMENTUM: &str = "momentum";

/// What a fuser's manifest says beyond a projector's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FuserFacts {
    /// How it was trained.
    pub recipe: FuserRecipe,
    /// Rounds behind it.
    pub rounds: u32,
    /// What it refines.
    pub base: Option<Box<Manifest>>,
}

/// A trained fuser.
#[derive(Debug, Clone, PartialEq)]
pub struct Fuser {
    shape: FuserShape,
    weights: Vec<f32>,
    /// Of the outer step; `None` before the first.
    momentum: Option<Vec<f32>>,
    facts: FuserFacts,
    base: Option<Ridge>,
    net: Built,
}

/// The weights as tensors, made when they are first used.
#[derive(Debug, Clone, Default)]
struct Built(OnceLock<Net>);

/// What is made from equal weights is equal.
impl PartialEq for Built {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Fuser {
    /// An untrained one. With a base, or in regime aware, its output layer starts from zero, so that it begins as what it refines.
    ///
    /// # Errors
    /// [`ProjectorError::Layers`] if target layers are made from different numbers of source layers; [`ProjectorError::Fuser`]
    /// for a recipe that cannot be, or a base that is no ridge projector between the same models.
    pub fn start(
        manifest: &Manifest,
        recipe: &FuserRecipe,
        base: Option<&Projector>,
        seed: u64,
    ) -> Result<Self, ProjectorError> {
        let shape = shape(manifest, recipe)?;
        let base = base.map(|base| base_of(manifest, recipe, base)).transpose()?;
        let zero_output = base.is_some() || recipe.regime == Regime::Aware;
        let weights = initial(&shape, seed, recipe.gate_start, zero_output);
        let (base_manifest, base) = base.unzip();
        let facts = FuserFacts { recipe: recipe.clone(), rounds: 0, base: base_manifest.map(Box::new) };
        Ok(Self { shape, weights, momentum: None, facts, base, net: Built::default() })
    }

    /// The same after an outer step.
    #[must_use]
    pub fn stepped(&self, step: OuterStep) -> Self {
        let facts = FuserFacts { rounds: self.facts.rounds + 1, ..self.facts.clone() };
        let (weights, momentum) = (step.weights, Some(step.momentum));
        Self { shape: self.shape, weights, momentum, facts, base: self.base.clone(), net: Built::default() }
    }

    /// Sizes.
    pub fn shape(&self) -> &FuserShape {
        &self.shape
    }

    /// Weights, in the order of [`FuserShape::parameters_in_order`].
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// The outer step's momentum.
    pub fn momentum(&self) -> Option<&[f32]> {
        self.momentum.as_deref()
    }

    /// How it was trained.
    pub fn facts(&self) -> &FuserFacts {
        &self.facts
    }

    /// Logits of the gates, keys' and values' of each layer.
    pub fn gates(&self) -> Vec<(f32, f32)> {
        let gates = &self.weights[self.weights.len() - self.shape.maps()..];
        gates.as_chunks().0.iter().map(|[key, value]| (*key, *value)).collect()
    }

    /// What it needs of the target's own.
    pub fn own(&self) -> Own {
        match self.facts.recipe.regime {
            Regime::Aware => Own::Whole,
            Regime::Unaware => Own::First,
        }
    }

    /// What goes into the fuser for these caches, un-rotated: the source's aligned columns, and what they correct. That is, in
    /// regime aware, the target's own cache; else what the base projects; without a base, the target's first column
    /// over and over.
    ///
    /// # Errors
    /// [`ProjectorError::Alignment`] if `own` has too few columns; [`CacheError::MissingLayer`].
    pub fn prefix(
        &self,
        manifest: &Manifest,
        source: &KvCache,
        alignment: &Alignment,
        own: &KvCache,
    ) -> Result<Prefix, ProjectorError> {
        let len = alignment.len();
        let needed = if self.own() == Own::Whole { len } else { KEPT.min(len) };
        if own.len() < needed {
            let what = format!("the target's own cache has {} columns of {needed}", own.len());
            return Err(ProjectorError::Alignment { what });
        }
        let (maps, width) = (self.shape.maps(), self.shape.target());
        let mut sources = Vec::with_capacity(maps * len * self.shape.source);
        for layers in &manifest.layers {
            for part in [keys, values] {
                sources.extend(beside(source, layers, alignment.columns(), part)?);
            }
        }
        let columns: Vec<usize> = match self.own() {
            Own::Whole => (0..len).collect(),
            Own::First => vec![0; len],
        };
        let bases: Vec<f32> = match (&self.base, self.own()) {
            (Some(ridge), Own::First) => {
                let base = self.facts.base.as_ref().expect("a base has a manifest");
                let layers = ridge.project(base, source, alignment, own)?;
                let all: Vec<usize> = (0..len).collect();
                let rows = |tensor: &[f32]| rows::of_tensor(tensor, &all, len, self.shape.head_dim);
                layers.iter().flat_map(|(_, layer)| [rows(&layer.k), rows(&layer.v)]).flatten().collect()
            }
            _ => {
                let mut rows = Vec::with_capacity(maps * len * width);
                for layer in 0..self.shape.layers {
                    for part in [keys, values] {
                        rows.extend(beside(own, &[layer], &columns, part)?);
                    }
                }
                rows
            }
        };
        let tensor = |values, width| Tensor::from_vec(values, (maps, len, width), &Device::Cpu).map_err(failed);
        let positions = (own.positions()[0]..).take(len).collect();
        Ok(Prefix {
            source: tensor(sources, self.shape.source)?,
            base: tensor(bases, width)?,
            own: KEPT.min(len),
            positions,
        })
    }

    /// Keys and values of every target layer.
    pub(in crate::projector) fn project(
        &self,
        manifest: &Manifest,
        source: &KvCache,
        alignment: &Alignment,
        own: &KvCache,
    ) -> Result<Vec<(usize, LayerKv)>, ProjectorError> {
        let prefix = self.prefix(manifest, source, alignment, own)?;
        let net = match self.net.0.get() {
            Some(net) => net,
            None => {
                let net = Net::new(self.shape, &self.weights, Precision::F32, &Device::Cpu, false).map_err(failed)?.0;
                self.net.0.get_or_init(|| net)
            }
        };
        let len = prefix.len();
        let fused = fused_columns(net, &prefix, Mode::Use, &Device::Cpu).map_err(failed)?;
        let whole =
            Tensor::cat(&[&prefix.base.narrow(1, 0, prefix.own).map_err(failed)?, &fused], 1).map_err(failed)?;
        let tensor = |map: usize| -> Result<Vec<f32>, ProjectorError> {
            let rows = whole.get(map).and_then(|rows| rows.flatten_all()?.to_vec1::<f32>()).map_err(failed)?;
            Ok(rows::to_tensor(&rows, len, self.shape.head_dim))
        };
        (0..self.shape.layers)
            .map(|layer| Ok((layer, LayerKv { k: tensor(2 * layer)?, v: tensor(2 * layer + 1)? })))
            .collect()
    }

    /// The manifest of a file with this fuser, from that of its training.
    pub fn manifest(&self, training: &Manifest, samples: u64) -> Manifest {
        let recipe = serde_json::to_value(&self.facts).expect("facts are plain data");
        Manifest { method: FUSER.to_owned(), recipe, samples, ..training.clone() }
    }

    pub(in crate::projector) fn tensors(&self) -> Tensors {
        let parameters = self.shape.parameters_in_order().into_iter();
        let weights = parameters.map(|part| (part.name, Stored::f32(part.shape, self.weights[part.range].to_vec())));
        let momentum = self.momentum.iter().map(|all| (MOMENTUM.to_owned(), Stored::f32([all.len()], all.clone())));
        let base = self.base.iter().zip(&self.facts.base).flat_map(|(ridge, manifest)| {
            ridge.tensors(manifest).into_iter().map(|(name, tensor)| (format!("{BASE}{name}"), tensor))
        });
        weights.chain(momentum).chain(base).collect()
    }

    /// What a round's replicas start from, who have the base: weights alone, in 16 bits where deltas are quantised too.
    pub(in crate::projector) fn tensors_to_start(&self) -> Tensors {
        let parameters = self.shape.parameters_in_order().into_iter();
        let weights = parameters.map(|part| {
            let weights = &self.weights[part.range];
            let stored = match self.facts.recipe.quantise {
                true => Stored::f16(part.shape, weights),
                false => Stored::f32(part.shape, weights.to_vec()),
            };
            (part.name, stored)
        });
        weights.collect()
    }

    /// From a file's tensors; the base from there too, or else the one `at_hand`.
    pub(in crate::projector) fn from_tensors(
        manifest: &Manifest,
        tensors: Tensors,
        at_hand: Option<&Projector>,
    ) -> Result<Self, ProjectorError> {
        let wrong = |what: String| ProjectorError::File { kind: KIND, what };
        let facts: FuserFacts =
            serde_json::from_value(manifest.recipe.clone()).map_err(|error| wrong(error.to_string()))?;
        let shape = shape(manifest, &facts.recipe)?;
        let (bases, mut own): (Tensors, Tensors) = tensors.into_iter().partition(|(name, _)| name.starts_with(BASE));
        let mut weights = Vec::with_capacity(shape.parameters());
        for part in shape.parameters_in_order() {
            weights.extend(take_f32(&mut own, KIND, &part.name, &part.shape)?);
        }
        let momentum = match own.contains_key(MOMENTUM) {
            true => Some(take_f32(&mut own, KIND, MOMENTUM, &[weights.len()])?),
            false => None,
        };
        if let Some(name) = own.keys().next() {
            return Err(wrong(format!("tensor {name} is not a fuser's")));
        }
        let base = match &facts.base {
            Some(stated) if bases.is_empty() => {
                let known = at_hand.filter(|base| base.manifest == **stated).and_then(Projector::as_ridge);
                let known =
                    known.ok_or_else(|| wrong("the base that it refines is neither in it nor at hand".to_owned()))?;
                Some(known.clone())
            }
            Some(manifest) => {
                let named = |(name, tensor): (String, Stored)| (name[BASE.len()..].to_owned(), tensor);
                manifest.check()?;
                Some(Ridge::from_tensors(manifest, bases.into_iter().map(named).collect())?)
            }
            None => None,
        };
        Ok(Self { shape, weights, momentum, facts, base, net: Built::default() })
    }
}

/// Keys, or values, of a layer.
type Part = fn(&LayerKv) -> &[f32];

fn keys(layer: &LayerKv) -> &[f32] {
    &layer.k
}

fn values(layer: &LayerKv) -> &[f32] {
    &layer.v
}

/// The sizes that a recipe asks for between the two models of a manifest.
///
/// # Errors
/// [`ProjectorError::Layers`] if target layers are made from different numbers of source layers, [`ProjectorError::Fuser`] for
/// widths that cannot be.
pub fn shape(manifest: &Manifest, recipe: &FuserRecipe) -> Result<FuserShape, ProjectorError> {
    let count = manifest.layers.first().map_or(0, Vec::len);
    if let Some(layer) = manifest.layers.iter().position(|list| list.len() != count) {
        let what =
            format!("a fuser's layers are made from equally many; layer {layer} is from {:?}", manifest.layers[layer]);
        return Err(ProjectorError::Layers { what });
    }
    let (hidden, depth) = (recipe.hidden as usize, recipe.depth as usize);
    if hidden == 0 || depth < super::shape::DEPTH {
        let what = format!("hidden width {hidden} and {depth} layers; 1 and {} are the least", super::shape::DEPTH);
        return Err(ProjectorError::Fuser { what });
    }
    let (source, target) = (&manifest.source, &manifest.target);
    Ok(FuserShape {
        layers: target.layers,
        source: count * source.width(),
        heads: target.kv_heads,
        head_dim: target.head_dim,
        hidden,
        depth,
    })
}

/// The ridge that a fuser of `manifest` is to refine.
fn base_of(manifest: &Manifest, recipe: &FuserRecipe, base: &Projector) -> Result<(Manifest, Ridge), ProjectorError> {
    let wrong = |what: &str| ProjectorError::Fuser { what: what.to_owned() };
    if recipe.regime == Regime::Aware {
        return Err(wrong("a base is for a target that has not read the text"));
    }
    let ridge = base.as_ridge().ok_or_else(|| wrong("its base is no ridge projector"))?;
    let own = base.manifest();
    if (&own.source, &own.target) != (&manifest.source, &manifest.target) {
        return Err(wrong("its base is between other models"));
    }
    Ok((own.clone(), ridge.clone()))
}

/// One half of `layers` beside each other for each of `columns`: `[columns, layers x H x D]`.
fn beside(cache: &KvCache, layers: &[usize], columns: &[usize], part: Part) -> Result<Vec<f32>, ProjectorError> {
    let width = rows::width(cache);
    let total = layers.len() * width;
    let mut rows = vec![0.0; columns.len() * total];
    for (place, layer) in layers.iter().enumerate() {
        let layer = cache.layer(*layer).ok_or(CacheError::MissingLayer { layer: *layer })?;
        let picked = rows::of_tensor(part(layer), columns, cache.len(), cache.layout().head_dim);
        for (row, picked) in rows.chunks_exact_mut(total).zip(picked.chunks_exact(width)) {
            row[place * width..(place + 1) * width].copy_from_slice(picked);
        }
    }
    Ok(rows)
}

#[expect(clippy::needless_pass_by_value, reason = "it is handed to map_err")]
fn failed(error: candle_core::Error) -> ProjectorError {
    ProjectorError::Fuser { what: error.to_string() }
}
