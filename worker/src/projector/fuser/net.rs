//! The fuser as a differentiable function, all maps at once (C2C, arXiv 2510.03215, as its public code computes it).
//!
//! For columns s of the source and t of the target, both un-rotated (the published code works on rotated keys; ours are
//! position-free, because tokens of two tokenizers do not stand at the same positions):
//!
//! - u₀ = W_in [s; t] + b_in; F(z) = z + drop(W₂ gelu(W₁ rms(z))), exact GELU, RMSNorm with gain, ε = 1e-6;
//! - u₁ = F₀(u₀); P = W_out F₂…(u₁) + b_out; w = σ(W_a F₁(u₁) + b_a), one number a head;
//! - fused = t + y w P with the gate y = 1 if z > 0, in training σ((z + g) / τ) with Gumbel noise g a column and head.
//!
//! Columns do not see each other. Runs on the processor and on cards alike. Does not know caches, files or optimisers.

use candle_core::{D, DType, Device, Result, Tensor, Var};
use protocol::experiment::projector::Precision;

use super::noise::Noise;
use super::shape::{FuserShape, Start};
use crate::random::Random;

/// Under the root of RMSNorm.
const EPSILON: f64 = 1e-6;

/// A fuser's parameters as tensors, in the order of [`FuserShape::parameters_in_order`].
#[derive(Debug, Clone)]
pub struct Net {
    shape: FuserShape,
    tensors: Vec<Tensor>,
    precision: Precision,
}

/// How gates and dropout behave.
#[derive(Debug, Clone, Copy)]
pub enum Mode<'a> {
    /// Gates are open or closed; nothing is dropped.
    Use,
    /// Gates are soft and noisy, numbers are dropped.
    Train {
        /// Temperature of the gates, above 0.
        temperature: f64,
        /// Noise of exactly these columns.
        noise: &'a Noise,
    },
}

impl Net {
    /// A net on `device` with the numbers of a flat vector; with `trained`, as variables, which come along.
    ///
    /// # Errors
    /// If memory runs out.
    ///
    /// # Panics
    /// If the vector is not of the shape's size.
    pub fn new(
        shape: FuserShape,
        weights: &[f32],
        precision: Precision,
        device: &Device,
        trained: bool,
    ) -> Result<(Self, Vec<Var>)> {
        assert_eq!(weights.len(), shape.parameters(), "weights are of the shape");
        let mut variables = Vec::new();
        let tensors = shape.parameters_in_order().into_iter().map(|parameter| {
            let values = Tensor::from_slice(&weights[parameter.range], &parameter.shape, device)?;
            if !trained {
                return Ok(values);
            }
            variables.push(Var::from_tensor(&values)?);
            Ok(variables.last().expect("one was pushed").as_tensor().clone())
        });
        let tensors = tensors.collect::<Result<_>>()?;
        Ok((Self { shape, tensors, precision }, variables))
    }

