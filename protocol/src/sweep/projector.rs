//! Kinds `projector-train` and `projector-eval`.
//!
//! ```toml
//! [[experiment]]
//! name = "bridge"
//! kind = "projector-train"
//! source = "smollm2-135m-instruct"
//! target = "gemma-3-270m"
//! method = "ridge"             # or "fuser"; each has keys of its own
//! samples = 512
//! shards = 2
//!
//! [[experiment]]
//! name = "refined"
//! kind = "projector-train"
//! source = "smollm2-135m-instruct"
//! target = "gemma-3-270m"
//! method = "fuser"
//! base = "bridge"              # an earlier experiment, for which this one waits, or "artifact:HASH"
//!
//! [[experiment]]
//! kind = "projector-eval"
//! projector = "refined"        # every training of that experiment; "artifact:HASH" needs source and target
//! tiers = ["seen", "unseen", "binding"]
//! ```

use toml::de::DeValue;

use super::{listed, read_model, small};
use crate::control::Output;
use crate::error::{SourceError, nearest};
use crate::experiment::projector::{
    Corpus, CorpusText, Couriers, EvalSpec, FuserRecipe, LayerMap, Loss, Method, PROJECTOR, Pairs, Precision,
    Projected, ProjectorRef, Regime, RidgeRecipe, Schedule, Shares, Stage, Tier, TrainSpec, stored_file,
};
use crate::experiment::{ShardSpec, Spread};
use crate::group::Group;
use crate::limits::SHARDS_PER_RUN_MAX;
use crate::source::{FromToml, TableReader, from_toml_text};

/// How an artifact of the store is named.
const ARTIFACT: &str = "artifact:";
/// Trainings of the experiments above, and the experiment that is being read: what names are looked up in.
pub(super) struct Above<'a> {
    pub(super) groups: &'a [Group],
    pub(super) group: &'a mut Group,
}

/// Keys of both methods: `source`, `target` (models), `method` (ridge, fuser; default ridge), `corpus` (`"couriers"`, the
/// default, or a list of absolute paths or of names that `bonepile store put` printed), for couriers `values` (8–10000, default 8), `names`
/// (2–10000, default 64), `wordings` (1–64, default 4), `pairs_percent` (0–100, default 0), `samples` (1–100000000, default
/// 512), `layers` (`"proportional"`, `"last-aligned"` or a list of source layers for each target layer; default: proportional
/// for ridge, last-aligned for a fuser), `nearest` (1–16, default 3, for proportional), `spread`.
pub(super) fn read_train(
    cell: &mut TableReader<'_>,
    seed: u64,
    above: &mut Above<'_>,
) -> Result<TrainSpec, SourceError> {
    let (source, target) = (read_model(cell, "source")?, read_model(cell, "target")?);
    let fuser = one_of(cell, "method", &[("ridge", false), ("fuser", true)], false)?;
    let corpus = read_corpus(cell)?;
    let layers = read_layers(cell, fuser)?;
    let spread = cell.optional("spread")?.unwrap_or(Spread::Any);
    let (method, shards) = match fuser {
        false => (Method::Ridge(read_ridge(cell)?), small(cell, "shards", 1, 256, 1)?),
        true => {
            let recipe = read_fuser(cell, &source, &target, above)?;
            (Method::Fuser(Box::new(recipe)), small(cell, "replicas", 1, 64, 4)?)
        }
    };
    let stage = Stage::Whole { shards };
    let spec = TrainSpec { source, target, corpus, layers, method, stage, spread, seed };
    if let Method::Fuser(recipe) = &spec.method {
        let of_round = u64::from(recipe.local_steps) * u64::from(recipe.batch);
        let rounds = spec.samples().div_ceil(of_round);
        if rounds.saturating_mul(2) > SHARDS_PER_RUN_MAX as u64 {
            let message = format!("{} samples make {rounds} rounds, too many for a run", spec.samples());
            return Err(cell.complain("samples", message).hint("raise local_steps or batch"));
        }
    }
    Ok(spec)
}

