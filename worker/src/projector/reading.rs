//! How a model reads a sample: ids, and where each token stands in the text that both models share.

use super::corpus::Sample;
use crate::cache::{KvCache, Span};
use crate::model::{Model, ModelError, Tokenizer};

/// Tokens of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// Ids, from the start of a sequence.
    pub ids: Vec<u32>,
    /// Of each token, in bytes of the sample's text; equal ends for what is no text.
    pub spans: Vec<Span>,
}

impl Reading {
    /// A plain text.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn of_text(tokenizer: &Tokenizer, text: &str) -> Result<Self, ModelError> {
        let (ids, spans) = tokenizer.encode_spans(text)?;
        Ok(Self { ids, spans })
    }

    /// A sample: in the model's chat template if it is a conversation and the model has a template, else as plain text. A
    /// conversation that spells a special token is read as plain text, and so is one that the template edits.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`], [`ModelError::ChatTemplate`].
    pub fn of_sample(tokenizer: &Tokenizer, sample: &Sample) -> Result<Self, ModelError> {
        let hostile = sample.turns.iter().any(|turn| tokenizer.spells_special(&turn.content));
        if sample.turns.is_empty() || hostile || tokenizer.template().is_none() {
            return Self::of_text(tokenizer, &sample.text);
        }
        let rendered = tokenizer.render_chat(&sample.turns, true)?;
        let Some(places) = places(sample, &rendered) else { return Self::of_text(tokenizer, &sample.text) };
        let (mut ids, spans) = tokenizer.encode_special_spans(&rendered)?;
        let mut spans: Vec<Span> = spans.into_iter().map(|span| in_text(span, &places)).collect();
        if let Some(bos) = tokenizer.bos().filter(|bos| tokenizer.adds_bos() && ids.first() != Some(bos)) {
            ids.insert(0, bos);
            spans.insert(0, (0, 0));
        }
        Ok(Self { ids, spans })
    }

    /// The model's cache of it, keys as before RoPE, places in the text noted.
    ///
    /// # Errors
    /// What failed in the model.
    pub fn cache(self, model: &Model) -> Result<KvCache, ModelError> {
        let mut context = model.start()?;
        // Logits of a text that is only read are of no use, and dear with a large vocabulary.
        let positions: Vec<i64> = (0..).take(self.ids.len()).collect();
        model.forward(&mut context, &self.ids, &positions, crate::model::Logits::None, None)?;
        Ok(model.extract(&context)?.unrotated().with_spans(self.spans)?)
    }
}

/// A turn's place in the rendered conversation, and in the sample's text.
struct Place {
    rendered: usize,
    text: usize,
    bytes: usize,
}

/// Where each turn stands; `None` if one is not found as it is.
fn places(sample: &Sample, rendered: &str) -> Option<Vec<Place>> {
    let (mut from, mut text) = (0, 0);
    let mut places = Vec::new();
    for turn in &sample.turns {
        let at = from + rendered[from..].find(&turn.content)?;
        places.push(Place { rendered: at, text, bytes: turn.content.len() });
        from = at + turn.content.len();
        // Turns are lines of the text.
        text += turn.content.len() + 1;
    }
    Some(places)
}

/// A span of the rendered conversation as one of the text: the first turn that it touches counts.
fn in_text((begin, end): Span, places: &[Place]) -> Span {
    let (begin, end) = (begin as usize, end as usize);
    let number = |at: usize| u32::try_from(at).expect("texts are shorter than 4 GiB");
    places
        .iter()
        .map(|place| (begin.max(place.rendered), end.min(place.rendered + place.bytes), place))
        .find(|(begin, end, _)| begin < end)
        .map_or((0, 0), |(begin, end, place)| {
            (number(begin - place.rendered + place.text), number(end - place.rendered + place.text))
        })
}
