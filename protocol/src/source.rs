//! Reading TOML that a person wrote: every complaint names file, line, column, key, what was expected, and a hint.
//!
//! [`TableReader`] is asked for keys one by one, each with its type and range, and at the end complains of keys that nobody
//! asked for. Only text in, values out; reads no files.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::error::{SourceError, nearest};

/// A text and its name, for error positions.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Name of the file, as the user gave it.
    pub file: &'a str,
    /// The whole text.
    pub text: &'a str,
}

impl<'a> Source<'a> {
    /// Parses the text as a TOML table.
    ///
    /// # Errors
    /// The first syntax error, at its place.
    pub fn parse(self) -> Result<Spanned<DeTable<'a>>, SourceError> {
        DeTable::parse(self.text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            self.error(offset, "", error.message()).hint("the text is not TOML from this place on")
        })
    }

    /// An error at byte `offset`.
    pub fn error(self, offset: usize, key: &str, message: impl Into<String>) -> SourceError {
        SourceError::at(self.file, self.text, offset, key, message)
    }
}

type Value<'a> = Spanned<DeValue<'a>>;

#[derive(Debug, Clone)]
struct Entry<'a> {
    key_offset: usize,
    value: &'a Value<'a>,
}

/// A table being read. Keys are asked for once each; [`TableReader::finish`] refuses what was not asked for.
#[derive(Debug, Clone)]
pub struct TableReader<'a> {
    source: Source<'a>,
    /// Dotted path of the table, empty for the root.
    path: String,
    /// Where the table begins, for complaints about what is missing.
    offset: usize,
    entries: BTreeMap<&'a str, Entry<'a>>,
    asked: Vec<&'a str>,
}

impl<'a> TableReader<'a> {
    /// Reads the root table of `source`, parsed before.
    pub fn root(source: Source<'a>, table: &'a Spanned<DeTable<'a>>) -> Self {
        Self::new(source, String::new(), 0, table.get_ref())
    }

    fn new(source: Source<'a>, path: String, offset: usize, table: &'a DeTable<'a>) -> Self {
        let entries = table
            .iter()
            .map(|(key, value)| (key.get_ref().as_ref(), Entry { key_offset: key.span().start, value }))
            .collect();
        Self { source, path, offset, entries, asked: Vec::new() }
    }

    /// The value of `key`, or `None` if the table does not have it.
    ///
    /// # Errors
    /// If the value is not a `T`.
    pub fn optional<T: FromToml>(&mut self, key: &'static str) -> Result<Option<T>, SourceError> {
        self.asked.push(key);
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        self.convert(key, entry.value).map(Some)
    }

    /// The value of `key`.
    ///
    /// # Errors
    /// If the table does not have it, or it is not a `T`.
    pub fn required<T: FromToml>(&mut self, key: &'static str) -> Result<T, SourceError> {
        self.optional(key)?.ok_or_else(|| {
            let message = format!("missing; expected {}", T::EXPECTED);
            self.source.error(self.offset, &self.dotted(key), message)
        })
    }

    /// The number at `key`, or `default`.
    ///
    /// # Errors
    /// If it is no number or outside `range`.
    pub fn number(
        &mut self,
        key: &'static str,
        range: RangeInclusive<u64>,
        default: Option<u64>,
    ) -> Result<u64, SourceError> {
        let found = match default {
            Some(default) => self.optional::<u64>(key)?.unwrap_or(default),
            None => self.required::<u64>(key)?,
        };
        if range.contains(&found) {
            return Ok(found);
        }
        let message = format!("{found} is out of range; expected {} to {}", range.start(), range.end());
        Err(self.complain(key, message))
    }

