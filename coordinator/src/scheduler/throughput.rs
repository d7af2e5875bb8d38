//! The throughput table T[work class][device model]: how long a unit of work takes, learned from every finished seat.
//!
//! One number a card is wrong by up to ten times, so the table keeps a cell for each pair. What was never seen is taken from
//! the nearest classes that were: the ratio between two device models, weighted by how much of the classes' names agrees,
//! pulled towards the ratio that the devices' own benchmarks (or the catalogue) give. Whole numbers throughout, so that a
//! replay gives the same table. Knows neither queues nor devices at hand.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::octaves::Octaves;

/// Weight of a new sample once a cell has many, percent: a card that throttles is noticed within a few shards.
const EWMA_PERCENT: i64 = 25;
/// Standard deviation of a cell before it has samples enough to tell, 1/1024 octaves: a factor of two either way.
const SPREAD_UNKNOWN: i64 = 1024;
/// A class's mean that moves by less than this, 1/1024 octaves, is no news: predictions stay as they are (4 %).
const NEWS: i32 = 58;
/// Weight of the ratio that the devices' benchmarks give, against 1 for a class whose name agrees in nothing.
const WEIGHT_OF_PRIOR: i64 = 2;
/// Weight of a class whose name agrees but for its last part.
const WEIGHT_OF_SIBLING: i64 = 24;

/// What was learned of one pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// Finished seats.
    pub samples: u32,
    /// Microseconds a unit of work, logarithm.
    pub mean: Octaves,
    /// Variance of the logarithm, (1/1024 octave)².
    pub variance: u64,
}

/// How a prediction came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// From finished seats of this class on this device model.
    Measured,
    /// From this class elsewhere and other classes here.
    Near,
    /// From the devices' benchmarks or the catalogue alone.
    Prior,
}

impl std::fmt::Display for Basis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Measured => "measured",
            Self::Near => "near classes",
            Self::Prior => "catalogue",
        })
    }
}

/// A prediction for one unit of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Microseconds, 1 or more.
    pub unit_us: u64,
    /// Standard deviation of its logarithm, 1/1024 octaves.
    pub spread: u32,
    /// How it came about.
    pub basis: Basis,
}

/// The table, and how often it had news.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    /// By work class, then device model.
    cells: BTreeMap<String, BTreeMap<String, Cell>>,
    /// Counts changes that predictions should follow.
    version: u64,
}

/// Predictions made since the table last had news.
#[derive(Debug, Clone, Default)]
pub struct Times {
    known: std::cell::RefCell<Known>,
}

#[derive(Debug, Clone, Default)]
struct Known {
    version: u64,
    estimates: BTreeMap<String, BTreeMap<String, Estimate>>,
}

impl Times {
    /// [`Table::predict`], remembered.
    pub fn predict(&self, table: &Table, class: &str, model: &str, prior: impl Fn(&str) -> Prior) -> Estimate {
        let mut known = self.known.borrow_mut();
        if known.version != table.version {
            *known = Known { version: table.version, estimates: BTreeMap::new() };
        }
        if let Some(estimate) = known.estimates.get(class).and_then(|row| row.get(model)) {
            return *estimate;
        }
        let estimate = table.predict(class, model, prior);
        known.estimates.entry(class.to_owned()).or_default().insert(model.to_owned(), estimate);
        estimate
    }

    /// Forgets everything: priors have changed.
    pub fn forget(&self) {
        *self.known.borrow_mut() = Known::default();
    }
}

/// What is known of a device model before anything ran on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prior {
    /// Microseconds that a unit of the class takes there, a guess.
    pub unit_us: u64,
}

impl Table {
    /// Learns from a finished seat: `units` of work of `class` took `wall_us` on a `model`.
    pub fn learn(&mut self, class: &str, model: &str, units: u32, wall_us: u64) {
        let sample = Octaves::of(wall_us.max(1)) - Octaves::of(u64::from(units.max(1)));
        let row = match self.cells.get_mut(class) {
            Some(row) => row,
            None => self.cells.entry(class.to_owned()).or_default(),
        };
        let Some(cell) = row.get_mut(model) else {
            row.insert(model.to_owned(), Cell { samples: 1, mean: sample, variance: 0 });
            self.version += 1;
            return;
        };
        let weight = (100 / (i64::from(cell.samples) + 1)).max(EWMA_PERCENT);
        let off = i64::from(sample.0) - i64::from(cell.mean.0);
        let before = cell.mean;
        cell.mean = Octaves(before.0 + i32::try_from(off * weight / 100).unwrap_or(0));
        let variance = i64::try_from(cell.variance).unwrap_or(i64::MAX / 200);
        let moved = (100 - weight) * (variance + weight * (off * off) / 100) / 100;
        cell.variance = u64::try_from(moved).unwrap_or(0);
        cell.samples = cell.samples.saturating_add(1);
        // Small steps add up: a drift is news as soon as it has crossed a step's border.
        if before.0.div_euclid(NEWS) != cell.mean.0.div_euclid(NEWS) || cell.samples <= 3 {
            self.version += 1;
        }
    }