    /// The same numbers, out of reach of gradients.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self { tensors: self.tensors.iter().map(Tensor::detach).collect(), ..self.clone() }
    }

    /// The fused columns `[maps, N, d_r]` of columns `source` `[maps, N, d_s]` and `target` `[maps, N, d_r]`, all f32.
    ///
    /// # Errors
    /// For tensors of other shapes.
    pub fn fuse(&self, source: &Tensor, target: &Tensor, mode: Mode<'_>) -> Result<Tensor> {
        let FuserShape { heads, head_dim, .. } = self.shape;
        let (maps, columns, width) = target.dims3()?;
        let u = self.linear(&Tensor::cat(&[source, target], 2)?, self.parameter(0), self.parameter(1))?;
        let u = self.block(&u, 0, mode)?;
        let head = 2 + 3 * self.shape.depth;
        let weights = self.linear(&self.block(&u, 1, mode)?, self.parameter(head), self.parameter(head + 1))?;
        let mut z = u;
        for block in 2..self.shape.depth {
            z = self.block(&z, block, mode)?;
        }
        let projected = self.linear(&z, self.parameter(head + 2), self.parameter(head + 3))?;
        let share = self.gate(&weights, mode)?.mul(&candle_nn::ops::sigmoid(&weights)?)?;
        let projected = projected.reshape((maps, columns, heads, head_dim))?.broadcast_mul(&share.unsqueeze(3)?)?;
        target + projected.reshape((maps, columns, width))?
    }

    /// y, of the shape of `like` `[maps, N, H_r]`.
    fn gate(&self, like: &Tensor, mode: Mode<'_>) -> Result<Tensor> {
        let logit = self.tensors.last().expect("a fuser has gates").broadcast_as(like.dims())?;
        match mode {
            Mode::Use => logit.gt(0.0)?.to_dtype(DType::F32),
            Mode::Train { temperature, noise } => candle_nn::ops::sigmoid(&((logit + &noise.gumbel)? / temperature)?),
        }
    }

    /// F.
    fn block(&self, x: &Tensor, block: usize, mode: Mode<'_>) -> Result<Tensor> {
        let [gain, up, down] = [2, 3, 4].map(|place| self.parameter(place + 3 * block));
        let rms = (x.sqr()?.mean_keepdim(D::Minus1)? + EPSILON)?.sqrt()?;
        let normed = x.broadcast_div(&rms)?.broadcast_mul(gain)?;
        let inner = self.product(&normed, up)?.gelu_erf()?;
        let branch = self.product(&inner, down)?;
        match mode {
            Mode::Train { noise: Noise { kept: Some(kept), .. }, .. } => x + (branch * &kept[block])?,
            Mode::Train { .. } | Mode::Use => x + branch,
        }
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        self.product(x, weight)?.broadcast_add(bias)
    }

    /// x W in the net's format. The processor has f32 only: there both sides, and both gradients, are rounded to the format
    /// and multiplied in f32, which is what a card's tensor cores do.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let format = match self.precision {
            Precision::F32 => return x.matmul(weight),
            Precision::Bf16 => DType::BF16,
            Precision::F16 => DType::F16,
        };
        let (x, weight) = (x.to_dtype(format)?, weight.to_dtype(format)?);
        match x.device().is_cpu() {
            true => x.to_dtype(DType::F32)?.matmul(&weight.to_dtype(DType::F32)?),
            false => x.matmul(&weight)?.to_dtype(DType::F32),
        }
    }

    fn parameter(&self, place: usize) -> &Tensor {
        &self.tensors[place]
    }
}

