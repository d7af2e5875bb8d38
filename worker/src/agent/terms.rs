//! On what terms a box is lent, as its operator types them.

use std::str::FromStr;

use protocol::control::Terms;
use protocol::limits::LABELS_MAX;

/// Millionths of a dollar in a dollar.
const MICRO: u64 = 1_000_000;
/// Longest label, bytes.
const LABEL_BYTES_MAX: usize = 128;

/// `site=attic`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label(String);

impl Label {
    fn name(&self) -> &str {
        self.0.split('=').next().unwrap_or(&self.0)
    }
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |text: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))
        };
        match text.split_once('=') {
            Some((name, value)) if plain(name) && plain(value) && text.len() <= LABEL_BYTES_MAX => {
                Ok(Self(text.to_owned()))
            }
            _ => Err(format!("`{text}` is not NAME=VALUE, each of letters, digits, `-`, `_`, `.` and `/`")),
        }
    }
}

/// US dollars, exact to their millionths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Price {
    micro_usd: u64,
}

impl FromStr for Price {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("`{text}` is not an amount of dollars such as 0.35");
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(part) || part.len() > 6 {
            return Err(wrong());
        }
        let whole: u64 = whole.parse().map_err(|_| wrong())?;
        let part: u64 = format!("{part:0<6}").parse().map_err(|_| wrong())?;
        let micro_usd = whole.checked_mul(MICRO).and_then(|whole| whole.checked_add(part)).ok_or_else(wrong)?;
        Ok(Self { micro_usd })
    }
}

/// The terms contradict themselves.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TermsError {
    /// A name has two values.
    #[error("label `{0}` is given twice")]
    Twice(String),
    /// More than a greeting carries.
    #[error("more than {LABELS_MAX} labels")]
    TooMany,
}

/// Terms from what was typed.
///
/// # Errors
/// [`TermsError`].
pub fn terms(labels: &[Label], price: Option<Price>, commands: bool, ahead: u32) -> Result<Terms, TermsError> {
    let mut labels = labels.to_vec();
    labels.sort();
    labels.dedup();
    if let Some(pair) = labels.windows(2).find(|pair| pair[0].name() == pair[1].name()) {
        return Err(TermsError::Twice(pair[0].name().to_owned()));
    }
    if labels.len() > LABELS_MAX {
        return Err(TermsError::TooMany);
    }
    Ok(Terms {
        labels: labels.into_iter().map(|label| label.0).collect(),
        price_microusd_per_hour: price.map_or(0, |price| price.micro_usd),
        commands,
        ahead,
    })
}

/// Terms in a sentence.
pub fn describe(terms: &Terms) -> String {
    let labels = if terms.labels.is_empty() { "no labels".to_owned() } else { terms.labels.join(", ") };
    let (whole, part) = (terms.price_microusd_per_hour / MICRO, terms.price_microusd_per_hour % MICRO);
    let fraction = format!("{part:06}");
    let fraction = fraction.trim_end_matches('0');
    let commands = if terms.commands { "programs of researchers may run" } else { "no programs of researchers" };
    format!("{labels}; {whole}.{fraction:0<2} USD an hour; {commands}; {} shards ahead", terms.ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_read_as_people_write_them() {
        let labels = ["site=attic".parse().unwrap(), "owner=anna".parse().unwrap()];
        let terms = terms(&labels, Some("0.35".parse().unwrap()), true, 256).unwrap();
        assert_eq!(terms.labels, ["owner=anna", "site=attic"]);
        assert_eq!(terms.price_microusd_per_hour, 350_000);
        let text = "owner=anna, site=attic; 0.35 USD an hour; programs of researchers may run; 256 shards ahead";
        assert_eq!(describe(&terms), text);
        let prices = [("1", 1_000_000), ("0.000001", 1), ("12.5", 12_500_000), ("0", 0)];
        assert!(prices.iter().all(|(text, micro_usd)| text.parse() == Ok(Price { micro_usd: *micro_usd })));
    }

    #[test]
    fn terms_that_make_no_sense_are_refused() {
        for bad in ["attic", "=attic", "site=", "site=a b", "a=b=c"] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
        for bad in ["", "-1", "1.", ".5", "1e3", "0.0000001", "99999999999999999999"] {
            assert!(bad.parse::<Price>().is_err(), "{bad}");
        }
        let twice = ["a=1".parse().unwrap(), "a=2".parse().unwrap()];
        assert_eq!(terms(&twice, None, false, 0), Err(TermsError::Twice("a".into())));
    }
}
