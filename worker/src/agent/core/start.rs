//! Taking seats in, and beginning them when their turn comes.

use protocol::control::{Failure, FailureKind, StartSeat};
use protocol::exec;
use protocol::experiment::ShardSpec;
use protocol::ids::DeviceId;
use protocol::time::UnixMillis;

use super::Agent;
use super::io::{Effect, SeatId};
use super::lanes::LaneId;
use super::seat::{Phase, Seat, Work};

impl Agent {
    pub(super) fn on_start(&mut self, now: UnixMillis, start: StartSeat) {
        let id = SeatId { attempt: start.attempt, role: start.role };
        if self.seats.contains_key(&id) {
            return; // Said twice, over a reconnect.
        }
        if start.seats.len() > 1 {
            self.ended.retain(|ended| *ended != id);
        }
        let lane = LaneId { device: start.device.clone(), lane: start.lane };
        let refused = self.refusal(&start);
        self.seats.insert(id, Seat::new(Some(start), Phase::Waiting, now));
        match refused {
            Some(failure) => self.end_as_failed(now, id, failure),
            None => {
                self.lanes.enter(id, lane.clone());
                self.moved.push(lane);
            }
        }
    }

    /// Why a seat has no place here.
    fn refusal(&self, start: &StartSeat) -> Option<Failure> {
        let needs_executor = !matches!(start.spec, ShardSpec::Command(_) | ShardSpec::NoOp(_));
        let known = if needs_executor { &self.lent.executors } else { &self.lent.devices };
        if !known.contains(&start.device) {
            let message = format!("this worker has no usable device {}", start.device);
            return Some(Failure::new(FailureKind::Unsupported, message));
        }
        if matches!(start.spec, ShardSpec::Command(_)) && !self.lent.commands {
            let failure = Failure::new(FailureKind::Forbidden, "this worker runs no programs of researchers");
            return Some(failure.hint("its operator may allow them: `bonepile-worker run --allow-commands`"));
        }
        None
    }

    /// Starts whoever's turn has come. A no-op is over at once, so that one call may go through a whole lane.
    pub(super) fn move_up(&mut self, now: UnixMillis) {
        while let Some(lane) = self.moved.pop() {
            while let Some(id) = self.lanes.next(&lane) {
                self.begin(now, id, &lane.device);
            }
            self.fill_deck(&lane);
        }
    }

    /// Hands a program to its runner while the program before it runs.
    fn fill_deck(&mut self, lane: &LaneId) {
        let Some((id, before)) = self.lanes.may_be_on_deck(lane) else { return };
        let is_program = |id: &SeatId| self.seats.get(id).is_some_and(|seat| seat.work == Work::Command);
        if is_program(&id) && is_program(&before) {
            self.lanes.put_on_deck(id);
            self.run_command(id, Some(before));
        }
    }

    fn run_command(&mut self, id: SeatId, behind: Option<SeatId>) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        seat.phase = Phase::Commanding;
        let start = seat.start.take().expect("a seat that has not begun has what it was asked for");
        self.effects.push_back(Effect::RunCommand { start: Box::new(start), behind });
    }

    /// A seat has its device.
    fn begin(&mut self, now: UnixMillis, id: SeatId, device: &DeviceId) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        seat.started_at = now;
        match seat.work {
            Work::Nothing => {
                let (outputs, models) = (vec![], vec![]);
                let finished =
                    exec::Finished { attempt: id.attempt, outputs, memory_peak_bytes: 0, models, waited_ms: 0 };
                seat.phase = Phase::Sending { finished, build: protocol::BUILD.to_owned(), since: now };
                self.leave_lane(id);
                self.keep_if_sent(now, id);
            }
            Work::Command => self.run_command(id, None),
            Work::Executor => match &seat.start {
                Some(start) if !start.inputs.is_empty() => {
                    seat.phase = Phase::Gathering;
                    "bringing inputs".clone_into(&mut seat.progress.note);
                    self.effects.push_back(Effect::Gather { seat: id, inputs: start.inputs.clone() });
                }
                _ => self.give_executor(now, id, device),
            },
        }
    }

    /// What a seat needs is here.
    pub(super) fn on_gathered(&mut self, now: UnixMillis, id: SeatId, inputs: Vec<(String, String)>) {
        let Some(seat) = self.seats.get_mut(&id).filter(|seat| matches!(seat.phase, Phase::Gathering)) else { return };
        seat.inputs = inputs;
        if let Some(device) = seat.start.as_ref().map(|start| start.device.clone()) {
            self.give_executor(now, id, &device);
        }
    }

    fn give_executor(&mut self, now: UnixMillis, id: SeatId, device: &DeviceId) {
        let Some(seat) = self.seats.get_mut(&id) else { return };
        let (models, of_attempt) = seat.models(self.worker, id.role);
        let (executor, launch, ready) = self.executors.take(device, id, models, &of_attempt);
        seat.phase = Phase::Starting { executor };
        "starting an executor".clone_into(&mut seat.progress.note);
        if launch {
            self.effects.push_back(Effect::Launch { executor, device: device.clone() });
        }
        self.end_spare(executor, &of_attempt);
        if ready {
            self.on_ready(now, executor);
        }
    }

    /// Whatever worked for a seat uses the device no longer.
    pub(super) fn leave_lane(&mut self, id: SeatId) {
        self.moved.extend(self.lanes.leave(id));
    }

    pub(super) fn on_command_ended(
        &mut self,
        now: UnixMillis,
        id: SeatId,
        wall_ms: u64,
        ended: Result<exec::Finished, Failure>,
    ) {
        self.leave_lane(id);
        match (self.seats.get_mut(&id), ended) {
            (Some(seat), Ok(finished)) => {
                seat.started_at = UnixMillis(now.0.saturating_sub(wall_ms));
                seat.phase = Phase::Sending { finished, build: protocol::BUILD.to_owned(), since: now };
                self.keep_if_sent(now, id);
            }
            (Some(_), Err(failure)) => self.end_as_failed(now, id, failure),
            // Cancelled meanwhile.
            (None, Ok(finished)) if !finished.outputs.is_empty() => {
                self.effects.push_back(Effect::Discard { seat: id });
            }
            (None, _) => {}
        }
    }
}
