//! Where a model computes, and in which numbers it holds what is large.
//!
//! On a card, weights and the keys and values of contexts are held in the place's [`ElementType`], and products take both
//! sides in it. Everything between two products (the residual stream, norms, rotation, softmax, logits) is f32: halves
//! neither reach the sums that some models' residual streams hold, nor does a card below compute capability 7.0 add them at
//! more than a fraction of its speed. Does not know weights or layers.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device, Result, Shape, Tensor};

use super::error::ModelError;
use crate::support::{BuildSupport, ElementType};

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The processor, with the kernels written for it.
    #[default]
    Cpu,
    /// The processor, with the operations that a card is given: slow, for tests of what runs there.
    CpuAsCard,
    /// The NVIDIA card with this number, of those that the process sees.
    Cuda(usize),
}

/// A device, and what it holds weights, keys and values in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// What computes.
    pub device: DeviceChoice,
    /// The processor has f32 only; there, weights as stored are [`Precision`](super::Precision)'s to say.
    pub elements: ElementType,
}

impl Place {
    /// Where this build computes unless told otherwise, in f32: the first card it sees, or the processor.
    pub fn of_build() -> Self {
        let device = match BuildSupport::this().capability {
            Some(_) => DeviceChoice::Cuda(0),
            None => DeviceChoice::Cpu,
        };
        Self { device, elements: ElementType::F32 }
    }

    /// Opens the device.
    ///
    /// # Errors
    /// [`ModelError::Place`] if this build or the card cannot do it, with the reason.
    pub(crate) fn open(self) -> std::result::Result<Compute, ModelError> {
        let refused = |why: String| ModelError::Place { place: self.to_string(), why };
        let (device, card) = match self.device {
            DeviceChoice::Cpu if self.elements != ElementType::F32 => {
                return Err(refused("on the processor f32 is the only type of numbers between weights".to_owned()));
            }
            DeviceChoice::Cpu => (Device::Cpu, false),
            DeviceChoice::CpuAsCard => (Device::Cpu, true),
            DeviceChoice::Cuda(ordinal) => {
                let support = BuildSupport::this();
                if support.capability.is_none() {
                    return Err(refused("this build computes on processors only".to_owned()));
                }
                let device = Device::new_cuda(ordinal).map_err(|error| refused(error.to_string()))?;
                if let Some(why) = capability(&device).and_then(|card| support.refuses(card)) {
                    return Err(refused(why));
                }
                if !support.elements.contains(&self.elements) {
                    return Err(refused(format!("this build has no kernels for {}", self.elements)));
                }
                (device, true)
            }
        };
        Ok(Compute { device, elements: self.elements, card })
    }
}

/// What a card says it is; None: it does not say, or is none.
#[cfg(feature = "cuda")]
fn capability(device: &Device) -> Option<protocol::hardware::ComputeCapability> {
    let (major, minor) = device.as_cuda_device().ok()?.cuda_stream().context().compute_capability().ok()?;
    Some(protocol::hardware::ComputeCapability { major: major.try_into().ok()?, minor: minor.try_into().ok()? })
}

#[cfg(not(feature = "cuda"))]
fn capability(_: &Device) -> Option<protocol::hardware::ComputeCapability> {
    None
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            DeviceChoice::Cpu => write!(f, "cpu in {}", self.elements),
            DeviceChoice::CpuAsCard => write!(f, "cpu as a card in {}", self.elements),
            DeviceChoice::Cuda(ordinal) => write!(f, "cuda:{ordinal} in {}", self.elements),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cpu-as-card", _) => Ok(Self::CpuAsCard),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!("`{text}` is not a device such as cpu or cuda:0")),
        }
    }
}

/// An open device. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Compute {
    device: Device,
    elements: ElementType,
    card: bool,
}

impl Compute {
    /// Whether to compute with what a card has, rather than with the processor's own kernels.
    pub(crate) fn is_card(&self) -> bool {
        self.card
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// What weights, keys and values are held in.
    pub(crate) fn dtype(&self) -> DType {
        match self.elements {
            ElementType::F32 => DType::F32,
            ElementType::F16 => DType::F16,
            ElementType::Bf16 => DType::BF16,
        }
    }

    /// These numbers on the device, f32.
    pub(crate) fn tensor(&self, values: &[f32], shape: impl Into<Shape>) -> Result<Tensor> {
        Tensor::from_slice(values, shape.into(), &self.device)
    }

    /// A tensor as the device holds it: there, and rounded.
    pub(crate) fn held(&self, x: &Tensor) -> Result<Tensor> {
        x.to_device(&self.device)?.to_dtype(self.dtype())
    }

    /// The product of two matrices or rows of matrices, both rounded to what the device holds, in f32.
    pub(crate) fn matmul(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (a, b) = (a.to_dtype(self.dtype())?, b.to_dtype(self.dtype())?);
        // candle has no product of bf16 on the processor.
        if self.device.is_cpu() && self.elements == ElementType::Bf16 {
            return a.to_dtype(DType::F32)?.matmul(&b.to_dtype(DType::F32)?);
        }
        a.matmul(&b)?.to_dtype(DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_place_cannot_do_is_refused_with_the_reason() {
        let halves = Place { device: DeviceChoice::Cpu, elements: ElementType::F16 };
        assert!(halves.open().unwrap_err().to_string().starts_with("cpu in f16: on the processor"));
        if BuildSupport::this().capability.is_none() {
            let card = Place { device: "cuda".parse().unwrap(), elements: ElementType::F32 };
            assert_eq!(card.open().unwrap_err().to_string(), "cuda:0 in f32: this build computes on processors only");
        }
        assert_eq!("cuda:1".parse(), Ok(DeviceChoice::Cuda(1)));
        assert!("cuda:x".parse::<DeviceChoice>().is_err() && "gpu".parse::<DeviceChoice>().is_err());
    }
}
