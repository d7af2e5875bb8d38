//! The coordinator's process: the scheduler, its queue of inputs and its journal, turn by turn as the real driver takes them:
//! all inputs that are there, then the deadline, then the journal, then the effects.
//!
//! Does not know wires or workers. Keeps every input for a second scheduler that must write the same journal.

use std::collections::VecDeque;

use protocol::control::SeatFinished;
use protocol::ids::{AttemptId, WorkerId};
use protocol::time::UnixMillis;

use super::check::{Ledger, Violation};
use super::disk::Disk;
use super::make::EPOCH_MS;
use super::sabotage::Sabotage;
use crate::scheduler::{Answer, Effect, Input, Record, Rejection, Scheduler, Settings, State, invariants};

/// Most inputs of a turn, as the driver's.
const BATCH_MAX: usize = 256;

/// An answer, with who asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reply {
    pub(super) to: Asker,
    pub(super) answer: Result<Answer, Rejection>,
}

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// A greeting on this session.
    Session(WorkerId, u64),
    /// Who submits the run of this index.
    Submission(usize),
    /// Who wants a join token.
    Token,
    /// The box of this index, which wants to join.
    Box(usize),
    /// Nobody who waits.
    Nobody,
}

/// What was done to the scheduler, for the second application.
#[derive(Debug, Clone)]
enum Act {
    Started(UnixMillis),
    Gave(UnixMillis, Input),
    Took { durable: bool },
}

#[derive(Debug)]
pub(super) struct Process {
    scheduler: Option<Scheduler>,
    pub(super) disk: Disk,
    /// The durable records, applied.
    shadow: State,
    pub(super) ledger: Ledger,
    inbox: VecDeque<(Asker, Input)>,
    replies: Vec<Reply>,
    pub(super) writing: bool,
    /// Counts starts: what was meant for an earlier process is lost.
    pub(super) life: u64,
    pub(super) clock_offset_ms: i64,
    settings: Settings,
    script: Vec<Act>,
    sabotage: Option<Sabotage>,
    checked: bool,
    pub(super) inputs: u64,
}