/// `lambdas` (each above 0, default 0.0001 to 1 in tens), `held_out_percent` (5–50, default 20).
fn read_ridge(cell: &mut TableReader<'_>) -> Result<RidgeRecipe, SourceError> {
    // Beside correlations, whose diagonal is 1: 100 beside sums over 10,000 tokens is 0.01 here.
    let usual = || vec![1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let lambdas = cell.optional::<Vec<f64>>("lambdas")?.unwrap_or_else(usual);
    if lambdas.is_empty() || lambdas.len() > 64 || lambdas.iter().any(|lambda| *lambda <= 0.0) {
        return Err(cell.complain("lambdas", "expected 1 to 64 numbers, each above 0"));
    }
    kept(cell, "lambdas", &lambdas)?;
    Ok(RidgeRecipe { lambdas, held_out_percent: small(cell, "held_out_percent", 5, 50, 20)? })
}

/// `regime` (unaware, aware; default unaware), `hidden` (0, the default: the widest that fits the devices that are there; else
/// 8–8192), `depth` (3–16, default 3), `base` (an experiment above or `artifact:HASH`), `pairs` (matched, shuffled), `loss`
/// (next-token, distil), `epochs` (1–1000, default 1), `batch` (1–4096, default 8), `micro_batch` (default: the batch),
/// `learning_rate` (default 0.001), `warmup` (0–1, default 0.1), `schedule` (linear, constant, cosine), `weight_decay` (default
/// 0.01), `clip` (default 1), `dropout` (0–1, default 0.1), `gate_start` (default 1: open), `temperature_end` (default 0.05),
/// `precision` (f32, bf16, f16), `checkpointing`, `local_steps` (1–256, default 16), `shares` (speed, equal; default speed), `quantise` (default true), `outer` (learning
/// rate and momentum; default: by the number of rounds), `validate` (0–4096, default 16), `replicas` (1–64, default 4).
fn read_fuser(
    cell: &mut TableReader<'_>,
    source: &str,
    target: &str,
    above: &mut Above<'_>,
) -> Result<FuserRecipe, SourceError> {
    let hidden = small(cell, "hidden", 0, 8192, 0)?;
    if (1..8).contains(&hidden) {
        return Err(cell.complain("hidden", format!("{hidden} is out of range; expected 0 or 8 to 8192")));
    }
    let batch = small(cell, "batch", 1, 4096, 8)?;
    let base = match cell.optional::<String>("base")? {
        Some(text) => Some(base(cell, &text, source, target, above)?),
        None => None,
    };
    Ok(FuserRecipe {
        regime: one_of(cell, "regime", &[("unaware", Regime::Unaware), ("aware", Regime::Aware)], Regime::Unaware)?,
        hidden,
        depth: small(cell, "depth", 3, 16, 3)?,
        base,
        pairs: one_of(cell, "pairs", &[("matched", Pairs::Matched), ("shuffled", Pairs::Shuffled)], Pairs::Matched)?,
        loss: one_of(cell, "loss", &[("next-token", Loss::NextToken), ("distil", Loss::Distil)], Loss::NextToken)?,
        epochs: small(cell, "epochs", 1, 1000, 1)?,
        batch,
        micro_batch: small(cell, "micro_batch", 1, batch, batch)?,
        learning_rate: real(cell, "learning_rate", 0.0, 10.0, 1e-3)?,
        warmup: real(cell, "warmup", 0.0, 1.0, 0.1)?,
        schedule: one_of(cell, "schedule", &SCHEDULES, Schedule::Linear)?,
        weight_decay: real(cell, "weight_decay", 0.0, 10.0, 0.01)?,
        clip: real(cell, "clip", 0.0, 1e6, 1.0)?,
        dropout: real(cell, "dropout", 0.0, 0.99, 0.1)?,
        gate_start: real(cell, "gate_start", -100.0, 100.0, 1.0)?,
        temperature_end: real(cell, "temperature_end", 1e-6, 1.0, 0.05)?,
        precision: one_of(cell, "precision", &PRECISIONS, Precision::F32)?,
        checkpointing: cell.optional("checkpointing")?.unwrap_or(false),
        local_steps: small(cell, "local_steps", 1, 256, 16)?,
        shares: one_of(cell, "shares", &[("speed", Shares::Speed), ("equal", Shares::Equal)], Shares::Speed)?,
        quantise: cell.optional("quantise")?.unwrap_or(true),
        outer: read_outer(cell)?,
        validate: small(cell, "validate", 0, 4096, 16)?,
    })
}

const SCHEDULES: [(&str, Schedule); 3] =
    [("linear", Schedule::Linear), ("constant", Schedule::Constant), ("cosine", Schedule::Cosine)];
const PRECISIONS: [(&str, Precision); 3] =
    [("f32", Precision::F32), ("bf16", Precision::Bf16), ("f16", Precision::F16)];

fn read_outer(cell: &mut TableReader<'_>) -> Result<Option<(f64, f64)>, SourceError> {
    match cell.optional::<Vec<f64>>("outer")?.as_deref() {
        None => Ok(None),
        Some([rate, momentum]) if (0.0..=10.0).contains(rate) && (0.0..1.0).contains(momentum) => {
            kept(cell, "outer", &[*rate, *momentum])?;
            Ok(Some((*rate, *momentum)))
        }
        Some(_) => Err(cell
            .complain("outer", "expected a learning rate from 0 to 10 and a momentum below 1")
            .hint("for example [0.7, 0.9]")),
    }
}

/// `projector` (an experiment above or `artifact:HASH`), `source` and `target` (default: those of the experiment), `shuffled`
/// (an experiment or artifact trained on shuffled pairs; a ridge projector brings its own), `tiers` (default all three), `facts`
/// (2–4096 of each tier, default 32), `facts_per_shard` (2–64, default 16), `conditions` (default all that can be had),
/// `answer_tokens` (1–64, default 8), `spread`.
pub(super) fn read_eval(
    cell: &mut TableReader<'_>,
    seed: u64,
    above: &mut Above<'_>,
) -> Result<Vec<ShardSpec>, SourceError> {
    let wanted = [optional_model(cell, "source")?, optional_model(cell, "target")?];
    let text = cell.required::<String>("projector")?;
    let projectors = looked_up(cell, "projector", &text, &wanted, above)?;
    let shuffled = cell.optional::<String>("shuffled")?;
    let tiers = distinct(cell, "tiers")?.unwrap_or_else(|| Tier::ALL.to_vec());
    let facts = small(cell, "facts", 2, 4096, 32)?;
    let per_shard = small(cell, "facts_per_shard", 2, 64, 16)?;
    let conditions = distinct(cell, "conditions")?;
    let answer_tokens = small(cell, "answer_tokens", 1, 64, 8)?;
    let spread = cell.optional("spread")?.unwrap_or(Spread::Any);
    let mut shards = Vec::new();
    for found in projectors {
        let pair = [Some(found.source.clone()), Some(found.target.clone())];
        let control = match &shuffled {
            Some(text) => {
                Some(only(cell, "shuffled", text, looked_up(cell, "shuffled", text, &pair, above)?)?.projector)
            }
            None => None,
        };
        let controlled = control.is_some() || found.brings_control;
        let usual = || Projected::ALL.into_iter().filter(|condition| controlled || *condition != Projected::Shuffled);
        let conditions = conditions.clone().unwrap_or_else(|| usual().collect());
        if !controlled && conditions.contains(&Projected::Shuffled) {
            return Err(cell
                .complain("conditions", "`shuffled` needs a projector that was trained on shuffled pairs")
                .hint("name one: shuffled = \"…\", an experiment with pairs = \"shuffled\""));
        }
        for tier in &tiers {
            for (first_fact, facts) in super::in_shards(facts, per_shard) {
                shards.push(ShardSpec::ProjectorEval(Box::new(EvalSpec {
                    source: found.source.clone(),
                    target: found.target.clone(),
                    projector: found.projector.clone(),
                    shuffled: control.clone(),
                    tier: *tier,
                    first_fact,
                    facts,
                    conditions: conditions.clone(),
                    answer_tokens,
                    spread,
                    seed,
                })));
            }
        }
    }
    Ok(shards)
}

/// A projector that a sweep names.
struct Found {
    projector: ProjectorRef,
    source: String,
    target: String,
    /// Its training makes the control too.
    brings_control: bool,
}

/// What `text` names; from and to the models that are wanted, if any are.
fn looked_up(
    cell: &TableReader<'_>,
    key: &'static str,
    text: &str,
    wanted: &[Option<String>; 2],
    above: &mut Above<'_>,
) -> Result<Vec<Found>, SourceError> {
    if let Some(hash) = text.strip_prefix(ARTIFACT) {
        let hash = hash.parse().map_err(|_| {
            cell.complain(key, format!("`{hash}` is not the name of an artifact"))
                .hint("64 hexadecimal digits, as `bonepile artifacts` shows them")
        })?;
        let [Some(source), Some(target)] = wanted else {
            return Err(cell.complain(key, "an artifact does not say between which models; give source and target"));
        };
        let projector = ProjectorRef::Artifact(Output { name: PROJECTOR.to_owned(), hash, bytes: 0 });
        let (source, target) = (source.clone(), target.clone());
        return Ok(vec![Found { projector, source, target, brings_control: false }]);
    }
    let Some(at) = above.groups.iter().position(|group| group.name == text && !text.is_empty()) else {
        let names = above.groups.iter().filter(|group| !group.trainings.is_empty()).map(|group| group.name.as_str());
        let names: Vec<_> = names.filter(|name| !name.is_empty()).collect();
        let error =
            cell.complain(key, format!("no experiment above is called `{text}`; there are: {}", listed(&names)));
        return Err(match nearest(text, names) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("a training stands before what uses it; one of the store is \"artifact:HASH\""),
        });
    };
    let first: usize = above.groups[..at].iter().map(|group| group.trainings.len()).sum();
    let fits = |spec: &TrainSpec| {
        let [source, target] = wanted;
        source.as_ref().is_none_or(|source| *source == spec.source)
            && target.as_ref().is_none_or(|target| *target == spec.target)
    };
    let found: Vec<_> = above.groups[at]
        .trainings
        .iter()
        .enumerate()
        .filter(|(_, spec)| fits(spec))
        .map(|(place, spec)| Found {
            projector: ProjectorRef::Trained(u32::try_from(first + place).unwrap_or(u32::MAX)),
            source: spec.source.clone(),
            target: spec.target.clone(),
            brings_control: matches!(spec.method, Method::Ridge(_)),
        })
        .collect();
    if found.is_empty() {
        let pair = wanted.iter().flatten().cloned().collect::<Vec<_>>().join(" to ");
        let what = if pair.is_empty() { "trains nothing".to_owned() } else { format!("trains nothing from {pair}") };
        return Err(cell.complain(key, format!("experiment `{text}` {what}")));
    }
    let at = u32::try_from(at).unwrap_or(u32::MAX);
    if let Err(place) = above.group.after.binary_search(&at) {
        above.group.after.insert(place, at);
    }
    Ok(found)
}

