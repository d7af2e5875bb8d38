//! Projectors end to end: caches of one model through packets, sums at another, a projector, its evaluation. On tiny models what
//! must hold of any pair, on the real ones what the pilot found.

use std::collections::BTreeMap;

use protocol::experiment::Spread;
use protocol::experiment::projector::{
    Corpus as CorpusSpec, CorpusText, Couriers, EvalSpec, LayerMap, Method, Projected, ProjectorRef, RidgeRecipe,
    Samples, Stage, Tier, TrainSpec,
};
use protocol::results::{EvalItem, EvalResult};
use worker::cache::KvCache;
use worker::experiment::ExperimentError;
use worker::experiment::projector::eval::{fact_keys, score, send_facts};
use worker::experiment::projector::train::{Solved, align, make_caches, sample_keys, solve, statistics};
use worker::model::{Message, Model};
use worker::projector::corpus::{Corpus, Sample};
use worker::projector::reading::Reading;
use worker::projector::ridge::statistics::Statistics;
use worker::projector::{Projector, ProjectorError};

use crate::reference::{GEMMA3, SMOLLM2, load_real, load_real_pair};
use crate::tiny::{FAMILIES, Tiny};

fn train_spec(samples: u32) -> TrainSpec {
    let couriers = Couriers { values: 8, names: 24, wordings: 1, pairs_percent: 0 };
    TrainSpec {
        source: "source".to_owned(),
        target: "target".to_owned(),
        corpus: CorpusSpec { text: CorpusText::Couriers(couriers), samples },
        layers: LayerMap::Proportional(1),
        method: Method::Ridge(RidgeRecipe { lambdas: vec![0.1, 0.3, 1.0], held_out_percent: 20 }),
        stage: Stage::Whole { shards: 1 },
        spread: Spread::Any,
        seed: 1,
    }
}

fn eval_spec(tier: Tier, facts: u32, conditions: &[Projected]) -> EvalSpec {
    EvalSpec {
        source: "source".to_owned(),
        target: "target".to_owned(),
        projector: ProjectorRef::Trained(0),
        shuffled: None,
        tier,
        first_fact: 0,
        facts,
        conditions: conditions.to_vec(),
        answer_tokens: 2,
        spread: Spread::Any,
        seed: 1,
    }
}

fn silent(_: u32, _: u32, _: &str) -> Result<(), ExperimentError> {
    Ok(())
}

/// Packets by name, as bytes: what one seat sends, another reads without having the model.
#[derive(Default)]
struct Mail(BTreeMap<String, Vec<u8>>);

impl Mail {
    fn send(&mut self, key: &str, cache: &KvCache) -> Result<(), ExperimentError> {
        assert!(!cache.is_rotated());
        self.0.insert(key.to_owned(), cache.to_bytes());
        Ok(())
    }

    fn fetch(&mut self, key: &str) -> Result<KvCache, ExperimentError> {
        Ok(KvCache::from_foreign_bytes(&self.0.remove(key).expect("each packet is asked for once"))?)
    }
}

fn part(source: &Model, target: &Model, spec: &TrainSpec, samples: &Samples) -> Statistics {
    let corpus = Corpus::open_paths(&spec.corpus, spec.seed).unwrap();
    let mut mail = Mail::default();
    make_caches(source, &corpus, samples, &mut |key, cache| mail.send(key, cache), &mut silent).unwrap();
    let mut keys = sample_keys(samples);
    keys.sort_unstable();
    assert_eq!(mail.0.keys().cloned().collect::<Vec<_>>(), keys);
    let (sums, result) = statistics(target, spec, &corpus, samples, &mut |key| mail.fetch(key), &mut silent).unwrap();
    assert!(mail.0.is_empty());
    assert_eq!((result.samples, result.rows), (samples.count, sums.rows()));
    sums
}

fn solved(source: &Model, target: &Model, spec: &TrainSpec, cuts: &[(u64, u32)]) -> Solved {
    let parts = cuts.iter().map(|(first, count)| {
        let samples = Samples { first: *first, count: *count };
        part(source, target, spec, &samples)
    });
    solve(&Statistics::merge(parts.collect()).unwrap(), spec).unwrap()
}

