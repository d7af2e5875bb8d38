//! One seed, from its number to its verdict. A seed that fails is played once more with its trace kept.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::check::Violation;
use super::sabotage::Sabotage;
use super::scenario::Scenario;
use super::world::World;

/// What happened in one history or in many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Histories.
    pub seeds: u64,
    /// Things that happened.
    pub steps: u64,
    /// Inputs of the scheduler.
    pub inputs: u64,
    /// Durable events by kind.
    pub events: BTreeMap<&'static str, u64>,
    /// Faults by name.
    pub faults: BTreeMap<&'static str, u64>,
    /// Times that the coordinator was killed.
    pub restarts: u64,
    /// Messages that arrived twice.
    pub duplicates: u64,
    /// Outcomes that arrived once more, late.
    pub late: u64,
    /// Shards accepted.
    pub shards: u64,
    /// Virtual time, milliseconds.
    pub virtual_ms: u64,
}

impl Tally {
    /// Adds another history's.
    pub fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        self.inputs += other.inputs;
        self.restarts += other.restarts;
        self.duplicates += other.duplicates;
        self.late += other.late;
        self.shards += other.shards;
        self.virtual_ms += other.virtual_ms;
        for (kind, count) in &other.events {
            *self.events.entry(kind).or_default() += count;
        }
        for (fault, count) in &other.faults {
            *self.faults.entry(fault).or_default() += count;
        }
    }

    /// Durable events of a kind.
    pub fn events_of(&self, kind: &str) -> u64 {
        self.events.get(kind).copied().unwrap_or(0)
    }

    /// All durable events.
    pub fn events_total(&self) -> u64 {
        self.events.values().sum()
    }
}

/// A seed in which something does not hold. Displayed: parameters, the end of the trace, what broke, the command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// The seed.
    pub seed: u64,
    /// What does not hold.
    pub violation: Violation,
    /// The drawn parameters.
    pub scenario: String,
    /// The end of the trace.
    pub trace: Vec<String>,
    /// What was broken on purpose.
    pub sabotage: Option<Sabotage>,
}

impl Failed {
    /// The command that plays this seed again.
    pub fn command(&self) -> String {
        let sabotage = self.sabotage.map_or(String::new(), |sabotage| format!(" --sabotage {}", sabotage.name()));
        format!("bonepile sim --seed {}{sabotage} --trace", self.seed)
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.scenario)?;
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "\nseed {}: invariant {}", self.seed, self.violation)?;
        write!(f, "run it again: {}", self.command())
    }
}

/// Plays a seed.
///
/// # Errors
/// If anything does not hold.
pub fn run_seed(seed: u64, sabotage: Option<Sabotage>) -> Result<Tally, Box<Failed>> {
    let scenario = Scenario { sabotage, ..Scenario::draw(seed) };
    let mut world = World::new(scenario.clone(), None);
    let violation = match played(&mut world) {
        Ok(()) => return Ok(Tally { seeds: 1, ..world.tally }),
        Err(violation) => violation,
    };
    let mut again = World::new(scenario.clone(), Some(false));
    let violation = match played(&mut again) {
        Err(second) if second == violation => violation,
        second => Violation::new("a_seed_repeats", format!("first {violation}, then {second:?}")),
    };
    let trace = again.trace().map(str::to_owned).collect();
    Err(Box::new(Failed { seed, violation, scenario: scenario.to_string(), trace, sabotage }))
}

/// Plays a seed and gives every line of its trace, with its parameters first.
pub fn traced(seed: u64, sabotage: Option<Sabotage>) -> (Vec<String>, Result<Tally, Violation>) {
    let scenario = Scenario { sabotage, ..Scenario::draw(seed) };
    let mut lines: Vec<_> = scenario.to_string().lines().map(str::to_owned).collect();
    let mut world = World::new(scenario, Some(true));
    let verdict = played(&mut world);
    lines.extend(world.trace().map(str::to_owned));
    (lines, verdict.map(|()| Tally { seeds: 1, ..world.tally }))
}

/// A panic of the scheduler is a violation like others.
fn played(world: &mut World) -> Result<(), Violation> {
    catch_unwind(AssertUnwindSafe(|| world.play())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(Violation::new("nothing_panics", text.unwrap_or("a panic without words")))
    })
}
