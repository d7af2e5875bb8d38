//! The loss of a fuser through the frozen target, and its gradient.
//!
//! The way back is cut in two at the fused cache. For each micro-batch the decoder gives the loss's gradient with respect to its
//! samples' keys and values, in one pass that reads weights once, and its activations are dropped; then the fuser gives the
//! gradient with respect to its weights. With checkpointing the fuser's activations are not held while the decoder works, nor
//! the decoder's of a layer while another works: they are computed again. Batches of any size take the memory of one micro-batch.
//! Does not know optimisers, rounds or where caches come from.

use std::ops::Range;

use candle_core::{D, DType, Device, Result, Tensor, Var};
use protocol::experiment::projector::Precision;

use super::net::{Mode, Net};
use super::noise::Noise;
use super::shape::FuserShape;
use crate::model::{Adapters, Keep, Model, ModelError, TrackedCache, TrackedSegment, next_token_loss};

/// Halvings of the loss's scale before a gradient counts as infinite.
const HALVINGS_MAX: u32 = 40;
/// Scale of losses with products in half precision, at first.
const SCALE: f64 = 65536.0;

/// Columns that the target is given, before the fuser has worked on them.
#[derive(Debug, Clone)]
pub struct Prefix {
    /// s, `[maps, n, d_s]` f32 on the processor, un-rotated.
    pub source: Tensor,
    /// t, `[maps, n, d_r]` alike.
    pub base: Tensor,
    /// The first so many columns of `base` are left as they are: the target's own first token.
    pub own: usize,
    /// Positions of the n columns.
    pub positions: Vec<i64>,
}

/// What the target reads behind them.
#[derive(Debug, Clone)]
pub struct Suffix {
    /// Ids.
    pub tokens: Vec<u32>,
    /// Rows whose prediction counts; row i predicts token i + 1.
    pub scored: Range<usize>,
    /// What the target predicts there with its native cache: probabilities `[scored, vocabulary]`. `None`: the tokens count.
    pub teacher: Option<Tensor>,
}

/// One sample to step over.
#[derive(Debug, Clone)]
pub struct Example {
    /// Its place in the corpus's order: what its noise is drawn by.
    pub place: u64,
    /// What goes in.
    pub prefix: Prefix,
    /// What comes out.
    pub suffix: Suffix,
}

/// How gradients are computed.
#[derive(Debug, Clone)]
pub struct StepOptions {
    /// Format of the fuser's products.
    pub precision: Precision,
    /// Activations of the fuser, and of the decoder on processors, are computed again on the way back.
    pub checkpointing: bool,
    /// Samples of a pass, whose activations are held together, 1 or more.
    pub micro_batch: usize,
    /// Probability that a number is dropped.
    pub dropout: f64,
    /// Temperature of the gates.
    pub temperature: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Where the fuser computes.
    pub device: Device,
}

/// A loss with its gradient.
#[derive(Debug, Clone)]
pub struct Gradient {
    /// Mean over the batch's scored tokens, nats.
    pub loss: f64,
    /// Of that mean, a number a weight.
    pub values: Vec<f32>,
}

/// The gradient of a batch's mean loss with respect to `weights`.
///
/// # Errors
/// Of the model, or for tensors that do not fit the shape; [`ModelError::Tensor`] if the gradient is not finite.
pub fn gradient(
    model: &Model,
    shape: &FuserShape,
    weights: &[f32],
    batch: &[Example],
    options: &StepOptions,
) -> std::result::Result<Gradient, ModelError> {
    let noise = |example: &Example| {
        let columns = example.prefix.len() - example.prefix.own;
        Noise::new(shape, columns, options.dropout, options.seed, example.place)
    };
    gradient_under(model, shape, weights, batch, options, &noise)
}

/// The same under noise that is given: a function, so that what can be drawn again need not be kept.
///
/// # Errors
/// As [`gradient`], and what `noise` says.
pub fn gradient_under(
    model: &Model,
    shape: &FuserShape,
    weights: &[f32],
    batch: &[Example],
    options: &StepOptions,
    noise: &dyn Fn(&Example) -> Result<Noise>,
) -> std::result::Result<Gradient, ModelError> {
    let scored: usize = batch.iter().map(|example| example.suffix.scored.len()).sum();
    let mut total = Gradient { loss: 0.0, values: vec![0.0; weights.len()] };
    let (net, variables) = Net::new(*shape, weights, options.precision, &options.device, true)?;
    for part in batch.chunks(options.micro_batch.max(1)) {
        let inputs = Inputs::new(part, options, noise)?;
        let kept = (!options.checkpointing).then(|| inputs.fuse(&net, options)).transpose()?;
        let values = match &kept {
            Some(fused) => fused.detach(),
            // Weights without variables leave no trace to go back by.
            None => inputs.fuse(&net.detached(), options)?,
        };
        let (loss, gradient) = decoder_gradient(model, shape, part, &inputs.columns, &values, scored, options)?;
        total.loss += loss;
        drop(values);
        let fused = match kept {
            Some(fused) => fused,
            None => inputs.fuse(&net, options)?,
        };
        let gradient = gradient.to_device(&options.device)?;
        add_weight_gradient(&fused, &gradient, &variables, shape, options.precision, &mut total.values)?;
    }
    Ok(total)
}

