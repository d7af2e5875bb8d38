//! What a projector carries: facts that only the source has read, asked of the target under every condition.
//!
//! In two halves. The source reads each fact and sends its cache, with a message that it writes from it where the text relay is
//! asked for. The target is given what the condition says, then a question, and is measured against its own reading of the text.
//! The candidates of the constrained choice are eight places of one token each, so chance is 0.125. Each fact is answered once:
//! the unit of analysis is the fact.

use std::collections::BTreeMap;
use std::time::Instant;

use protocol::experiment::projector::{EvalSpec, Projected};
use protocol::results::{EvalItem, EvalResult};
use serde::{Deserialize, Serialize};

use super::facts::{Told, candidates, told};
use super::fit::Fits;
use super::train::align;
use crate::cache::{KvCache, LayerKv};
use crate::experiment::facts::candidate_tokens;
use crate::experiment::measure::{kl, log_softmax};
use crate::experiment::transfer::{Emit, Fetch, Sent};
use crate::experiment::{ExperimentError, Progress, model_facts};
use crate::model::{Model, Sampler, argmax};
use crate::projector::reading::Reading;
use crate::projector::{Projector, rows};

/// Longest answer that a spec may ask for, tokens.
const ANSWER_TOKENS_MAX: u32 = 64;
/// Longest message of the text relay, tokens.
const MESSAGE_TOKENS: usize = 32;
/// What the source goes on from when it is to pass on what it read: as a text goes on, for models without a chat template.
const PASS_ON: &str = "\nNote to a colleague who has not read this:";

/// Said with each cache: what the source took, and what it would have written instead.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    /// Reading the text, milliseconds.
    read_ms: f64,
    /// Writing the message, milliseconds.
    write_ms: f64,
    /// What it wrote; empty if it was not asked to.
    message: String,
}

/// Name of a fact's packet: `fact-3`.
pub fn fact_key(fact: u32) -> String {
    format!("fact-{fact}")
}

/// Names of all packets that the source sends, in that order.
pub fn fact_keys(spec: &EvalSpec) -> Vec<String> {
    facts(spec).map(fact_key).collect()
}

fn facts(spec: &EvalSpec) -> std::ops::Range<u32> {
    spec.first_fact..spec.first_fact.saturating_add(spec.facts)
}

/// The source's half: its cache of each fact, un-rotated.
///
/// # Errors
/// [`ExperimentError::BadSpec`], what `emit` said, or what failed in the model.
pub fn send_facts(
    model: &Model,
    spec: &EvalSpec,
    emit: &mut Emit<'_>,
    progress: &mut Progress<'_>,
) -> Result<Sent, ExperimentError> {
    check(spec)?;
    let mut sent = Sent::default();
    for (done, index) in (0..).zip(facts(spec)) {
        progress(done, spec.facts, &format!("fact {} of {}", done + 1, spec.facts))?;
        let text = told(spec.tier, spec.seed, index)?.text;
        let started = Instant::now();
        let cache = Reading::of_text(model.tokenizer(), &text)?.cache(model)?;
        let mut note = Note { read_ms: milliseconds(started), ..Note::default() };
        if spec.conditions.contains(&Projected::TextRelay) {
            let started = Instant::now();
            note.message = pass_on(model, &cache)?;
            note.write_ms = milliseconds(started);
        }
        sent.packets += 1;
        sent.tokens += cache.len() as u64;
        let note = serde_json::to_string(&note).expect("a note is plain data");
        emit(&fact_key(index), &cache.with_note(note))?;
    }
    progress(spec.facts, spec.facts, "done")?;
    Ok(sent)
}

/// What the source writes from its cache, up to the end of a line.
fn pass_on(model: &Model, cache: &KvCache) -> Result<String, ExperimentError> {
    let mut context = model.inject(cache)?;
    let logits = model.prefill(&mut context, &model.tokenizer().encode(PASS_ON)?)?;
    let written = model.generate(&mut context, logits, MESSAGE_TOKENS, &mut Sampler::greedy())?;
    let text = model.tokenizer().decode(&written.tokens)?;
    Ok(text.trim().lines().next().unwrap_or_default().to_owned())
}

