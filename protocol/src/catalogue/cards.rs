//! GPUs by name, with the figures that decide what fits and about how fast it is: every card that old boxes and cheap clouds
//! are likely to have.
//!
//! Figures are the vendor's own, dense, at boost clock: NVIDIA's architecture whitepapers (GK210, GM200, GP100, GP104, GV100,
//! TU102 and TU116, GA100, GA102, AD102, GH100, GB202) and the data sheets of single boards. They are where estimates begin;
//! what a card in a box really does is measured. Memory is what the board carries; NVML reports 0 to 5 % less.

use crate::hardware::ComputeCapability;

/// A GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Card {
    /// As NVML reports it with a driver of today.
    pub name: &'static str,
    /// For the command line.
    pub short: &'static str,
    /// On the board, for one GPU of it, bytes.
    pub memory_bytes: u64,
    /// Of that memory, bytes a second.
    pub bandwidth_bytes_per_s: u64,
    /// f32 without tensor cores, GFLOP/s.
    pub f32_gflops: u32,
    /// f16 without tensor cores, GFLOP/s. `None`: none worth using, such as Pascal's GeForces with 1/64 of f32.
    pub f16_gflops: Option<u32>,
    /// bf16 without tensor cores, GFLOP/s. `None` below compute capability 8.0.
    pub bf16_gflops: Option<u32>,
    /// f16 on tensor cores with sums in f32, GFLOP/s. `None`: it has none.
    pub tensor_gflops: Option<u32>,
    /// Which kernels run on it.
    pub capability: ComputeCapability,
    /// Power limit as sold, watts.
    pub tdp_watts: u32,
}

impl Card {
    /// Memory for shards if the operator sets nothing: what workers lend of a card, bytes.
    pub const fn usable_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(crate::limits::GPU_RESERVE_BYTES)
    }
}

const GIB: u64 = 1 << 30;
const GIGABYTE: u64 = 1_000_000_000;

/// `gflops`: f32, f16, bf16, tensor; 0 is `None`.
const fn row(
    name: &'static str,
    short: &'static str,
    gib: u64,
    gigabytes_per_s: u64,
    [f32_gflops, f16, bf16, tensor]: [u32; 4],
    (major, minor): (u16, u16),
    tdp_watts: u32,
) -> Card {
    Card {
        name,
        short,
        memory_bytes: gib * GIB,
        bandwidth_bytes_per_s: gigabytes_per_s * GIGABYTE,
        f32_gflops,
        f16_gflops: given(f16),
        bf16_gflops: given(bf16),
        tensor_gflops: given(tensor),
        capability: ComputeCapability { major, minor },
        tdp_watts,
    }
}

const fn given(gflops: u32) -> Option<u32> {
    if gflops == 0 { None } else { Some(gflops) }
}