fn base(
    cell: &TableReader<'_>,
    text: &str,
    source: &str,
    target: &str,
    above: &mut Above<'_>,
) -> Result<ProjectorRef, SourceError> {
    let wanted = [Some(source.to_owned()), Some(target.to_owned())];
    Ok(only(cell, "base", text, looked_up(cell, "base", text, &wanted, above)?)?.projector)
}

fn only(cell: &TableReader<'_>, key: &str, text: &str, mut found: Vec<Found>) -> Result<Found, SourceError> {
    match (found.len(), found.pop()) {
        (1, Some(found)) => Ok(found),
        (count, _) => Err(cell
            .complain(key, format!("experiment `{text}` has {count} trainings between these models"))
            .hint("give the one that is meant an experiment of its own")),
    }
}

fn read_corpus(cell: &mut TableReader<'_>) -> Result<Corpus, SourceError> {
    let text = match cell.optional::<CorpusWord>("corpus")?.unwrap_or(CorpusWord::Couriers) {
        CorpusWord::Couriers => CorpusText::Couriers(Couriers {
            values: small(cell, "values", 8, 10_000, 8)?,
            names: small(cell, "names", 2, 10_000, 64)?,
            wordings: small(cell, "wordings", 1, 64, 4)?,
            pairs_percent: small(cell, "pairs_percent", 0, 100, 0)?,
        }),
        CorpusWord::Files(files) => {
            let good = |file: &String| match stored_file(file) {
                Some(stored) => is_text(&stored.name),
                None => file.starts_with('/') && is_text(file),
            };
            if let Some(bad) = files.iter().find(|file| !good(file)) {
                return Err(cell
                    .complain("corpus", format!("`{bad}` is not an absolute path to a .txt or .jsonl file"))
                    .hint(
                        "every worker reads it there; `bonepile store put FILE` prints the name of one in the store",
                    ));
            }
            if files.is_empty() {
                return Err(cell.complain("corpus", "the list is empty; \"couriers\" needs no files"));
            }
            CorpusText::Files(files)
        }
    };
    Ok(Corpus { text, samples: small(cell, "samples", 1, 100_000_000, 512)? })
}

