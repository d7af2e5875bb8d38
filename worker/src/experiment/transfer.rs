//! Same-model cache transfer: does a cache that another instance made say what its text would have said?
//!
//! In two halves. The source turns facts into packets; the target answers a question about each fact under every
//! condition and measures the distance to the text itself (the oracle). Same model, same split of positions: the injected
//! cache is the concatenated text, so its logits must be the oracle's, bit for bit. What the seed project's phase 2a did
//! instead is condition `naive`, measured next to it.

use std::collections::BTreeMap;

use protocol::experiment::{Condition, TransferSpec};
use protocol::results::{TransferItem, TransferResult};

use super::error::ExperimentError;
use super::facts::{CITIES, Fact, candidate_tokens};
use super::inspect::max_abs;
use super::measure::{kl, log_softmax};
use super::{Progress, model_facts};
use crate::cache::{KvCache, Matched, Part};
use crate::model::{Context, Model, ModelError, Sampler, argmax};

/// Tokens that the seed project's source generated before its cache was taken.
const NAIVE_TOKENS: usize = 30;
/// Longest answer that a spec may ask for, tokens.
const ANSWER_TOKENS_MAX: u32 = 64;
/// Text about nobody, as often as needed: the other half of keys-only and values-only.
const NEUTRAL: &str = "Someone is a person who lives somewhere. They moved to another place last year. ";

/// Takes a packet's name and the cache to send.
pub type Emit<'a> = dyn FnMut(&str, &KvCache) -> Result<(), ExperimentError> + 'a;
/// Gives the cache of that name, waiting for it if need be. It has been checked against the model's layout.
pub type Fetch<'a> = dyn FnMut(&str) -> Result<KvCache, ExperimentError> + 'a;

/// What the source computed, besides the packets it emitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Packets emitted.
    pub packets: u32,
    /// Columns in them.
    pub tokens: u64,
}

/// Name of a fact's packet: `fact-3`.
pub fn packet_key(fact: u32) -> String {
    format!("fact-{fact}")
}

/// Name of the packet that condition `naive` needs: `fact-3-naive`.
pub fn naive_key(fact: u32) -> String {
    format!("fact-{fact}-naive")
}

/// Names of all packets that the source sends, in that order.
pub fn packet_keys(spec: &TransferSpec) -> Vec<String> {
    let naive = spec.conditions.contains(&Condition::Naive);
    let facts = spec.first_fact..spec.first_fact.saturating_add(spec.facts);
    facts.flat_map(|fact| [Some(packet_key(fact)), naive.then(|| naive_key(fact))]).flatten().collect()
}

/// The source's half: prefills each fact's text and emits its cache.
///
/// # Errors
/// [`ExperimentError::BadSpec`], what `emit` returned, or what failed in the model.
pub fn make_caches(
    model: &Model,
    spec: &TransferSpec,
    emit: &mut Emit<'_>,
    progress: &mut Progress<'_>,
) -> Result<Sent, ExperimentError> {
    check(spec)?;
    let mut sent = Sent::default();
    let mut send = |key: String, cache: &KvCache| {
        sent.packets += 1;
        sent.tokens += cache.len() as u64;
        emit(&key, cache)
    };
    for (done, index) in (0..).zip(spec.first_fact..spec.first_fact + spec.facts) {
        progress(done, spec.facts, &format!("fact {} of {}", done + 1, spec.facts))?;
        let ids = model.tokenizer().encode_start(&Fact::new(spec.seed, index)?.text())?;
        let mut context = model.start()?;
        let logits = model.prefill(&mut context, &ids)?;
        send(packet_key(index), &model.extract(&context)?)?;
        if spec.conditions.contains(&Condition::Naive) {
            let written = model.generate(&mut context, logits, NAIVE_TOKENS, &mut Sampler::greedy())?.tokens.len();
            // The seed's loop never fed its last token back, so that token is not in the cache.
            let kept = if written == NAIVE_TOKENS { written - 1 } else { written };
            let cache = model.extract(&context)?.slice_tokens(0..ids.len() + kept)?.with_generated(kept);
            send(naive_key(index), &cache)?;
        }
    }
    progress(spec.facts, spec.facts, "done")?;
    Ok(sent)
}

