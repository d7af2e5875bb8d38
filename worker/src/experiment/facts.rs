//! Courier facts: made-up sentences whose answer no model can know, and small models can read out of a text.
//!
//! "{Name} is a {job} who lives in {City}. {Name} moved to {City} last year." With the text, SmolLM2-135M names the city
//! in 16 of 16; without, at chance (1 in 8). A fact is fixed by seed and index, so shards and boxes agree on it.

use super::error::ExperimentError;
use crate::model::Tokenizer;
use crate::random::Random;

/// The cities, each one token in the models we ship tests for.
pub const CITIES: [&str; 8] = ["Paris", "London", "Tokyo", "Berlin", "Madrid", "Rome", "Chicago", "Boston"];

const NAMES: [&str; 40] = [
    "Alice", "Bruno", "Clara", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis",
    "Maria", "Nadia", "Oscar", "Petra", "Quinn", "Robert", "Sarah", "Thomas", "Ursula", "Victor", "Wendy", "Xavier",
    "Yusuf", "Zoe", "Anton", "Bella", "Carlos", "Diana", "Edgar", "Fiona", "George", "Hannah", "Ivan", "Julia",
    "Kevin", "Laura", "Martin", "Nora",
];

const JOBS: [&str; 16] = [
    "courier", "baker", "teacher", "nurse", "painter", "lawyer", "farmer", "dentist", "driver", "singer", "writer",
    "plumber", "chemist", "gardener", "tailor", "pilot",
];

/// Facts of one seed; beyond this the sentences would repeat.
pub const FACTS_MAX: u32 = 640;

/// One made-up person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// First name.
    pub name: &'static str,
    /// What they do.
    pub job: &'static str,
    /// Where they live: the answer.
    pub city: &'static str,
}

impl Fact {
    /// Fact `index` of `seed`. Neighbours in index live in different cities; no two facts of a seed are alike.
    ///
    /// # Errors
    /// [`ExperimentError::BadSpec`] from [`FACTS_MAX`] on.
    pub fn new(seed: u64, index: u32) -> Result<Self, ExperimentError> {
        if index >= FACTS_MAX {
            let what = format!("fact {index} is asked for, there are {FACTS_MAX} of a seed");
            return Err(ExperimentError::BadSpec { what });
        }
        let index = index as usize;
        let cycle = index / NAMES.len();
        Ok(Self {
            name: shuffled(NAMES, seed, "names")[index % NAMES.len()],
            job: shuffled(JOBS, seed, "jobs")[(index + cycle) % JOBS.len()],
            city: shuffled(CITIES, seed, "cities")[(index + index / CITIES.len()) % CITIES.len()],
        })
    }

    /// The sentences that state the fact.
    pub fn text(&self) -> String {
        let Self { name, job, city } = self;
        format!("{name} is a {job} who lives in {city}. {name} moved to {city} last year.")
    }

    /// The question, up to where the city's name follows.
    pub fn question(&self) -> String {
        let name = self.name;
        format!("\nQuestion: In which city does {name} live?\nAnswer: {name} lives in")
    }

    /// The question as the seed project asked: a bare question, free to be answered in any words.
    pub fn bare_question(&self) -> String {
        format!("In which city does {} live?", self.name)
    }
}

/// First token of each candidate as it follows a space.
///
/// # Errors
/// [`ExperimentError::Candidates`] if two share it: a choice between them would mean nothing.
pub fn candidate_tokens(tokenizer: &Tokenizer, candidates: &[&str]) -> Result<Vec<u32>, ExperimentError> {
    let mut tokens: Vec<u32> = Vec::with_capacity(candidates.len());
    for candidate in candidates {
        let ids = tokenizer.encode(&format!(" {candidate}"))?;
        let first = *ids.first().expect("text that is not empty has tokens");
        if let Some(same) = tokens.iter().position(|token| *token == first) {
            let (first, second) = (candidates[same].to_owned(), (*candidate).to_owned());
            return Err(ExperimentError::Candidates { first, second });
        }
        tokens.push(first);
    }
    Ok(tokens)
}

/// The list in an order fixed by the seed (Fisher and Yates).
fn shuffled<const N: usize>(mut list: [&'static str; N], seed: u64, purpose: &str) -> [&'static str; N] {
    let mut random = Random::new(seed, purpose);
    for last in (1..N).rev() {
        list.swap(last, random.below(last + 1));
    }
    list
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn facts_are_fixed_distinct_and_neighbours_differ() {
        for seed in [0, 7, u64::MAX] {
            let facts: Vec<Fact> = (0..FACTS_MAX).map(|index| Fact::new(seed, index).unwrap()).collect();
            let texts: BTreeSet<String> = facts.iter().map(Fact::text).collect();
            assert_eq!(texts.len(), facts.len());
            assert!(facts.windows(2).all(|pair| pair[0].city != pair[1].city && pair[0].name != pair[1].name));
        }
        assert_eq!(Fact::new(3, 5).unwrap(), Fact::new(3, 5).unwrap());
        assert_ne!(Fact::new(3, 0).unwrap(), Fact::new(4, 0).unwrap());
        assert!(matches!(Fact::new(0, FACTS_MAX), Err(ExperimentError::BadSpec { .. })));
    }

    #[test]
    fn the_sentences_are_those_of_the_pilot() {
        let fact = Fact { name: "Alice", job: "baker", city: "Paris" };
        assert_eq!(fact.text(), "Alice is a baker who lives in Paris. Alice moved to Paris last year.");
        assert_eq!(fact.question(), "\nQuestion: In which city does Alice live?\nAnswer: Alice lives in");
    }
}
