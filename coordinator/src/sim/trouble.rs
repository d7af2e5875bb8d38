//! Faults, orders, lies, and the healing of it all.

use protocol::ids::{RunId, WorkerId};

use super::check::Violation;
use super::fault::{Fault, Order, Stage};
use super::make;
use super::process::Asker;
use super::scenario::GB;
use super::worker::Deed;
use super::world::{Happening, World};
use crate::scheduler::Input;

/// Faults.
impl World {
    pub(super) fn fault(&mut self, index: usize) -> Result<(), Violation> {
        let fault = self.scenario.faults[index].1.clone();
        self.say(|| format!("! {fault:?}"));
        *self.tally.faults.entry(fault.name()).or_default() += 1;
        let now_ms = self.now_ms;
        match fault {
            Fault::WorkerCrash { at, down_ms } => self.crash(at, down_ms),
            Fault::BudgetChanged { at, device, percent } => {
                let planned = self.scenario.boxes[at].devices[device].budget_bytes;
                self.workers[at].plan.devices[device].budget_bytes = (planned * percent / 100).max(GB / 2);
                self.crash(at, 500);
            }
            Fault::SessionLost { at, noticed } => {
                self.cut_now(at, noticed);
            }
            Fault::Partition { at, ms } => self.partition(at, ms),
            Fault::SlowCard { at, device, ms } => self.workers[at].ailments[device].slow_until = now_ms + ms,
            Fault::LyingCard { at, device, ms } => self.workers[at].ailments[device].lying_until = now_ms + ms,
            Fault::SickCard { at, device, ms } => {
                self.workers[at].ailments[device].sick_until = now_ms + ms;
                let deeds = self.workers[at].fail_device(now_ms, device);
                self.deeds(at, deeds);
            }
            Fault::FullDisk { at, ms } => self.workers[at].disk_full_until = now_ms + ms,
            Fault::ForeignMemory { at, device, bytes, ms } => {
                let ailments = &mut self.workers[at].ailments[device];
                (ailments.foreign_bytes, ailments.foreign_until) = (bytes, now_ms + ms);
            }
            Fault::ModelLost { at, model, ms } => drop(self.workers[at].lost_models.insert(model, now_ms + ms)),
            Fault::SeatFails { at, kind } => {
                let deeds = self.workers[at].fail_one(now_ms, kind);
                self.deeds(at, deeds);
            }
            Fault::CoordinatorKilled { stage, down_ms } => self.armed = Some((stage, down_ms)),
            Fault::SlowJournal { ms } => self.slow_journal_ms = ms,
            Fault::ClockJump { by_ms } => {
                self.process.clock_offset_ms += by_ms;
                return self.turn();
            }
        }
        Ok(())
    }

    /// Kills the coordinator if that is due at this point of its turn.
    pub(super) fn dies_at(&mut self, stage: Stage) -> Result<bool, Violation> {
        let Some((_, down_ms)) = self.armed.filter(|(armed, _)| *armed == stage) else { return Ok(false) };
        self.armed = None;
        self.say(|| format!("! the coordinator is killed: {stage:?}"));
        let before = self.process.disk.records().len();
        self.process.kill(stage == Stage::Written)?;
        self.count(before);
        self.tally.restarts += 1;
        for at in 0..self.workers.len() {
            self.cut(at, true, true);
        }
        self.queue.push(self.now_ms + down_ms, Happening::CoordinatorUp);
        Ok(true)
    }

    fn crash(&mut self, at: usize, down_ms: u64) {
        if !self.workers[at].up {
            return;
        }
        self.cut(at, true, self.now_ms.is_multiple_of(2));
        (self.links[at].session, self.links[at].welcomed) = (None, None);
        self.workers[at].crash();
        self.queue.push(self.now_ms + down_ms, Happening::WorkerUp(at));
    }