fn is_text(name: &str) -> bool {
    name.ends_with(".txt") || name.ends_with(".jsonl")
}

fn read_layers(cell: &mut TableReader<'_>, fuser: bool) -> Result<LayerMap, SourceError> {
    let usual = if fuser { LayersWord::LastAligned } else { LayersWord::Proportional };
    match cell.optional::<LayersWord>("layers")?.unwrap_or(usual) {
        LayersWord::LastAligned => Ok(LayerMap::LastAligned),
        LayersWord::Proportional => Ok(LayerMap::Proportional(small(cell, "nearest", 1, 16, 3)?)),
        LayersWord::Given(lists) if lists.is_empty() || lists.iter().any(Vec::is_empty) => {
            Err(cell.complain("layers", "a list is empty; each target layer is made from one source layer or more"))
        }
        LayersWord::Given(lists) => Ok(LayerMap::Given(lists)),
    }
}

fn optional_model(cell: &mut TableReader<'_>, key: &'static str) -> Result<Option<String>, SourceError> {
    if cell.keys().contains(&key) {
        return read_model(cell, key).map(Some);
    }
    // Asked for, so that it counts as known.
    cell.optional::<String>(key)
}

/// A list without repetitions; `None` if it is left out.
fn distinct<T: FromToml + PartialEq + std::fmt::Display>(
    cell: &mut TableReader<'_>,
    key: &'static str,
) -> Result<Option<Vec<T>>, SourceError> {
    let Some(list) = cell.optional::<Vec<T>>(key)? else { return Ok(None) };
    if list.is_empty() {
        return Err(cell.complain(key, "the list is empty; leave the key out for the usual ones"));
    }
    match (1..list.len()).find(|at| list[..*at].contains(&list[*at])) {
        Some(twice) => Err(cell.complain(key, format!("`{}` stands there twice", list[twice]))),
        None => Ok(Some(list)),
    }
}