/// Weights to start from. With `zero_output` the fuser begins as the identity on `t`: what it refines is used as it is.
pub fn initial(shape: &FuserShape, seed: u64, gate: f64, zero_output: bool) -> Vec<f32> {
    let mut weights = vec![0.0_f32; shape.parameters()];
    for parameter in shape.parameters_in_order() {
        let mut random = Random::new(seed, &format!("fuser {}", parameter.name));
        let values = &mut weights[parameter.range];
        let mut uniform = |inputs: usize| {
            let bound = 1.0 / (inputs as f64).sqrt();
            values.iter_mut().for_each(|value| *value = ((2.0 * random.unit() - 1.0) * bound) as f32);
        };
        match parameter.start {
            Start::Uniform { inputs } => uniform(inputs),
            Start::Output { inputs } if !zero_output => uniform(inputs),
            Start::Output { .. } => {}
            Start::Ones => values.fill(1.0),
            Start::Gate => values.fill(gate as f32),
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: FuserShape = FuserShape { layers: 2, source: 6, heads: 2, head_dim: 3, hidden: 5, depth: 4 };

    fn normal(shape: &[usize], purpose: &str) -> Tensor {
        let mut random = Random::new(3, purpose);
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| random.normal() as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Gains and gates that differ from one and from each other.
    fn weights() -> Vec<f32> {
        let mut random = Random::new(3, "weights");
        initial(&SHAPE, 5, 0.4, false).iter().map(|weight| weight + 0.2 * random.normal() as f32).collect()
    }

    fn net(weights: &[f32], precision: Precision) -> Net {
        Net::new(SHAPE, weights, precision, &Device::Cpu, false).unwrap().0
    }

    fn columns() -> (Tensor, Tensor) {
        (normal(&[4, 3, 6], "source"), normal(&[4, 3, 6], "target"))
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let noise = Noise::new(&SHAPE, 3, 0.3, 1, 0).unwrap();
        let mode = Mode::Train { temperature: 0.7, noise: &noise };
        let (source, target) = columns();
        let share = normal(&[4, 3, 6], "weights of the sum");
        let loss = |net: &Net| (net.fuse(&source, &target, mode).unwrap() * &share).unwrap().sum_all().unwrap();
        let weights = weights();
        let (trained, variables) = Net::new(SHAPE, &weights, Precision::F32, &Device::Cpu, true).unwrap();
        let gradients = loss(&trained).backward().unwrap();
        let mut checked = 0;
        for (parameter, variable) in SHAPE.parameters_in_order().iter().zip(&variables) {
            let gradient: Vec<f32> = gradients.get(variable).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let typical = (gradient.iter().map(|g| g * g).sum::<f32>() / gradient.len() as f32).sqrt();
            assert!(typical > 1e-4, "{} has no gradient", parameter.name);
            for (place, gradient) in gradient.iter().enumerate().step_by(1 + gradient.len() / 40) {
                let at = |step: f32| {
                    let mut moved = weights.clone();
                    moved[parameter.range.start + place] += step;
                    f64::from(loss(&net(&moved, Precision::F32)).to_scalar::<f32>().unwrap())
                };
                let difference = (at(5e-3) - at(-5e-3)) / 1e-2;
                let error = (f64::from(*gradient) - difference).abs();
                let name = &parameter.name;
                assert!(
                    error < 1e-2 * f64::from(typical.max(gradient.abs())),
                    "{name} {place}: {gradient}, {difference}"
                );
                checked += 1;
            }
        }
        assert!(checked > 300, "{checked}");
    }

    #[test]
    fn a_fuser_that_starts_from_zero_changes_nothing_and_closed_gates_do_not_either() {
        let (source, target) = columns();
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let fused = |weights: &[f32]| numbers(&net(weights, Precision::F32).fuse(&source, &target, Mode::Use).unwrap());
        assert_eq!(fused(&initial(&SHAPE, 5, 1.0, true)), numbers(&target));
        assert_eq!(fused(&initial(&SHAPE, 5, 0.0, false)), numbers(&target), "the published gates start closed");
        assert_ne!(fused(&initial(&SHAPE, 5, 1.0, false)), numbers(&target));
    }

    #[test]
    fn columns_do_not_see_each_other() {
        let (source, target) = columns();
        let net = net(&weights(), Precision::F32);
        let all = net.fuse(&source, &target, Mode::Use).unwrap();
        let one = net.fuse(&source.narrow(1, 1, 1).unwrap(), &target.narrow(1, 1, 1).unwrap(), Mode::Use).unwrap();
        let difference = (all.narrow(1, 1, 1).unwrap() - one).unwrap().abs().unwrap().max_all().unwrap();
        assert!(difference.to_scalar::<f32>().unwrap() < 1e-6);
    }

    #[test]
    fn fewer_bits_round_a_little() {
        let (source, target) = columns();
        let fused = |precision| net(&weights(), precision).fuse(&source, &target, Mode::Use).unwrap();
        let exact = fused(Precision::F32);
        let error = |precision| {
            let difference = (fused(precision) - &exact).unwrap().sqr().unwrap().sum_all().unwrap();
            (difference / exact.sqr().unwrap().sum_all().unwrap()).unwrap().to_scalar::<f32>().unwrap().sqrt()
        };
        let (half, brain) = (error(Precision::F16), error(Precision::Bf16));
        assert!(1e-6 < half && half < brain && brain < 2e-2, "{half} {brain}");
    }
}
