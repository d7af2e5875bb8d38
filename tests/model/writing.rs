//! Models that write: samplers with seeds, many sequences at once, each with its own end.

use std::process::{Command, Output};

use protocol::memory::ModelShape;
use worker::model::quant::PREFILL_ROWS_MIN;
use worker::model::{
    BatchItem, End, Generated, LoadOptions, Model, ModelError, Precision, Sampler, Sampling, Sequence, argmax,
};

use crate::reference::{SMOLLM2, load_real};
use crate::tiny::{FAMILIES, Tiny};

fn load(family: &str, precision: Precision) -> Model {
    Tiny::new(family).load_with(&LoadOptions { precision, ..LoadOptions::default() }).unwrap()
}

fn prompts(model: &Model, count: usize) -> Vec<Vec<u32>> {
    let size = model.tokenizer().size();
    (0..count).map(|p| (0..9 + p).map(|i| ((i * 37 + p * 11 + 3) % size) as u32).collect()).collect()
}

/// One of four ways to choose; hot enough that the tiny Gemma, which is very sure of itself, does not repeat one token.
fn sampling(model: &Model, index: usize, seed: u64) -> Sampling {
    let heat = if model.config().family.architecture == "gemma3" { 10.0 } else { 1.0 };
    match index % 4 {
        0 => Sampling::default(),
        1 => Sampling { temperature: 1.3 * heat, seed, ..Sampling::default() },
        2 => Sampling { temperature: 0.8 * heat, top_k: Some(20), seed, ..Sampling::default() },
        _ => Sampling { temperature: 1.0 * heat, top_p: Some(0.9), seed, ..Sampling::default() },
    }
}

/// Each prompt prefilled alone, then all written together, `counts` tokens at most.
fn write(model: &Model, prompts: &[Vec<u32>], seed: u64, counts: &[usize]) -> Vec<Generated> {
    let mut contexts: Vec<_> = prompts.iter().map(|_| model.start().unwrap()).collect();
    let mut samplers: Vec<_> =
        (0..prompts.len()).map(|index| Sampler::new(sampling(model, index, seed + index as u64)).unwrap()).collect();
    let logits: Vec<_> =
        contexts.iter_mut().zip(prompts).map(|(context, prompt)| model.prefill(context, prompt).unwrap()).collect();
    let mut sequences: Vec<_> = contexts
        .iter_mut()
        .zip(&mut samplers)
        .zip(logits.into_iter().zip(counts))
        .map(|((context, sampler), (logits, count))| Sequence { context, logits, sampler, count: *count })
        .collect();
    let written = model.generate_batch(&mut sequences).unwrap();
    for ((sequence, prompt), written) in sequences.iter().zip(prompts).zip(&written) {
        assert_eq!(sequence.context.len(), prompt.len() + written.tokens.len(), "the context holds what was written");
    }
    written
}

#[test]
fn the_same_seeds_give_the_same_texts() {
    for family in FAMILIES {
        for (precision, count) in
            [(Precision::F32, 5), (Precision::Stored, 5), (Precision::Stored, PREFILL_ROWS_MIN + 3)]
        {
            let place = format!("{family}, {precision:?}, {count}");
            let model = load(family, precision);
            let prompts = prompts(&model, count);
            let counts: Vec<_> = (0..count).map(|index| 5 + 7 * (index % 3)).collect();
            let texts = write(&model, &prompts, 7, &counts);
            assert_eq!(texts, write(&model, &prompts, 7, &counts), "{place}");
            assert_ne!(texts, write(&model, &prompts, 70, &counts), "{place}");
            for (text, count) in texts.iter().zip(&counts) {
                assert_eq!(text.end == End::Count, text.tokens.len() == *count, "{place}");
            }
        }
    }
}