fn one_of<T: Copy>(
    cell: &mut TableReader<'_>,
    key: &'static str,
    words: &[(&'static str, T)],
    default: T,
) -> Result<T, SourceError> {
    let Some(text) = cell.optional::<String>(key)? else { return Ok(default) };
    if let Some((_, found)) = words.iter().find(|(word, _)| *word == text) {
        return Ok(*found);
    }
    let names: Vec<_> = words.iter().map(|(word, _)| *word).collect();
    let error = cell.complain(key, format!("unknown {key} `{text}`; expected one of {}", names.join(", ")));
    Err(match nearest(&text, names) {
        Some(near) => error.hint(format!("did you mean `{near}`?")),
        None => error,
    })
}

fn real(cell: &mut TableReader<'_>, key: &'static str, min: f64, max: f64, default: f64) -> Result<f64, SourceError> {
    let number = cell.optional::<f64>(key)?.unwrap_or(default);
    if (min..=max).contains(&number) {
        kept(cell, key, &[number])?;
        return Ok(number);
    }
    Err(cell.complain(key, format!("{number} is out of range; expected {min} to {max}")))
}

/// Numbers go through JSON into the journal and must come back as they were.
fn kept(cell: &TableReader<'_>, key: &str, numbers: &[f64]) -> Result<(), SourceError> {
    let comes_back = |number: &f64| {
        let text = serde_json::to_string(number).unwrap_or_default();
        serde_json::from_str::<f64>(&text).is_ok_and(|back| back.to_bits() == number.to_bits())
    };
    match numbers.iter().find(|number| !comes_back(number)) {
        None => Ok(()),
        Some(number) => {
            Err(cell.complain(key, format!("{number} has more digits than are kept")).hint("15 are, which is enough"))
        }
    }
}

enum CorpusWord {
    Couriers,
    Files(Vec<String>),
}

impl FromToml for CorpusWord {
    const EXPECTED: &'static str = "\"couriers\" or a list of files";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        match value.as_str() {
            Some("couriers") => Ok(Self::Couriers),
            Some(other) => Err(Some(format!("unknown corpus `{other}`; expected {}", Self::EXPECTED))),
            None => Vec::from_toml(value).map(Self::Files),
        }
    }
}

