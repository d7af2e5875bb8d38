//! Sizes of memory as people write them.

use std::str::FromStr;

/// A size as people write it: `4GB`, `1.5GiB`, `512MB`, `1000000`. Decimal units as in vendors' figures, binary ones with an `i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "kb" | "k" => 1e3,
            "mb" | "m" => 1e6,
            "gb" | "g" => 1e9,
            "kib" => 1024.0,
            "mib" => 1024.0 * 1024.0,
            "gib" => 1024.0 * 1024.0 * 1024.0,
            _ => return Err(format!("`{text}` is not a size such as 4GB or 512MiB")),
        };
        let number: f64 = number.parse().map_err(|_| format!("`{text}` is not a size such as 4GB or 512MiB"))?;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative; saturates")]
        Ok(Self((number * unit) as u64))
    }
}

crate::source::from_toml_text!(ByteSize, "a size such as \"4GB\"");

/// Millionths of a sum that is not negative, rounded.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative; saturates")]
pub fn micros(amount: f64) -> u64 {
    (amount * 1e6).round() as u64
}
