//! Sweeps as researchers write them: TOML with a matrix, refused whole if anything is wrong.
//!
//! ```toml
//! name = "first-look"          # 1–100 characters
//! seed = 42                    # default 0; every shard's randomness comes from it
//! priority = 0                 # -100 to 100, higher first; default 0
//! account = "alice"            # whose share it takes; default: everybody's
//! running_max = 4              # shards at once; default 0: no limit
//!
//! [[experiment]]
//! name = "look"                # for `after = ["look"]` of a later experiment; may be left out
//! kind = "inspect"
//! texts = 16
//! [experiment.matrix]          # every combination of one value of each list
//! model = ["smollm2-135m-instruct", "gemma-3-270m"]
//! layers = ["all", "full"]
//! ```
//!
//! Keys of each kind are documented at its `read_…` function; how a model is named, in [`crate::model_name`]. Does not check
//! whether a model is present anywhere: the scheduler knows that, and says so in `explain`.

pub mod command;
mod group;
mod projector;

use serde::{Deserialize, Serialize};

use self::projector::Above;
use crate::error::{SourceError, nearest};
use crate::experiment::{Condition, InspectSpec, LayerSelection, ShardSpec, Spread, TransferSpec};
use crate::group::Group;
use crate::limits::{SHARDS_PER_RUN_MAX, SWEEP_BYTES_MAX};
use crate::model_name::ModelName;
use crate::source::{Source, TableReader, from_toml_text};

/// A sweep that was read without complaint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// For people; not unique.
    pub name: String,
    /// Seed of everything random in it.
    pub seed: u64,
    /// Higher goes first, -100 to 100.
    pub priority: i32,
    /// Whose share of the cluster it takes; empty: everybody's.
    pub account: String,
    /// Most of its shards that may run at once; 0: no limit.
    pub running_max: u32,
    /// What is to be done, in the order of the text; at least one.
    pub shards: Vec<ShardSpec>,
    /// Its experiments, in the order of the text.
    pub groups: Vec<Group>,
}

impl Sweep {
    /// Reads a sweep from `text`; `file` is only for complaints.
    ///
    /// # Errors
    /// The first thing wrong with it, with its place in the text.
    pub fn parse(file: &str, text: &str) -> Result<Self, SourceError> {
        if text.len() > SWEEP_BYTES_MAX {
            let message = format!("{} bytes are over the limit of {SWEEP_BYTES_MAX}", text.len());
            return Err(SourceError::whole(file, message));
        }
        let source = Source { file, text };
        let table = source.parse()?;
        let mut root = TableReader::root(source, &table);
        let name: String = root.required("name")?;
        if name.trim().is_empty() || name.chars().count() > 100 || name.chars().any(char::is_control) {
            return Err(root.complain("name", "expected 1 to 100 printable characters"));
        }
        let seed = root.number("seed", 0..=u64::MAX, Some(0))?;
        let priority = root.optional::<i64>("priority")?.unwrap_or(0);
        let priority = i32::try_from(priority)
            .ok()
            .filter(|priority| (-100..=100).contains(priority))
            .ok_or_else(|| root.complain("priority", "expected a whole number from -100 to 100"))?;
        let account = root.optional::<String>("account")?.unwrap_or_default();
        if account.chars().count() > 100 || account.chars().any(char::is_control) {
            return Err(root.complain("account", "expected at most 100 printable characters"));
        }
        let running_max = small(&mut root, "running_max", 0, 100_000, 0)?;
        let experiments = root.tables("experiment")?;
        if experiments.is_empty() {
            return Err(root
                .complain("experiment", "missing; expected at least one [[experiment]]")
                .hint("see examples/first-look.toml"));
        }
        root.finish()?;
        let (mut shards, mut groups) = (Vec::new(), Vec::new());
        for mut experiment in experiments {
            let first = u32::try_from(shards.len()).unwrap_or(u32::MAX);
            let mut group = group::read(&mut experiment, &groups, first)?;
            shards.extend(read_experiment(experiment, seed, &mut Above { groups: &groups, group: &mut group })?);
            group.count = u32::try_from(shards.len()).unwrap_or(u32::MAX).saturating_sub(first);
            groups.push(group);
            let trainings: usize = groups.iter().map(|group| group.trainings.len()).sum();
            if shards.len() + trainings > SHARDS_PER_RUN_MAX {
                let message = format!("the matrix has over {SHARDS_PER_RUN_MAX} shards");
                return Err(SourceError::whole(file, message).hint("split it into several sweeps"));
            }
        }
        Ok(Self { name, seed, priority, account, running_max, shards, groups })
    }