#[test]
fn few_sequences_write_what_each_writes_alone() {
    for family in FAMILIES {
        let model = load(family, Precision::Stored);
        let prompts = prompts(&model, PREFILL_ROWS_MIN - 1);
        let counts: Vec<_> = (0..prompts.len()).map(|index| 6 + 5 * (index % 3)).collect();
        let together = write(&model, &prompts, 3, &counts);
        for (index, prompt) in prompts.iter().enumerate() {
            let mut context = model.start().unwrap();
            let logits = model.prefill(&mut context, prompt).unwrap();
            let mut sampler = Sampler::new(sampling(&model, index, 3 + index as u64)).unwrap();
            let alone = model.generate(&mut context, logits, counts[index], &mut sampler).unwrap();
            assert_eq!(alone, together[index], "{family}, sequence {index}");
        }
    }
}

#[test]
fn a_text_cut_in_two_is_the_text() {
    let model = load("qwen3", Precision::Stored);
    let prompt = &prompts(&model, 1)[0];
    let settings = Sampling { temperature: 1.5, seed: 9, ..Sampling::default() };
    let write = |pieces: &[usize]| {
        let (mut context, mut sampler) = (model.start().unwrap(), Sampler::new(settings).unwrap());
        let mut logits = model.prefill(&mut context, prompt).unwrap();
        let mut text = Vec::new();
        for count in pieces {
            let mut sequence = [Sequence { context: &mut context, logits, sampler: &mut sampler, count: *count }];
            text.extend(model.generate_batch(&mut sequence).unwrap().pop().unwrap().tokens);
            let [sequence] = sequence;
            logits = sequence.logits;
        }
        text
    };
    assert_eq!(write(&[12]), write(&[5, 0, 7]));
}

#[test]
fn texts_end_where_the_model_does() {
    let model = load("llama", Precision::Stored);
    let last = model.config().context_length as i64 - 1;
    let (mut near, mut far) = (model.start().unwrap(), model.start().unwrap());
    let near_logits = model.prefill(&mut near, &[5, 6, 7]).unwrap();
    let far_logits = model.prefill_at(&mut far, &[5, 6, 7], last - 4).unwrap();
    let [mut one, mut other] = [Sampler::greedy(), Sampler::greedy()];
    let mut sequences = [
        Sequence { context: &mut near, logits: near_logits, sampler: &mut one, count: 10 },
        Sequence { context: &mut far, logits: far_logits, sampler: &mut other, count: 10 },
    ];
    let written = model.generate_batch(&mut sequences).unwrap();
    assert!(written[1].end == End::Context && written[1].tokens.len() == 2, "{written:?}");
    assert!(written[0].end != End::Context, "the other one goes on");
    assert_eq!(far.next_position(), last + 1);

    // The end token as the likeliest of all: nothing is written, and it is not fed.
    let end = (0..model.vocabulary() as u32).find(|id| model.tokenizer().is_end(*id)).unwrap();
    let mut logits = vec![0.0; model.vocabulary()];
    logits[end as usize] = 9.0;
    let mut context = model.start().unwrap();
    model.prefill(&mut context, &[5]).unwrap();
    let written = model.generate(&mut context, logits.clone(), 4, &mut Sampler::greedy()).unwrap();
    assert_eq!((written, context.len()), (Generated { tokens: Vec::new(), end: End::Token }, 1));
    let written = model.generate(&mut context, logits, 0, &mut Sampler::greedy()).unwrap();
    assert_eq!(written.end, End::Count, "nothing asked, nothing chosen");

    let refused = model.generate(&mut context, vec![0.0; 3], 4, &mut Sampler::greedy());
    assert!(matches!(refused, Err(ModelError::Logits { got: 3, .. })));
    let mut part = model.start_layers(0..1).unwrap();
    let refused = model.generate(&mut part, vec![0.0; model.vocabulary()], 4, &mut Sampler::greedy());
    assert!(matches!(refused, Err(ModelError::Part { .. })));
}