/// The target's half: answers a question about each fact under every condition of the spec.
///
/// # Errors
/// [`ExperimentError::BadSpec`], [`ExperimentError::Candidates`], what `fetch` returned, or what failed in the model.
pub fn score(
    model: &Model,
    spec: &TransferSpec,
    fetch: &mut Fetch<'_>,
    progress: &mut Progress<'_>,
) -> Result<TransferResult, ExperimentError> {
    check(spec)?;
    let mut target =
        Target { model, spec, candidates: candidate_tokens(model.tokenizer(), &CITIES)?, packets: BTreeMap::new() };
    let mut items = Vec::new();
    for (done, index) in (0..).zip(spec.first_fact..spec.first_fact + spec.facts) {
        progress(done, spec.facts, &format!("fact {} of {}", done + 1, spec.facts))?;
        let oracle = target.oracle(index, false)?;
        for condition in &spec.conditions {
            items.push(target.item(index, *condition, &oracle, fetch)?);
            progress(done, spec.facts, &format!("fact {} of {}: {condition}", done + 1, spec.facts))?;
        }
    }
    progress(spec.facts, spec.facts, "done")?;
    let candidates = CITIES.map(str::to_owned).to_vec();
    Ok(TransferResult { model: model_facts(model, &spec.model), candidates, items })
}

fn check(spec: &TransferSpec) -> Result<(), ExperimentError> {
    let bad = |what: String| Err(ExperimentError::BadSpec { what });
    if spec.facts < 2 {
        return bad(format!("{} facts; another subject's cache needs 2 or more", spec.facts));
    }
    if spec.answer_tokens == 0 || spec.answer_tokens > ANSWER_TOKENS_MAX {
        return bad(format!("answers of {} tokens, 1 to {ANSWER_TOKENS_MAX} are possible", spec.answer_tokens));
    }
    match spec.first_fact.checked_add(spec.facts - 1) {
        Some(last) => Fact::new(spec.seed, last).map(|_| ()),
        None => bad("fact numbers beyond 32 bits".to_owned()),
    }
}

/// A sequence that has read the question, and the logits for what comes next.
struct Asked {
    context: Context,
    logits: Vec<f32>,
}

struct Target<'a> {
    model: &'a Model,
    spec: &'a TransferSpec,
    /// First token of each city.
    candidates: Vec<u32>,
    packets: BTreeMap<String, KvCache>,
}

