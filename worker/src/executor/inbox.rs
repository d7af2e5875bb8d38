//! What the agent has said, shared by the thread that listens and the one that computes.
//!
//! The computing thread waits here for seats and packets, and looks here between steps whether to stop. Nothing is decided
//! here but that: when the agent is gone, everything stops.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use protocol::exec::{RunSeat, ToExecutor};
use protocol::ids::AttemptId;

use super::wire::receive;

/// The attempt was stopped, or the agent is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped;

/// Orders, packets and stops that have come in.
#[derive(Debug, Default)]
pub struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

/// Written by the listening thread; seats are taken out by the computing one.
#[derive(Debug, Default)]
struct State {
    seats: VecDeque<RunSeat>,
    /// The attempt that is computed now.
    current: Option<AttemptId>,
    /// Paths of packets, by attempt and name.
    packets: BTreeMap<(AttemptId, String), String>,
    /// Packets that have reached the other seat, by attempt.
    sent: BTreeMap<AttemptId, u64>,
    stopped: BTreeSet<AttemptId>,
    /// The agent is gone: nothing more will come.
    closed: bool,
}

impl Inbox {
    /// Takes in what comes until the pipe ends. Runs on a thread of its own.
    pub fn listen(&self, mut input: impl Read) {
        loop {
            match receive::<ToExecutor>(&mut input) {
                Ok(Some(message)) => self.take(message),
                Ok(None) => break,
                Err(error) => {
                    tracing::error!(%error, "the agent cannot be understood");
                    break;
                }
            }
        }
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits for a seat to work on; None when the agent is gone.
    pub fn next_seat(&self) -> Option<RunSeat> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(seat) = state.seats.pop_front() {
                state.current = Some(seat.attempt);
                return Some(seat);
            }
            state = self.wait(state);
        }
    }

    /// Waits for a packet and gives its path.
    ///
    /// # Errors
    /// [`Stopped`] if the attempt is stopped meanwhile, or the agent is gone.
    pub fn packet(&self, attempt: AttemptId, key: &str) -> Result<String, Stopped> {
        let mut state = self.lock();
        loop {
            if state.closed || state.stopped.contains(&attempt) {
                return Err(Stopped);
            }
            if let Some(path) = state.packets.get(&(attempt, key.to_owned())) {
                return Ok(path.clone());
            }
            state = self.wait(state);
        }
    }

    /// Waits until at most `most` of the `made` packets are still on their way.
    ///
    /// # Errors
    /// As [`Self::packet`].
    pub fn wait_for_room(&self, attempt: AttemptId, made: u64, most: u64) -> Result<(), Stopped> {
        let mut state = self.lock();
        loop {
            if state.closed || state.stopped.contains(&attempt) {
                return Err(Stopped);
            }
            if made.saturating_sub(state.sent.get(&attempt).copied().unwrap_or(0)) <= most {
                return Ok(());
            }
            state = self.wait(state);
        }
    }

    /// Looks whether to go on.
    ///
    /// # Errors
    /// [`Stopped`] if not.
    pub fn check(&self, attempt: AttemptId) -> Result<(), Stopped> {
        let state = self.lock();
        if state.closed || state.stopped.contains(&attempt) { Err(Stopped) } else { Ok(()) }
    }

    /// Forgets an attempt that is over.
    pub fn done(&self, attempt: AttemptId) {
        let mut state = self.lock();
        state.current = None;
        state.stopped.remove(&attempt);
        state.sent.remove(&attempt);
        state.packets.retain(|(of, _), _| *of != attempt);
    }

    fn take(&self, message: ToExecutor) {
        let mut state = self.lock();
        match message {
            ToExecutor::RunSeat(seat) => state.seats.push_back(seat),
            ToExecutor::PacketArrived(packet) => {
                state.packets.insert((packet.attempt, packet.key), packet.path);
            }
            ToExecutor::PacketSent(packet) => {
                // Said of an attempt that is over, it is nobody's.
                let known = state.current.into_iter().chain(state.seats.iter().map(|seat| seat.attempt));
                if known.into_iter().any(|attempt| attempt == packet.attempt) {
                    *state.sent.entry(packet.attempt).or_default() += 1;
                }
            }
            ToExecutor::StopSeat(stop) => {
                // A stop that comes after the end of its attempt has nothing to stop.
                let known = state.current.into_iter().chain(state.seats.iter().map(|seat| seat.attempt));
                if known.into_iter().any(|attempt| attempt == stop.attempt) {
                    state.stopped.insert(stop.attempt);
                }
            }
        }
        self.changed.notify_all();
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one insertion or removal, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