enum LayersWord {
    LastAligned,
    Proportional,
    Given(Vec<Vec<u32>>),
}

impl FromToml for LayersWord {
    const EXPECTED: &'static str =
        "\"proportional\", \"last-aligned\" or a list of source layers for each target layer";

    fn from_toml(value: &DeValue<'_>) -> Result<Self, Option<String>> {
        match value.as_str() {
            Some("last-aligned") => Ok(Self::LastAligned),
            Some("proportional") => Ok(Self::Proportional),
            Some(other) => Err(Some(format!("unknown layers `{other}`; expected {}", Self::EXPECTED))),
            None => {
                let number = |layer: u64| u32::try_from(layer).map_err(|_| Some(format!("{layer} is no layer")));
                let list = |list: Vec<u64>| list.into_iter().map(number).collect::<Result<Vec<_>, _>>();
                let lists = Vec::<Vec<u64>>::from_toml(value)?;
                lists.into_iter().map(list).collect::<Result<Vec<_>, _>>().map(Self::Given)
            }
        }
    }
}

from_toml_text!(Tier, "seen, unseen or binding");
from_toml_text!(Projected, "the name of a condition");

#[cfg(test)]
mod tests {
    use super::super::Sweep;
    use super::*;

    const GOOD: &str = r#"
name = "bridges"
seed = 7
[[experiment]]
name = "ridge"
kind = "projector-train"
samples = 256
shards = 2
layers = "proportional"
nearest = 2
[experiment.matrix]
source = ["smollm2-135m-instruct", "gemma-3-270m"]
target = ["gemma-3-270m"]

[[experiment]]
name = "fine"
kind = "projector-train"
source = "smollm2-135m-instruct"
target = "gemma-3-270m"
method = "fuser"
base = "ridge"
corpus = ["/data/a.jsonl"]
outer = [0.7, 0.5]
replicas = 3

[[experiment]]
kind = "projector-eval"
projector = "fine"
facts = 5
facts_per_shard = 2
tiers = ["seen", "binding"]
"#;

