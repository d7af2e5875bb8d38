//! Operations with a gradient, for running a frozen model as a differentiable function.
//!
//! candle's fused kernels and its quantised product drop gradients without a word, and its matrix product computes one for
//! a frozen side too. Each operation here is fused and has a backward of its own; a frozen weight never gets a gradient,
//! and a stored one is dequantised tile by tile in both directions. CPU, f32, contiguous tensors; on cards, and where `card`
//! says so, [`composed`] takes their place. Does not know the order in which a decoder applies them (`decoder::tracked`).

pub(crate) mod composed;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor};

use super::error::ModelError;
use super::family::Activation;
use super::frozen::Held;
use super::matrix::Output;
use super::panel;
use super::quant::QuantMatrix;
use super::team::team;
use super::vector;

/// Numbers of an elementwise operation that a task takes.
const ELEMENTS_PER_TASK: usize = 8192;

/// `x Wᵀ` for `x` `[T, inputs]` and a frozen `W` `[outputs, inputs]`: dense f32.
pub(crate) fn frozen_dense(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Product { weight: Weight::Dense(weight.detach()) })
}

/// The same for a stored `W`, exact up to f32 rounding.
pub(crate) fn frozen_stored(x: &Tensor, matrix: &QuantMatrix) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Product { weight: Weight::Stored(matrix.clone()) })
}

/// x / rms(x) * weight over the last axis, with a frozen weight.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f32, card: bool) -> Result<Tensor> {
    if card {
        return composed::rms_norm(x, weight, epsilon);
    }
    x.contiguous()?.apply_op1(RmsNorm { weight: weight.to_vec1()?, epsilon })
}

/// `[H, T, D]` with column t of each head turned by the angles of row t in `cosines` and `sines`, `[T, D/2]`.
pub(crate) fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor, card: bool) -> Result<Tensor> {
    if card {
        return composed::rotate(x, cosines, sines);
    }
    let (cosines, sines) = (cosines.flatten_all()?.to_vec1()?, sines.flatten_all()?.to_vec1()?);
    x.contiguous()?.apply_op1(Rotation { cosines, sines })
}

/// softmax(scale * x + mask) over the last axis of `x` `[H, T, S]`; `mask` is `[T, S]`.
pub(crate) fn softmax(x: &Tensor, scale: f64, mask: Option<&Tensor>, card: bool) -> Result<Tensor> {
    if card {
        return composed::softmax(x, scale, mask);
    }
    let mask = mask.map(|mask| mask.flatten_all()?.to_vec1()).transpose()?;
    #[expect(clippy::cast_possible_truncation, reason = "it came from an f32")]
    let scale = scale as f32;
    x.contiguous()?.apply_op1(Softmax { scale, mask })
}

/// act(gate) · up, for two of the same shape.
pub(crate) fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Gated { activation })
}

/// Mean cross-entropy, in nats, of `targets` under softmax of `logits` `[T, vocabulary]`: one operation, where separate ones
/// would go over the vocabulary seven times.
///
/// # Errors
/// [`ModelError::Input`] if there is not one target a row; [`ModelError::TokenRange`] for one outside the vocabulary.
pub fn next_token_loss(logits: &Tensor, targets: &[u32]) -> std::result::Result<Tensor, ModelError> {
    let (rows, vocabulary) = logits.dims2()?;
    if rows == 0 || rows != targets.len() {
        return Err(ModelError::Input { tokens: targets.len(), positions: rows });
    }
    if let Some(id) = targets.iter().find(|id| **id as usize >= vocabulary) {
        return Err(ModelError::TokenRange { id: *id, vocabulary });
    }
    Ok(logits.contiguous()?.apply_op1(CrossEntropy { targets: targets.to_vec() })?)
}

/// The numbers of a contiguous operand.
pub(crate) fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("an operand with a gradient must be contiguous"),
    }
}

/// Lends the numbers of a contiguous f32 tensor on the CPU.
pub(crate) fn with_numbers<R>(tensor: &Tensor, work: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => work(slice(storage, layout)?),
        _ => candle_core::bail!("an operation of the processor met a tensor of a card"),
    }
}

