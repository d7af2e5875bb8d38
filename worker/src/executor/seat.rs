//! One seat's part of a shard: finds the model, runs the procedure, writes what it made, says how far it is.

use std::io::Write;
use std::time::Instant;

use protocol::control::{Failure, FailureKind};
use protocol::exec::{Finished, RunSeat};
use protocol::experiment::{ShardSpec, TransferSpec};
use protocol::ids::Role;
use protocol::results::{ModelFacts, ShardResult, TransferSourceResult};

use super::desk::{Desk, Emitted};
use super::failure::failure;
use super::inbox::Inbox;
use super::projector;
use super::warm::Warm;
use super::wire::Outbox;
use crate::cache::KvCache;
use crate::experiment::inspect::inspect;
use crate::experiment::transfer::{make_caches, score};
use crate::experiment::{ExperimentError, model_facts};
use crate::memory;
use crate::model::Model;

/// Does a seat's part; its files lie below the order's directory then.
///
/// # Errors
/// The failure to report. Nothing of a failed attempt counts; the agent removes its files.
pub fn run<W: Write>(order: &RunSeat, warm: &mut Warm, inbox: &Inbox, outbox: &Outbox<W>) -> Result<Finished, Failure> {
    let desk = Desk::new(order, inbox, outbox);
    let told = |error: ExperimentError| failure(&error);
    let mut models = Vec::new();
    let mut outputs = Vec::new();
    let model = match order.spec.models_of(order.role).first() {
        Some(wanted) => {
            desk.progress(0, 0, "loading model").map_err(told)?;
            let Some(file) = order.models.iter().find(|file| file.name == *wanted) else {
                return Err(Failure::new(FailureKind::ModelMissing, format!("model {wanted} was not handed over")));
            };
            let model = warm.model(file).map_err(|error| told(error.into()))?;
            models.push((file.name.clone(), model.fingerprint().to_owned()));
            Some(model)
        }
        None => None,
    };
    let result = match (&order.spec, order.role, model) {
        (ShardSpec::Inspect(spec), Role::Main, Some(model)) => {
            ShardResult::Inspect(inspect(model, spec, &mut desk.watch()).map_err(told)?)
        }
        (ShardSpec::Transfer(spec), Role::Source, Some(model)) => {
            ShardResult::TransferSource(desk.send_facts(model, spec).map_err(told)?)
        }
        (ShardSpec::Transfer(spec), Role::Target, Some(model)) => {
            let mut fetch = |key: &str| desk.fetch(model.layout(), key);
            ShardResult::Transfer(score(model, spec, &mut fetch, &mut desk.watch()).map_err(told)?)
        }
        (ShardSpec::ProjectorTrain(spec), role, model) => {
            let made = projector::train(&desk, model, spec, role).map_err(told)?;
            outputs.extend(made.files.into_iter().map(|(name, path)| (name, path.to_string_lossy().into_owned())));
            made.result
        }
        (ShardSpec::ProjectorEval(spec), role, Some(model)) => {
            projector::evaluate(&desk, model, spec, role).map_err(told)?.result
        }
        (spec, role, _) => {
            let what = format!("a shard of kind {} has no seat {role} for an executor", spec.kind());
            return Err(Failure::new(FailureKind::BadSpec, what));
        }
    };
    outputs.push(desk.write_result(&result).map_err(told)?);
    let waited_ms = u64::try_from(desk.waited().as_millis()).unwrap_or(u64::MAX);
    Ok(Finished { attempt: order.attempt, outputs, memory_peak_bytes: memory::peak_bytes(), models, waited_ms })
}

impl<W: Write> Desk<'_, W> {
    /// The source's half of a transfer.
    fn send_facts(&self, model: &Model, spec: &TransferSpec) -> Result<TransferSourceResult, ExperimentError> {
        let (mut emitted, started) = (Emitted::default(), Instant::now());
        let mut emit = |key: &str, cache: &KvCache| self.emit(&mut emitted, key, cache);
        make_caches(model, spec, &mut emit, &mut self.watch())?;
        Ok(emitted.result(model_facts(model, &spec.model), started))
    }
}

impl Emitted {
    /// What a source says of what it sent, since `started`.
    pub(super) fn result(self, model: ModelFacts, started: Instant) -> TransferSourceResult {
        let compute = started.elapsed().saturating_sub(self.elsewhere);
        TransferSourceResult {
            model,
            packets: self.packets,
            bytes: self.bytes,
            tokens: self.tokens,
            compute_ms: compute.as_secs_f64() * 1e3,
        }
    }
}