    /// The table at `key`.
    ///
    /// # Errors
    /// If it is something else.
    pub fn table(&mut self, key: &'static str) -> Result<Option<TableReader<'a>>, SourceError> {
        self.asked.push(key);
        let Some(entry) = self.entries.get(key) else { return Ok(None) };
        match entry.value.get_ref() {
            DeValue::Table(table) => Ok(Some(Self::new(self.source, self.dotted(key), entry.key_offset, table))),
            other => Err(self.complain(key, format!("expected a table [{key}], found {}", article(other)))),
        }
    }

    /// The array of tables at `key`, `[[key]]`; empty if there is none.
    ///
    /// # Errors
    /// If it is something else.
    pub fn tables(&mut self, key: &'static str) -> Result<Vec<TableReader<'a>>, SourceError> {
        self.asked.push(key);
        let Some(entry) = self.entries.get(key) else { return Ok(Vec::new()) };
        let complaint = |found: &DeValue<'_>| {
            self.complain(key, format!("expected tables [[{key}]], found {}", article(found)))
                .hint(format!("write [[{key}]] with two brackets, once for each"))
        };
        let DeValue::Array(items) = entry.value.get_ref() else { return Err(complaint(entry.value.get_ref())) };
        items
            .iter()
            .map(|item| match item.get_ref() {
                DeValue::Table(table) => Ok(Self::new(self.source, self.dotted(key), item.span().start, table)),
                other => Err(complaint(other)),
            })
            .collect()
    }

    /// Every table that arises when this one is completed by one value of each axis of `matrix`, the last axis fastest.
    ///
    /// # Errors
    /// If an axis is not a non-empty array, or names a key that this table fixes.
    pub fn combinations(&self, matrix: &TableReader<'a>) -> Result<Vec<TableReader<'a>>, SourceError> {
        let mut axes: Vec<_> = matrix.entries.iter().collect();
        axes.sort_by_key(|(_, entry)| entry.key_offset);
        let mut tables = vec![self.clone()];
        for (key, axis) in axes {
            let complaint = |message: String| self.source.error(axis.key_offset, &matrix.dotted(key), message);
            let DeValue::Array(values) = axis.value.get_ref() else {
                return Err(complaint(format!("expected a list of values, found {}", article(axis.value.get_ref())))
                    .hint("a single value belongs above the matrix"));
            };
            if values.is_empty() {
                return Err(complaint("the list is empty, so the matrix has no cell".into()));
            }
            if self.entries.contains_key(*key) {
                return Err(complaint("is fixed above the matrix too; keep one of the two".into()));
            }
            tables = tables
                .iter()
                .flat_map(|table| {
                    values.iter().map(|value| {
                        let mut table = table.clone();
                        table.entries.insert(key, Entry { key_offset: value.span().start, value });
                        table
                    })
                })
                .collect();
        }
        Ok(tables)
    }

    /// The keys of the table, in the order of the text.
    pub fn keys(&self) -> Vec<&'a str> {
        let mut keys: Vec<_> = self.entries.iter().map(|(key, entry)| (entry.key_offset, *key)).collect();
        keys.sort_unstable();
        keys.into_iter().map(|(_, key)| key).collect()
    }

    /// The plain value of `key` (a text, a number, true or false) as the text would say it, quotes left out; `None` if the
    /// table does not have it.
    ///
    /// # Errors
    /// If it is a list or a table.
    pub fn plain(&mut self, key: &str) -> Result<Option<String>, SourceError> {
        let Some((known, value)) = self.entries.get_key_value(key).map(|(known, entry)| (*known, entry.value)) else {
            return Ok(None);
        };
        self.asked.push(known);
        match value.get_ref() {
            DeValue::String(text) => Ok(Some(text.as_ref().to_owned())),
            DeValue::Integer(number) => Ok(Some(number.to_string())),
            DeValue::Float(number) => Ok(Some(number.to_string())),
            DeValue::Boolean(flag) => Ok(Some(flag.to_string())),
            other => {
                Err(self.complain(key, format!("expected a text, a number, true or false, found {}", article(other))))
            }
        }
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// If the table has a key that was not asked for: the first in the text.
    pub fn finish(self) -> Result<(), SourceError> {
        let unknown = self.entries.iter().filter(|(key, _)| !self.asked.contains(key));
        let Some((key, entry)) = unknown.min_by_key(|(_, entry)| entry.key_offset) else { return Ok(()) };
        let message = format!("unknown key; expected one of {}", self.asked.join(", "));
        let error = self.source.error(entry.key_offset, &self.dotted(key), message);
        Err(match nearest(key, self.asked.iter().copied()) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error,
        })
    }

    /// An error about the value of `key`.
    pub fn complain(&self, key: &str, message: impl Into<String>) -> SourceError {
        let offset = self.entries.get(key).map_or(self.offset, |entry| entry.value.span().start);
        self.source.error(offset, &self.dotted(key), message)
    }

    fn convert<T: FromToml>(&self, key: &str, value: &Value<'a>) -> Result<T, SourceError> {
        T::from_toml(value.get_ref()).map_err(|problem| {
            let message =
                problem.unwrap_or_else(|| format!("expected {}, found {}", T::EXPECTED, article(value.get_ref())));
            self.source.error(value.span().start, &self.dotted(key), message)
        })
    }

    fn dotted(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

/// A value that a TOML text can hold.
pub trait FromToml: Sized {
    /// What is expected, for complaints: `a text in quotes`.
    const EXPECTED: &'static str;

    /// The value.
    ///
    /// # Errors
    /// `None` if it is of another type, `Some` text if there is more to say.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>>;
}

impl FromToml for String {
    const EXPECTED: &'static str = "a text in quotes";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        value.as_str().map(ToOwned::to_owned).ok_or(None)
    }
}

impl FromToml for bool {
    const EXPECTED: &'static str = "true or false";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        value.as_bool().ok_or(None)
    }
}

impl FromToml for i64 {
    const EXPECTED: &'static str = "a whole number";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        let number = value.as_integer().ok_or(None)?;
        Self::from_str_radix(number.as_str(), number.radix()).map_err(|_| Some(format!("{number} is too large")))
    }
}

