//! What the evaluation asks: facts of three tiers.
//!
//! *Seen*: a person that training has not seen, in a place that it has. *Unseen*: both new. *Binding*: two persons in one
//! sentence, in different places that training has seen, one of them asked for. Persons and jobs are those of
//! [`crate::experiment::facts`], whose names no training text has.

use protocol::experiment::projector::Tier;

use crate::experiment::ExperimentError;
use crate::experiment::facts::{CITIES, FACTS_MAX, Fact};

/// Places that no text that the project makes up for training has; each one token in the models we ship tests for.
pub const UNSEEN: [&str; 8] = ["Vienna", "Sydney", "Toronto", "Moscow", "Dublin", "Seattle", "Athens", "Miami"];

/// A fact as it is told and asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// What the source reads.
    pub text: String,
    /// What the target is asked, up to where the place follows.
    pub prompt: String,
    /// The same as a bare question, free to be answered in any words.
    pub question: String,
    /// The place.
    pub answer: &'static str,
}

/// Places to choose among in a tier.
pub fn candidates(tier: Tier) -> [&'static str; 8] {
    match tier {
        Tier::Seen | Tier::Binding => CITIES,
        Tier::Unseen => UNSEEN,
    }
}

/// Fact `index` of a tier and seed. Neighbours have different answers.
///
/// # Errors
/// [`ExperimentError::BadSpec`] from [`FACTS_MAX`] on.
pub fn told(tier: Tier, seed: u64, index: u32) -> Result<Told, ExperimentError> {
    let mut fact = Fact::new(seed, index)?;
    let text = match tier {
        Tier::Seen => fact.text(),
        Tier::Unseen => {
            let place = CITIES.iter().position(|city| *city == fact.city).expect("facts are of these cities");
            fact.city = UNSEEN[place];
            fact.text()
        }
        Tier::Binding => pair(&fact, &Fact::new(seed, (index + 1) % FACTS_MAX)?, index),
    };
    let question = format!("\n{}", fact.bare_question());
    Ok(Told { text, prompt: fact.question(), question, answer: fact.city })
}

/// Who is asked for comes first in every other pair. As plain as can be: with more words, small models mix the two up even when
/// they have read the text themselves.
fn pair(asked: &Fact, other: &Fact, index: u32) -> String {
    let (first, second) = if index.is_multiple_of(2) { (asked, other) } else { (other, asked) };
    let phrase = |Fact { name, city, .. }: &Fact| format!("{name} lives in {city}");
    format!("{}, and {}.", phrase(first), phrase(second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_have_different_answers_and_pairs_two_places() {
        for tier in Tier::ALL {
            let facts: Vec<Told> = (0..FACTS_MAX).map(|index| told(tier, 3, index).unwrap()).collect();
            assert!(facts.windows(2).all(|pair| pair[0].answer != pair[1].answer), "{tier}");
            for fact in &facts {
                let named = candidates(tier).into_iter().filter(|place| fact.text.contains(place)).count();
                assert_eq!(named, if tier == Tier::Binding { 2 } else { 1 }, "{fact:?}");
                assert!(fact.text.contains(fact.answer) && !fact.prompt.contains(fact.answer));
            }
        }
        assert!(told(Tier::Seen, 0, FACTS_MAX).is_err());
    }

    #[test]
    fn who_is_asked_for_stands_first_as_often_as_second() {
        let first = (0..64).filter(|index| {
            let fact = told(Tier::Binding, 1, *index).unwrap();
            let asked = fact.prompt.split("does ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
            fact.text.starts_with(&asked)
        });
        assert_eq!(first.count(), 32);
    }
}
