//! Every K, V and logit of both real models against `transformers`' in full: relative L2, and KL over all positions, for each
//! path of computation. Ignored by default, for it needs 0.9 GB of tensors that are not in the repository:
//! `make check-reference` makes them and runs this. The limits are those of f32 noise between implementations, with a factor
//! of 4 to 20 to spare, and, where activations are rounded to 8 bits, about twice what llama.cpp takes for itself.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use worker::model::{LoadOptions, Logits, Model, Precision, Tap, argmax};

use crate::checkpoints::{deviation, numbers};
use crate::reference::{Case, GEMMA3, Reference, SMOLLM2, model_file};
use crate::stored::kl;

/// Where the tensors lie.
const VARIABLE: &str = "BONEPILE_REFERENCE";

struct Path {
    name: &'static str,
    precision: Precision,
    /// Tokens that run at once.
    pass: usize,
    limits: Limits,
}

/// What a path may deviate by.
#[derive(Clone, Copy)]
struct Limits {
    /// Relative L2 of K and V of each layer.
    tensor: f64,
    /// Of any logit, absolute.
    logit: f64,
    /// KL(reference ‖ path) at any position, nats.
    kl: f64,
    /// The same, mean over all positions of all prompts.
    kl_mean: f64,
}

const EXACT: Limits = Limits { tensor: 1e-5, logit: 1e-3, kl: 1e-6, kl_mean: 1e-6 };
const ROUNDED: Limits = Limits { tensor: f64::INFINITY, logit: f64::INFINITY, kl: f64::INFINITY, kl_mean: 1e-2 };

const PATHS: [Path; 4] = [
    Path { name: "f32", precision: Precision::F32, pass: 512, limits: EXACT },
    Path { name: "f32, a token at a time", precision: Precision::F32, pass: 1, limits: EXACT },
    Path { name: "stored", precision: Precision::Stored, pass: 512, limits: EXACT },
    Path { name: "stored, a token at a time", precision: Precision::Stored, pass: 1, limits: ROUNDED },
];

/// The worst of one path and prompt.
#[derive(Default)]
struct Row {
    key_plain: f64,
    key: f64,
    value: f64,
    logit: f64,
    costs: Vec<f64>,
    agreed: usize,
}

impl Row {
    fn join(mut self, other: &Self) -> Self {
        self.key_plain = worse(self.key_plain, other.key_plain);
        self.key = worse(self.key, other.key);
        self.value = worse(self.value, other.value);
        self.logit = worse(self.logit, other.logit);
        self.costs.extend(&other.costs);
        self.agreed += other.agreed;
        self
    }

    fn largest(&self) -> f64 {
        self.costs.iter().copied().fold(0.0, worse)
    }

    fn mean(&self) -> f64 {
        self.costs.iter().sum::<f64>() / self.costs.len() as f64
    }

    fn print(&self, place: &str) {
        let agreement = self.agreed as f64 / self.costs.len() as f64;
        let (mean, largest, positions) = (self.mean(), self.largest(), self.costs.len());
        eprintln!(
            "{place:<42} {:>8.1e} {:>8.1e} {:>8.1e} {:>8.1e} {mean:>8.1e} {largest:>8.1e} {agreement:>6.3} {positions:>4}",
            self.key_plain, self.key, self.value, self.logit
        );
    }

    /// What is beyond its limit.
    fn beyond(&self, limits: Limits) -> Vec<String> {
        let measures = [
            ("K before RoPE", self.key_plain, limits.tensor),
            ("K", self.key, limits.tensor),
            ("V", self.value, limits.tensor),
            ("a logit", self.logit, limits.logit),
            ("KL", self.largest(), limits.kl),
            ("mean KL", self.mean(), limits.kl_mean),
        ];
        let beyond = measures.into_iter().filter(|(_, got, limit)| got.is_nan() || got > limit);
        beyond.map(|(what, got, limit)| format!("{what} deviates by {got:.1e}, limit {limit:.0e}")).collect()
    }
}

/// The larger, or NaN if one is.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

fn run(model: &Model, case: &Case, pass: usize, want: &HashMap<String, Tensor>) -> Row {
    let (layers, heads) = (model.config().layers.len(), model.config().kv_heads);
    // New columns come a head at a time, so they are collected a head at a time and joined.
    let mut plain = vec![vec![Vec::new(); heads]; layers];
    let mut row = Row::default();
    let mut context = model.start().unwrap();
    let positions: Vec<i64> = (0..case.ids.len() as i64).collect();
    let logits = &want["logits"];
    for (ids, positions) in case.ids.chunks(pass).zip(positions.chunks(pass)) {
        let mut observe = |tap: Tap, layer: usize, tensor: &Tensor| {
            if tap == Tap::KeyPlain {
                for (head, rows) in plain[layer].iter_mut().enumerate() {
                    rows.extend(numbers(&tensor.get(head)?));
                }
            }
            Ok(())
        };
        let rows = model.forward(&mut context, ids, positions, Logits::All, Some(&mut observe)).unwrap();
        for (got, position) in rows.iter().zip(positions) {
            let want = numbers(&logits.get(usize::try_from(*position).unwrap()).unwrap());
            row.logit = got.iter().zip(&want).map(|(a, b)| f64::from((a - b).abs())).fold(row.logit, worse);
            row.costs.push(kl(&want, got));
            row.agreed += usize::from(argmax(got) == argmax(&want));
        }
    }
    let cache = model.extract(&context).unwrap();
    for (layer, plain) in plain.iter().enumerate() {
        let kv = cache.layer(layer).unwrap();
        let against = |what: &str, got: &[f32]| deviation(got, &numbers(&want[&format!("{what}.{layer}")]));
        row.key_plain = worse(row.key_plain, against("k_pre", &plain.concat()));
        row.key = worse(row.key, against("k_post", &kv.k));
        row.value = worse(row.value, against("v", &kv.v));
    }
    row
}

#[test]
#[ignore = "needs the full tensors: make check-reference"]
fn every_path_gives_the_full_tensors() {
    let directory = PathBuf::from(std::env::var_os(VARIABLE).expect("run `make check-reference`"));
    let head = ["K plain", "K", "V", "logit", "KL mean", "KL max", "top 1"].map(|head| format!("{head:>8}"));
    eprintln!("{:<42} {}", "worst relative L2 of any layer", head.join(" "));
    let mut wrong = Vec::new();
    for (name, (file, json)) in [("smollm2", SMOLLM2), ("gemma3", GEMMA3)] {
        let reference: Reference = serde_json::from_str(json).unwrap();
        let path = model_file(file).expect("the model's file is needed");
        for Path { name: path_name, precision, pass, limits } in PATHS {
            let model = Model::load(&path, &LoadOptions { precision, ..LoadOptions::default() }).unwrap();
            let mut all = Row::default();
            for case in &reference.cases {
                let tensors = directory.join(format!("{name}.{}.safetensors", case.name));
                let want = candle_core::safetensors::load(&tensors, &Device::Cpu).unwrap();
                let row = run(&model, case, pass, &want);
                row.print(&format!("{name} {}, {path_name}", case.name));
                all = all.join(&row);
            }
            all.print(&format!("{name} ALL, {path_name}"));
            wrong.extend(all.beyond(limits).into_iter().map(|what| format!("{name}, {path_name}: {what}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