    pub(super) fn worker_up(&mut self, at: usize) {
        let gone = self.healed && self.scenario.gone.contains(&at);
        if !gone && !self.workers[at].up {
            self.say(|| format!("box {at} is up again"));
            self.workers[at].up = true;
            self.queue.push(self.now_ms, Happening::Dial(at));
        }
    }

    /// The box's session breaks, and it dials again at once.
    fn cut_now(&mut self, at: usize, noticed: bool) {
        self.cut(at, true, noticed);
        if let Some(key) = self.links[at].session {
            self.missed(at, key);
        }
    }

    fn partition(&mut self, at: usize, ms: u64) {
        let link = &mut self.links[at];
        link.blocked_until = link.blocked_until.max(self.now_ms + ms);
        link.deadly = link.blocked_until - self.now_ms >= self.scenario.wire.idle_ms;
        if link.deadly {
            self.cut(at, false, false);
        }
    }

    /// A lying card says that others' seats are done, that it holds them, and of its own that they made something else.
    pub(super) fn add_lies(&mut self, at: usize, deeds: &mut Vec<Deed>) {
        let Some(liar) = self.workers[at].id else { return };
        let attempts: Vec<_> = self.process.ledger.attempts().collect();
        if attempts.is_empty() {
            return;
        }
        let (attempt, role, worker) = *self.work_rng.pick(&attempts);
        let known = self.process.state().attempt(attempt).and_then(|body| body.seat(role));
        let settled = known.is_some_and(|seat| seat.outcome.is_some());
        if worker == liar && !settled {
            return;
        }
        let lie = make::finished(attempt, role, 1, 1, 666);
        deeds.push(Deed::Say(Box::new(lie.into())));
        if worker != liar
            && let Some(Deed::Say(message)) = deeds.first_mut()
            && let protocol::control::ToCoordinator::Heartbeat(heartbeat) = &mut **message
        {
            heartbeat.held.push(make::held(attempt, role));
        }
    }
}

/// Orders and healing.
impl World {
    pub(super) fn order(&mut self, index: usize) -> Result<(), Violation> {
        let order = self.scenario.orders[index].1.clone();
        self.say(|| format!("! {order:?}"));
        let worker = |at: usize| self.workers[at].id.unwrap_or(WorkerId(0));
        let run = |index: usize| self.submitted[index].unwrap_or(RunId(0));
        let input = match order {
            Order::Cancel(index) => Input::CancelRun { run: run(index), reason: "an order".to_owned() },
            Order::Retry(index) => Input::RetryRun(run(index)),
            Order::Drain(at) => Input::SetDrain { worker: worker(at), on: true },
            Order::Undrain(at) => Input::SetDrain { worker: worker(at), on: false },
            Order::Revoke(at) => Input::RevokeWorker(worker(at)),
        };
        if self.process.is_up() { self.offer(Asker::Nobody, input) } else { Ok(()) }
    }

    /// The faults are over: from here on everything must come to its end.
    pub(super) fn heal(&mut self) -> Result<(), Violation> {
        self.say(|| "faults end".to_owned());
        self.armed = None;
        self.healed = true;
        for at in 0..self.workers.len() {
            self.links[at].blocked_until = 0;
            self.links[at].deadly = false;
            self.workers[at].heal();
            if self.workers[at].plan != self.scenario.boxes[at] {
                self.workers[at].plan = self.scenario.boxes[at].clone();
                self.crash(at, 500);
            }
            if self.scenario.gone.contains(&at) {
                self.crash(at, 500);
            }
        }
        self.queue.push(self.now_ms + 60_000, Happening::GreetAgain);
        Ok(())
    }

    /// Every worker greets anew, and none is drained any more.
    pub(super) fn greet_again(&mut self) {
        for at in 0..self.workers.len() {
            self.cut_now(at, true);
            if let Some(worker) = self.workers[at].id.filter(|_| self.process.is_up()) {
                self.queue.push(self.now_ms, Happening::Undrain(worker));
            }
        }
    }
}