/// A copy of a tensor's numbers, in order.
fn numbers(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

/// A product with a frozen weight.
struct Product {
    weight: Weight,
}

enum Weight {
    Dense(Tensor),
    Stored(QuantMatrix),
}

impl Product {
    fn weight(&self) -> Held<'_> {
        match &self.weight {
            Weight::Dense(weight) => Held::dense(weight),
            Weight::Stored(matrix) => Held::Stored(matrix),
        }
    }
}

impl CustomOp1 for Product {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (count, width) = layout.shape().dims2()?;
        let weight = self.weight();
        let weight = weight.frozen()?;
        if width != weight.inputs() {
            candle_core::bail!("{:?} times a weight of {} inputs", layout.shape(), weight.inputs());
        }
        let y = panel::rows_times(slice(storage, layout)?, weight);
        Ok((CpuStorage::F32(y), (count, weight.outputs()).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let gradient = gradient.contiguous()?;
        let dx = with_numbers(&gradient, |dy| Ok(panel::rows_times_transposed(dy, self.weight().frozen()?)))?;
        Tensor::from_vec(dx, x.shape(), x.device()).map(Some)
    }
}

struct RmsNorm {
    weight: Vec<f32>,
    epsilon: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(storage, layout)?;
        let width = self.weight.len();
        if layout.shape().dims().last() != Some(&width) {
            candle_core::bail!("{:?} normed by {width} factors", layout.shape());
        }
        let mut y = vec![0_f32; x.len()];
        team().chunks(&mut y, width, |row, y| {
            vector::rms_norm(&x[row * width..][..width], &self.weight, self.epsilon, y);
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let width = self.weight.len();
        let (values, mut result) = (numbers(x)?, numbers(gradient)?);
        team().chunks(&mut result, width, |row, gradient| {
            vector::rms_norm_backward(&values[row * width..][..width], &self.weight, self.epsilon, gradient);
        });
        Tensor::from_vec(result, x.shape(), x.device()).map(Some)
    }
}

struct Rotation {
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Rotation {
    /// Turns forwards for a `sign` of 1, back for -1.
    fn turn(&self, x: &mut [f32], shape: &Shape, sign: f32) -> Result<()> {
        let (_, count, width) = shape.dims3()?;
        let half = width / 2;
        if self.cosines.len() != count * half {
            candle_core::bail!("{shape:?} turned by {} angles", self.cosines.len());
        }
        team().chunks(x, width, |row, x| {
            let start = row % count * half;
            let (low, high) = x.split_at_mut(half);
            for pair in 0..half {
                let (cosine, sine) = (self.cosines[start + pair], sign * self.sines[start + pair]);
                let (a, b) = (low[pair], high[pair]);
                low[pair] = a * cosine - b * sine;
                high[pair] = b * cosine + a * sine;
            }
        });
        Ok(())
    }
}

impl CustomOp1 for Rotation {
    fn name(&self) -> &'static str {
        "rotation"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut x = slice(storage, layout)?.to_vec();
        self.turn(&mut x, layout.shape(), 1.0)?;
        Ok((CpuStorage::F32(x), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let mut result = numbers(gradient)?;
        self.turn(&mut result, x.shape(), -1.0)?;
        Tensor::from_vec(result, x.shape(), x.device()).map(Some)
    }
}

struct Softmax {
    scale: f32,
    mask: Option<Vec<f32>>,
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, count, width) = layout.shape().dims3()?;
        if self.mask.as_ref().is_some_and(|mask| mask.len() != count * width) {
            candle_core::bail!("{:?} under a mask of another size", layout.shape());
        }
        let mut y = slice(storage, layout)?.to_vec();
        team().chunks(&mut y, width, |row, y| {
            let mask = self.mask.as_ref().map(|mask| &mask[row % count * width..][..width]);
            vector::scale(y, self.scale);
            if let Some(mask) = mask {
                vector::add(y, mask);
            }
            vector::softmax(y);
        });
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (_, _, width) = x.dims3()?;
        let (y, mut result) = (numbers(y)?, numbers(gradient)?);
        team().chunks(&mut result, width, |row, gradient| {
            vector::softmax_backward(gradient, &y[row * width..][..width], self.scale);
        });
        Tensor::from_vec(result, x.shape(), x.device()).map(Some)
    }
}

struct Gated {
    activation: Activation,
}

impl CustomOp2 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        of_gate: &Layout,
        up: &CpuStorage,
        of_up: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut y, up) = (slice(gate, of_gate)?.to_vec(), slice(up, of_up)?);
        if of_gate.shape() != of_up.shape() {
            candle_core::bail!("{:?} gated by {:?}", of_up.shape(), of_gate.shape());
        }
        let times = match self.activation {
            Activation::Silu => vector::silu_times,
            Activation::GeluTanh => vector::gelu_times,
        };
        team().chunks(&mut y, ELEMENTS_PER_TASK, |task, y| times(y, &up[task * ELEMENTS_PER_TASK..][..y.len()]));
        Ok((CpuStorage::F32(y), of_gate.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (mut gates, mut ups, dy) = (numbers(gate)?, numbers(up)?, numbers(dy)?);
        let backward = match self.activation {
            Activation::Silu => vector::silu_times_backward,
            Activation::GeluTanh => vector::gelu_times_backward,
        };
        let shares = Output::new(&mut ups, 1);
        team().chunks(&mut gates, ELEMENTS_PER_TASK, |task, gates| {
            let first = task * ELEMENTS_PER_TASK;
            // SAFETY: these numbers are this task's alone.
            #[expect(unsafe_code, reason = "two outputs are split alike")]
            let ups = unsafe { shares.rows(first..first + gates.len()) };
            backward(gates, ups, &dy[first..first + ups.len()]);
        });
        let back = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        Ok((Some(back(gates, gate)?), Some(back(ups, up)?)))
    }
}

struct CrossEntropy {
    targets: Vec<u32>,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = slice(storage, layout)?;
        let width = logits.len() / self.targets.len();
        let mut losses = vec![0.0_f32; self.targets.len()];
        team().chunks(&mut losses, 1, |row, loss| {
            let logits = &logits[row * width..][..width];
            loss[0] = vector::log_sum_exp(logits) - logits[self.targets[row] as usize];
        });
        let mean = losses.iter().sum::<f32>() / losses.len() as f32;
        Ok((CpuStorage::F32(vec![mean]), Shape::from(())))
    }

