//! Which executor works for which seat. Processes are elsewhere; here are only their numbers and states.

use std::collections::BTreeMap;

use protocol::ids::{AttemptId, DeviceId};
use protocol::time::UnixMillis;

use super::io::{ExecutorId, SeatId};

/// The executors of a worker.
#[derive(Debug, Default)]
pub(super) struct Executors {
    all: BTreeMap<ExecutorId, Executor>,
    last: u64,
}

#[derive(Debug)]
struct Executor {
    device: DeviceId,
    /// What it was built from, once it has said so.
    build: String,
    /// Models of the seat that it worked for last: what it has loaded, if that went well.
    models: Vec<String>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Not up yet; meant for a seat unless that was cancelled.
    Starting(Option<SeatId>),
    /// Up, warm, free.
    Idle,
    /// Works for a seat.
    Busy(SeatId),
    /// Told to stop working for a seat; killed at the time given, `None` once that is done.
    Stopping { seat: SeatId, kill_at: Option<UnixMillis> },
    /// Killed to give its memory back.
    Ending,
}

/// What a vanished executor did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    /// It worked for a seat, or was to.
    Working(SeatId),
    /// It was told to stop working for a seat.
    Stopping(SeatId),
    /// Nothing.
    Idle,
}

impl Executors {
    /// An executor of `device` for `seat`, which needs `models`: its number, whether it must be launched, whether it is up
    /// already. One that has them loaded goes first, and one with a model that is `needed` by another seat last.
    pub(super) fn take(
        &mut self,
        device: &DeviceId,
        seat: SeatId,
        models: Vec<String>,
        needed: &[String],
    ) -> (ExecutorId, bool, bool) {
        let promised = |executor: &Executor| executor.models.iter().any(|model| needed.contains(model));
        let rank = |executor: &Executor| match &executor.state {
            State::Idle if executor.models == models => Some(0),
            State::Idle if !promised(executor) => Some(1),
            State::Starting(None) => Some(2),
            _ => None,
        };
        let on_device = self.all.iter().filter(|(_, executor)| executor.device == *device);
        let free = on_device.filter_map(|(id, executor)| Some((rank(executor)?, *id))).min();
        if let Some((rank, id)) = free {
            let executor = self.all.get_mut(&id).expect("it was found there");
            executor.models = models;
            executor.state = State::Starting(Some(seat));
            return (id, false, rank < 2);
        }
        self.last += 1;
        let (id, device, state) = (ExecutorId(self.last), device.clone(), State::Starting(Some(seat)));
        self.all.insert(id, Executor { device, build: String::new(), models, state });
        (id, true, false)
    }

    /// An executor is up: the seat that it works for from now on.
    pub(super) fn up(&mut self, id: ExecutorId) -> Option<SeatId> {
        let executor = self.all.get_mut(&id)?;
        let State::Starting(seat) = &executor.state else { return None };
        let seat = *seat;
        executor.state = seat.map_or(State::Idle, State::Busy);
        seat
    }

    /// What an executor was built from, as it said when it came up.
    pub(super) fn note_build(&mut self, id: ExecutorId, build: String) {
        if let Some(executor) = self.all.get_mut(&id) {
            executor.build = build;
        }
    }

    /// What an executor was built from.
    pub(super) fn build_of(&self, id: ExecutorId) -> String {
        self.all.get(&id).map(|executor| executor.build.clone()).unwrap_or_default()
    }

    /// The seat that an executor works for.
    pub(super) fn seat_of(&self, id: ExecutorId) -> Option<SeatId> {
        match self.all.get(&id)?.state {
            State::Busy(seat) => Some(seat),
            _ => None,
        }
    }

    /// An executor is to stop working for `seat`; `false` if it does not work for it, so that nobody need be told.
    pub(super) fn stop(&mut self, id: ExecutorId, seat: SeatId, kill_at: UnixMillis) -> bool {
        match self.all.get(&id).map(|executor| &executor.state) {
            Some(State::Busy(of)) if *of == seat => {
                self.set(id, State::Stopping { seat, kill_at: Some(kill_at) });
                true
            }
            Some(State::Starting(Some(of))) if *of == seat => {
                self.set(id, State::Starting(None));
                false
            }
            _ => false,
        }
    }

    /// The last word of an executor about an attempt that it was told to stop: it is free, its seat's files too.
    pub(super) fn stopped(&mut self, id: ExecutorId, attempt: AttemptId) -> Option<SeatId> {
        match self.all.get(&id)?.state {
            State::Stopping { seat, kill_at: Some(_) } if seat.attempt == attempt => {
                self.set(id, State::Idle);
                Some(seat)
            }
            _ => None,
        }
    }

    /// An executor has done its work.
    pub(super) fn free(&mut self, id: ExecutorId) {
        if self.seat_of(id).is_some() {
            self.set(id, State::Idle);
        }
    }

    /// An executor's process has ended.
    pub(super) fn gone(&mut self, id: ExecutorId) -> Gone {
        match self.all.remove(&id).map(|executor| executor.state) {
            Some(State::Busy(seat) | State::Starting(Some(seat))) => Gone::Working(seat),
            Some(State::Stopping { seat, .. }) => Gone::Stopping(seat),
            Some(State::Starting(None) | State::Idle | State::Ending) | None => Gone::Idle,
        }
    }

    /// Idle executors on the device of `freed` beside itself, but for those that have another model of `kept` loaded; they end.
    pub(super) fn spare_beside(&mut self, freed: ExecutorId, kept: &[String]) -> Vec<ExecutorId> {
        let Some(own) = self.all.get(&freed) else { return Vec::new() };
        let (device, models) = (own.device.clone(), own.models.clone());
        let spare = |id: &ExecutorId, executor: &Executor| {
            let wanted = executor.models != models && executor.models.iter().any(|model| kept.contains(model));
            *id != freed && executor.device == device && matches!(executor.state, State::Idle) && !wanted
        };
        let spares: Vec<_> = self.all.iter().filter(|(id, executor)| spare(id, executor)).map(|(id, _)| *id).collect();
        for id in &spares {
            self.set(*id, State::Ending);
        }
        spares
    }

    /// Number of the executor launched last.
    #[cfg(test)]
    pub(super) fn last_number(&self) -> u64 {
        self.last
    }

    /// When the next executor that does not stop is to be killed.
    pub(super) fn next_kill(&self) -> Option<UnixMillis> {
        self.all.values().filter_map(|executor| kill_at(&executor.state)).min()
    }

    /// Executors that did not stop in time; each is named once.
    pub(super) fn take_overdue(&mut self, now: UnixMillis) -> Vec<ExecutorId> {
        let mut overdue = Vec::new();
        for (id, executor) in &mut self.all {
            if let State::Stopping { kill_at, .. } = &mut executor.state
                && kill_at.is_some_and(|at| at <= now)
            {
                *kill_at = None;
                overdue.push(*id);
            }
        }
        overdue
    }

    fn set(&mut self, id: ExecutorId, state: State) {
        self.all.get_mut(&id).expect("the caller has just found it").state = state;
    }
}

fn kill_at(state: &State) -> Option<UnixMillis> {
    match state {
        State::Stopping { kill_at, .. } => *kill_at,
        _ => None,
    }
}