/// Mean loss over the scored tokens of all examples, with hard gates and nothing dropped.
///
/// # Errors
/// As [`gradient`].
pub fn loss(
    model: &Model,
    net: &Net,
    shape: &FuserShape,
    examples: &[Example],
    device: &Device,
) -> std::result::Result<f64, ModelError> {
    let (mut sum, mut count) = (0.0, 0);
    for example in examples {
        let fused = fused_columns(net, &example.prefix, Mode::Use, device)?.to_device(&Device::Cpu)?;
        let rows: Vec<Tensor> = (0..shape.maps()).map(|map| fused.get(map)).collect::<Result<_>>()?;
        let cache = cache_of(shape, &rows, &example.prefix)?;
        let suffix = Suffix { teacher: None, ..example.suffix.clone() };
        sum += f64::from(suffix_losses(model, &[cache], std::iter::once(&suffix), Keep::Inputs)?.to_scalar::<f32>()?);
        count += example.suffix.scored.len();
    }
    Ok(sum / f64::from(u32::try_from(count.max(1)).expect("scored tokens fit 32 bits")))
}

/// The columns of one prefix that the fuser makes, `[maps, n - own, d_r]`.
///
/// # Errors
/// For tensors that do not fit the net.
pub fn fused_columns(net: &Net, prefix: &Prefix, mode: Mode<'_>, device: &Device) -> Result<Tensor> {
    net.fuse(&prefix.fused_part(&prefix.source, device)?, &prefix.fused_part(&prefix.base, device)?, mode)
}

impl Prefix {
    /// Columns.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// True without columns.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    fn fused_part(&self, tensor: &Tensor, device: &Device) -> Result<Tensor> {
        tensor.narrow(1, self.own, self.len() - self.own)?.to_device(device)
    }
}

/// A micro-batch's columns beside each other.
struct Inputs {
    source: Tensor,
    base: Tensor,
    noise: Noise,
    /// Each sample's among them.
    columns: Vec<Range<usize>>,
}

impl Inputs {
    fn new(part: &[Example], options: &StepOptions, noise: &dyn Fn(&Example) -> Result<Noise>) -> Result<Self> {
        let mut columns = Vec::new();
        let mut next = 0;
        for Example { prefix, .. } in part {
            let count = prefix.len() - prefix.own;
            columns.push(next..next + count);
            next += count;
        }
        let noise = Noise::join(&part.iter().map(noise).collect::<Result<Vec<_>>>()?)?.to_device(&options.device)?;
        let join = |of: fn(&Prefix) -> &Tensor| {
            let parts = part.iter().map(|example| example.prefix.fused_part(of(&example.prefix), &Device::Cpu));
            Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?.to_device(&options.device)
        };
        let (source, base) = (join(|prefix| &prefix.source)?, join(|prefix| &prefix.base)?);
        Ok(Self { source, base, noise, columns })
    }

    fn fuse(&self, net: &Net, options: &StepOptions) -> Result<Tensor> {
        net.fuse(&self.source, &self.base, Mode::Train { temperature: options.temperature, noise: &self.noise })
    }
}

/// What the samples of a micro-batch add to the mean loss over `scored` tokens, with their fused columns `[maps, N, d_r]` beside
/// each other, and the gradient with respect to these.
fn decoder_gradient(
    model: &Model,
    shape: &FuserShape,
    part: &[Example],
    columns: &[Range<usize>],
    fused: &Tensor,
    scored: usize,
    options: &StepOptions,
) -> std::result::Result<(f64, Tensor), ModelError> {
    let fused = fused.to_device(&Device::Cpu)?;
    let leaves = (0..shape.maps()).map(|map| Var::from_tensor(&fused.get(map)?)).collect::<Result<Vec<_>>>()?;
    let caches = part.iter().zip(columns).map(|(example, columns)| {
        let rows = leaves.iter().map(|leaf| leaf.narrow(0, columns.start, columns.len()));
        cache_of(shape, &rows.collect::<Result<Vec<_>>>()?, &example.prefix)
    });
    let caches = caches.collect::<Result<Vec<_>>>()?;
    let keep = if options.checkpointing { Keep::Inputs } else { Keep::Activations };
    let suffixes = part.iter().map(|example| &example.suffix);
    let loss = (suffix_losses(model, &caches, suffixes, keep)? / scored as f64)?;
    let gradients = loss.backward()?;
    let missing = || candle_core::Error::Msg("a key or value has no gradient".to_owned());
    let gradients =
        leaves.iter().map(|leaf| gradients.get(leaf).ok_or_else(missing)?.unsqueeze(0)).collect::<Result<Vec<_>>>()?;
    Ok((f64::from(loss.to_scalar::<f32>()?), Tensor::cat(&gradients, 0)?))
}