impl Target<'_> {
    /// Scores one fact under one condition.
    fn item(
        &mut self,
        index: u32,
        condition: Condition,
        oracle: &[f32],
        fetch: &mut Fetch<'_>,
    ) -> Result<TransferItem, ExperimentError> {
        let fact = self.fact(index)?;
        let other = self.fact(self.other(index))?;
        // Scores of "the packet's answer" mean something only if it is another answer.
        assert_ne!(fact.city, other.city, "neighbouring facts live in different cities");
        let asked = self.ask(index, condition, fetch)?;
        // The seed's wording has an oracle of its own, so that its distance is what became of the cache, not the wording.
        let own_oracle;
        let (oracle, question) = if matches!(condition, Condition::Naive | Condition::NaiveText) {
            own_oracle = self.oracle(index, true)?;
            (own_oracle.as_slice(), fact.bare_question())
        } else {
            (oracle, fact.question())
        };
        let logits = asked.logits.clone();
        let generated = self.answer(asked)?;
        let (choice, p_answer) = self.choose(&logits, fact.city);
        let source = if condition == Condition::OtherSubject { &other } else { &fact };
        Ok(TransferItem {
            fact: index,
            condition,
            context: source.text(),
            question,
            answer: fact.city.to_owned(),
            packet_answer: source.city.to_owned(),
            choice: choice.to_owned(),
            p_answer,
            exact: generated.contains(fact.city),
            kl: kl(oracle, &logits),
            logit_max_abs: max_abs(oracle, &logits),
            stalled: self.model.tokenizer().is_end(argmax(&logits)),
            generated,
        })
    }

    /// Gives the model what the condition says, then the question.
    fn ask(&mut self, index: u32, condition: Condition, fetch: &mut Fetch<'_>) -> Result<Asked, ExperimentError> {
        let fact = self.fact(index)?;
        let question = self.model.tokenizer().encode(&fact.question())?;
        let (cache, gap) = match condition {
            Condition::Text => {
                let context = self.read(&fact.text())?;
                return self.continued(context, &question, 0);
            }
            Condition::NoContext => {
                let start = self.model.tokenizer().encode_start(&fact.question())?;
                return self.continued(self.model.start()?, &start, 0);
            }
            Condition::NaiveText => {
                let context = self.read(&fact.text())?;
                return self.continued(context, &self.model.tokenizer().encode(&fact.bare_question())?, 0);
            }
            Condition::Naive => {
                let context = self.model.inject(self.packet(&naive_key(index), fetch)?)?;
                return self.continued(context, &self.naive_question(&fact)?, 0);
            }
            Condition::Injected => (self.packet(&packet_key(index), fetch)?.clone(), 0),
            Condition::Shifted(gap) => (self.packet(&packet_key(index), fetch)?.clone(), gap),
            Condition::Rerotated(gap) => (self.packet(&packet_key(index), fetch)?.rebase(i64::from(gap)), 0),
            Condition::MatchedNoise => {
                let seed = self.spec.seed.wrapping_add(u64::from(index));
                (self.packet(&packet_key(index), fetch)?.noise_like(Matched::Layer, seed), 0)
            }
            Condition::OtherSubject => (self.packet(&packet_key(self.other(index)), fetch)?.clone(), 0),
            Condition::KeysOnly => (self.half(index, Part::Values, fetch)?, 0),
            Condition::ValuesOnly => (self.half(index, Part::Keys, fetch)?, 0),
        };
        self.continued(self.model.inject(&cache)?, &question, gap)
    }

    /// Logits after the text itself and the question, in the seed's wording if `bare`.
    fn oracle(&self, index: u32, bare: bool) -> Result<Vec<f32>, ExperimentError> {
        let fact = self.fact(index)?;
        let question = if bare { fact.bare_question() } else { fact.question() };
        let context = self.read(&fact.text())?;
        Ok(self.continued(context, &self.model.tokenizer().encode(&question)?, 0)?.logits)
    }

    /// A sequence that has read `text`, in one pass, as the source does.
    fn read(&self, text: &str) -> Result<Context, ExperimentError> {
        let mut context = self.model.start()?;
        self.model.prefill(&mut context, &self.model.tokenizer().encode_start(text)?)?;
        Ok(context)
    }

    fn continued(&self, mut context: Context, ids: &[u32], gap: u32) -> Result<Asked, ExperimentError> {
        let position = context.next_position() + i64::from(gap);
        let logits = self.model.prefill_at(&mut context, ids, position)?;
        Ok(Asked { context, logits })
    }

    /// The seed's question: BOS again in mid-sequence wherever the model has a BOS, as its tokenizer call put it there.
    fn naive_question(&self, fact: &Fact) -> Result<Vec<u32>, ModelError> {
        let tokenizer = self.model.tokenizer();
        let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
        ids.extend(tokenizer.encode(&fact.bare_question())?);
        Ok(ids)
    }

    /// The fact's cache with `part` replaced by that of neutral text of the same length at the same positions.
    fn half(&mut self, index: u32, part: Part, fetch: &mut Fetch<'_>) -> Result<KvCache, ExperimentError> {
        let (model, cache) = (self.model, self.packet(&packet_key(index), fetch)?);
        let mut text = NEUTRAL.to_owned();
        let mut ids = model.tokenizer().encode_start(&text)?;
        while ids.len() < cache.len() {
            text.push_str(NEUTRAL);
            ids = model.tokenizer().encode_start(&text)?;
        }
        let mut context = model.start()?;
        model.prefill(&mut context, &ids[..cache.len()])?;
        let neutral = model.extract(&context)?;
        Ok(cache.rotated().replace(part, &neutral)?)
    }

    fn packet(&mut self, key: &str, fetch: &mut Fetch<'_>) -> Result<&KvCache, ExperimentError> {
        if !self.packets.contains_key(key) {
            let cache = fetch(key)?;
            self.packets.insert(key.to_owned(), cache);
        }
        Ok(&self.packets[key])
    }

    /// The likeliest answer's text.
    fn answer(&self, mut asked: Asked) -> Result<String, ExperimentError> {
        let count = self.spec.answer_tokens as usize;
        let written = self.model.generate(&mut asked.context, asked.logits, count, &mut Sampler::greedy())?;
        Ok(self.model.tokenizer().decode(&written.tokens)?)
    }

    /// The likeliest city, and the probability of `answer` among the cities.
    fn choose(&self, logits: &[f32], answer: &str) -> (&'static str, f64) {
        let candidates: Vec<f32> = self.candidates.iter().map(|token| logits[*token as usize]).collect();
        let log_probabilities = log_softmax(&candidates);
        let place = CITIES.iter().position(|city| *city == answer).expect("answers are cities");
        (CITIES[argmax(&candidates) as usize], log_probabilities[place].exp())
    }

    fn fact(&self, index: u32) -> Result<Fact, ExperimentError> {
        Fact::new(self.spec.seed, index)
    }

    /// Another subject of the same shard: the next fact, and the one before for the last.
    fn other(&self, index: u32) -> u32 {
        let last = self.spec.first_fact + self.spec.facts - 1;
        if index == last { index - 1 } else { index + 1 }
    }
}