fn evaluated(source: &Model, target: &Model, spec: &EvalSpec, solved: &Solved) -> EvalResult {
    let mut mail = Mail::default();
    send_facts(source, spec, &mut |key, cache| mail.send(key, cache), &mut silent).unwrap();
    assert_eq!(mail.0.len(), fact_keys(spec).len());
    let pair = (&solved.projector, Some(&solved.shuffled));
    score(target, spec, pair, &mut |key| mail.fetch(key), &mut silent).unwrap()
}

fn of(result: &EvalResult, condition: Projected) -> Vec<&EvalItem> {
    result.items.iter().filter(|item| item.condition == condition).collect()
}

/// Largest difference of two projectors' caches of one text.
fn apart(source: &Model, target: &Model, a: &Projector, b: &Projector) -> f32 {
    let text = "Alice is a baker who lives in Paris.";
    let read = |model: &Model| Reading::of_text(model.tokenizer(), text).unwrap();
    let sent = read(source).cache(source).unwrap();
    let alignment = align(&read(target), &sent).unwrap();
    let own = a.own().cache(target, &read(target)).unwrap();
    let (a, b) = (a.project(&sent, &alignment, &own).unwrap(), b.project(&sent, &alignment, &own).unwrap());
    let pairs = a.layers().zip(b.layers());
    let far = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    pairs.map(|((_, x), (_, y))| far(&x.k, &y.k).max(far(&x.v, &y.v))).fold(0.0, f32::max)
}

#[test]
fn shards_in_any_order_make_one_projector_of_any_pair() {
    for (from, to) in [("llama", "gemma3"), ("gemma3", "llama"), ("qwen3", "qwen2")] {
        let (source, target) = (Tiny::new(from).load().unwrap(), Tiny::new(to).load().unwrap());
        let spec = train_spec(20);
        let whole = solved(&source, &target, &spec, &[(0, 20)]);
        for cuts in [vec![(11, 9), (0, 11)], vec![(16, 4), (0, 4), (8, 4), (4, 4), (12, 4)]] {
            let parts = solved(&source, &target, &spec, &cuts);
            let far = apart(&source, &target, &whole.projector, &parts.projector);
            assert!(far < 1e-5, "{from} to {to} in {}: {far}", cuts.len());
            assert_eq!(parts.result.rows, whole.result.rows);
        }
        let refused = whole.projector.project(
            &Reading::of_text(target.tokenizer(), "x").unwrap().cache(&target).unwrap(),
            &worker::projector::Alignment::by_spans(&[(0, 1)], &[(0, 1)]).unwrap(),
            &Reading::of_text(target.tokenizer(), "x").unwrap().cache(&target).unwrap(),
        );
        assert!(matches!(refused, Err(ProjectorError::Fingerprint { side: "source", .. })), "{refused:?}");
    }
}

#[test]
fn every_condition_is_scored_in_every_tier_that_tiny_models_can_spell() {
    let (source, target) = (Tiny::new("llama").load().unwrap(), Tiny::new("gemma3").load().unwrap());
    let solved = solved(&source, &target, &train_spec(20), &[(0, 20)]);
    for tier in [Tier::Seen, Tier::Binding] {
        let spec = eval_spec(tier, 3, &Projected::ALL);
        let result = evaluated(&source, &target, &spec, &solved);
        assert_eq!((result.items.len(), result.layers.len()), (3 * Projected::ALL.len(), 2));
        assert!(of(&result, Projected::Native).iter().all(|item| item.kl == 0.0 && item.bytes == 0));
        for item in &result.items {
            let swapped = item.condition == Projected::Mismatched;
            assert_eq!(item.answer != item.packet_answer, swapped, "{item:?}");
            assert!((0.0..=1.0).contains(&item.p_answer) && item.kl.is_finite() && item.latency_ms > 0.0);
        }
        let sent = of(&result, Projected::Projected)[0];
        let text = Reading::of_text(source.tokenizer(), &sent.context).unwrap();
        let bytes = text.ids.len() * source.config().kv_bytes_per_token();
        assert_eq!(sent.bytes, bytes as u64);
    }
    let mut spec = eval_spec(Tier::Seen, 2, &[Projected::Shuffled]);
    let alone = score(&target, &spec, (&solved.projector, None), &mut |_| panic!("not asked"), &mut silent);
    assert!(matches!(alone, Err(ExperimentError::BadSpec { .. })));
    spec.facts = 1;
    assert!(matches!(
        send_facts(&source, &spec, &mut |_, _| Ok(()), &mut silent),
        Err(ExperimentError::BadSpec { .. })
    ));
}

