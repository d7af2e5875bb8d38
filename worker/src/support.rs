//! What a build of the executor can compute on: `bonepile-executor support --json` prints it, the agent reads it.
//!
//! Kernels are compiled for one compute capability; on a card they do not fit, a build fails at the first operation. So the
//! agent asks each build once, and a card without kernels is refused before a shard is placed on it. Knows the build, not
//! the box.

use std::fmt;
use std::str::FromStr;

use protocol::hardware::{ComputeCapability, DeviceKind};
use serde::{Deserialize, Serialize};

/// From this capability on, cards compute with bf16; candle's kernels for it are left out below.
const BF16: ComputeCapability = ComputeCapability { major: 8, minor: 0 };

/// What a model on a card holds weights, keys and values in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ElementType {
    /// 32 bits.
    #[default]
    F32,
    /// Half: 11 bits of precision, at most 65504.
    F16,
    /// 8 bits of precision, the range of f32.
    Bf16,
}

/// What a build of the executor can compute on, and in what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildSupport {
    /// The code it was built from.
    pub build: String,
    /// What it computes on unless told otherwise.
    pub backend: DeviceKind,
    /// What its kernels were compiled for; `None`: it has none for cards.
    pub capability: Option<ComputeCapability>,
    /// What weights, keys and values may be held in there.
    pub elements: Vec<ElementType>,
}

impl BuildSupport {
    /// This build's.
    pub fn this() -> Self {
        Self::of(protocol::BUILD, BUILT_FOR)
    }

    /// Of a build with kernels for `capability`, or none.
    pub fn of(build: &str, capability: Option<ComputeCapability>) -> Self {
        let (backend, elements) = match capability {
            None => (DeviceKind::Cpu, vec![ElementType::F32]),
            Some(capability) if capability < BF16 => (DeviceKind::Cuda, vec![ElementType::F32, ElementType::F16]),
            Some(_) => (DeviceKind::Cuda, vec![ElementType::F32, ElementType::F16, ElementType::Bf16]),
        };
        Self { build: build.to_owned(), backend, capability, elements }
    }

    /// Why the build cannot compute on a card of capability `card`; `None` if it can.
    pub fn refuses(&self, card: ComputeCapability) -> Option<String> {
        let have = match self.capability {
            Some(built) if runs_on(built, card) => return None,
            Some(built) => format!("this executor build's kernels are for {built}"),
            None => "this executor build has kernels for processors only".to_owned(),
        };
        Some(format!("no kernel for this card: its compute capability is {card}, {have}"))
    }
}

impl fmt::Display for BuildSupport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let elements: Vec<_> = self.elements.iter().map(ToString::to_string).collect();
        let elements = elements.join(", ");
        match self.capability {
            Some(capability) => write!(f, "cuda, kernels for compute capability {capability}, {elements}"),
            None => write!(f, "cpu, {elements}"),
        }
    }
}

/// Some kernels are linked as machine code, which runs within its major version from its minor one on; from 9.0 on the
/// toolchain compiles for exactly one capability.
fn runs_on(built: ComputeCapability, card: ComputeCapability) -> bool {
    built == card || (built.major == card.major && built.minor < card.minor && built.major < 9)
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

impl FromStr for ElementType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = [Self::F32, Self::F16, Self::Bf16];
        let named = all.into_iter().find(|elements| elements.to_string() == text);
        named.ok_or_else(|| format!("`{text}` is not f32, f16 or bf16"))
    }
}

#[cfg(not(feature = "cuda"))]
const BUILT_FOR: Option<ComputeCapability> = None;

/// What candle's build script compiled its kernels for; it reads the same variable.
#[cfg(feature = "cuda")]
const BUILT_FOR: Option<ComputeCapability> = match option_env!("CUDA_COMPUTE_CAP") {
    Some(text) => Some(capability(text)),
    None => panic!("set CUDA_COMPUTE_CAP to build with the feature cuda: 61 for a card of compute capability 6.1"),
};

/// `61` is 6.1, `90a` is 9.0, `120` is 12.0.
#[cfg(any(feature = "cuda", test))]
const fn capability(text: &str) -> ComputeCapability {
    let bytes = text.as_bytes();
    let (mut number, mut digits) = (0_u16, 0);
    while digits < bytes.len() && bytes[digits].is_ascii_digit() && digits < 3 {
        number = number * 10 + (bytes[digits] - b'0') as u16;
        digits += 1;
    }
    assert!(digits >= 2, "CUDA_COMPUTE_CAP is a number such as 61 or 90a");
    ComputeCapability { major: number / 10, minor: number % 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sm(major: u16, minor: u16) -> ComputeCapability {
        ComputeCapability { major, minor }
    }

    #[test]
    fn a_card_without_kernels_is_refused_with_both_numbers() {
        let turing = BuildSupport::of("b", Some(sm(7, 5)));
        let why = "no kernel for this card: its compute capability is 6.1, this executor build's kernels are for 7.5";
        assert_eq!(turing.refuses(sm(6, 1)).as_deref(), Some(why));
        let why = "no kernel for this card: its compute capability is 6.1, \
                   this executor build has kernels for processors only";
        assert_eq!(BuildSupport::of("b", None).refuses(sm(6, 1)).as_deref(), Some(why));
        for (built, fitting, other) in [
            (sm(6, 1), vec![sm(6, 1)], vec![sm(6, 0), sm(7, 0), sm(5, 2)]),
            (sm(8, 0), vec![sm(8, 0), sm(8, 6), sm(8, 9)], vec![sm(7, 5), sm(9, 0)]),
            (sm(10, 0), vec![sm(10, 0)], vec![sm(10, 3), sm(12, 0)]),
        ] {
            let support = BuildSupport::of("b", Some(built));
            assert!(fitting.iter().all(|card| support.refuses(*card).is_none()), "{built}");
            assert!(other.iter().all(|card| support.refuses(*card).is_some()), "{built}");
        }
    }

    #[test]
    fn old_cards_have_no_bf16() {
        let elements = |capability| BuildSupport::of("b", capability).elements;
        assert_eq!(elements(None), [ElementType::F32]);
        assert_eq!(elements(Some(sm(7, 5))), [ElementType::F32, ElementType::F16]);
        assert_eq!(elements(Some(sm(8, 0))), [ElementType::F32, ElementType::F16, ElementType::Bf16]);
        assert!("f64".parse::<ElementType>().is_err() && "bf16".parse() == Ok(ElementType::Bf16));
    }

    #[test]
    fn capabilities_are_read_as_the_toolchain_writes_them() {
        for (text, wanted) in [("61", sm(6, 1)), ("75", sm(7, 5)), ("90a", sm(9, 0)), ("120", sm(12, 0))] {
            assert_eq!(capability(text), wanted);
        }
    }
}
