//! Every card that the tables name is in the catalogue.

use protocol::catalogue::card;

/// As written there, and by the name that we find it by; `A100` and `H100` alone mean any of their kinds.
const NAMED: [(&str, &str); 24] = [
    ("GTX 1080", "gtx-1080"),
    ("GTX 1660 SUPER, 6GB", "gtx-1660-super"),
    ("RTX 3060", "rtx-3060"),
    ("RTX 3060 12GB", "NVIDIA GeForce RTX 3060"),
    ("RTX 3070", "rtx-3070"),
    ("RTX 3080", "rtx-3080"),
    ("RTX 3090, 24GB", "rtx-3090"),
    ("RTX 4060", "rtx-4060"),
    ("RTX 4070", "rtx-4070"),
    ("RTX 4080, 16GB", "rtx-4080"),
    ("RTX 4090, 24GB", "rtx-4090"),
    ("RTX 5060 Ti 16GB", "rtx-5060-ti"),
    ("RTX 5090", "rtx-5090"),
    ("RTX A6000, 48GB", "rtx-a6000"),
    ("V100", "v100-16gb"),
    ("V100", "v100-32gb"),
    ("A100 40GB", "a100-40gb"),
    ("A100, 40-80GB", "a100-80gb"),
    ("A100 (80GB)", "a100-sxm4-80gb"),
    ("A100, 80GB", "NVIDIA A100 80GB PCIe"),
    ("H100", "h100"),
    ("H100 rack", "h100-pcie"),
    ("older ones: P40", "Tesla P40"),
    ("older ones: K80", "Tesla K80"),
];

#[test]
fn every_card_that_is_named_is_known() {
    for (written, name) in NAMED {
        assert!(card(name).is_some(), "{written}: no {name}");
    }
    // Memory as the tables give it, GiB.
    for (name, gib) in
        [("gtx-1660-super", 6), ("rtx-3060", 12), ("rtx-3090", 24), ("rtx-4090", 24), ("rtx-5060-ti", 16)]
    {
        assert_eq!(card(name).unwrap().memory_bytes, gib << 30, "{name}");
    }
    for (name, gib) in [("rtx-4080", 16), ("rtx-a6000", 48), ("a100-40gb", 40), ("a100-80gb", 80)] {
        assert_eq!(card(name).unwrap().memory_bytes, gib << 30, "{name}");
    }
}