/// The target's half: answers about each fact under every condition of the spec. `fetch` gives the source's caches by
/// [`fact_key`]; `shuffled` is the control that was trained on shuffled pairs.
///
/// # Errors
/// [`ExperimentError::BadSpec`], [`ExperimentError::Candidates`], [`ExperimentError::Projector`] for projectors of other models,
/// what `fetch` said, or what failed in the model.
pub fn score(
    model: &Model,
    spec: &EvalSpec,
    (projector, shuffled): (&Projector, Option<&Projector>),
    fetch: &mut Fetch<'_>,
    progress: &mut Progress<'_>,
) -> Result<EvalResult, ExperimentError> {
    check(spec)?;
    if spec.conditions.contains(&Projected::Shuffled) && shuffled.is_none() {
        let what = "condition `shuffled` needs a projector that was trained on shuffled pairs".to_owned();
        return Err(ExperimentError::BadSpec { what });
    }
    let places = candidates(spec.tier);
    let tokens = candidate_tokens(model.tokenizer(), &places)?;
    let fits = Fits::new(model.layout());
    let mut target = Target { model, spec, projector, shuffled, places, tokens, heard: BTreeMap::new(), fits };
    let mut items = Vec::new();
    for (done, index) in (0..).zip(facts(spec)) {
        progress(done, spec.facts, &format!("fact {} of {}", done + 1, spec.facts))?;
        for wanted in [index, target.other(index)] {
            if !target.heard.contains_key(&wanted) {
                let heard = target.hear(wanted, fetch)?;
                target.heard.insert(wanted, heard);
            }
        }
        target.heard.retain(|known, _| known.abs_diff(index) <= 1);
        let native = target.native(index)?;
        let oracle = target.ask(&native, &target.heard[&index].told.prompt)?.logits;
        for condition in &spec.conditions {
            progress(done, spec.facts, &format!("fact {} of {}: {condition}", done + 1, spec.facts))?;
            items.push(target.item(index, *condition, &native, &oracle)?);
        }
        target.compare(index, &native)?;
    }
    progress(spec.facts, spec.facts, "done")?;
    let source = target.source_facts()?;
    Ok(EvalResult {
        source,
        target: model_facts(model, &spec.target),
        method: projector.manifest().method.clone(),
        parameters: projector.parameters(),
        tier: spec.tier,
        candidates: places.map(str::to_owned).to_vec(),
        items,
        layers: target.fits.finish(&projector.manifest().layers),
    })
}

fn check(spec: &EvalSpec) -> Result<(), ExperimentError> {
    let bad = |what: String| Err(ExperimentError::BadSpec { what });
    if spec.facts < 2 {
        return bad(format!("{} facts; another subject's cache needs 2 or more", spec.facts));
    }
    if spec.answer_tokens == 0 || spec.answer_tokens > ANSWER_TOKENS_MAX {
        return bad(format!("answers of {} tokens, 1 to {ANSWER_TOKENS_MAX} are possible", spec.answer_tokens));
    }
    match spec.first_fact.checked_add(spec.facts - 1) {
        Some(last) => told(spec.tier, spec.seed, last).map(|_| ()),
        None => bad("fact numbers beyond 32 bits".to_owned()),
    }
}

/// What the source sent of a fact, and how the target would read it.
struct Heard {
    told: Told,
    reading: Reading,
    cache: KvCache,
    note: Note,
}

/// What the target is given before it reads the question.
struct Given {
    /// `None`: nothing.
    cache: Option<KvCache>,
    bytes: u64,
    /// Until it is there, milliseconds.
    ready_ms: f64,
}

/// After the question: logits for what comes next, what was generated, time to the logits.
struct Asked {
    logits: Vec<f32>,
    generated: String,
    first_logit_ms: f64,
}

struct Target<'a> {
    model: &'a Model,
    spec: &'a EvalSpec,
    projector: &'a Projector,
    shuffled: Option<&'a Projector>,
    places: [&'static str; 8],
    /// First token of each.
    tokens: Vec<u32>,
    heard: BTreeMap<u32, Heard>,
    fits: Fits,
}