impl FromToml for f64 {
    const EXPECTED: &'static str = "a number";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        let text = match value {
            DeValue::Float(number) => number.as_str().replace('_', ""),
            DeValue::Integer(number) => number.as_str().replace('_', ""),
            _ => return Err(None),
        };
        text.parse::<Self>()
            .ok()
            .filter(|number| number.is_finite())
            .ok_or_else(|| Some(format!("{text} is no plain number")))
    }
}

impl FromToml for u64 {
    const EXPECTED: &'static str = "a whole number, 0 or more";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        i64::from_toml(value)?.try_into().map_err(|_| Some("expected a whole number, 0 or more".to_owned()))
    }
}

impl<T: FromToml> FromToml for Vec<T> {
    const EXPECTED: &'static str = "a list";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        let items = value.as_array().ok_or(None)?;
        items
            .iter()
            .map(|item| {
                T::from_toml(item.get_ref()).map_err(|problem| {
                    Some(problem.unwrap_or_else(|| {
                        format!("expected a list of which each is {}, found {}", T::EXPECTED, article(item.get_ref()))
                    }))
                })
            })
            .collect()
    }
}

/// Implements [`FromToml`] for enums that a text spells by [`std::str::FromStr`].
macro_rules! from_toml_text {
    ($type:ty, $expected:expr) => {
        impl $crate::source::FromToml for $type {
            const EXPECTED: &'static str = $expected;

            fn from_toml(value: &toml::de::DeValue<'_>) -> Result<Self, Option<String>> {
                value.as_str().ok_or(None)?.parse().map_err(|problem: String| Some(problem))
            }
        }
    };
}
pub(crate) use from_toml_text;

fn article(value: &DeValue<'_>) -> String {
    match value.type_str() {
        "integer" => "a whole number".to_owned(),
        "string" => "a text".to_owned(),
        "array" => "a list".to_owned(),
        other => format!("a {other}"),
    }
}
