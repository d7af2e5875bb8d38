//! What fewer bits in a cache cost in answers, on the real models and the fact prompts.

use worker::cache::{KvCache, Packing, Path};
use worker::experiment::facts::Fact;
use worker::model::Model;

use crate::reference::{GEMMA3, SMOLLM2, load_real};
use crate::stored::kl;

const FACTS: u32 = 6;

/// Cache of a fact's text, and the question's logits behind `change`d and unchanged caches.
fn cost(model: &Model, fact: &Fact, change: impl Fn(&KvCache) -> KvCache) -> f64 {
    let mut context = model.start().unwrap();
    model.prefill(&mut context, &model.tokenizer().encode_start(&fact.text()).unwrap()).unwrap();
    let cache = model.extract(&context).unwrap();
    let question = model.tokenizer().encode(&fact.question()).unwrap();
    let ask = |cache: &KvCache| model.prefill(&mut model.inject(cache).unwrap(), &question).unwrap();
    kl(&ask(&cache), &ask(&change(&cache)))
}

fn check((name, json): (&str, &str)) {
    let Some((model, _turn)) = load_real((name, json)) else { return };
    let facts: Vec<Fact> = (0..FACTS).map(|index| Fact::new(11, index).unwrap()).collect();
    for (packing, limit) in [(Packing::Int8, 1e-3), (Packing::Int4, 0.02)] {
        let costs: Vec<f64> =
            facts.iter().map(|fact| cost(&model, fact, |cache| cache.pack(packing).unwrap().unpack())).collect();
        let mean = costs.iter().sum::<f64>() / costs.len() as f64;
        let cache = {
            let mut context = model.start().unwrap();
            let ids = model.tokenizer().encode_start(&facts[0].text()).unwrap();
            model.prefill(&mut context, &ids).unwrap();
            model.extract(&context).unwrap()
        };
        let ratio = cache.pack(packing).unwrap().bytes() as f64 / (cache.bytes_per_token() * cache.len()) as f64;
        let worst = costs.iter().fold(0_f64, |worst, cost| worst.max(*cost));
        eprintln!("{name} {packing:?}: KL mean {mean:.1e}, worst {worst:.1e}, {ratio:.3} of the bytes of f32");
        assert!(worst <= limit, "{name} {packing:?}: {costs:?}");
        let drift = cache.drift(&cache.pack(packing).unwrap().unpack()).unwrap();
        assert!(drift.iter().flat_map(|layer| &layer.value).all(|drift| (0.0..0.05).contains(&drift.max(0.0))));
    }
    // A mixture with another fact's cache is far from both compared with any of the above.
    let other = |cache: &KvCache| {
        let noise = cache.noise_like(worker::cache::Matched::Channel, 1);
        cache.interpolate(&noise, 0.5, Path::Straight).unwrap()
    };
    assert!(cost(&model, &facts[0], other) > 0.1);
}

#[test]
fn smollm2_answers_alike_from_fewer_bits() {
    check(SMOLLM2);
}

#[test]
fn gemma3_answers_alike_from_fewer_bits() {
    check(GEMMA3);
}
