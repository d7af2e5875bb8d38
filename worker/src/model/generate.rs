//! Letting a model write: one sequence, or many that step together.
//!
//! Does not decide what is asked or what becomes of the text.

use super::context::Context;
use super::error::ModelError;
use super::loaded::{BatchItem, Model};
use super::sampling::Sampler;
use super::team::team;

/// A sequence that a model goes on writing.
#[derive(Debug)]
pub struct Sequence<'a> {
    /// What it has seen; holds the text written, too, afterwards.
    pub context: &'a mut Context,
    /// Logits at its last position so far, `[vocabulary]`; behind the text written, afterwards, so that it can go on.
    pub logits: Vec<f32>,
    /// How its tokens are chosen.
    pub sampler: &'a mut Sampler,
    /// Tokens to write at most.
    pub count: usize,
}

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The text's tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why there are no more.
    pub end: End,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Token,
    /// As many tokens as were asked for.
    Count,
    /// The model has no positions beyond.
    Context,
}

impl Model {
    /// Extends a sequence by the tokens that `sampler` chooses, up to `count` or until the model ends its text. `logits` are
    /// those at the last position so far. The context holds all that was written, afterwards.
    ///
    /// # Errors
    /// As [`Model::generate_batch`].
    pub fn generate(
        &self,
        context: &mut Context,
        logits: Vec<f32>,
        count: usize,
        sampler: &mut Sampler,
    ) -> Result<Generated, ModelError> {
        let mut written = self.generate_batch(&mut [Sequence { context, logits, sampler, count }])?;
        Ok(written.pop().expect("one sequence was given"))
    }

    /// The same for several sequences at once: a step of all costs little more than a step of one. Each has its own sampler and
    /// its own end, and takes part in no step after it.
    ///
    /// The same sequences with the same seeds give the same texts. Whether a sequence also gives the text that it gives alone
    /// depends on the step's arithmetic: with weights as stored, steps of fewer sequences than
    /// [`PREFILL_ROWS_MIN`](super::quant::PREFILL_ROWS_MIN) compute each as if it were alone, bit for bit; steps of more are
    /// exact where those round, and steps with f32 weights differ in their last bits, so that a text may take another turn.
    ///
    /// # Errors
    /// Another model's context or a part's, logits of another length: nothing has happened then. [`ModelError::Tensor`] in the
    /// middle: contexts hold what was written until then.
    ///
    /// # Panics
    /// If the model was loaded for ids only: it does not know which of them end a text.
    pub fn generate_batch(&self, sequences: &mut [Sequence<'_>]) -> Result<Vec<Generated>, ModelError> {
        for sequence in &*sequences {
            self.check_whole(sequence.context)?;
            if sequence.logits.len() != self.vocabulary() {
                let (expected, got) = (self.vocabulary(), sequence.logits.len());
                return Err(ModelError::Logits { expected, got });
            }
        }
        let mut written: Vec<_> = sequences.iter().map(|_| Generated { tokens: Vec::new(), end: End::Count }).collect();
        let mut running: Vec<usize> = (0..sequences.len()).collect();
        loop {
            running.retain(|index| written[*index].tokens.len() < sequences[*index].count);
            let mut next = Vec::with_capacity(running.len());
            for (index, token) in running.iter().zip(choose(sequences, &running)?) {
                let text = &mut written[*index];
                if self.tokenizer().is_end(token) {
                    text.end = End::Token;
                } else if sequences[*index].context.next_position() >= self.config().context_length as i64 {
                    text.end = End::Context;
                } else {
                    text.tokens.push(token);
                    next.push(*index);
                }
            }
            running = next;
            if running.is_empty() {
                return Ok(written);
            }
            let mut items: Vec<_> = sequences
                .iter_mut()
                .zip(&written)
                .enumerate()
                .filter(|(index, _)| running.binary_search(index).is_ok())
                .map(|(_, (sequence, text))| BatchItem {
                    context: &mut *sequence.context,
                    tokens: &text.tokens[text.tokens.len() - 1..],
                })
                .collect();
            let logits = self.forward_batch(&mut items)?;
            running.iter().zip(logits).for_each(|(index, logits)| sequences[*index].logits = logits);
        }
    }
}

/// The next token of each running sequence. Drawing from a large vocabulary takes as long as a part of the step, so it is
/// shared out.
fn choose(sequences: &mut [Sequence<'_>], running: &[usize]) -> Result<Vec<u32>, ModelError> {
    let members = sequences.iter_mut().enumerate().filter(|(index, _)| running.binary_search(index).is_ok());
    let mut draws: Vec<_> =
        members.map(|(_, sequence)| (&mut *sequence.sampler, &sequence.logits[..], Ok(0))).collect();
    team().chunks(&mut draws, 1, |_, draw| {
        for (sampler, logits, token) in draw {
            *token = sampler.choose(logits);
        }
    });
    draws.into_iter().map(|(.., token)| token).collect()
}