impl Target<'_> {
    fn hear(&self, index: u32, fetch: &mut Fetch<'_>) -> Result<Heard, ExperimentError> {
        let told = told(self.spec.tier, self.spec.seed, index)?;
        let reading = Reading::of_text(self.model.tokenizer(), &told.text)?;
        let key = fact_key(index);
        let cache = fetch(&key)?;
        let wrong = |error: serde_json::Error| ExperimentError::Packet { key, what: format!("its note: {error}") };
        let note = serde_json::from_str(cache.note()).map_err(wrong)?;
        Ok(Heard { told, reading, cache, note })
    }

    /// Scores one fact under one condition.
    fn item(
        &self,
        index: u32,
        condition: Projected,
        native: &Given,
        oracle: &[f32],
    ) -> Result<EvalItem, ExperimentError> {
        let (own, other) = (&self.heard[&index], &self.heard[&self.other(index)]);
        // Scores of "the cache's own answer" mean something only if it is another answer.
        assert_ne!(own.told.answer, other.told.answer, "neighbouring facts have different answers");
        let teller = if condition == Projected::Mismatched { other } else { own };
        let made;
        let given = match condition {
            Projected::Native => native,
            _ => {
                made = self.given(condition, teller)?;
                &made
            }
        };
        let asked = self.ask(given, &own.told.prompt)?;
        let free = self.ask(given, &own.told.question)?;
        let (choice, p_answer) = self.choose(&asked.logits, own.told.answer);
        Ok(EvalItem {
            fact: index,
            condition,
            context: teller.told.text.clone(),
            question: own.told.prompt.clone(),
            answer: own.told.answer.to_owned(),
            packet_answer: teller.told.answer.to_owned(),
            choice: choice.to_owned(),
            p_answer,
            kl: kl(oracle, &asked.logits),
            injected: asked.generated.contains(teller.told.answer),
            generated: asked.generated,
            question_generated: free.generated,
            stalled: self.model.tokenizer().is_end(argmax(&free.logits)),
            bytes: given.bytes,
            latency_ms: given.ready_ms + asked.first_logit_ms,
        })
    }

    /// What a condition gives, besides the oracle's.
    fn given(&self, condition: Projected, teller: &Heard) -> Result<Given, ExperimentError> {
        let sent = (teller.cache.len() * teller.cache.bytes_per_token()) as u64;
        let started = Instant::now();
        let (cache, bytes, source_ms) = match condition {
            Projected::NoContext => (None, 0, 0.0),
            Projected::RawCopy => (Some(self.raw_copy(&teller.cache)?), sent, teller.note.read_ms),
            Projected::Projected | Projected::Mismatched => {
                (Some(self.project(self.projector, teller)?), sent, teller.note.read_ms)
            }
            Projected::Shuffled => {
                let shuffled = self.shuffled.expect("checked at the start");
                (Some(self.project(shuffled, teller)?), sent, teller.note.read_ms)
            }
            Projected::TextRelay => {
                let Note { read_ms, write_ms, message } = &teller.note;
                let cache = match message.is_empty() {
                    true => None,
                    false => Some(Reading::of_text(self.model.tokenizer(), message)?.cache(self.model)?),
                };
                (cache, message.len() as u64, read_ms + write_ms)
            }
            Projected::Native => unreachable!("the oracle's cache is made first"),
        };
        Ok(Given { cache, bytes, ready_ms: source_ms + milliseconds(started) })
    }

    /// The target's own cache of the text.
    fn native(&self, index: u32) -> Result<Given, ExperimentError> {
        let started = Instant::now();
        let cache = self.heard[&index].reading.clone().cache(self.model)?;
        Ok(Given { cache: Some(cache), bytes: 0, ready_ms: milliseconds(started) })
    }

    fn project(&self, projector: &Projector, teller: &Heard) -> Result<KvCache, ExperimentError> {
        let own = projector.own().cache(self.model, &teller.reading)?;
        Ok(projector.project(&teller.cache, &align(&teller.reading, &teller.cache)?, &own)?)
    }

    /// The source's cache as it is, keys rotated as the source rotates them: for each layer the one nearest in depth, each row
    /// of H x D numbers cut or filled up with zeros.
    fn raw_copy(&self, source: &KvCache) -> Result<KvCache, ExperimentError> {
        let (source, layout) = (source.rotated(), self.model.layout());
        let (from, to) = (rows::width(&source), layout.layer_len(1));
        let columns: Vec<usize> = (0..source.len()).collect();
        let fit = |tensor: &[f32]| {
            let rows = rows::of_tensor(tensor, &columns, source.len(), source.layout().head_dim);
            let cut = |row: &[f32]| row.iter().copied().chain(std::iter::repeat(0.0)).take(to).collect::<Vec<_>>();
            rows::to_tensor(&rows.chunks_exact(from).flat_map(cut).collect::<Vec<_>>(), source.len(), layout.head_dim)
        };
        let map = crate::projector::align::layers(
            &protocol::experiment::projector::LayerMap::Proportional(1),
            source.layout(),
            layout,
        )?;
        let layers = map.iter().enumerate().map(|(index, nearest)| {
            let layer = source.layer(nearest[0]).ok_or(crate::cache::CacheError::MissingLayer { layer: nearest[0] })?;
            Ok((index, LayerKv { k: fit(&layer.k), v: fit(&layer.v) }))
        });
        let layers = layers.collect::<Result<Vec<_>, ExperimentError>>()?;
        Ok(KvCache::new(layout.clone(), layers, source.positions().to_vec(), None, true)?)
    }

    /// Reads the question behind what is given, and answers it.
    fn ask(&self, given: &Given, question: &str) -> Result<Asked, ExperimentError> {
        let (model, tokenizer) = (self.model, self.model.tokenizer());
        let started = Instant::now();
        let (mut context, ids) = match &given.cache {
            Some(cache) => (model.inject(cache)?, tokenizer.encode(question)?),
            None => (model.start()?, tokenizer.encode_start(question)?),
        };
        let logits = model.prefill(&mut context, &ids)?;
        let first_logit_ms = milliseconds(started);
        let count = self.spec.answer_tokens as usize;
        let written = model.generate(&mut context, logits.clone(), count, &mut Sampler::greedy())?;
        Ok(Asked { logits, generated: tokenizer.decode(&written.tokens)?, first_logit_ms })
    }

    /// The likeliest place, and the probability of `answer` among the places.
    fn choose(&self, logits: &[f32], answer: &str) -> (&'static str, f64) {
        let candidates: Vec<f32> = self.tokens.iter().map(|token| logits[*token as usize]).collect();
        let place = self.places.iter().position(|place| *place == answer).expect("answers are candidates");
        (self.places[argmax(&candidates) as usize], log_softmax(&candidates)[place].exp())
    }

    /// How near the projected cache comes to the native one.
    fn compare(&mut self, index: u32, native: &Given) -> Result<(), ExperimentError> {
        let projected = self.project(self.projector, &self.heard[&index])?;
        let native = native.cache.as_ref().expect("the oracle has read the text").unrotated();
        Ok(self.fits.add(&native, &projected)?)
    }

    fn source_facts(&self) -> Result<protocol::results::ModelFacts, ExperimentError> {
        let layout = self.heard.values().next().expect("there are facts").cache.layout();
        let number = |value: usize| u32::try_from(value).expect("a model's sizes fit 32 bits");
        Ok(protocol::results::ModelFacts {
            name: self.spec.source.clone(),
            fingerprint: layout.fingerprint.clone(),
            architecture: layout.architecture.to_owned(),
            layers: number(layout.layers.len()),
            kv_heads: number(layout.kv_heads),
            head_dim: number(layout.head_dim),
        })
    }

    /// Another subject of the same shard: the next fact, and the one before for the last.
    fn other(&self, index: u32) -> u32 {
        let last = self.spec.first_fact + self.spec.facts - 1;
        if index == last { index - 1 } else { index + 1 }
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