    fn complaint(text: &str) -> String {
        let error = Sweep::parse("s.toml", text).unwrap_err();
        match &error.hint {
            Some(hint) => format!("{error} | {hint}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn trainings_and_what_uses_them_are_tied_by_name() {
        let sweep = Sweep::parse("s.toml", GOOD).unwrap();
        assert_eq!(sweep.groups.iter().map(|group| group.trainings.len()).collect::<Vec<_>>(), [2, 1, 0]);
        let ridge = &sweep.groups[0].trainings[0];
        assert_eq!(
            (ridge.layers.clone(), ridge.stage.clone()),
            (LayerMap::Proportional(2), Stage::Whole { shards: 2 })
        );
        let Method::Fuser(recipe) = &sweep.groups[1].trainings[0].method else { panic!("a fuser") };
        assert_eq!(recipe.base, Some(ProjectorRef::Trained(0)));
        assert_eq!((recipe.outer, recipe.hidden, recipe.micro_batch), (Some((0.7, 0.5)), 0, 8));
        assert_eq!(
            (sweep.groups[1].after.as_slice(), sweep.groups[2].after.as_slice()),
            ([0].as_slice(), [1].as_slice())
        );
        let summaries: Vec<_> = sweep.shards.iter().map(ShardSpec::summary).collect();
        let pair = "projector-eval smollm2-135m-instruct -> gemma-3-270m";
        let facts = |tier, range| format!("{pair} {tier} facts={range}");
        let expected = [("seen", "0..2"), ("seen", "2..5"), ("binding", "0..2"), ("binding", "2..5")];
        assert_eq!(summaries, expected.map(|(tier, range)| facts(tier, range)));
        let ShardSpec::ProjectorEval(eval) = &sweep.shards[0] else { panic!("an evaluation") };
        assert_eq!(eval.projector, ProjectorRef::Trained(2));
        assert!(!eval.conditions.contains(&Projected::Shuffled), "a fuser brings no control");
        assert_eq!(sweep.models(), ["smollm2-135m-instruct", "gemma-3-270m"]);
    }

    #[test]
    fn an_evaluation_goes_over_every_training_of_its_experiment() {
        let both = GOOD.replace("projector = \"fine\"", "projector = \"ridge\"");
        let sweep = Sweep::parse("s.toml", &both).unwrap();
        assert_eq!(sweep.shards.len(), 8);
        let one = both.replace("facts = 5", "facts = 5\nsource = \"gemma-3-270m\"");
        let sweep = Sweep::parse("s.toml", &one).unwrap();
        let ShardSpec::ProjectorEval(eval) = &sweep.shards[0] else { panic!("an evaluation") };
        assert_eq!((sweep.shards.len(), &eval.projector), (4, &ProjectorRef::Trained(1)));
        assert!(eval.conditions.contains(&Projected::Shuffled), "ridge makes its own control");
        let hash = "0a".repeat(32);
        let stored = one.replace("projector = \"ridge\"", &format!("projector = \"artifact:{hash}\""));
        let stored = stored.replace("facts = 5", "facts = 5\ntarget = \"gemma-3-270m\"");
        let sweep = Sweep::parse("s.toml", &stored).unwrap();
        let ShardSpec::ProjectorEval(eval) = &sweep.shards[0] else { panic!("an evaluation") };
        assert!(matches!(&eval.projector, ProjectorRef::Artifact(artifact) if artifact.hash.to_string() == hash));
    }

    #[test]
    fn complaints_name_what_is_wrong_and_what_would_be_right() {
        let swap = |from: &str, to: &str| complaint(&GOOD.replace(from, to));
        assert!(
            swap("base = \"ridge\"", "base = \"rigde\"")
                .ends_with("no experiment above is called `rigde`; there are: ridge | did you mean `ridge`?")
        );
        assert!(
            swap("method = \"fuser\"", "method = \"fusor\"")
                .ends_with("unknown method `fusor`; expected one of ridge, fuser | did you mean `fuser`?")
        );
        assert!(swap("shards = 2\nlayers", "lambdas = [0.1, 0]\nlayers").contains("each above 0"));
        assert!(swap("replicas = 3", "shards = 3").contains("unknown key"));
        assert!(swap("projector = \"fine\"", "projector = \"artifact:12\"").contains("not the name of an artifact"));
        assert!(swap("outer = [0.7, 0.5]", "outer = [0.7]").contains("for example [0.7, 0.9]"));
        assert!(swap("\"/data/a.jsonl\"", "\"a.jsonl\"").contains("not an absolute path"));
        assert!(swap("[\"seen\", \"binding\"]", "[\"sen\"]").contains("unknown tier `sen`"));
        assert!(swap("[\"seen\", \"binding\"]", "[]").contains("the list is empty"));
        assert!(swap("layers = \"proportional\"", "layers = [[0], []]").contains("a list is empty"));
        assert!(swap("facts = 5", "conditions = [\"shuffled\"]").contains("trained on shuffled pairs"));
        assert!(swap("facts = 5", "source = \"gemma-3-270m\"").contains("trains nothing from gemma-3-270m"));
        assert!(swap("outer =", "learning_rate = 11\nouter =").contains("11 is out of range"));
        assert!(swap("method = \"fuser\"", "method = \"fuser\"\nepochs = 0").contains("0 is out of range"));
        let two = GOOD.replace(
            "source = [\"smollm2-135m-instruct\", \"gemma-3-270m\"]",
            "source = [\"smollm2-135m-instruct\"]\nseeded = [1]",
        );
        assert!(complaint(&two).contains("unknown key"));
    }
}