    /// Takes over what was measured elsewhere: as if `samples` seats had each taken `unit_us` a unit.
    pub fn teach(&mut self, class: &str, model: &str, unit_us: u64, samples: u32) {
        let cell = Cell { samples: samples.max(1), mean: Octaves::of(unit_us), variance: 0 };
        self.cells.entry(class.to_owned()).or_default().insert(model.to_owned(), cell);
        self.version += 1;
    }

    /// Grows whenever predictions may have changed.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Every cell: (class, device model, cell).
    pub fn cells(&self) -> impl Iterator<Item = (&str, &str, &Cell)> {
        self.cells
            .iter()
            .flat_map(|(class, row)| row.iter().map(move |(model, cell)| (class.as_str(), model.as_str(), cell)))
    }

    /// Whether anything was learned of a class.
    pub fn knows(&self, class: &str) -> bool {
        self.cells.contains_key(class)
    }

    /// The cell of a pair.
    pub fn cell(&self, class: &str, model: &str) -> Option<&Cell> {
        self.cells.get(class)?.get(model)
    }

    /// Predicts a unit of `class` on `model`; `prior` guesses it for any device model from benchmarks or the catalogue.
    pub fn predict(&self, class: &str, model: &str, prior: impl Fn(&str) -> Prior) -> Estimate {
        if let Some(cell) = self.cell(class, model) {
            return cell.estimate();
        }
        let level = |model: &str| Octaves::of(prior(model).unit_us);
        let (mean, weight) = match self.cells.get(class) {
            Some(row) => self.ran_elsewhere(class, row, model, level),
            None => self.never_ran(class, model, level),
        };
        match weight {
            0 => Estimate {
                unit_us: prior(model).unit_us.max(1),
                spread: u32::try_from(SPREAD_UNKNOWN).unwrap_or(u32::MAX),
                basis: Basis::Prior,
            },
            weight => {
                // The more agreeing classes, the narrower.
                let spread = SPREAD_UNKNOWN * 2 / (2 + weight.ilog2() as i64);
                Estimate {
                    unit_us: mean.value(),
                    spread: u32::try_from(spread).unwrap_or(u32::MAX),
                    basis: Basis::Near,
                }
            }
        }
    }

    /// The class ran on other device models: each tells its level, times the ratio of the two models for similar classes.
    fn ran_elsewhere(
        &self,
        class: &str,
        row: &BTreeMap<String, Cell>,
        model: &str,
        level: impl Fn(&str) -> Octaves,
    ) -> (Octaves, i64) {
        let (mut sum, mut weights) = (0i64, 0i64);
        for (other, cell) in row {
            let (ratio, _) = self.ratio(class, other, model, level(model) - level(other));
            let weight = i64::from(cell.samples.min(4));
            sum += weight * i64::from((cell.mean + ratio).0);
            weights += weight;
        }
        (Octaves(mean(sum, weights)), weights)
    }

    /// The class never ran: how much the prior is off for similar classes on this model, or on any.
    fn never_ran(&self, class: &str, model: &str, level: impl Fn(&str) -> Octaves) -> (Octaves, i64) {
        let (mut sum, mut weights) = (0i64, 0i64);
        for (other, row) in &self.cells {
            let likeness = likeness(class, other);
            // A stranger's level says nothing; only its ratios do.
            if likeness < 2 {
                continue;
            }
            for (at, cell) in row {
                let (ratio, _) = self.ratio(class, at, model, level(model) - level(at));
                let weight = likeness * if at == model { 4 } else { 1 };
                sum += weight * i64::from((cell.mean + ratio).0);
                weights += weight;
            }
        }
        (Octaves(mean(sum, weights)), weights)
    }