    /// `dx = dy (softmax x - 1[target]) / T`.
    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let factor = gradient.to_scalar::<f32>()? / self.targets.len() as f32;
        let mut result = numbers(x)?;
        let width = result.len() / self.targets.len();
        team().chunks(&mut result, width, |row, x| {
            vector::softmax(x);
            x[self.targets[row] as usize] -= 1.0;
            vector::scale(x, factor);
        });
        Tensor::from_vec(result, x.shape(), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Device, Var};

    use super::*;
    use crate::model::quant::QuantKind;
    use crate::random::Random;

    fn normal(shape: &[usize], purpose: &str) -> Tensor {
        let mut random = Random::new(5, purpose);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal() as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// The gradient of a weighted sum of `operation`'s results against central differences, at every number of x.
    fn check(shape: &[usize], operation: impl Fn(&Tensor) -> Tensor) {
        let x = normal(shape, "x");
        let weights = normal(operation(&x).dims(), "weights of the sum");
        let loss = |x: &Tensor| (operation(x) * &weights).unwrap().sum_all().unwrap();
        let variable = Var::from_tensor(&x).unwrap();
        let gradients = loss(variable.as_tensor()).backward().unwrap();
        let gradient = numbers(gradients.get(&variable).expect("there is a gradient")).unwrap();
        let typical = (gradient.iter().map(|g| g * g).sum::<f32>() / gradient.len() as f32).sqrt();
        assert!(typical > 1e-3, "the gradient is zero");
        let start = numbers(&x).unwrap();
        for (index, gradient) in gradient.iter().enumerate() {
            let at = |step: f32| {
                let mut moved = start.clone();
                moved[index] += step;
                let moved = Tensor::from_vec(moved, shape, &Device::Cpu).unwrap();
                f64::from(loss(&moved).to_scalar::<f32>().unwrap())
            };
            let difference = (at(5e-3) - at(-5e-3)) / 1e-2;
            let error = (f64::from(*gradient) - difference).abs();
            assert!(error < 1e-2 * f64::from(typical.max(gradient.abs())), "{index}: {gradient} and {difference}");
        }
    }

    fn matrix(weight: &Tensor) -> QuantMatrix {
        let (rows, cols) = weight.dims2().unwrap();
        let bytes: Vec<u8> = numbers(weight).unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
        let range = 0..bytes.len();
        QuantMatrix::new(QuantKind::F32, rows, cols, Arc::new(bytes), range).unwrap()
    }

    #[test]
    fn products_have_the_gradient_of_their_activations() {
        let weight = normal(&[150, 7], "weight");
        check(&[3, 7], |x| frozen_dense(x, &weight).unwrap());
        let stored = matrix(&weight);
        check(&[3, 7], |x| frozen_stored(x, &stored).unwrap());
        let (x, dense) = (normal(&[3, 7], "x"), Var::from_tensor(&weight).unwrap());
        let variable = Var::from_tensor(&x).unwrap();
        let loss = frozen_dense(variable.as_tensor(), dense.as_tensor()).unwrap().sum_all().unwrap();
        assert!(loss.backward().unwrap().get(&dense).is_none(), "a frozen weight has no gradient");
    }

    #[test]
    fn gates_have_a_gradient_on_both_sides() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let other = normal(&[3, 7], "other");
            check(&[3, 7], |x| gated(x, &other, activation).unwrap());
            check(&[3, 7], |x| gated(&other, x, activation).unwrap());
        }
    }

    #[test]
    fn losses_have_a_gradient() {
        check(&[3, 7], |x| next_token_loss(x, &[6, 0, 3]).unwrap());
        let logits = normal(&[3, 7], "x");
        let wanted = candle_nn::loss::cross_entropy(&logits, &Tensor::new(&[6_u32, 0, 3], &Device::Cpu).unwrap());
        let got: f32 = next_token_loss(&logits, &[6, 0, 3]).unwrap().to_scalar().unwrap();
        assert!((got - wanted.unwrap().to_scalar::<f32>().unwrap()).abs() < 1e-6);
        assert!(matches!(next_token_loss(&logits, &[6, 0]), Err(ModelError::Input { .. })));
        assert!(matches!(next_token_loss(&logits, &[6, 0, 7]), Err(ModelError::TokenRange { id: 7, .. })));
    }

    #[test]
    fn norms_have_a_gradient() {
        let weight = normal(&[6], "weight");
        for card in [false, true] {
            check(&[2, 2, 6], |x| rms_norm(x, &weight, 1e-5, card).unwrap());
        }
    }

    #[test]
    fn rotations_have_a_gradient() {
        let angles = normal(&[3, 2], "angles");
        for card in [false, true] {
            check(&[2, 3, 4], |x| rotate(x, &angles.cos().unwrap(), &angles.sin().unwrap(), card).unwrap());
        }
    }

    #[test]
    fn softmax_has_a_gradient_and_hides_what_is_masked() {
        let mask = vec![0.0, f32::NEG_INFINITY, 0.0, 0.0, 0.0, f32::NEG_INFINITY];
        let mask = Tensor::from_vec(mask, (2, 3), &Device::Cpu).unwrap();
        for card in [false, true] {
            check(&[2, 2, 3], |x| softmax(x, 0.7, Some(&mask), card).unwrap());
            check(&[2, 2, 3], |x| softmax(x, 0.7, None, card).unwrap());
            let y = softmax(&normal(&[2, 2, 3], "x"), 0.7, Some(&mask), card).unwrap().to_vec3::<f32>().unwrap();
            assert!(y.iter().flatten().all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-6));
            assert!(y.iter().all(|head| head[0][1] == 0.0 && head[1][2] == 0.0));
        }
    }
}