/// The prefix that the decoder takes, from the fused rows `[n - own, d_r]` of each map.
fn cache_of(shape: &FuserShape, rows: &[Tensor], prefix: &Prefix) -> Result<TrackedCache> {
    let part = |map: usize| {
        let own = prefix.base.get(map)?.narrow(0, 0, prefix.own)?;
        let rows = if prefix.own == 0 { rows[map].clone() } else { Tensor::cat(&[&own, &rows[map]], 0)? };
        rows.reshape((prefix.len(), shape.heads, shape.head_dim))?.transpose(0, 1)?.contiguous()
    };
    let layers = (0..shape.layers).map(|layer| Ok((part(2 * layer)?, part(2 * layer + 1)?))).collect::<Result<_>>()?;
    Ok(TrackedCache { layers, positions: prefix.positions.clone(), rotated: false })
}

/// Sum of the losses of all scored rows of sequences that see nothing of each other: cross-entropy to the next token, or to the
/// teacher's prediction.
fn suffix_losses<'a>(
    model: &Model,
    caches: &[TrackedCache],
    suffixes: impl Iterator<Item = &'a Suffix>,
    keep: Keep,
) -> std::result::Result<Tensor, ModelError> {
    let suffixes: Vec<&Suffix> = suffixes.collect();
    let positions: Vec<Vec<i64>> = caches
        .iter()
        .zip(&suffixes)
        .map(|(cache, suffix)| (cache.positions.last().map_or(0, |last| last + 1)..).take(suffix.scored.end).collect())
        .collect();
    let segments: Vec<TrackedSegment<'_>> = caches
        .iter()
        .zip(&suffixes)
        .zip(&positions)
        .map(|((prefix, suffix), positions)| {
            let scored = suffix.scored.clone();
            TrackedSegment { prefix, tokens: &suffix.tokens[..scored.end], positions, scored }
        })
        .collect();
    let logits = model.forward_tracked_batch(&segments, &Adapters::new(), keep)?.to_device(&Device::Cpu)?;
    let (mut sum, mut first) = (Tensor::zeros((), DType::F32, &Device::Cpu)?, 0);
    for suffix in suffixes {
        let rows = suffix.scored.len();
        let logits = logits.narrow(0, first, rows)?;
        first += rows;
        let loss = match &suffix.teacher {
            None => {
                let targets = &suffix.tokens[suffix.scored.start + 1..=suffix.scored.end];
                (next_token_loss(&logits, targets)? * rows as f64)?
            }
            Some(teacher) => (teacher * candle_nn::ops::log_softmax(&logits, D::Minus1)?)?.sum_all()?.neg()?,
        };
        sum = (sum + loss)?;
    }
    Ok(sum)
}

/// Adds what `gradient` of `fused` means for the weights. In half precision the gradient is scaled up so that small numbers
/// survive, and scaled less if large ones do not: no sample is left out.
fn add_weight_gradient(
    fused: &Tensor,
    gradient: &Tensor,
    variables: &[Var],
    shape: &FuserShape,
    precision: Precision,
    sum: &mut [f32],
) -> Result<()> {
    let mut scale = if precision == Precision::F16 { SCALE } else { 1.0 };
    let parameters = shape.parameters_in_order();
    for _ in 0..HALVINGS_MAX {
        let gradients = (fused * (gradient * scale)?)?.sum_all()?.backward()?;
        let mut values = Vec::with_capacity(variables.len());
        for variable in variables {
            let missing = || candle_core::Error::Msg("a weight has no gradient".to_owned());
            values.push(gradients.get(variable).ok_or_else(missing)?.flatten_all()?.to_vec1::<f32>()?);
        }
        if values.iter().flatten().all(|value| value.is_finite()) {
            let unscale = (1.0 / scale) as f32;
            for (parameter, values) in parameters.iter().zip(&values) {
                sum[parameter.range.clone()].iter_mut().zip(values).for_each(|(sum, value)| *sum += value * unscale);
            }
            return Ok(());
        }
        if precision != Precision::F16 {
            break;
        }
        scale /= 2.0;
    }
    candle_core::bail!("the gradient is not finite")
}
