//! Inputs that people give: tokens, runs, draining, revoking.

use protocol::control::{CancelSeat, Failure, FailureKind};
use protocol::ids::{DeviceRef, RunId, ShardId, TokenId, WorkerId};
use protocol::limits::{SHARDS_PER_RUN_MAX, clean_text};

use super::event::{Event, RunAccepted, TokenCreated};
use super::input::{Answer, Effect, NewRun, Rejection};
use super::machine::Scheduler;
use super::status::{RunState, ShardState, TokenState};

/// Tokens and workers.
impl Scheduler {
    pub(super) fn create_token(&mut self, secret_hash: [u8; 32], ttl_ms: u64, uses: u32) -> Result<Answer, Rejection> {
        if ttl_ms == 0 || uses == 0 {
            return Err(Rejection::TokenUseless);
        }
        let token = TokenId(self.state.tokens.last_key_value().map_or(1, |(last, _)| last.0 + 1));
        let expires_at = self.now.plus_ms(ttl_ms);
        self.emit(Event::TokenCreated(TokenCreated { token, secret_hash, expires_at, uses }));
        Ok(Answer::Token(token))
    }

    pub(super) fn revoke_token(&mut self, token: TokenId) -> Result<Answer, Rejection> {
        let known = self.state.tokens.get(&token).ok_or(Rejection::TokenUnknown(token))?;
        if !known.revoked {
            self.emit(Event::TokenRevoked { token });
        }
        Ok(Answer::Done)
    }

    pub(super) fn redeem_token(
        &mut self,
        token: TokenId,
        spki_sha256: [u8; 32],
        hostname: &str,
    ) -> Result<Answer, Rejection> {
        let known = self.state.tokens.get(&token).ok_or(Rejection::TokenUnknown(token))?;
        let owner = self.state.worker_by_key(&spki_sha256);
        if let Some(worker) = owner.filter(|worker| self.state.workers[worker].revoked) {
            return Err(Rejection::WorkerRevoked(worker));
        }
        // The answer to the first try may have been lost on the way: the same key gets the same answer.
        let again = owner.filter(|worker| known.workers.contains(worker));
        match (known.state(self.now), again) {
            (TokenState::Revoked, _) => return Err(Rejection::TokenRevoked(token)),
            (TokenState::Expired, _) => return Err(Rejection::TokenExpired(token)),
            (_, Some(worker)) => return Ok(Answer::Worker(worker)),
            (TokenState::Used, None) => return Err(Rejection::TokenUsed(token)),
            (TokenState::Open, None) => {}
        }
        let worker = owner.unwrap_or_else(|| {
            let worker = WorkerId(self.state.workers.last_key_value().map_or(1, |(last, _)| last.0 + 1));
            self.emit(Event::WorkerRegistered { worker, hostname: clean_text(hostname), spki_sha256 });
            worker
        });
        self.emit(Event::TokenRedeemed { token, worker, spki_sha256 });
        Ok(Answer::Worker(worker))
    }

    pub(super) fn set_drain(&mut self, worker: WorkerId, on: bool) -> Result<Answer, Rejection> {
        let known = self.state.workers.get(&worker).ok_or(Rejection::WorkerUnknown(worker))?;
        if known.revoked {
            return Err(Rejection::WorkerRevoked(worker));
        }
        match (known.draining, on) {
            (false, true) => self.emit(Event::DrainStarted { worker }),
            (true, false) => self.emit(Event::DrainEnded { worker }),
            (false, false) | (true, true) => {}
        }
        self.unsettled = true;
        Ok(Answer::Done)
    }

    pub(super) fn release_device(&mut self, device: DeviceRef) -> Result<Answer, Rejection> {
        if self.state.quarantined_until(&device).is_none() {
            return Err(Rejection::NotQuarantined(device));
        }
        self.emit(Event::DeviceReleased { device });
        self.unsettled = true;
        Ok(Answer::Done)
    }

    pub(super) fn revoke_worker(&mut self, worker: WorkerId) -> Result<Answer, Rejection> {
        let known = self.state.workers.get(&worker).ok_or(Rejection::WorkerUnknown(worker))?;
        if known.revoked {
            return Ok(Answer::Done);
        }
        self.emit(Event::WorkerRevoked { worker });
        let seats: Vec<_> = self
            .state
            .unfinished_seats()
            .filter(|(_, seat)| seat.device.worker == worker)
            .map(|(attempt, seat)| (attempt, seat.role))
            .collect();
        for (attempt, role) in seats {
            let failure = Failure::new(FailureKind::ExecutorLost, format!("worker {worker} was revoked"));
            self.fail_attempt(attempt, role, failure, true);
        }
        if let Some(session) = self.live.sessions.get_mut(&worker).filter(|session| session.connected) {
            session.connected = false;
            let session = session.number;
            self.effect(Effect::Close { worker, session });
        }
        self.unsettled = true;
        Ok(Answer::Done)
    }
}

/// Runs.
impl Scheduler {
    pub(super) fn submit(&mut self, new: NewRun) -> Result<Answer, Rejection> {
        let count = new.specs.len() + new.groups.iter().map(|group| group.trainings.len()).sum::<usize>();
        if count == 0 || count > SHARDS_PER_RUN_MAX {
            return Err(Rejection::ShardCount { count });
        }
        let run = RunId(self.state.runs.last_key_value().map_or(1, |(last, _)| last.0 + 1));
        let NewRun { name, priority, seed, account, running_max, file, text, groups, specs } = new;
        self.emit(Event::RunAccepted(RunAccepted {
            run,
            name,
            priority,
            seed,
            account,
            running_max,
            file,
            text,
            groups,
            specs,
        }));
        self.advance_trainings(run);
        self.unsettled = true;
        Ok(Answer::Run(run))
    }

    pub(super) fn cancel_run(&mut self, run: RunId, reason: &str) -> Result<Answer, Rejection> {
        let known = self.state.runs.get(&run).ok_or(Rejection::RunUnknown(run))?;
        if known.state != RunState::Running {
            return Err(Rejection::RunOver { run, state: known.state });
        }
        let seats: Vec<_> = self
            .state
            .unfinished_seats()
            .filter(|(attempt, _)| attempt.shard.run == run)
            .map(|(attempt, seat)| (attempt, seat.device.worker))
            .collect();
        self.emit(Event::RunCancelled { run, reason: clean_text(reason) });
        for (attempt, worker) in seats {
            self.send(worker, CancelSeat { attempt, reason: format!("run {run} was cancelled: {reason}") });
        }
        self.unsettled = true;
        Ok(Answer::Done)
    }

    pub(super) fn retry_run(&mut self, run: RunId) -> Result<Answer, Rejection> {
        let known = self.state.runs.get(&run).ok_or(Rejection::RunUnknown(run))?;
        if known.state == RunState::Cancelled {
            return Err(Rejection::RunOver { run, state: known.state });
        }
        let failed: Vec<_> = (0u32..)
            .zip(&known.shards)
            .filter(|(_, shard)| shard.state == ShardState::Failed)
            .map(|(index, _)| ShardId { run, index })
            .collect();
        if failed.is_empty() {
            return Err(Rejection::NothingFailed(run));
        }
        let count = u32::try_from(failed.len()).unwrap_or(u32::MAX);
        for shard in failed {
            self.emit(Event::ShardReopened { shard });
        }
        self.unsettled = true;
        Ok(Answer::Reopened(count))
    }
}
