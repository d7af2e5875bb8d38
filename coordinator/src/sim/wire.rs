//! Links between boxes and the coordinator: sessions, latency, duplicates, late messages, partitions, idle timeouts.
//!
//! Within a session each direction keeps its order, as a stream does; a lost message means a lost session. Messages of an old
//! session may arrive after the next one's greeting, and an outcome once more much later.

use protocol::control::{Hello, ToCoordinator, ToWorker};

use super::check::Violation;
use super::process::Asker;
use super::world::{Happening, World};
use crate::scheduler::Input;

/// A worker without a welcome gives a session up after this long, milliseconds; as the agent.
const WELCOME_MS: u64 = 15_000;
/// A duplicate outcome comes at most this much later, milliseconds.
const LATE_MS: u64 = 30_000;

/// A session: its number and which process of the coordinator it was with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SessionKey {
    pub(super) life: u64,
    pub(super) session: u64,
}

/// What goes to the coordinator.
#[derive(Debug, Clone)]
pub(super) enum Up {
    Hello(Box<Hello>),
    Said(Box<ToCoordinator>),
}

/// What goes to a worker.
#[derive(Debug, Clone)]
pub(super) enum Down {
    Welcome,
    Closed,
    Message(Box<ToWorker>),
}

/// A box's wire and its newest session as the box sees it.
#[derive(Debug, Clone, Default)]
pub(super) struct Link {
    pub(super) session: Option<SessionKey>,
    pub(super) welcomed: Option<SessionKey>,
    /// Nothing gets through before.
    pub(super) blocked_until: u64,
    /// What is sent now never arrives: its session dies of the partition.
    pub(super) deadly: bool,
    up_newest: u64,
    down_newest: u64,
}

/// What the box does and sees.
impl World {
    pub(super) fn dial(&mut self, at: usize) {
        let Some(_) = self.workers[at].id.filter(|_| self.workers[at].up && self.links[at].session.is_none()) else {
            return;
        };
        if !self.process.is_up() || self.now_ms < self.links[at].blocked_until {
            let pause_ms = self.wire_rng.between(500, 4_000);
            self.queue.push(self.now_ms + pause_ms, Happening::Dial(at));
            return;
        }
        self.sessions += 1;
        let key = SessionKey { life: self.process.life, session: self.sessions };
        let link = &mut self.links[at];
        (link.session, link.welcomed) = (Some(key), None);
        (link.up_newest, link.down_newest) = (0, 0);
        let hello = Up::Hello(Box::new(self.workers[at].hello()));
        self.send_up(at, key, hello);
        self.queue.push(self.now_ms + WELCOME_MS, Happening::Unwelcome { at, key });
    }

    /// A welcomed worker says something; else nobody hears it.
    pub(super) fn say_up(&mut self, at: usize, message: ToCoordinator) {
        let Some(key) = self.links[at].welcomed else { return };
        let outcome = matches!(message, ToCoordinator::SeatFinished(_) | ToCoordinator::SeatFailed(_));
        let wire = self.scenario.wire;
        if outcome && !self.healed && self.wire_rng.chance(wire.late_permille) {
            let late_ms = self.wire_rng.between(0, LATE_MS);
            let message = Up::Said(Box::new(message.clone()));
            self.tally.late += 1;
            self.queue.push(self.now_ms + late_ms, Happening::Up { at, key, message });
        }
        self.send_up(at, key, Up::Said(Box::new(message)));
    }

    fn send_up(&mut self, at: usize, key: SessionKey, message: Up) {
        let Some(arrives_ms) = self.arrival(at, true) else { return };
        let duplicate = !self.healed && self.wire_rng.chance(self.scenario.wire.duplicate_permille);
        if duplicate && matches!(message, Up::Said(_)) {
            self.tally.duplicates += 1;
            self.queue.push(arrives_ms, Happening::Up { at, key, message: message.clone() });
        }
        self.queue.push(arrives_ms, Happening::Up { at, key, message });
    }

    pub(super) fn send_down(&mut self, at: usize, key: SessionKey, message: Down) {
        let Some(arrives_ms) = self.arrival(at, false) else { return };
        let duplicate = !self.healed && self.wire_rng.chance(self.scenario.wire.duplicate_permille);
        if duplicate && matches!(message, Down::Message(_)) {
            self.tally.duplicates += 1;
            self.queue.push(arrives_ms, Happening::Down { at, key, message: message.clone() });
        }
        self.queue.push(arrives_ms, Happening::Down { at, key, message });
    }

