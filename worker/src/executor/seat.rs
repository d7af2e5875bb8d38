//! One seat's part of a shard: finds the model, runs the procedure, writes what it made, says how far it is.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use protocol::control::{Failure, FailureKind, SeatProgress};
use protocol::exec::{Finished, PacketFile, Progressed, RunSeat};
use protocol::experiment::{ShardSpec, TransferSpec};
use protocol::ids::{AttemptId, Role};
use protocol::results::{ShardResult, TransferSourceResult};

use super::failure::failure;
use super::inbox::Inbox;
use super::warm::Warm;
use super::wire::Outbox;
use crate::cache::{CacheError, KvCache};
use crate::experiment::inspect::inspect;
use crate::experiment::transfer::{make_caches, score};
use crate::experiment::{ExperimentError, model_facts};
use crate::memory;
use crate::model::Model;

/// Name of every seat's result within its shard.
const RESULT: &str = "result.json";

/// What a seat's procedure works with, besides the model.
struct Desk<'a, W> {
    attempt: AttemptId,
    directory: PathBuf,
    inbox: &'a Inbox,
    outbox: &'a Outbox<W>,
}

/// Does a seat's part; its files lie below the order's directory then.
///
/// # Errors
/// The failure to report. Nothing of a failed attempt counts; the agent removes its files.
pub fn run<W: Write>(order: &RunSeat, warm: &mut Warm, inbox: &Inbox, outbox: &Outbox<W>) -> Result<Finished, Failure> {
    let desk = Desk { attempt: order.attempt, directory: PathBuf::from(&order.directory), inbox, outbox };
    let told = |error: ExperimentError| failure(&error);
    desk.progress(0, 0, "loading model").map_err(told)?;
    let Some(wanted) = order.spec.models().first().copied() else {
        let what = format!("a shard of kind {} needs no executor", order.spec.kind());
        return Err(Failure::new(FailureKind::BadSpec, what));
    };
    let Some(file) = order.models.iter().find(|file| file.name == wanted) else {
        return Err(Failure::new(FailureKind::ModelMissing, format!("model {wanted} was not handed over")));
    };
    let model = warm.model(file).map_err(|error| told(error.into()))?;
    let result = match (&order.spec, order.role) {
        (ShardSpec::Inspect(spec), Role::Main) => {
            ShardResult::Inspect(inspect(model, spec, &mut desk.watch()).map_err(told)?)
        }
        (ShardSpec::Transfer(spec), Role::Source) => {
            ShardResult::TransferSource(desk.send_caches(model, spec).map_err(told)?)
        }
        (ShardSpec::Transfer(spec), Role::Target) => {
            let mut fetch = |key: &str| desk.fetch(model, key);
            ShardResult::Transfer(score(model, spec, &mut fetch, &mut desk.watch()).map_err(told)?)
        }
        (spec, role) => {
            let what = format!("a shard of kind {} has no seat {role}", spec.kind());
            return Err(Failure::new(FailureKind::BadSpec, what));
        }
    };
    let path = desk.write_result(&result)?;
    Ok(Finished {
        attempt: order.attempt,
        outputs: vec![(RESULT.to_owned(), path)],
        memory_peak_bytes: memory::peak_bytes(),
        models: vec![(file.name.clone(), model.fingerprint().to_owned())],
    })
}

impl<W: Write> Desk<'_, W> {
    /// Says how far the seat is; an error if it should stop.
    fn progress(&self, done: u32, total: u32, note: &str) -> Result<(), ExperimentError> {
        self.inbox.check(self.attempt)?;
        let progress = SeatProgress { done, total, note: note.to_owned() };
        self.outbox.say(Progressed { attempt: self.attempt, progress })?;
        Ok(())
    }

    /// The same as a callback for procedures.
    fn watch(&self) -> impl FnMut(u32, u32, &str) -> Result<(), ExperimentError> {
        |done, total, note| self.progress(done, total, note)
    }

    /// The source's half of a transfer: each cache becomes a file that the agent is told of.
    fn send_caches(&self, model: &Model, spec: &TransferSpec) -> Result<TransferSourceResult, ExperimentError> {
        let directory = self.directory.join("packets");
        std::fs::create_dir_all(&directory).map_err(|error| on_disk("packets", &directory, &error))?;
        let mut bytes = 0;
        let mut elsewhere = Duration::ZERO;
        let started = Instant::now();
        let mut emit = |key: &str, cache: &KvCache| {
            let computed = Instant::now();
            let path = directory.join(format!("{key}.safetensors"));
            bytes += cache.save(&path).map_err(|error| match error {
                CacheError::Io { source, .. } => on_disk(key, &path, &source),
                error => error.into(),
            })?;
            let (key, path) = (key.to_owned(), path.to_string_lossy().into_owned());
            self.outbox.say(PacketFile { attempt: self.attempt, key, path })?;
            elsewhere += computed.elapsed();
            Ok(())
        };
        let sent = make_caches(model, spec, &mut emit, &mut self.watch())?;
        let compute = started.elapsed().saturating_sub(elsewhere);
        Ok(TransferSourceResult {
            model: model_facts(model, &spec.model),
            packets: sent.packets,
            bytes,
            tokens: sent.tokens,
            compute_ms: compute.as_secs_f64() * 1e3,
        })
    }

    /// Waits for a packet and reads it; a packet that does not fit this model is refused here, before any use.
    fn fetch(&self, model: &Model, key: &str) -> Result<KvCache, ExperimentError> {
        let path = PathBuf::from(self.inbox.packet(self.attempt, key)?);
        KvCache::load(&path, model.layout()).map_err(|source| match source {
            CacheError::Io { source, .. } => on_disk(key, &path, &source),
            source => ExperimentError::PacketRefused { key: key.to_owned(), source },
        })
    }

    fn write_result(&self, result: &ShardResult) -> Result<String, Failure> {
        let path = self.directory.join(RESULT);
        let json = serde_json::to_vec_pretty(result).expect("results are plain data with string keys");
        std::fs::write(&path, json).map_err(|error| failure(&on_disk(RESULT, &path, &error)))?;
        Ok(path.to_string_lossy().into_owned())
    }
}

fn on_disk(key: &str, path: &Path, error: &std::io::Error) -> ExperimentError {
    ExperimentError::Packet { key: key.to_owned(), what: format!("{}: {error}", path.display()) }
}
