//! Typed access to JSON that a model's author wrote. An absent key and `null` are the same thing.

use serde_json::{Map, Value};

use super::checkpoint::CheckpointError;

/// An object and the name of the key that held it, for messages.
#[derive(Debug, Clone)]
pub(crate) struct Json<'a> {
    object: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Json<'a> {
    /// The object at the top of a document.
    pub(crate) fn new(document: &'a Value) -> Result<Self, CheckpointError> {
        let wrong = || CheckpointError::KeyType { key: "the document".to_owned(), expected: "an object" };
        Ok(Self { object: document.as_object().ok_or_else(wrong)?, prefix: String::new() })
    }

    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.object.keys().map(String::as_str)
    }

    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<Json<'a>>, CheckpointError> {
        let object = self.typed(key, "an object", Value::as_object)?;
        Ok(object.map(|object| Json { object, prefix: format!("{}.", self.name(key)) }))
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.typed(key, "a finite number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    /// An integer that is not negative.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.typed(key, "an integer that is not negative", |value| {
            value.as_u64().and_then(|number| usize::try_from(number).ok())
        })
    }

    /// A token's id, or several.
    pub(crate) fn ids(&self, key: &str) -> Result<Vec<u32>, CheckpointError> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = self.typed(key, "a token's id or several", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, CheckpointError> {
        value.ok_or_else(|| CheckpointError::MissingKey { key: self.name(key) })
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        match self.value(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(CheckpointError::KeyType { key: self.name(key), expected }),
            },
        }
    }
}