    /// Names of the models that anything of it needs, each once.
    pub fn models(&self) -> Vec<&str> {
        let trainings = self.groups.iter().flat_map(|group| &group.trainings);
        let trained = trainings.flat_map(|spec| [spec.source.as_str(), spec.target.as_str()]);
        let mut models = Vec::new();
        for model in trained.chain(self.shards.iter().flat_map(ShardSpec::models)) {
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models
    }
}

fn read_experiment(
    mut experiment: TableReader<'_>,
    seed: u64,
    above: &mut Above<'_>,
) -> Result<Vec<ShardSpec>, SourceError> {
    let matrix = experiment.table("matrix")?;
    let cells = match &matrix {
        Some(matrix) => experiment.combinations(matrix)?,
        None => vec![experiment],
    };
    let mut shards = Vec::new();
    for mut cell in cells {
        let kind: String = cell.required("kind")?;
        match kind.as_str() {
            "inspect" => shards.push(read_inspect(&mut cell, seed)?),
            "transfer" => shards.extend(read_transfer(&mut cell, seed)?),
            "command" => shards.push(command::read(&mut cell)?),
            "no-op" => shards.extend(command::read_no_op(&mut cell)?),
            "projector-train" => {
                let training = projector::read_train(&mut cell, seed, above)?;
                above.group.trainings.push(training);
            }
            "projector-eval" => shards.extend(projector::read_eval(&mut cell, seed, above)?),
            _ => {
                let known = ["inspect", "transfer", "command", "no-op", "projector-train", "projector-eval"];
                let error =
                    cell.complain("kind", format!("unknown kind `{kind}`; expected one of {}", known.join(", ")));
                return Err(match nearest(&kind, known) {
                    Some(near) => error.hint(format!("did you mean `{near}`?")),
                    None => error,
                });
            }
        }
        if !shards.is_empty() && !above.group.trainings.is_empty() {
            return Err(cell.complain("kind", "an experiment that trains does nothing else; make it two"));
        }
        cell.finish()?;
    }
    Ok(shards)
}

/// `model`, `layers` (all, full, sliding; default all), `texts` (1–256, default 16).
fn read_inspect(cell: &mut TableReader<'_>, seed: u64) -> Result<ShardSpec, SourceError> {
    Ok(ShardSpec::Inspect(InspectSpec {
        model: read_model(cell, "model")?,
        layers: cell.optional("layers")?.unwrap_or(LayerSelection::All),
        texts: small(cell, "texts", 1, 256, 16)?,
        seed,
    }))
}

/// `model`, `facts` (2–4096, default 16), `facts_per_shard` (2–64, default 4), `conditions` (default
/// [`Condition::DEFAULT`]), `answer_tokens` (1–64, default 8), `spread` (any, devices, workers; default any).
fn read_transfer(cell: &mut TableReader<'_>, seed: u64) -> Result<Vec<ShardSpec>, SourceError> {
    let model = read_model(cell, "model")?;
    let facts = small(cell, "facts", 2, 4096, 16)?;
    let per_shard = small(cell, "facts_per_shard", 2, 64, 4)?;
    let conditions = cell.optional::<Vec<Condition>>("conditions")?.unwrap_or_else(|| Condition::DEFAULT.to_vec());
    if conditions.is_empty() {
        return Err(cell.complain("conditions", "the list is empty; leave the key out for the usual ones"));
    }
    if let Some(twice) = (1..conditions.len()).find(|i| conditions[..*i].contains(&conditions[*i])) {
        return Err(cell.complain("conditions", format!("`{}` stands there twice", conditions[twice])));
    }
    let answer_tokens = small(cell, "answer_tokens", 1, 64, 8)?;
    let spread = cell.optional("spread")?.unwrap_or(Spread::Any);
    Ok(in_shards(facts, per_shard)
        .map(|(first_fact, facts)| {
            ShardSpec::Transfer(TransferSpec {
                model: model.clone(),
                first_fact,
                facts,
                conditions: conditions.clone(),
                answer_tokens,
                spread,
                seed,
            })
        })
        .collect())
}

/// Facts in shards: first and number of each. The last takes a remainder along: a shard needs a second subject.
fn in_shards(facts: u32, per_shard: u32) -> impl Iterator<Item = (u32, u32)> {
    let shards = (facts / per_shard).max(1);
    (0..shards).map(move |shard| {
        let first = shard * per_shard;
        (first, if shard + 1 == shards { facts - first } else { per_shard })
    })
}

fn read_model(cell: &mut TableReader<'_>, key: &'static str) -> Result<String, SourceError> {
    let model: String = cell.required(key)?;
    match model.parse::<ModelName>() {
        Ok(_) => Ok(model),
        Err(error) => Err(cell.complain(key, format!("unknown model `{model}`; {error}")).hint(error.hint(&model))),
    }
}

/// Names to choose from, for a complaint.
fn listed(names: &[&str]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

fn small(cell: &mut TableReader<'_>, key: &'static str, min: u32, max: u32, default: u32) -> Result<u32, SourceError> {
    let number = cell.number(key, u64::from(min)..=u64::from(max), Some(u64::from(default)))?;
    Ok(u32::try_from(number).expect("the range ends at a u32"))
}

from_toml_text!(Condition, "the name of a condition");
from_toml_text!(LayerSelection, "all, full or sliding");
from_toml_text!(Spread, "any, devices or workers");

impl std::str::FromStr for LayerSelection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "all" => Ok(Self::All),
            "full" => Ok(Self::Full),
            "sliding" => Ok(Self::Sliding),
            _ => Err(format!("unknown selection `{text}`; expected all, full or sliding")),
        }
    }
}

