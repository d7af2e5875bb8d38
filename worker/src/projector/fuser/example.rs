//! From a corpus's sample to what a step takes: the target's own, what follows the text, and which of it counts.

use std::ops::Range;

use candle_core::{Device, Tensor};
use protocol::experiment::projector::Loss;

use super::step::{Prefix, Suffix};
use super::trained::Fuser;
use crate::cache::KvCache;
use crate::model::{Logits, Model, ModelError};
use crate::projector::corpus::Sample;
use crate::projector::file::Manifest;
use crate::projector::reading::Reading;
use crate::projector::{Alignment, ProjectorError};

/// What the target reads behind the text of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// Ids of prompt and answer.
    pub tokens: Vec<u32>,
    /// Rows whose prediction counts, as in [`Suffix`].
    pub scored: Range<usize>,
}

impl Continuation {
    /// Of a sample. For [`Loss::NextToken`] the answer's tokens count; for [`Loss::Distil`] every token behind the text does, as
    /// the target has an opinion on each.
    ///
    /// # Errors
    /// [`ProjectorError::Fuser`] if nothing is left to predict; what the tokenizer says.
    pub fn new(model: &Model, sample: &Sample, loss: Loss) -> Result<Self, ProjectorError> {
        let tokenizer = model.tokenizer();
        let encode = |text: &str| tokenizer.encode(text).map_err(failed);
        let mut tokens = encode(&sample.prompt)?;
        let first = match loss {
            Loss::NextToken => tokens.len().saturating_sub(1),
            Loss::Distil => 0,
        };
        tokens.extend(encode(&sample.answer)?);
        let scored = first..tokens.len().saturating_sub(1);
        if scored.is_empty() {
            let what = format!("nothing follows the text of sample {} that could be predicted", sample.id);
            return Err(ProjectorError::Fuser { what });
        }
        Ok(Self { tokens, scored })
    }

    /// As what a step takes, with the target's own prediction behind its native reading of the text if it is to be learned from.
    ///
    /// # Errors
    /// What failed in the model.
    pub fn suffix(self, model: &Model, reading: &Reading, loss: Loss) -> Result<Suffix, ProjectorError> {
        let Self { tokens, scored } = self;
        let teacher = match loss {
            Loss::NextToken => None,
            Loss::Distil => Some(teacher(model, reading, &tokens[..scored.end], &scored).map_err(failed)?),
        };
        Ok(Suffix { tokens, scored, teacher })
    }
}

/// Probabilities `[scored, vocabulary]` behind the target's own cache of the text.
fn teacher(model: &Model, reading: &Reading, tokens: &[u32], scored: &Range<usize>) -> Result<Tensor, ModelError> {
    let mut context = model.start()?;
    let unscored = [&reading.ids[..], &tokens[..scored.start]].concat();
    let positions: Vec<i64> = (0..).take(unscored.len()).collect();
    model.forward(&mut context, &unscored, &positions, Logits::None, None)?;
    let positions: Vec<i64> = (positions.len() as i64..).take(scored.len()).collect();
    let rows = model.forward(&mut context, &tokens[scored.clone()], &positions, Logits::All, None)?;
    let logits = Tensor::from_vec(rows.concat(), (scored.len(), model.vocabulary()), &Device::Cpu)?;
    Ok(candle_nn::ops::softmax_last_dim(&logits)?)
}

/// What goes into `fuser` for a sample that the target reads as `reading` and of which `source` is the source's cache.
///
/// # Errors
/// As [`Fuser::prefix`]; [`ProjectorError::Alignment`] for a cache that does not say where its tokens stand.
pub fn prefix(
    model: &Model,
    fuser: &Fuser,
    manifest: &Manifest,
    reading: &Reading,
    source: &KvCache,
) -> Result<Prefix, ProjectorError> {
    manifest.accept(source.layout(), model.layout())?;
    let what = "the source's cache does not say where its tokens stand".to_owned();
    let spans = source.spans().ok_or(ProjectorError::Alignment { what })?;
    let alignment = Alignment::by_spans(&reading.spans, spans)?;
    let own = fuser.own().cache(model, reading).map_err(failed)?;
    fuser.prefix(manifest, &source.unrotated(), &alignment, &own.unrotated())
}

fn failed(error: ModelError) -> ProjectorError {
    ProjectorError::Model(Box::new(error))
}
