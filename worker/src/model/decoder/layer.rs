//! One layer as one operation with a gradient, for passes on the CPU without adapters.
//!
//! The same computation as `tracked`, where every step is an operation of its own: here nothing is copied between steps, what
//! the way back needs is kept once, gradients of branches are added where they meet, and all of it is shared out to the team.
//! Frozen weights get no gradient, and neither do the embeddings. Shapes as in `decoder`; P columns of the prefix of one
//! sequence, and ΣP of all, sequence after sequence.

mod attention;

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{Block, Keep, Norm, Pass};
use crate::model::family::Activation;
use crate::model::grad::{slice, with_numbers};
use crate::model::linear::Linear;
use crate::model::panel::{Panels, apply, apply_transposed};
use crate::model::team::team;
use crate::model::vector;

/// Numbers of an elementwise operation that a task takes.
const ELEMENTS_PER_TASK: usize = 8192;

/// What the layers of one pass share.
pub(super) struct Shared {
    sequences: Vec<Sequence>,
    settings: Vec<Turns>,
    setting_of: Vec<usize>,
}

/// Where one sequence's rows and columns lie.
struct Sequence {
    /// Of the T new tokens.
    rows: Range<usize>,
    /// Of the ΣP columns of all prefixes.
    prefix: Range<usize>,
}

/// Rotations and masks of layers with one setting.
struct Turns {
    /// `[T, D/2]` each.
    cosines: Vec<f32>,
    sines: Vec<f32>,
    /// One a sequence: `[T, P + T]` of its own, 0 or -inf; None: everything is visible.
    masks: Vec<Option<Vec<f32>>>,
}

/// The operation: the residual stream `[T, C]` and the prefixes' K (rotated) and V, `[H_kv, ΣP, D]` each, to `[T, C]`.
pub(super) struct Layer {
    block: Arc<Block>,
    shared: Arc<Shared>,
    index: usize,
    keep: Keep,
    kept: OnceLock<Kept>,
}

/// What the way back needs of the way there.
struct Kept {
    /// `[T, H * D]` and `[T, H_kv * D]`: before the norm of heads where there is one (else empty), and after rotation.
    plain: [Vec<f32>; 2],
    turned: [Vec<f32>; 2],
    /// `[T, H_kv * D]`.
    v: Vec<f32>,
    probabilities: Vec<Vec<f32>>,
    /// The branches before their norms, `[T, C]`; empty where there is none.
    branches: [Vec<f32>; 2],
    /// The residual stream between attention and MLP.
    middle: Vec<f32>,
    gate: Panels,
    up: Panels,
}

/// Of the residual stream, `[T, C]`, None where it is embeddings; of the prefixes' K and V, `[H_kv, ΣP, D]` each.
type Gradients = (Option<Vec<f32>>, [Vec<f32>; 2]);

impl Shared {
    /// `lengths`: columns of the prefix and new tokens of each sequence, as `pass` has them.
    pub(super) fn new(pass: &Pass<'_, '_>, lengths: &[(usize, usize)]) -> Result<Self> {
        let (mut row, mut column) = (0, 0);
        let sequences = lengths.iter().map(|(prefix, new)| {
            let sequence = Sequence { rows: row..row + new, prefix: column..column + prefix };
            (row, column) = (sequence.rows.end, sequence.prefix.end);
            sequence
        });
        let sequences = sequences.collect();
        let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1();
        let settings = pass.settings.iter().map(|setting| {
            let masks = setting.masks.iter().map(|mask| mask.as_ref().map(numbers).transpose());
            let (cosines, sines) = (numbers(&setting.cosines)?, numbers(&setting.sines)?);
            Ok(Turns { cosines, sines, masks: masks.collect::<Result<_>>()? })
        });
        Ok(Self { sequences, settings: settings.collect::<Result<_>>()?, setting_of: pass.setting_of.clone() })
    }
}

impl Turns {
    /// Turns heads of `width` numbers in rows of `heads`: forwards for a `sign` of 1, back for -1.
    fn turn(&self, rows: &mut [f32], heads: usize, width: usize, sign: f32) {
        let half = width / 2;
        team().chunks(rows, heads * width, |row, values| {
            let at = row * half..(row + 1) * half;
            let sines: Vec<f32> = self.sines[at.clone()].iter().map(|sine| sign * sine).collect();
            values.chunks_mut(width).for_each(|head| vector::rotate(head, &self.cosines[at.clone()], &sines));
        });
    }
}

impl Layer {
    pub(super) fn new(block: &Arc<Block>, shared: &Arc<Shared>, index: usize, keep: Keep) -> Self {
        Self { block: Arc::clone(block), shared: Arc::clone(shared), index, keep, kept: OnceLock::new() }
    }