#[test]
fn greedy_is_the_likeliest_token_each_time() {
    for family in FAMILIES {
        let model = load(family, Precision::F32);
        let prompt = &prompts(&model, 1)[0];
        let mut context = model.start().unwrap();
        let logits = model.prefill(&mut context, prompt).unwrap();
        let written = model.generate(&mut context, logits.clone(), 6, &mut Sampler::greedy()).unwrap();
        let (mut context, mut logits, mut expected) = (model.start().unwrap(), logits, Vec::new());
        model.prefill(&mut context, prompt).unwrap();
        while expected.len() < 6 && !model.tokenizer().is_end(argmax(&logits)) {
            expected.push(argmax(&logits));
            logits = model.prefill(&mut context, &expected[expected.len() - 1..]).unwrap();
        }
        assert_eq!(written.tokens, expected, "{family}");
    }
}

/// The executor's binary is beside the tests'.
fn tool(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bonepile-executor")).arg("model").args(arguments).output().unwrap()
}

fn tiny_file() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tiny.gguf");
    Tiny::new("llama").write(&path);
    let name = path.to_str().unwrap().to_owned();
    (directory, name)
}

#[test]
fn the_tool_runs_a_batch() {
    let (directory, model) = tiny_file();
    let lines = directory.path().join("prompts.txt");
    std::fs::write(&lines, "Alice lives in Paris\n\nBruno moved to Tokyo last year\nCarlos\n").unwrap();
    let lines = lines.to_str().unwrap();
    let sampled =
        ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--seed", "4", "--tokens", "6", "--json"];
    let document = |prompts: &[&str]| -> serde_json::Value {
        let output = tool(&[&["run", &model], prompts, &sampled].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let from_file = document(&["--batch", lines]);
    let typed =
        document(&["--text", "Alice lives in Paris", "--text", "Bruno moved to Tokyo last year", "--text", "Carlos"]);
    assert_eq!(from_file["prompts"], typed["prompts"]);
    let prompts = typed["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 3);
    for prompt in prompts {
        let written = prompt["generated_ids"].as_array().unwrap().len();
        assert!(written == 6 || prompt["end"] == "token", "{prompt}");
        assert_eq!(prompt["top"].as_array().unwrap().len(), 5);
    }
    // The first prompt's seed is the one given, also when it is alone.
    let alone = document(&["--text", "Alice lives in Paris"]);
    assert_eq!(alone["prompts"][0]["generated_ids"], prompts[0]["generated_ids"]);
    let plain = tool(&["run", &model, "--text", "Alice", "--text", "Bruno", "--tokens", "3"]);
    let said = String::from_utf8(plain.stdout).unwrap();
    assert!(said.starts_with("==> 1 <==\n") && said.contains("\n==> 2 <==\n"), "{said}");
}

#[test]
fn the_tool_refuses_nonsense_before_it_looks_for_a_model() {
    let (directory, model) = tiny_file();
    let empty = directory.path().join("empty.txt");
    std::fs::write(&empty, "\n").unwrap();
    let refused = |arguments: &[&str]| {
        let output = tool(arguments);
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let absent = |rest: &[&str]| refused(&[&["run", "no-such-model", "--text", "x"], rest].concat());
    for (rest, expected) in [
        (&["--temperature", "-0.5"][..], "error: cannot sample with a temperature of -0.5"),
        (&["--temperature", "NaN"], "error: cannot sample with a temperature of NaN"),
        (&["--top-p", "0"], "error: cannot sample with a top-p of 0"),
        (&["--top-p", "1.5"], "error: cannot sample with a top-p of 1.5"),
        (&["--top-k", "0"], "error: cannot sample with a top-k of 0"),
        (&["--text", "y", "--save", "z"], "error: --save takes one prompt, not 2"),
    ] {
        let said = absent(rest);
        assert!(said.starts_with(expected), "{rest:?}: {said}");
    }
    let said = refused(&["run", "no-such-model", "--batch", empty.to_str().unwrap()]);
    assert!(said.contains("has no prompts"), "{said}");
    assert!(refused(&["run", "no-such-model", "--batch", "/no/such/file"]).contains("cannot read /no/such/file"));
    assert!(refused(&["run", &model, "--text", ""]).contains("a prompt is empty"));
}

#[test]
fn the_tool_shows_memory_by_phase() {
    let (_directory, model) = tiny_file();
    let document = |context: &str| -> serde_json::Value {
        let output = tool(&["show", &model, "--context", context, "--threads", "3", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let memory = &document("640")["memory"];
    assert_eq!((&memory["context_tokens"], &memory["threads"]), (&640.into(), &3.into()));
    // Two layers, keys and values, two heads of 8; in halves, then in f32.
    assert_eq!(memory["ways"][0]["parts"]["keys_values"], 640 * 2 * 2 * 2 * 8 * 2);
    assert_eq!(memory["ways"][1]["parts"]["keys_values"], 640 * 2 * 2 * 2 * 8 * 4);
    for way in memory["ways"].as_array().unwrap() {
        let sum: u64 = way["parts"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(way["peak"], sum, "{way}");
    }
    for context in ["0", "4097"] {
        let output = tool(&["show", &model, "--context", context]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("this model has 1 to 4096"), "{said}");
    }
    let text = String::from_utf8(tool(&["show", &model]).stdout).unwrap();
    assert!(text.contains("one sequence of 1024 tokens,") && text.contains("the most at once"), "{text}");
}

#[test]
fn the_tool_tells_a_models_shape_from_its_headers() {
    let (directory, model) = tiny_file();
    let told = |path: &str| -> ModelShape {
        let output = tool(&["shape", "--json", "--", path]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let shape = told(&model);
    let sizes = [shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.ffn];
    assert_eq!((sizes, shape.context_length), ([2, 32, 4, 2, 8, 64], 4096));
    // The same model in both layouts, and one with a window in one layer of two.
    for name in crate::checkpoints::NAMES {
        let path = crate::checkpoints::directory(name);
        let (one, other) = (told(path.to_str().unwrap()), told(path.join("model.gguf").to_str().unwrap()));
        assert_eq!((one.parameters(), one.tied, one.vocabulary), (other.parameters(), other.tied, other.vocabulary));
        assert!(one.stored.unwrap().all > 0 && one.is_plausible(), "{name}: {one:?}");
    }
    let refused = tool(&["shape", directory.path().to_str().unwrap()]);
    assert!(!refused.status.success() && refused.stdout.is_empty());
    let text = String::from_utf8(tool(&["shape", &model]).stdout).unwrap();
    assert!(text.contains("layers           2\n"), "{text}");
}

#[test]
fn smollm2_writes_several_texts_at_once() {
    let Some((exact, _turn)) = load_real(SMOLLM2) else { return };
    let options = LoadOptions { precision: Precision::Stored, ..LoadOptions::default() };
    let model = Model::load(exact.path(), &options).unwrap();
    drop(exact);
    let texts = ["The capital of France is", "Water boils at a temperature of", "My favourite colour is"];
    let prompts: Vec<_> = texts.iter().map(|text| model.tokenizer().encode_start(text).unwrap()).collect();
    let mut contexts: Vec<_> = prompts.iter().map(|_| model.start().unwrap()).collect();
    let pairs = contexts.iter_mut().zip(&prompts);
    let mut items: Vec<_> = pairs.map(|(context, tokens)| BatchItem { context, tokens }).collect();
    let logits = model.forward_batch(&mut items).unwrap();
    let mut samplers = [Sampler::greedy(), Sampler::greedy(), Sampler::greedy()];
    let mut sequences: Vec<_> = contexts
        .iter_mut()
        .zip(&mut samplers)
        .zip(logits)
        .map(|((context, sampler), logits)| Sequence { context, logits, sampler, count: 12 })
        .collect();
    let written = model.generate_batch(&mut sequences).unwrap();
    let said: Vec<_> = written.iter().map(|written| model.tokenizer().decode(&written.tokens).unwrap()).collect();
    eprintln!("{said:?}");
    assert!(said[0].contains("Paris"), "{said:?}");
}