impl Process {
    pub(super) fn new(settings: Settings, sabotage: Option<Sabotage>, checked: bool) -> Self {
        Self {
            scheduler: None,
            disk: Disk::new(sabotage),
            shadow: State::default(),
            ledger: Ledger::default(),
            inbox: VecDeque::new(),
            replies: Vec::new(),
            writing: false,
            life: 0,
            clock_offset_ms: 0,
            settings,
            script: Vec::new(),
            sabotage,
            checked,
            inputs: 0,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.scheduler.is_some()
    }

    /// The scheduler's state; of the durable records while the process is down.
    pub(super) fn state(&self) -> &State {
        self.scheduler.as_ref().map_or(&self.shadow, Scheduler::state)
    }

    /// Something waits for the next turn.
    pub(super) fn has_input(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// A process starts from the journal.
    pub(super) fn start(&mut self, at_ms: u64) -> Result<(), Violation> {
        let now = self.clock(at_ms);
        self.ledger.restarted(self.disk.records())?;
        let scheduler = replayed(self.disk.records(), now)?;
        if text(scheduler.state()) != text(&self.shadow) {
            return Err(unlike(scheduler.state(), &self.shadow));
        }
        self.life += 1;
        self.script.push(Act::Started(now));
        self.scheduler = Some(scheduler);
        let settings = self.settings.clone();
        self.offer(Asker::Nobody, Input::Configure(settings));
        Ok(())
    }

    /// The process is killed; `durable`: what it was writing turns out to be on the disk.
    pub(super) fn kill(&mut self, durable: bool) -> Result<(), Violation> {
        if self.writing {
            match durable {
                true => self.written()?,
                false => self.script.push(Act::Took { durable: false }),
            }
        }
        self.disk.killed();
        self.writing = false;
        self.scheduler = None;
        self.inbox.clear();
        self.replies.clear();
        Ok(())
    }

    pub(super) fn offer(&mut self, from: Asker, input: Input) {
        if self.scheduler.is_some() {
            self.inbox.push_back((from, input));
        }
    }

    /// The first half of a turn: everything up to the deadline is decided.
    pub(super) fn decide(&mut self, at_ms: u64) -> Result<(), Violation> {
        for _ in 0..BATCH_MAX {
            let Some((asker, input)) = self.inbox.pop_front() else { break };
            let answer = self.give(at_ms, input)?;
            if asker != Asker::Nobody {
                self.replies.push(Reply { to: asker, answer });
            }
        }
        let now = self.clock(at_ms);
        let deadline = self.scheduler.as_ref().and_then(Scheduler::next_deadline);
        if deadline.is_some_and(|deadline| deadline <= now) && self.sabotage != Some(Sabotage::ForgetsLeases) {
            self.give(at_ms, Input::Tick)?.map_err(|rejection| {
                Violation::new("a_refused_input_changes_nothing", format!("a tick was refused: {rejection}"))
            })?;
        }
        Ok(())
    }

    /// The second half: the journal begins to write; `false` if there is nothing to write.
    pub(super) fn write(&mut self) -> Result<bool, Violation> {
        let Some(scheduler) = &mut self.scheduler else { return Ok(false) };
        let batch = scheduler.take_events();
        if batch.is_empty() {
            return Ok(false);
        }
        self.disk.begin(batch, self.checked)?;
        self.writing = true;
        Ok(true)
    }

    /// The batch is durable: the records must give the state that decided them.
    pub(super) fn written(&mut self) -> Result<(), Violation> {
        self.writing = false;
        self.script.push(Act::Took { durable: true });
        for record in self.disk.finish() {
            self.ledger.durable(record)?;
            if !self.checked {
                continue;
            }
            self.shadow.apply(record).map_err(|error| Violation::new("the_journal_replays", error.to_string()))?;
        }
        match &self.scheduler {
            Some(scheduler) if self.checked && *scheduler.state() != self.shadow => {
                Err(unlike(&self.shadow, scheduler.state()))
            }
            _ => Ok(()),
        }
    }

    /// The next effect, if it may leave.
    pub(super) fn act(&mut self) -> Result<Option<Effect>, Violation> {
        let effect = self.scheduler.as_mut().and_then(Scheduler::poll_effect);
        if let Some(effect) = &effect {
            self.ledger.leaves(effect)?;
        }
        Ok(effect)
    }

    /// Answers that may leave.
    pub(super) fn take_replies(&mut self) -> Vec<Reply> {
        std::mem::take(&mut self.replies)
    }

    /// When the next deadline comes, in virtual time.
    pub(super) fn deadline_ms(&self) -> Option<u64> {
        let at = self.scheduler.as_ref()?.next_deadline()?.0;
        Some(at.saturating_sub(EPOCH_MS).saturating_add_signed(self.clock_offset_ms.saturating_neg()))
    }

    /// The invariants of histories, at their end.
    pub(super) fn check_history(&self, at_ms: u64) -> Result<(), Violation> {
        if !self.checked {
            return Ok(());
        }
        self.ledger.at_the_end(&self.shadow)?;
        let again = replayed(self.disk.records(), self.clock(at_ms))?;
        if text(again.state()) != text(&self.shadow) {
            return Err(unlike(again.state(), &self.shadow));
        }
        self.apply_again()
    }

    fn give(&mut self, at_ms: u64, input: Input) -> Result<Result<Answer, Rejection>, Violation> {
        let now = self.clock(at_ms);
        let input = self.sabotaged(input);
        if self.checked {
            self.script.push(Act::Gave(now, input.clone()));
        }
        self.inputs += 1;
        let Some(scheduler) = &mut self.scheduler else { return Ok(Ok(Answer::Done)) };
        let before = scheduler.state().seq;
        let answer = scheduler.handle(now, input);
        if answer.is_err() && scheduler.state().seq != before {
            return Err(Violation::new("a_refused_input_changes_nothing", format!("{answer:?} decided events")));
        }
        if self.checked {
            invariants::check(scheduler.state(), scheduler.live())?;
        }
        Ok(answer)
    }

    fn sabotaged(&self, input: Input) -> Input {
        match (self.sabotage, input) {
            (Some(Sabotage::IgnoresFences), Input::SeatFinished { worker, session, finished }) => {
                let open = self.state().shard(finished.attempt.shard).and_then(|shard| shard.open_attempt());
                let seat = open.and_then(|open| Some((open.fence, open.seat(finished.role)?.device.worker)));
                let Some((fence, holder)) = seat.filter(|(fence, _)| *fence > finished.attempt.fence) else {
                    return Input::SeatFinished { worker, session, finished };
                };
                let live = self.scheduler.as_ref().and_then(|scheduler| scheduler.live().connected(holder));
                let attempt = AttemptId { fence, ..finished.attempt };
                let session = live.map_or(session, |live| live.number);
                Input::SeatFinished { worker: holder, session, finished: SeatFinished { attempt, ..finished } }
            }
            (Some(Sabotage::Overbooks), Input::Connected(mut connected)) => {
                for device in &mut connected.hello.devices {
                    device.memory_total_bytes *= 4;
                    device.memory_budget_bytes *= 4;
                }
                Input::Connected(connected)
            }
            (Some(Sabotage::Overbooks), Input::Heartbeat { worker, session, mut heartbeat }) => {
                heartbeat.telemetry.iter_mut().for_each(|device| device.memory_free_bytes *= 16);
                Input::Heartbeat { worker, session, heartbeat }
            }
            (_, input) => input,
        }
    }

    /// Everything once more, to another scheduler: its journal must be the same.
    fn apply_again(&self) -> Result<(), Violation> {
        let mut scheduler = Scheduler::new();
        let mut journal: Vec<Record> = Vec::new();
        for (number, act) in self.script.iter().enumerate() {
            match act {
                Act::Started(now) => scheduler = replayed(&journal, *now)?,
                Act::Gave(_, Input::Heartbeat { .. })
                    if self.sabotage == Some(Sabotage::Wavers) && number.is_multiple_of(7) => {}
                Act::Gave(now, input) => drop(scheduler.handle(*now, input.clone())),
                Act::Took { durable } => {
                    let events = scheduler.take_events();
                    if *durable {
                        journal.extend(events);
                    }
                }
            }
        }
        let first = self.disk.records();
        if journal == first {
            return Ok(());
        }
        let at = first.iter().zip(&journal).take_while(|(a, b)| a == b).count();
        let detail = format!("record {}: first {:?}, then {:?}", at + 1, first.get(at), journal.get(at));
        Err(Violation::new("same_inputs_give_the_same_events", detail))
    }

    fn clock(&self, at_ms: u64) -> UnixMillis {
        UnixMillis((EPOCH_MS + at_ms).saturating_add_signed(self.clock_offset_ms))
    }
}

fn replayed(journal: &[Record], now: UnixMillis) -> Result<Scheduler, Violation> {
    let mut scheduler = Scheduler::new();
    for record in journal {
        let replayed = scheduler.replay(record);
        replayed.map_err(|error| Violation::new("the_journal_replays", error.to_string()))?;
    }
    scheduler.start(now);
    Ok(scheduler)
}

fn text(state: &State) -> String {
    serde_json::to_string(state).unwrap_or_else(|error| error.to_string())
}

/// Where two states differ, in a few words of each.
fn unlike(one: &State, other: &State) -> Violation {
    let (one, other) = (text(one), text(other));
    let same = one.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    let part = |text: &str| {
        String::from_utf8_lossy(&text.as_bytes()[same.saturating_sub(80)..text.len().min(same + 80)]).into_owned()
    };
    Violation::new("replay_gives_the_live_state", format!("…{}… or …{}…", part(&one), part(&other)))
}