/// Every card, by age. A K80 has two GPUs; a row is one.
#[rustfmt::skip]
pub const CARDS: &[Card] = &[
    row("Tesla K80", "k80", 12, 240, [4370, 0, 0, 0], (3, 7), 150),
    row("Tesla M40", "m40", 12, 288, [6840, 0, 0, 0], (5, 2), 250),
    row("Tesla M40 24GB", "m40-24gb", 24, 288, [6840, 0, 0, 0], (5, 2), 250),
    row("NVIDIA GeForce GTX 1060 6GB", "gtx-1060", 6, 192, [4370, 0, 0, 0], (6, 1), 120),
    row("NVIDIA GeForce GTX 1070", "gtx-1070", 8, 256, [6460, 0, 0, 0], (6, 1), 150),
    row("NVIDIA GeForce GTX 1070 Ti", "gtx-1070-ti", 8, 256, [8190, 0, 0, 0], (6, 1), 180),
    row("NVIDIA GeForce GTX 1080", "gtx-1080", 8, 320, [8870, 0, 0, 0], (6, 1), 180),
    row("NVIDIA GeForce GTX 1080 Ti", "gtx-1080-ti", 11, 484, [11_340, 0, 0, 0], (6, 1), 250),
    row("NVIDIA TITAN Xp", "titan-xp", 12, 548, [12_150, 0, 0, 0], (6, 1), 250),
    row("Tesla P4", "p4", 8, 192, [5500, 0, 0, 0], (6, 1), 75),
    row("Tesla P40", "p40", 24, 347, [11_760, 0, 0, 0], (6, 1), 250),
    row("Tesla P100-PCIE-16GB", "p100", 16, 732, [9530, 19_050, 0, 0], (6, 0), 250),
    row("Tesla V100-PCIE-16GB", "v100-16gb", 16, 900, [14_130, 28_260, 0, 112_000], (7, 0), 250),
    row("Tesla V100-SXM2-32GB", "v100-32gb", 32, 900, [15_670, 31_330, 0, 125_000], (7, 0), 300),
    row("NVIDIA GeForce GTX 1650", "gtx-1650", 4, 128, [2980, 5970, 0, 0], (7, 5), 75),
    row("NVIDIA GeForce GTX 1660 SUPER", "gtx-1660-super", 6, 336, [5030, 10_050, 0, 0], (7, 5), 125),
    row("NVIDIA GeForce GTX 1660 Ti", "gtx-1660-ti", 6, 288, [5440, 10_870, 0, 0], (7, 5), 120),
    row("NVIDIA GeForce RTX 2060", "rtx-2060", 6, 336, [6450, 12_900, 0, 25_800], (7, 5), 160),
    row("NVIDIA GeForce RTX 2070", "rtx-2070", 8, 448, [7460, 14_930, 0, 29_900], (7, 5), 175),
    row("NVIDIA GeForce RTX 2080", "rtx-2080", 8, 448, [10_070, 20_140, 0, 40_300], (7, 5), 215),
    row("NVIDIA GeForce RTX 2080 Ti", "rtx-2080-ti", 11, 616, [13_450, 26_900, 0, 53_800], (7, 5), 250),
    row("Tesla T4", "t4", 16, 320, [8140, 16_280, 0, 65_000], (7, 5), 70),
    row("NVIDIA GeForce RTX 3060", "rtx-3060", 12, 360, [12_740, 12_740, 12_740, 25_500], (8, 6), 170),
    row("NVIDIA GeForce RTX 3070", "rtx-3070", 8, 448, [20_310, 20_310, 20_310, 40_600], (8, 6), 220),
    row("NVIDIA GeForce RTX 3080", "rtx-3080", 10, 760, [29_770, 29_770, 29_770, 59_500], (8, 6), 320),
    row("NVIDIA GeForce RTX 3090", "rtx-3090", 24, 936, [35_580, 35_580, 35_580, 71_200], (8, 6), 350),
    row("NVIDIA RTX A4000", "rtx-a4000", 16, 448, [19_170, 19_170, 19_170, 76_700], (8, 6), 140),
    row("NVIDIA RTX A5000", "rtx-a5000", 24, 768, [27_770, 27_770, 27_770, 111_100], (8, 6), 230),
    row("NVIDIA RTX A6000", "rtx-a6000", 48, 768, [38_710, 38_710, 38_710, 154_800], (8, 6), 300),
    row("NVIDIA A10", "a10", 24, 600, [31_240, 31_240, 31_240, 125_000], (8, 6), 150),
    row("NVIDIA A100-PCIE-40GB", "a100-40gb", 40, 1555, [19_500, 78_000, 39_000, 312_000], (8, 0), 250),
    row("NVIDIA A100 80GB PCIe", "a100-80gb", 80, 1935, [19_500, 78_000, 39_000, 312_000], (8, 0), 300),
    row("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb", 80, 2039, [19_500, 78_000, 39_000, 312_000], (8, 0), 400),
    row("NVIDIA GeForce RTX 4060", "rtx-4060", 8, 272, [15_110, 15_110, 15_110, 30_200], (8, 9), 115),
    row("NVIDIA GeForce RTX 4070", "rtx-4070", 12, 504, [29_150, 29_150, 29_150, 58_300], (8, 9), 200),
    row("NVIDIA GeForce RTX 4080", "rtx-4080", 16, 717, [48_740, 48_740, 48_740, 97_500], (8, 9), 320),
    row("NVIDIA GeForce RTX 4090", "rtx-4090", 24, 1008, [82_580, 82_580, 82_580, 165_200], (8, 9), 450),
    row("NVIDIA L4", "l4", 24, 300, [30_300, 30_300, 30_300, 121_000], (8, 9), 72),
    row("NVIDIA L40S", "l40s", 48, 864, [91_600, 91_600, 91_600, 362_000], (8, 9), 350),
    row("NVIDIA GeForce RTX 5060 Ti", "rtx-5060-ti", 16, 448, [23_700, 23_700, 23_700, 47_400], (12, 0), 180),
    row("NVIDIA GeForce RTX 5090", "rtx-5090", 32, 1792, [104_800, 104_800, 104_800, 209_500], (12, 0), 575),
    row("NVIDIA H100 PCIe", "h100-pcie", 80, 2039, [51_200, 102_400, 102_400, 756_000], (9, 0), 350),
    row("NVIDIA H100 80GB HBM3", "h100", 80, 3352, [66_900, 133_800, 133_800, 989_000], (9, 0), 700),
    row("NVIDIA H200", "h200", 141, 4800, [66_900, 133_800, 133_800, 989_000], (9, 0), 700),
];

/// The card of this name: short, as NVML reports it, or as older drivers did and people write it, such as `GeForce GTX 1080` or
/// `gtx 1080`.
pub fn card(name: &str) -> Option<&'static Card> {
    let wanted = plain(name);
    CARDS.iter().find(|card| card.short == name || plain(card.name) == wanted || card.short == wanted)
}

/// Without makers' words, lower case, words joined by `-`.
fn plain(name: &str) -> String {
    let words = name.split(|c: char| c.is_whitespace() || c == '-').map(str::to_lowercase);
    let words: Vec<String> =
        words.filter(|word| !matches!(word.as_str(), "" | "nvidia" | "geforce" | "tesla")).collect();
    words.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_by_every_name() {
        for name in ["gtx-1080", "NVIDIA GeForce GTX 1080", "GeForce GTX 1080", "GTX 1080"] {
            assert_eq!(card(name).map(|card| card.short), Some("gtx-1080"), "{name}");
        }
        assert_eq!(card("Tesla V100-SXM2-32GB").map(|card| card.short), Some("v100-32gb"));
        assert_eq!(card("gtx-1090"), None);
        for one in CARDS {
            assert_eq!(card(one.name), Some(one), "{}", one.name);
            assert_eq!(card(one.short), Some(one), "{}", one.short);
        }
    }

    #[test]
    fn figures_agree_with_their_generation() {
        for one in CARDS {
            let sm = (one.capability.major, one.capability.minor);
            assert_eq!(one.bf16_gflops.is_some(), sm >= (8, 0), "{}", one.short);
            assert_eq!(one.tensor_gflops.is_some(), sm >= (7, 0) && !one.short.starts_with("gtx"), "{}", one.short);
            assert_eq!(one.f16_gflops.is_some(), sm == (6, 0) || sm >= (7, 0), "{}", one.short);
            assert!(one.usable_bytes() > 3 * GIB && one.bandwidth_bytes_per_s >= 128 * GIGABYTE);
            assert!((2_000..120_000).contains(&one.f32_gflops) && (70..=700).contains(&one.tdp_watts), "{}", one.short);
        }
    }
}
