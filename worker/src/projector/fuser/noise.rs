//! What is random in a training step, fixed by the seed and the sample: the same whoever steps, however samples are grouped,
//! and again when activations are computed a second time.

use candle_core::{Device, Result, Tensor};

use super::shape::FuserShape;
use crate::random::Random;

/// Noise of some columns.
#[derive(Debug, Clone)]
pub struct Noise {
    /// Gumbel noise of the gates, `[maps, N, H_r]`.
    pub gumbel: Tensor,
    /// For each block, 0 for a number that is dropped and 1 / (1 - p) for one that is kept, `[maps, N, h]`; `None`: nothing is
    /// dropped.
    pub kept: Option<Vec<Tensor>>,
}

impl Noise {
    /// Of the `columns` of the sample at `place`.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn new(shape: &FuserShape, columns: usize, dropout: f64, seed: u64, place: u64) -> Result<Self> {
        let mut random = Random::new(seed, &format!("fuser noise {place}"));
        let count = shape.maps() * columns * shape.heads;
        let gumbel: Vec<f32> = (0..count).map(|_| gumbel(&mut random)).collect();
        let gumbel = Tensor::from_vec(gumbel, (shape.maps(), columns, shape.heads), &Device::Cpu)?;
        let mut block = || {
            let count = shape.maps() * columns * shape.hidden;
            let kept = (0..count).map(|_| if random.unit() > dropout { 1.0 / (1.0 - dropout) as f32 } else { 0.0 });
            Tensor::from_vec(kept.collect::<Vec<_>>(), (shape.maps(), columns, shape.hidden), &Device::Cpu)
        };
        let kept = (dropout > 0.0).then(|| (0..shape.depth).map(|_| block()).collect()).transpose()?;
        Ok(Self { gumbel, kept })
    }

    /// The same on `device`.
    ///
    /// # Errors
    /// If memory runs out there.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let kept = self.kept.as_ref().map(|kept| kept.iter().map(|kept| kept.to_device(device)).collect());
        Ok(Self { gumbel: self.gumbel.to_device(device)?, kept: kept.transpose()? })
    }

    /// Of several samples' columns, one behind the other.
    ///
    /// # Errors
    /// If memory runs out.
    pub fn join(parts: &[Self]) -> Result<Self> {
        let join = |tensors: Vec<&Tensor>| Tensor::cat(&tensors, 1);
        let gumbel = join(parts.iter().map(|part| &part.gumbel).collect())?;
        let blocks = parts.first().and_then(|part| part.kept.as_ref()).map_or(0, Vec::len);
        let kept =
            (0..blocks).map(|block| join(parts.iter().flat_map(|part| &part.kept).map(|kept| &kept[block]).collect()));
        let kept = if blocks > 0 { Some(kept.collect::<Result<_>>()?) } else { None };
        Ok(Self { gumbel, kept })
    }
}

/// -ln(-ln(U + 1e-20) + 1e-20), as the published code draws it: one Gumbel number, not the difference of two.
fn gumbel(random: &mut Random) -> f32 {
    let inner = -(random.unit() + 1e-20).ln() + 1e-20;
    -inner.ln() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_a_samples_own_and_has_its_mean() {
        let shape = FuserShape { layers: 2, source: 4, heads: 2, head_dim: 4, hidden: 64, depth: 3 };
        let numbers = |noise: &Noise| noise.gumbel.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (a, b) = (Noise::new(&shape, 400, 0.25, 1, 7).unwrap(), Noise::new(&shape, 3, 0.25, 1, 8).unwrap());
        assert_eq!(numbers(&a), numbers(&Noise::new(&shape, 400, 0.25, 1, 7).unwrap()));
        let mean = numbers(&a).iter().sum::<f32>() / 3200.0;
        assert!((mean - 0.5772).abs() < 0.07, "a Gumbel number's mean is Euler's constant, not {mean}");
        let kept = a.kept.as_ref().unwrap()[1].mean_all().unwrap().to_scalar::<f32>().unwrap();
        assert!((kept - 1.0).abs() < 0.01, "what is dropped is made up for: {kept}");
        let both = Noise::join(&[a.clone(), b.clone()]).unwrap();
        assert_eq!(numbers(&Noise { gumbel: both.gumbel.narrow(1, 400, 3).unwrap(), kept: None }), numbers(&b));
        assert_eq!(both.kept.unwrap()[2].dims(), [4, 403, 64]);
        assert!(Noise::join(&[Noise::new(&shape, 2, 0.0, 1, 7).unwrap()]).unwrap().kept.is_none());
    }
}
