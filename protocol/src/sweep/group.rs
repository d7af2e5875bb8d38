//! `name`, `after` and `[experiment.require]` of an experiment.

use crate::error::{SourceError, nearest};
use crate::group::{Dtype, Group, Require, is_label};
use crate::hardware::{ComputeCapability, DeviceKind};
use crate::source::{TableReader, from_toml_text};

/// Keys beside the kind's own: `name` (must be unique), `after` (names of earlier experiments).
pub(super) fn read(table: &mut TableReader<'_>, earlier: &[Group], first: u32) -> Result<Group, SourceError> {
    let name = table.optional::<String>("name")?.unwrap_or_default();
    if !name.is_empty() && earlier.iter().any(|group| group.name == name) {
        return Err(table.complain("name", format!("two experiments are called `{name}`")));
    }
    let mut after = Vec::new();
    for wanted in table.optional::<Vec<String>>("after")?.unwrap_or_default() {
        let found = earlier.iter().position(|group| group.name == wanted);
        let Some(found) = found else {
            let names: Vec<_> =
                earlier.iter().map(|group| group.name.as_str()).filter(|name| !name.is_empty()).collect();
            let error = table.complain(
                "after",
                format!("no experiment above is called `{wanted}`; there are: {}", super::listed(&names)),
            );
            return Err(match nearest(&wanted, names) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint("an experiment can only wait for those that stand before it"),
            });
        };
        after.push(u32::try_from(found).unwrap_or(u32::MAX));
    }
    after.sort_unstable();
    after.dedup();
    let require = match table.table("require")? {
        Some(mut table) => {
            let require = read_require(&mut table)?;
            table.finish()?;
            require
        }
        None => Require::default(),
    };
    Ok(Group { name, first, count: 0, after, require, trainings: Vec::new() })
}

/// `labels`, `prefer` (lists of `name=value`), `device` (cpu, cuda), `model` (part of the product name), `capability`
/// (`"7.0"`), `dtype` (f32, f16, bf16), `price_max_usd_per_hour`.
fn read_require(table: &mut TableReader<'_>) -> Result<Require, SourceError> {
    let price = table.optional::<f64>("price_max_usd_per_hour")?;
    if price.is_some_and(|price| !(0.0..=1e6).contains(&price)) {
        return Err(table.complain("price_max_usd_per_hour", "expected 0 to 1000000"));
    }
    Ok(Require {
        labels: labels(table, "labels")?,
        prefer: labels(table, "prefer")?,
        device: table.optional("device")?,
        model: table.optional::<String>("model")?.map(|model| model.to_lowercase()),
        capability: table.optional("capability")?,
        dtype: table.optional("dtype")?,
        price_max_microusd_per_hour: price.map(crate::size::micros),
    })
}

fn labels(table: &mut TableReader<'_>, key: &'static str) -> Result<Vec<String>, SourceError> {
    let mut labels = table.optional::<Vec<String>>(key)?.unwrap_or_default();
    if let Some(bad) = labels.iter().find(|label| !is_label(label)) {
        return Err(table.complain(key, format!("`{bad}` is not a label")).hint("for example \"site=attic\""));
    }
    labels.sort();
    labels.dedup();
    Ok(labels)
}

from_toml_text!(DeviceKind, "cpu or cuda");
from_toml_text!(ComputeCapability, "a compute capability such as \"7.0\"");
from_toml_text!(Dtype, "f32, f16 or bf16");

impl std::str::FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!("unknown device `{text}`; expected cpu or cuda")),
        }
    }
}

impl std::str::FromStr for ComputeCapability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.split_once('.')
            .and_then(|(major, minor)| Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? }))
            .ok_or_else(|| format!("`{text}` is not a compute capability; expected one such as \"7.0\""))
    }
}

impl std::str::FromStr for Dtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!("unknown number format `{text}`; expected f32, f16 or bf16")),
        }
    }
}
