//! What both models read while a projector is trained: numbered samples, the same on every box.
//!
//! A corpus is fixed by its spec and a seed. Each epoch is a permutation of its samples; places count on over epochs, so a range
//! of places says exactly which samples are meant, whoever works on them. Texts of files stay in the files: only where each
//! begins is held.
//!
//! Layout:
//! - `couriers`: sentences that the project makes up, from `words`. `files`: text, JSON lines and chats.
//! - `order`: permutations.

mod couriers;
mod files;
mod order;
mod words;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use protocol::experiment::projector::{Corpus as CorpusSpec, CorpusText, Samples};

use self::couriers::Sentences;
use self::files::Texts;
use self::order::Order;
use crate::model::Message;

/// Two texts that belong together: what the source reads, and what the target says then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Number in the corpus, from 0.
    pub id: u64,
    /// What must not lie on both sides of a split into training and held out: a set of persons, or a document.
    pub group: u64,
    /// What the source reads.
    pub text: String,
    /// What the target reads behind the text: a question, or nothing.
    pub prompt: String,
    /// What follows; its tokens are scored.
    pub answer: String,
    /// The text as turns of a conversation, which a model with a chat template reads in its template. Empty: plain text.
    pub turns: Vec<Message>,
}

/// A corpus cannot be read. Fragments follow "failed to read the corpus".
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// The spec asks for something impossible.
    #[error("{what}")]
    Spec {
        /// What.
        what: String,
    },
    /// A file holds something else than expected.
    #[error("{} line {line}: {what}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line from 1.
        line: u64,
        /// What was expected, and what is there.
        what: String,
    },
    /// A file could not be read, or changed meanwhile.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A corpus that is open.
#[derive(Debug)]
pub struct Corpus {
    samples: u64,
    texts: Source,
    hash: String,
    order: Mutex<Order>,
}

#[derive(Debug)]
enum Source {
    Made(Sentences),
    Files(Texts),
}

impl Corpus {
    /// Opens the corpus of a spec. `find` says where a file that is not given by path lies; `None`: nowhere.
    ///
    /// # Errors
    /// [`CorpusError`]: a spec that asks for too much, a file that is not there, a line that is not as it should be.
    pub fn open(spec: &CorpusSpec, seed: u64, find: &dyn Fn(&str) -> Option<PathBuf>) -> Result<Self, CorpusError> {
        let samples = u64::from(spec.samples);
        if samples == 0 {
            return Err(CorpusError::Spec { what: "a corpus of 0 samples".to_owned() });
        }
        let (texts, content) = match &spec.text {
            CorpusText::Couriers(couriers) => {
                (Source::Made(Sentences::new(couriers, seed)?), words::version().to_owned())
            }
            CorpusText::Files(names) => {
                let texts = Texts::open(names, samples, find)?;
                let content = texts.hash().to_owned();
                (Source::Files(texts), content)
            }
        };
        let stated = serde_json::to_string(&(spec, seed, content)).expect("a spec is plain data");
        let hash = format!("blake3:{}", blake3::hash(stated.as_bytes()).to_hex());
        Ok(Self { samples, texts, hash, order: Mutex::new(Order::new(seed, samples)) })
    }

    /// The same where all files are given by path.
    ///
    /// # Errors
    /// As [`Corpus::open`].
    pub fn open_paths(spec: &CorpusSpec, seed: u64) -> Result<Self, CorpusError> {
        Self::open(spec, seed, &|name| Path::new(name).is_absolute().then(|| PathBuf::from(name)))
    }

    /// Samples of an epoch.
    pub fn len(&self) -> u64 {
        self.samples
    }

    /// Never: a corpus has a sample.
    pub fn is_empty(&self) -> bool {
        self.samples == 0
    }

    /// What the corpus holds, in which order: equal hashes mean equal samples at equal places.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The sample at `place`, counted over epochs.
    ///
    /// # Errors
    /// [`CorpusError`] if a file changed since it was opened.
    pub fn at(&self, place: u64) -> Result<Sample, CorpusError> {
        let id = self.order.lock().unwrap_or_else(std::sync::PoisonError::into_inner).id(place);
        self.sample(id)
    }

    /// Sample `id`, from 0.
    ///
    /// # Errors
    /// As [`Corpus::at`].
    pub fn sample(&self, id: u64) -> Result<Sample, CorpusError> {
        match &self.texts {
            Source::Made(sentences) => Ok(sentences.sample(id)),
            Source::Files(texts) => texts.sample(id),
        }
    }

    /// The samples of a range, with their places.
    ///
    /// # Errors
    /// Each as [`Corpus::at`].
    pub fn range(&self, samples: &Samples) -> impl Iterator<Item = Result<(u64, Sample), CorpusError>> {
        places(samples).map(|place| Ok((place, self.at(place)?)))
    }
}

/// The places of a range.
pub fn places(samples: &Samples) -> std::ops::Range<u64> {
    samples.first..samples.first.saturating_add(u64::from(samples.count))
}

/// True if a group is held out, where `percent` of the groups are: every so manieth, the first always.
pub fn held_out(group: u64, percent: u32) -> bool {
    (group % 100) * u64::from(percent) % 100 < u64::from(percent)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protocol::experiment::projector::Couriers;

    use super::*;

    pub(super) fn spec(samples: u32) -> CorpusSpec {
        CorpusSpec {
            text: CorpusText::Couriers(Couriers { values: 16, names: 24, wordings: 3, pairs_percent: 30 }),
            samples,
        }
    }

    #[test]
    fn a_corpus_is_fixed_by_spec_and_seed() {
        let (a, b) = (Corpus::open_paths(&spec(50), 3).unwrap(), Corpus::open_paths(&spec(50), 3).unwrap());
        let other = Corpus::open_paths(&spec(50), 4).unwrap();
        assert!((0..120).all(|place| a.at(place).unwrap() == b.at(place).unwrap()));
        assert!((0..120).any(|place| a.at(place).unwrap() != other.at(place).unwrap()));
        assert_eq!(a.hash(), b.hash());
        assert_ne!(a.hash(), other.hash());
        assert!(Corpus::open_paths(&spec(0), 3).is_err());
    }

    #[test]
    fn about_as_many_groups_are_held_out_as_asked_and_the_first_always() {
        for percent in [5, 10, 20, 25, 50] {
            let held = (0..1000).filter(|group| held_out(*group, percent)).count();
            assert!(held.abs_diff(10 * percent as usize) <= 10, "{percent}: {held}");
            assert!(held_out(0, percent) && !held_out(1, percent));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Whatever the shards, every sample of an epoch is in exactly one.
        #[test]
        fn every_sample_comes_once_an_epoch(
            samples in 1_u32..80,
            seed in any::<u64>(),
            epoch in 0_u64..3,
            cuts in proptest::collection::vec(1_u32..30, 1..20),
        ) {
            let corpus = Corpus::open_paths(&spec(samples), seed).unwrap();
            let (mut first, end) = (epoch * u64::from(samples), (epoch + 1) * u64::from(samples));
            let mut shards = Vec::new();
            for cut in cuts.iter().cycle() {
                let count = u64::from(*cut).min(end - first);
                shards.push(Samples { first, count: u32::try_from(count).unwrap() });
                first += count;
                if first == end { break; }
            }
            shards.reverse();
            let mut seen: Vec<u64> =
                shards.iter().flat_map(|shard| corpus.range(shard)).map(|sample| sample.unwrap().1.id).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..u64::from(samples)).collect::<Vec<_>>());
        }
    }
}