    /// When what is sent now arrives; `None`: never.
    fn arrival(&mut self, at: usize, up: bool) -> Option<u64> {
        let (least, most) = self.scenario.wire.latency_ms;
        let latency_ms = self.wire_rng.between(least, most);
        let link = &mut self.links[at];
        let blocked = self.now_ms < link.blocked_until;
        if blocked && link.deadly {
            return None;
        }
        let newest = if up { &mut link.up_newest } else { &mut link.down_newest };
        *newest = (self.now_ms.max(link.blocked_until) + latency_ms).max(*newest);
        Some(*newest)
    }

    pub(super) fn arrives_down(&mut self, at: usize, key: SessionKey, message: Down) -> Result<(), Violation> {
        if self.links[at].session != Some(key) {
            return Ok(());
        }
        match message {
            Down::Welcome => {
                self.links[at].welcomed = Some(key);
                let deeds = self.workers[at].welcomed(self.now_ms);
                self.deeds(at, deeds);
                self.queue.push(self.now_ms, Happening::Beat { at, key });
            }
            Down::Closed => self.missed(at, key),
            Down::Message(message) => {
                let worker = &mut self.workers[at];
                let deeds = worker.take(self.now_ms, *message, &self.scenario.truth, &mut self.work_rng)?;
                self.deeds(at, deeds);
            }
        }
        Ok(())
    }

    /// The box knows that its session is over, and dials again.
    pub(super) fn missed(&mut self, at: usize, key: SessionKey) {
        if self.links[at].session == Some(key) {
            (self.links[at].session, self.links[at].welcomed) = (None, None);
            let pause_ms = self.wire_rng.between(100, 3_000);
            self.queue.push(self.now_ms + pause_ms, Happening::Dial(at));
        }
    }

    pub(super) fn unwelcome(&mut self, at: usize, key: SessionKey) {
        if self.links[at].welcomed != Some(key) {
            self.missed(at, key);
        }
    }
}

/// What the coordinator's side sees.
impl World {
    pub(super) fn arrives_up(&mut self, at: usize, key: SessionKey, message: Up) -> Result<(), Violation> {
        let Some(worker) = self.workers[at].id else { return Ok(()) };
        if key.life != self.process.life || !self.process.is_up() {
            return Ok(());
        }
        let session = key.session;
        match message {
            Up::Hello(hello) => {
                let input = super::make::connected(worker, at, session, *hello);
                self.offer(Asker::Session(worker, session), input)
            }
            Up::Said(said) => {
                let input = match *said {
                    ToCoordinator::Heartbeat(heartbeat) => Input::Heartbeat { worker, session, heartbeat },
                    ToCoordinator::SeatFinished(finished) => Input::SeatFinished { worker, session, finished },
                    ToCoordinator::SeatFailed(failed) => Input::SeatFailed { worker, session, failed },
                    _ => return Ok(()),
                };
                self.offer(Asker::Nobody, input)
            }
        }
    }

    pub(super) fn noticed(&mut self, at: usize, key: SessionKey) -> Result<(), Violation> {
        match self.workers[at].id {
            Some(worker) if key.life == self.process.life && self.process.is_up() => {
                self.offer(Asker::Nobody, Input::Disconnected { worker, session: key.session })
            }
            _ => Ok(()),
        }
    }

    /// A session breaks now: each side notices soon or when it was idle for too long.
    pub(super) fn cut(&mut self, at: usize, worker_soon: bool, coordinator_soon: bool) {
        let Some(key) = self.links[at].session else { return };
        let idle_ms = self.scenario.wire.idle_ms;
        let mut moment = |soon: bool| {
            let early = if soon { 0 } else { idle_ms };
            self.now_ms + early + self.wire_rng.between(0, 1_000)
        };
        let (missed_ms, noticed_ms) = (moment(worker_soon), moment(coordinator_soon));
        self.queue.push(missed_ms, Happening::Missed { at, key });
        self.queue.push(noticed_ms, Happening::Noticed { at, key });
    }
}