    /// Time on `to` over time on `from`: of every class that ran on both, by likeness, and `prior`.
    fn ratio(&self, class: &str, from: &str, to: &str, prior: Octaves) -> (Octaves, i64) {
        if from == to {
            return (Octaves(0), 0);
        }
        let (mut sum, mut weights) = (WEIGHT_OF_PRIOR * i64::from(prior.0), WEIGHT_OF_PRIOR);
        for (other, row) in &self.cells {
            if let (Some(a), Some(b)) = (row.get(from), row.get(to)) {
                let weight = likeness(class, other);
                sum += weight * i64::from((b.mean - a.mean).0);
                weights += weight;
            }
        }
        (Octaves(mean(sum, weights)), weights)
    }
}

impl Cell {
    /// What it predicts.
    pub fn estimate(&self) -> Estimate {
        Estimate { unit_us: self.mean.value(), spread: self.spread(), basis: Basis::Measured }
    }

    /// Standard deviation of the logarithm, 1/1024 octaves: what was seen, and what few samples leave open.
    pub fn spread(&self) -> u32 {
        let open = u64::try_from(SPREAD_UNKNOWN * SPREAD_UNKNOWN / 16).unwrap_or(0) / u64::from(self.samples.max(1));
        u32::try_from((self.variance + open).isqrt()).unwrap_or(u32::MAX)
    }
}

fn mean(sum: i64, weights: i64) -> i32 {
    i32::try_from(sum / weights.max(1)).unwrap_or(0)
}

/// How much two classes' names agree from the front, part by part: 1 for nothing, [`WEIGHT_OF_SIBLING`] for all but the last.
fn likeness(one: &str, other: &str) -> i64 {
    if one == other {
        return 2 * WEIGHT_OF_SIBLING;
    }
    // Kinds say what sort of work it is; programs have nothing in common but that they are programs.
    let ((kind, one), (other_kind, other)) = (split_kind(one), split_kind(other));
    if kind != other_kind {
        return 1;
    }
    let longest = parts(one).count().max(parts(other).count());
    let shared = parts(one).zip(parts(other)).take_while(|(a, b)| a == b).count();
    match shared {
        0 if kind == "command" || kind.is_empty() => 1,
        0 => 2,
        shared => {
            let share = i64::try_from(shared * 100 / longest.max(1)).unwrap_or(0);
            1 + (WEIGHT_OF_SIBLING - 1) * (share + 40).min(100) / 100
        }
    }
}

/// `("inspect", "gemma")` of `inspect/gemma`.
fn split_kind(class: &str) -> (&str, &str) {
    class.split_once('/').unwrap_or(("", class))
}

fn parts(name: &str) -> impl Iterator<Item = &str> {
    name.split(['/', ' ', '(']).filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(_: &str) -> Prior {
        Prior { unit_us: 1_000_000 }
    }

    #[test]
    fn a_cell_follows_its_samples_and_tells_their_spread() {
        let mut table = Table::default();
        for _ in 0..20 {
            table.learn("inspect/a", "gtx", 10, 20_000_000);
        }
        let estimate = table.predict("inspect/a", "gtx", flat);
        assert!(estimate.unit_us.abs_diff(2_000_000) < 10_000, "{estimate:?}");
        assert_eq!(estimate.basis, Basis::Measured);
        let calm = estimate.spread;
        for slow in 0..20 {
            table.learn("inspect/a", "gtx", 10, if slow % 2 == 0 { 40_000_000 } else { 20_000_000 });
        }
        assert!(table.predict("inspect/a", "gtx", flat).spread > 4 * calm);
    }

    #[test]
    fn what_never_ran_here_is_told_by_classes_of_the_same_family() {
        let mut table = Table::default();
        let learn = |table: &mut Table, class: &str, old: u64, new: u64| {
            table.learn(class, "old", 1, old);
            table.learn(class, "new", 1, new);
        };
        learn(&mut table, "resnet (batch 16)", 8_000_000, 1_000_000);
        learn(&mut table, "a3c", 1_000_000, 1_000_000);
        table.learn("resnet (batch 32)", "old", 1, 16_000_000);
        let estimate = table.predict("resnet (batch 32)", "new", flat);
        assert_eq!(estimate.basis, Basis::Near);
        assert!((1_800_000..4_000_000).contains(&estimate.unit_us), "{estimate:?}");
        let sibling = table.predict("resnet (batch 64)", "new", flat);
        assert!((500_000..4_000_000).contains(&sibling.unit_us), "{sibling:?}");
    }

    #[test]
    fn an_empty_table_gives_the_prior() {
        let estimate = Table::default().predict("x", "new", flat);
        assert_eq!((estimate.unit_us, estimate.basis), (1_000_000, Basis::Prior));
    }
}
