//! Sentences about made-up people and where they live, and a question about each.
//!
//! The first wording is the evaluation's; its names never occur here, nor the places of its tier *unseen*. A sample's group is a
//! handful of names, and the two persons of a sample come from one group, so no person lies on both sides of a split.

use protocol::experiment::projector::Couriers;

use super::words::{JOBS, NAMES, PLACES};
use super::{CorpusError, Sample};
use crate::experiment::facts::CITIES;
use crate::random::Random;

/// Names of a group.
const GROUP: usize = 4;

/// A text and a question about it. `{n}` is the person asked for, `{c}` where they live, `{j}` what they do; `{m}`, `{d}`, `{k}`
/// are the same of another person.
type Wording = (&'static str, &'static str);

const ONE: [Wording; 12] = [
    (
        "{n} is a {j} who lives in {c}. {n} moved to {c} last year.",
        "\nQuestion: In which city does {n} live?\nAnswer: {n} lives in",
    ),
    ("{n} works as a {j} in {c}.", "\nQuestion: Where does {n} work?\nAnswer: {n} works in"),
    ("Last summer {n}, a {j}, left home and settled in {c}.", "\n{n} settled in"),
    ("The {j} of {c} is called {n}.", "\nQuestion: In which city is {n} the {j}?\nAnswer: {n} is the {j} in"),
    ("Letter from {c}: {n} writes that life as a {j} is good there.", "\n{n} writes from"),
    ("{n} was born in {c} and became a {j}.", "\nQuestion: Where was {n} born?\nAnswer: {n} was born in"),
    ("Everybody in {c} knows {n}, the {j} with the red hat.", "\n{n} is known in"),
    ("Name: {n}. Job: {j}. City: {c}.", "\nThe city of {n} is"),
    ("If you travel to {c}, visit {n}. A better {j} is hard to find.", "\nTo see {n}, travel to"),
    ("{n} took the night train to {c}, where a job as a {j} was free.", "\nThe train took {n} to"),
    ("After ten years as a {j}, {n} bought a small house in {c}.", "\nThe house of {n} stands in"),
    ("\"I love {c},\" said {n}, the {j}. \"I will never leave {c}.\"", "\n{n} will never leave"),
];

/// The first two are the evaluation's.
const TWO: [Wording; 8] = [
    ("{n} lives in {c}, and {m} lives in {d}.", "\nQuestion: In which city does {n} live?\nAnswer: {n} lives in"),
    ("{m} lives in {d}, and {n} lives in {c}.", "\nQuestion: In which city does {n} live?\nAnswer: {n} lives in"),
    ("{n} works in {c}. {m} works in {d}.", "\nQuestion: Where does {n} work?\nAnswer: {n} works in"),
    ("{m} went to {d} while {n} went to {c}.", "\nQuestion: Where did {n} go?\nAnswer: {n} went to"),
    ("{n} from {c} met {m}, a {k} from {d}.", "\n{n} comes from"),
    ("{m}, the {k}, was born in {d}; {n}, the {j}, was born in {c}.", "\n{n} was born in"),
    ("While {m} stayed in {d}, {n} became a {j} in {c}.", "\n{n} became a {j} in"),
    ("People: {m} ({k}, {d}) and {n} ({j}, {c}).", "\nThe city of {n} is"),
];

/// The sentences of one seed.
#[derive(Debug)]
pub(super) struct Sentences {
    seed: u64,
    places: Vec<&'static str>,
    names: Vec<&'static str>,
    wordings: usize,
    pairs_percent: usize,
}

impl Sentences {
    /// # Errors
    /// [`CorpusError::Spec`] for more words than there are, or too few.
    pub(super) fn new(spec: &Couriers, seed: u64) -> Result<Self, CorpusError> {
        let within = |what: &str, got: u32, least: usize, most: usize| {
            let wrong =
                || CorpusError::Spec { what: format!("couriers with {got} {what}; {least} to {most} are possible") };
            let got = usize::try_from(got).expect("32 bits fit");
            if (least..=most).contains(&got) { Ok(got) } else { Err(wrong()) }
        };
        let values = within("values", spec.values, CITIES.len(), CITIES.len() + PLACES.len())?;
        let names = within("names", spec.names, 2, NAMES.len())?;
        let wordings = within("wordings", spec.wordings, 1, ONE.len())?;
        let pairs_percent = within("percent of pairs", spec.pairs_percent, 0, 100)?;
        let further = shuffled(&PLACES, seed, "courier places");
        let places = CITIES.into_iter().chain(further).take(values).collect();
        let names = shuffled(&NAMES, seed, "courier names").into_iter().take(names).collect();
        Ok(Self { seed, places, names, wordings, pairs_percent })
    }