    fn turns(&self) -> &Turns {
        &self.shared.settings[self.shared.setting_of[self.index]]
    }

    fn forward(&self, x: &[f32], prefix: [&[f32]; 2]) -> Result<(Vec<f32>, Kept)> {
        let block = &*self.block;
        let a = &block.attention;
        let [mut q, mut k, v] = products(&block.attention_norm.all(x), [&a.q, &a.k, &a.v])?;
        let kept_if = |norm: &Option<Norm>, rows: &Vec<f32>| if norm.is_some() { rows.clone() } else { Vec::new() };
        let plain = [kept_if(&a.q_norm, &q), kept_if(&a.k_norm, &k)];
        for (rows, heads, norm) in [(&mut q, a.heads, &a.q_norm), (&mut k, a.kv_heads, &a.k_norm)] {
            if let Some(norm) = norm {
                *rows = norm.all(rows);
            }
            self.turns().turn(rows, heads, a.head_dim, 1.0);
        }
        let (mixed, probabilities) = self.attend(&q, [&k, &v], prefix);
        let [branch] = products(&mixed, [&a.output])?;
        let (middle, branch) = joined(x, branch, block.post_attention_norm.as_ref());

        let (gate, up) = (block.mlp.gate.held(), block.mlp.up.held());
        let normed = Panels::from_rows(&block.mlp_norm.all(&middle), block.mlp_norm.values.len());
        let [gate, up] = apply(&normed, [gate.frozen()?, up.frozen()?]);
        let down = block.mlp.down.held();
        let [last] = apply(&block.mlp.inner(&gate, &up), [down.frozen()?]);
        let (y, last) = joined(&middle, last.to_rows(), block.post_mlp_norm.as_ref());
        let branches = [branch, last];
        Ok((y, Kept { plain, turned: [q, k], v, probabilities, branches, middle, gate, up }))
    }

    /// The gradients of what came in: of the residual stream, unless these are embeddings, and of the prefix's K and V.
    fn backward(&self, x: &[f32], prefix: [&[f32]; 2], dy: &[f32]) -> Result<Gradients> {
        let again;
        let kept = match (self.keep, self.kept.get()) {
            (Keep::Inputs, _) => {
                again = self.forward(x, prefix)?.1;
                &again
            }
            (Keep::Activations, Some(kept)) => kept,
            (Keep::Activations, None) => candle_core::bail!("a layer goes back before it went forward"),
        };
        let block = &*self.block;
        let a = &block.attention;
        let branch = Norm::optional_back(block.post_mlp_norm.as_ref(), &kept.branches[1], dy);
        let (gate, up, down) = (block.mlp.gate.held(), block.mlp.up.held(), block.mlp.down.held());
        let inner = apply_transposed([(down.frozen()?, &Panels::from_rows(&branch, block.mlp_norm.values.len()))]);
        let [d_gate, d_up] = block.mlp.inner_back(&kept.gate, &kept.up, &inner);
        let normed = apply_transposed([(gate.frozen()?, &d_gate), (up.frozen()?, &d_up)]).to_rows();
        let mut middle = block.mlp_norm.back(&kept.middle, &normed);
        vector::add(&mut middle, dy);

        let branch = Norm::optional_back(block.post_attention_norm.as_ref(), &kept.branches[0], &middle);
        let mixed = products_back([(&a.output, &branch)])?;
        let (turned, prefix) = self.attend_back(kept, prefix, &mixed);
        if self.index == 0 {
            return Ok((None, prefix));
        }
        let [mut q, mut k, v] = turned;
        let norms = [(&mut q, a.heads, &a.q_norm, &kept.plain[0]), (&mut k, a.kv_heads, &a.k_norm, &kept.plain[1])];
        for (rows, heads, norm, plain) in norms {
            self.turns().turn(rows, heads, a.head_dim, -1.0);
            if let Some(norm) = norm {
                *rows = norm.back(plain, rows);
            }
        }
        let normed = products_back([(&a.q, &q), (&a.k, &k), (&a.v, &v)])?;
        let mut first = block.attention_norm.back(x, &normed);
        vector::add(&mut first, &middle);
        Ok((Some(first), prefix))
    }
}