#[test]
fn tokens_know_where_they_stand_in_every_tokenizer() {
    // Several bytes a character, more than one token a character, spaces in a row.
    for text in ["Alice lives in Paris.", "Zoë  moved to 東京 🙂 last\nyear", ""] {
        for family in FAMILIES {
            let model = Tiny::new(family).load().unwrap();
            let (ids, spans) = model.tokenizer().encode_spans(text).unwrap();
            assert_eq!(ids, model.tokenizer().encode_start(text).unwrap());
            assert_eq!(ids.len(), spans.len());
            let first = usize::from(model.tokenizer().adds_bos());
            assert!(spans[..first].iter().all(|span| *span == (0, 0)), "{family}");
            let mut end = 0;
            for (begin, next) in &spans[first..] {
                assert!(*begin <= end && *next >= end && text.is_char_boundary(*begin as usize), "{family} {spans:?}");
                end = *next;
            }
            assert_eq!(end as usize, text.len(), "{family} {spans:?}");
        }
    }
}

#[test]
fn a_conversation_is_read_in_the_template_and_keeps_its_places() {
    let Some((smollm, _turn)) = load_real(SMOLLM2) else { return };
    let turns = [("user", "Where does Alice live?"), ("assistant", "In Paris."), ("user", "Since when?")];
    let turns: Vec<Message> =
        turns.map(|(role, content)| Message { role: role.to_owned(), content: content.to_owned() }).to_vec();
    let text = "Where does Alice live?\nIn Paris.\nSince when?".to_owned();
    let mut sample =
        Sample { id: 0, group: 0, text: text.clone(), prompt: String::new(), answer: String::new(), turns };
    let reading = Reading::of_sample(smollm.tokenizer(), &sample).unwrap();
    assert_eq!(reading.ids, smollm.tokenizer().encode_chat(&sample.turns, true).unwrap());
    let words: Vec<&str> = reading
        .spans
        .iter()
        .map(|(begin, end)| &text[*begin as usize..*end as usize])
        .filter(|word| !word.is_empty())
        .collect();
    assert_eq!(words.concat(), "Where does Alice live?In Paris.Since when?");
    // What spells a special token is never a special token.
    sample.turns[0].content = "<|im_end|>".to_owned();
    let plain = Reading::of_sample(smollm.tokenizer(), &sample).unwrap();
    assert_eq!(plain, Reading::of_text(smollm.tokenizer(), &text).unwrap());
}

/// What the pilot found, with a third of its sentences: the place comes through where the raw copy is harmful and both controls
/// know nothing.
#[test]
fn smollm2_tells_gemma3_where_people_live() {
    let Some((source, target, _turn)) = load_real_pair(SMOLLM2, GEMMA3) else { return };
    let solved = solved(&source, &target, &train_spec(48), &[(0, 48)]);
    let conditions =
        [Projected::Native, Projected::RawCopy, Projected::Projected, Projected::Mismatched, Projected::Shuffled];
    let mut spec = eval_spec(Tier::Seen, 8, &conditions);
    spec.answer_tokens = 1;
    let result = evaluated(&source, &target, &spec, &solved);
    let right = |condition| of(&result, condition).iter().filter(|item| item.choice == item.answer).count();
    let kl = |condition| of(&result, condition).iter().map(|item| item.kl).sum::<f64>() / 8.0;
    for condition in conditions {
        eprintln!("smollm2 to gemma3, {condition}: {} of 8, KL {:.3}", right(condition), kl(condition));
    }
    assert_eq!(right(Projected::Native), 8);
    assert!(right(Projected::Projected) >= 7 && kl(Projected::Projected) < 1.0);
    assert!(right(Projected::RawCopy) <= 4 && right(Projected::Shuffled) <= 4);
    let swapped = of(&result, Projected::Mismatched);
    assert!(swapped.iter().filter(|item| item.choice == item.packet_answer).count() >= 6);
}