    /// Sample `id`: its value is the next in turn, so that all values occur about equally often; all else is drawn.
    pub(super) fn sample(&self, id: u64) -> Sample {
        let mut random = Random::new(self.seed, &format!("courier {id}"));
        let mut draw = |limit: usize| random.below(limit);
        let turn = usize::try_from(id % self.places.len() as u64).expect("less than a usize");
        let pair = draw(100) < self.pairs_percent;
        let name = draw(self.names.len());
        let group = name / GROUP;
        let members = &self.names[group * GROUP..((group + 1) * GROUP).min(self.names.len())];
        let (member, other) = (name % GROUP, 1 + draw(members.len().max(2) - 1));
        let elsewhere = (turn + 1 + draw(self.places.len() - 1)) % self.places.len();
        let (job, second_job) = (draw(JOBS.len()), draw(JOBS.len()));
        // A group of one has nobody to pair with.
        let wordings: &[Wording] = if pair && members.len() > 1 { &TWO } else { &ONE };
        let (text, question) = wordings[draw(self.wordings.min(wordings.len()).max(usize::from(pair) + 1))];
        let fill = |template: &str| {
            template
                .replace("{n}", self.names[name])
                .replace("{c}", self.places[turn])
                .replace("{j}", JOBS[job])
                .replace("{m}", members[(member + other) % members.len()])
                .replace("{d}", self.places[elsewhere])
                .replace("{k}", JOBS[second_job])
        };
        Sample {
            id,
            group: group as u64,
            text: fill(text),
            prompt: fill(question),
            answer: format!(" {}.", self.places[turn]),
            turns: Vec::new(),
        }
    }
}

/// The list in an order fixed by the seed (Fisher and Yates).
fn shuffled(list: &[&'static str], seed: u64, purpose: &str) -> Vec<&'static str> {
    let mut random = Random::new(seed, purpose);
    let mut list = list.to_vec();
    for last in (1..list.len()).rev() {
        list.swap(last, random.below(last + 1));
    }
    list
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::experiment::facts::Fact;
    use crate::experiment::projector::facts::UNSEEN;

    fn sentences(values: u32, names: u32, wordings: u32, pairs_percent: u32) -> Sentences {
        Sentences::new(&Couriers { values, names, wordings, pairs_percent }, 5).unwrap()
    }

    #[test]
    fn words_are_distinct_and_none_is_the_evaluations() {
        let evaluated: BTreeSet<&str> = (0..40).map(|index| Fact::new(0, index).unwrap().name).collect();
        assert_eq!(evaluated.len(), 40);
        assert!(NAMES.iter().all(|name| !evaluated.contains(name)));
        assert!(PLACES.iter().all(|place| !UNSEEN.contains(place) && !CITIES.contains(place)));
        for list in [&PLACES[..], &NAMES[..], &JOBS[..]] {
            assert_eq!(list.iter().collect::<BTreeSet<_>>().len(), list.len());
        }
        assert!(NAMES.iter().all(|name| !PLACES.contains(name)));
    }

    #[test]
    fn the_first_wording_is_the_evaluations() {
        let sample = sentences(8, 8, 1, 0).sample(11);
        let fact = Fact { name: NAMES[0], job: JOBS[0], city: CITIES[3] };
        let name = sample.text.split(' ').next().unwrap();
        let job = sample.text.split(' ').nth(3).unwrap();
        assert_eq!(sample.text, fact.text().replace(NAMES[0], name).replace(JOBS[0], job));
        assert_eq!(sample.prompt, fact.question().replace(NAMES[0], name));
        assert_eq!(sample.answer, format!(" {}.", CITIES[3]));
    }

    #[test]
    fn every_value_occurs_and_pairs_are_two_persons_of_a_group_in_two_places() {
        let sentences = sentences(32, 30, 12, 40);
        let samples: Vec<Sample> = (0..640).map(|id| sentences.sample(id)).collect();
        let answers: BTreeSet<&str> = samples.iter().map(|sample| sample.answer.as_str()).collect();
        assert_eq!(answers.len(), 32);
        assert!(CITIES.iter().all(|city| answers.contains(format!(" {city}.").as_str())));
        let words = |text: &str| -> BTreeSet<String> {
            text.split(|c: char| !c.is_alphabetic()).map(ToOwned::to_owned).collect()
        };
        let mut pairs = 0;
        for sample in &samples {
            let words = words(&sample.text);
            let names: Vec<usize> =
                (0..sentences.names.len()).filter(|index| words.contains(sentences.names[*index])).collect();
            assert!(names.iter().all(|name| (name / GROUP) as u64 == sample.group), "{sample:?}");
            assert!(!sample.text.contains('{') && !sample.prompt.contains('{'), "{sample:?}");
            if names.len() == 2 {
                pairs += 1;
                let places: BTreeSet<_> = sentences.places.iter().filter(|place| words.contains(**place)).collect();
                assert_eq!(places.len(), 2, "{sample:?}");
            }
        }
        assert!((180..330).contains(&pairs), "{pairs}");
    }

    #[test]
    fn more_words_than_there_are_is_an_error_that_says_how_many_there_are() {
        let wrong = |values, names, wordings, pairs_percent| {
            Sentences::new(&Couriers { values, names, wordings, pairs_percent }, 0).unwrap_err().to_string()
        };
        assert_eq!(wrong(7, 8, 1, 0), "couriers with 7 values; 8 to 403 are possible");
        assert!(wrong(8, 1, 1, 0).contains("names") && wrong(8, 2, 13, 0).contains("wordings"));
        assert!(wrong(8, 2, 1, 101).contains("percent of pairs"));
    }
}