impl CustomOp3 for Layer {
    fn name(&self) -> &'static str {
        "layer"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of_x: &Layout,
        k: &CpuStorage,
        of_k: &Layout,
        v: &CpuStorage,
        of_v: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (y, kept) = self.forward(slice(x, of_x)?, [slice(k, of_k)?, slice(v, of_v)?])?;
        if self.keep == Keep::Activations && self.kept.set(kept).is_err() {
            candle_core::bail!("a layer of a pass runs once");
        }
        Ok((CpuStorage::F32(y), of_x.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, [dk, dv]) = with_numbers(x, |x| {
            with_numbers(k, |k| with_numbers(v, |v| with_numbers(&dy, |dy| self.backward(x, [k, v], dy))))
        })?;
        let like = |values: Vec<f32>, tensor: &Tensor| Tensor::from_vec(values, tensor.shape(), tensor.device());
        Ok((dx.map(|dx| like(dx, x)).transpose()?, Some(like(dk, k)?), Some(like(dv, v)?)))
    }
}

/// Projections of the same rows `[T, inputs]`, with their biases.
fn products<const N: usize>(rows: &[f32], linears: [&Linear; N]) -> Result<[Vec<f32>; N]> {
    let held = linears.map(Linear::held);
    let mut weights = Vec::with_capacity(N);
    for held in &held {
        weights.push(held.frozen()?);
    }
    let weights = std::array::from_fn(|index| weights[index]);
    let mut results: [_; N] = apply(&Panels::from_rows(rows, weights[0].inputs()), weights).map(|y| y.to_rows());
    for (y, linear) in results.iter_mut().zip(linears) {
        linear.add_bias(y);
    }
    Ok(results)
}

/// The gradient of rows from those of their projections.
fn products_back<const N: usize>(parts: [(&Linear, &[f32]); N]) -> Result<Vec<f32>> {
    let held = parts.map(|(linear, _)| linear.held());
    let mut operands = Vec::with_capacity(N);
    for (held, (_, dy)) in held.iter().zip(parts) {
        let weight = held.frozen()?;
        operands.push((weight, Panels::from_rows(dy, weight.outputs())));
    }
    let parts: [_; N] = std::array::from_fn(|index| (operands[index].0, &operands[index].1));
    Ok(apply_transposed(parts).to_rows())
}

/// x + branch, normed first where there is a norm; then the branch as it was is given back too.
fn joined(x: &[f32], branch: Vec<f32>, norm: Option<&Norm>) -> (Vec<f32>, Vec<f32>) {
    let (mut sum, kept) = match norm {
        Some(norm) => (norm.all(&branch), branch),
        None => (branch, Vec::new()),
    };
    vector::add(&mut sum, x);
    (sum, kept)
}

impl super::Mlp {
    /// act(gate) · up.
    fn inner(&self, gate: &Panels, up: &Panels) -> Panels {
        let (mut inner, ups) = (gate.clone(), up.numbers());
        let times = match self.activation {
            Activation::Silu => vector::silu_times,
            Activation::GeluTanh => vector::gelu_times,
        };
        team().chunks(inner.numbers_mut(), ELEMENTS_PER_TASK, |task, inner| {
            times(inner, &ups[task * ELEMENTS_PER_TASK..][..inner.len()]);
        });
        inner
    }

    /// The gradients of gate and up.
    fn inner_back(&self, gate: &Panels, up: &Panels, dy: &Panels) -> [Panels; 2] {
        let (mut d_gate, mut d_up, dy) = (gate.clone(), up.clone(), dy.numbers());
        let backward = match self.activation {
            Activation::Silu => vector::silu_times_backward,
            Activation::GeluTanh => vector::gelu_times_backward,
        };
        let mut parts: Vec<_> = d_gate
            .numbers_mut()
            .chunks_mut(ELEMENTS_PER_TASK)
            .zip(d_up.numbers_mut().chunks_mut(ELEMENTS_PER_TASK))
            .zip(dy.chunks(ELEMENTS_PER_TASK))
            .collect();
        team().chunks(&mut parts, 1, |_, part| {
            let ((gate, up), dy) = &mut part[0];
            backward(gate, up, dy);
        });
        [d_gate, d_up]
    }
}

impl Norm {
    /// Each row of `x`, as wide as the norm, normed.
    fn all(&self, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        self.rows(x, &mut y);
        y
    }

    /// The gradient of rows `x` from that of the normed ones.
    fn back(&self, x: &[f32], dy: &[f32]) -> Vec<f32> {
        let width = self.values.len();
        let mut dx = dy.to_vec();
        team().chunks(&mut dx, width, |row, dx| {
            vector::rms_norm_backward(&x[row * width..][..width], &self.values, self.epsilon, dx);
        });
        dx
    }

    fn optional_back(norm: Option<&Self>, x: &[f32], dy: &[f32]) -> Vec<f32> {
        norm.map_or_else(|| dy.to_vec(), |norm| norm.back(x, dy))
    }
}