impl std::str::FromStr for Spread {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "any" => Ok(Self::Any),
            "devices" => Ok(Self::Devices),
            "workers" => Ok(Self::Workers),
            _ => Err(format!("unknown spread `{text}`; expected any, devices or workers")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "first-look"
seed = 42

[[experiment]]
kind = "inspect"
[experiment.matrix]
model = ["smollm2-135m-instruct", "gemma-3-270m"]
layers = ["all", "full"]

[[experiment]]
kind = "transfer"
model = "smollm2-135m-instruct"
facts = 9
spread = "workers"
"#;

    fn complaint(text: &str) -> String {
        let error = Sweep::parse("s.toml", text).unwrap_err();
        match &error.hint {
            Some(hint) => format!("{error} | {hint}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn a_matrix_becomes_every_combination_and_facts_become_shards() {
        let sweep = Sweep::parse("s.toml", GOOD).unwrap();
        let summaries: Vec<_> = sweep.shards.iter().map(ShardSpec::summary).collect();
        assert_eq!(
            summaries,
            [
                "inspect smollm2-135m-instruct layers=all",
                "inspect smollm2-135m-instruct layers=full",
                "inspect gemma-3-270m layers=all",
                "inspect gemma-3-270m layers=full",
                "transfer smollm2-135m-instruct facts=0..4",
                "transfer smollm2-135m-instruct facts=4..9",
            ]
        );
    }

    #[test]
    fn complaints_name_place_key_expectation_and_hint() {
        let swap = |from: &str, to: &str| complaint(&GOOD.replace(from, to));
        assert_eq!(
            swap("spread =", "spraed ="),
            "s.toml:15:1: key \"experiment.spraed\": unknown key; expected one of name, after, require, matrix, kind, model, facts, \
             facts_per_shard, conditions, answer_tokens, spread | did you mean `spread`?"
        );
        assert_eq!(
            swap("\"gemma-3-270m\"", "\"gemma-3-270\""),
            "s.toml:8:35: key \"experiment.model\": unknown model `gemma-3-270`; expected one of \
             smollm2-135m-instruct, gemma-3-270m | did you mean `gemma-3-270m`?"
        );
        assert_eq!(
            swap("\"gemma-3-270m\"", "\"org/name:model.bin\""),
            "s.toml:8:35: key \"experiment.model\": unknown model `org/name:model.bin`; `model.bin` is no file that the hub \
             could have; expected a path that ends in .gguf | a name from `bonepile models list`, \
             ORG/NAME[@REVISION][:FILE] of Hugging Face's hub, the name of a .gguf file in the models directory, or an \
             absolute path"
        );
        assert_eq!(
            swap("facts = 9", "facts = 1"),
            "s.toml:14:9: key \"experiment.facts\": 1 is out of range; expected 2 to 4096"
        );
        assert_eq!(
            swap("seed = 42", "seed = \"42\""),
            "s.toml:3:8: key \"seed\": expected a whole number, 0 or more, found a text"
        );
        assert_eq!(
            swap("kind = \"transfer\"", "kind = \"transfr\""),
            "s.toml:12:8: key \"experiment.kind\": unknown kind `transfr`; expected one of inspect, transfer, command, no-op, \
             projector-train, projector-eval | \
             did you mean `transfer`?"
        );
        assert_eq!(
            swap("layers = [\"all\", \"full\"]", "layers = []"),
            "s.toml:9:1: key \"experiment.matrix.layers\": the list is empty, so the matrix has no cell"
        );
        assert_eq!(swap("name = \"first-look\"", ""), "s.toml:1:1: key \"name\": missing; expected a text in quotes");
        assert!(swap("[experiment.matrix]", "[experiment.matrix").starts_with("s.toml:7:"));
        assert!(complaint("name = \"x\"").contains("at least one [[experiment]]"));
        assert!(complaint("name = \"x\"\nexperiment = 3").contains("expected tables [[experiment]]"));
    }

    #[test]
    fn a_model_may_come_from_anywhere() {
        let commit = format!("Qwen/Qwen3-0.6B@{}", "0a".repeat(20));
        for model in ["Qwen/Qwen3-0.6B", "o/n@main:q/x.gguf", &commit, "own.gguf", "/data/models/x", "/data/x.gguf"] {
            let sweep = Sweep::parse("s.toml", &GOOD.replace("gemma-3-270m", model)).unwrap();
            assert_eq!(sweep.shards[2].models(), [model]);
        }
    }

    #[test]
    fn conditions_are_checked_one_by_one() {
        let with = |list: &str| format!("{GOOD}conditions = {list}\n");
        assert!(Sweep::parse("s.toml", &with("[\"text\", \"shifted+16\"]")).is_ok());
        assert!(complaint(&with("[\"shifted+0\"]")).contains("not a gap in tokens"));
        assert!(complaint(&with("[\"naiv\"]")).contains("unknown condition `naiv`"));
        assert!(complaint(&with("[\"text\", \"text\"]")).contains("stands there twice"));
    }

    const CHAIN: &str = r#"
name = "chain"
account = "alice"
running_max = 2
[[experiment]]
name = "collect"
kind = "command"
argv = ["python3", "train.py", "--lr={lr}"]
memory = "6GB"
collect = ["out/*.json"]
[experiment.files]
"train.py" = "print(1)"
[experiment.matrix]
lr = [0.1, 0.01]
[[experiment]]
after = ["collect"]
kind = "no-op"
shards = 3
[experiment.require]
labels = ["site=attic"]
capability = "7.0"
dtype = "bf16"
device = "cuda"
price_max_usd_per_hour = 0.5
"#;

    #[test]
    fn programs_take_parameters_and_experiments_wait_for_each_other() {
        let sweep = Sweep::parse("s.toml", CHAIN).unwrap();
        assert_eq!((sweep.shards.len(), sweep.account.as_str(), sweep.running_max), (5, "alice", 2));
        let ShardSpec::Command(spec) = &sweep.shards[1] else { panic!("a command") };
        assert_eq!(spec.argv[2], "--lr=0.01");
        assert_eq!(spec.env, [("BONEPILE_PARAM_LR".to_owned(), "0.01".to_owned())]);
        assert_eq!((spec.memory_bytes, spec.class.as_str(), spec.work), (6_000_000_000, "python3", 1));
        let second = &sweep.groups[1];
        assert_eq!((second.first, second.count, second.after.as_slice()), (2, 3, [0].as_slice()));
        assert_eq!(second.require.price_max_microusd_per_hour, Some(500_000));
    }

    #[test]
    fn complaints_about_programs_and_order_name_their_place() {
        let swap = |old: &str, new: &str| Sweep::parse("s.toml", &CHAIN.replace(old, new)).unwrap_err().to_string();
        assert_eq!(
            swap("{lr}", "{rate}"),
            "s.toml:8:8: key \"experiment.argv\": `{rate}` names no parameter of the matrix"
        );
        assert!(swap("[\"collect\"]", "[\"colect\"]").contains("no experiment above is called `colect`"));
        assert!(swap("site=attic", "attic").contains("`attic` is not a label"));
        assert!(swap("\"6GB\"", "\"6 parsecs\"").contains("is not a size"));
        assert!(swap("out/*.json", "../x").contains("not a relative pattern"));
        assert!(swap("\"7.0\"", "\"seven\"").contains("not a compute capability"));
    }

    #[test]
    fn every_example_reads() {
        let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let mut read = 0;
        for folder in [examples.clone(), examples.join("pairs")] {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_some_and(|extension| extension == "toml") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    if let Err(error) = Sweep::parse(&path.display().to_string(), &text) {
                        panic!("{error}");
                    }
                    read += 1;
                }
            }
        }
        assert!(read >= 11, "{read}");
    }
}
