//! Chat templates: messages to the text, and the ids, that a model was trained on.
//!
//! Templates are Jinja, written for Hugging Face's renderer; `minijinja` runs them with the same settings. Does not invent
//! a template for a model without one.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, State, Value, context};
use serde::{Deserialize, Serialize};

use super::error::ModelError;
use super::tokenizer::Tokenizer;

/// Stands for a message's text while its template is rendered. From a private-use plane, so no text contains it.
const PLACEHOLDER: char = '\u{10FFFD}';
/// Instructions that a template may execute; real ones take some thousands.
const FUEL: u64 = 5_000_000;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Tokenizer {
    /// The text of a conversation as the model's template writes it; with `generation_prompt`, up to where the
    /// assistant's answer goes.
    ///
    /// # Errors
    /// [`ModelError::NoChatTemplate`] for base models, [`ModelError::ChatTemplate`] if the template fails.
    pub fn render_chat(&self, messages: &[Message], generation_prompt: bool) -> Result<String, ModelError> {
        let source = self.template().ok_or(ModelError::NoChatTemplate)?;
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(ModelError::ChatTemplate)?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(python_method);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let turns =
            messages.iter().map(|turn| context! { role => turn.role.as_str(), content => turn.content.as_str() });
        let variables = context! {
            messages => Value::from_iter(turns),
            add_generation_prompt => generation_prompt,
            bos_token => self.spelling(self.bos()),
            eos_token => self.spelling(self.eos()),
        };
        environment.render_str(source, variables).map_err(ModelError::ChatTemplate)
    }

    /// Ids of a conversation. Special tokens come from the template alone: where a message spells one, messages are put in
    /// after the template's own have been found, and a template that edits messages (trims them, say) edits nothing then.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`], and [`ModelError::Tokenizer`].
    pub fn encode_chat(&self, messages: &[Message], generation_prompt: bool) -> Result<Vec<u32>, ModelError> {
        let hostile = messages.iter().any(|message| self.spells_special(&message.content));
        let mut ids = if hostile {
            self.encode_apart(messages, generation_prompt)?
        } else {
            self.encode_with_specials(&self.render_chat(messages, generation_prompt)?)?
        };
        if let Some(bos) = self.bos().filter(|bos| self.adds_bos() && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    fn encode_apart(&self, messages: &[Message], generation_prompt: bool) -> Result<Vec<u32>, ModelError> {
        let mark = |index: usize| format!("{PLACEHOLDER}{index}{PLACEHOLDER}");
        let marked: Vec<Message> = messages
            .iter()
            .enumerate()
            .map(|(index, message)| Message { role: message.role.clone(), content: mark(index) })
            .collect();
        let rendered = self.render_chat(&marked, generation_prompt)?;
        let (mut ids, mut pending) = (Vec::new(), String::new());
        // Odd pieces lie between two placeholders: they are message numbers.
        for (piece, text) in rendered.split(PLACEHOLDER).enumerate() {
            if piece % 2 == 0 {
                self.push_template(text, &mut ids, &mut pending)?;
            } else {
                let index = text.parse::<usize>().ok();
                let message = index.and_then(|index| messages.get(index)).ok_or_else(|| ModelError::Tokenizer {
                    what: "the chat template takes messages apart; one that spells a special token cannot be encoded"
                        .into(),
                })?;
                pending.push_str(&message.content);
            }
        }
        ids.extend(self.encode(&pending)?);
        Ok(ids)
    }

    /// Adds text of the template to what is `pending`, which is encoded, as plain text, up to each special token. A message
    /// and the words around it are one text to the tokenizer: apart, a line break before spaces would be another token.
    fn push_template(&self, text: &str, ids: &mut Vec<u32>, pending: &mut String) -> Result<(), ModelError> {
        let mut at = 0;
        for (id, begin, end) in self.special_places(text)? {
            pending.push_str(&text[at..begin]);
            ids.extend(self.encode(pending)?);
            pending.clear();
            ids.push(id);
            at = end;
        }
        pending.push_str(&text[at..]);
        Ok(())
    }
}

/// The methods of Python strings that templates use and Jinja lacks.
fn python_method(_: &mut State<'_, '_>, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("no method {method}"));
    let text = value.as_str().ok_or_else(unknown)?;
    let argument = arguments.first().and_then(Value::as_str);
    match (method, argument) {
        ("strip", None) => Ok(text.trim().into()),
        ("lstrip", None) => Ok(text.trim_start().into()),
        ("rstrip", None) => Ok(text.trim_end().into()),
        ("upper", None) => Ok(text.to_uppercase().into()),
        ("lower", None) => Ok(text.to_lowercase().into()),
        ("startswith", Some(prefix)) => Ok(text.starts_with(prefix).into()),
        ("endswith", Some(suffix)) => Ok(text.ends_with(suffix).into()),
        ("split", Some(separator)) => Ok(Value::from_iter(text.split(separator))),
        _ => Err(unknown()),
    }
}
