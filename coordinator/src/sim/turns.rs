//! The coordinator's turns as the world sees them: when one begins, where it may be killed, what leaves it.

use super::check::Violation;
use super::fault::Stage;
use super::process::{Asker, Reply};
use super::sabotage::Sabotage;
use super::trace::{describe, fact};
use super::wire::{Down, SessionKey};
use super::world::{Happening, World};
use crate::scheduler::{Answer, Effect, Input};

impl World {
    pub(super) fn coordinator_up(&mut self) -> Result<(), Violation> {
        if self.process.is_up() {
            return Ok(());
        }
        self.process.start(self.now_ms)?;
        self.wake_at = None;
        self.say(|| "coordinator starts".to_owned());
        self.turn()
    }

    /// A deadline of the scheduler comes.
    pub(super) fn wake(&mut self, at_ms: u64) -> Result<(), Violation> {
        if self.wake_at != Some(at_ms) {
            return Ok(());
        }
        self.wake_at = None;
        self.turn()
    }

    /// An input for the coordinator, which takes it now or after what it is writing.
    pub(super) fn offer(&mut self, from: Asker, input: Input) -> Result<(), Violation> {
        if let Input::SeatFinished { worker, finished, .. } = &input {
            self.process.ledger.heard(*worker, finished.attempt, finished.role);
        }
        if self.trace.is_some() {
            let line = describe(&input);
            self.say(|| format!("  > {line}"));
        }
        self.process.offer(from, input);
        self.turn()
    }

    pub(super) fn turn(&mut self) -> Result<(), Violation> {
        while self.process.is_up() && !self.process.writing {
            if self.dies_at(Stage::Idle)? {
                return Ok(());
            }
            self.process.decide(self.now_ms)?;
            if self.dies_at(Stage::Decided)? {
                return Ok(());
            }
            if self.process.write()? {
                if self.dies_at(Stage::Torn)? || self.dies_at(Stage::Written)? {
                    return Ok(());
                }
                let (least, most) = self.scenario.disk_ms;
                let takes_ms = self.disk_rng.between(least, most) + std::mem::take(&mut self.slow_journal_ms);
                self.queue.push(self.now_ms + takes_ms, Happening::JournalDone(self.process.life));
                if self.scenario.sabotage == Some(Sabotage::ActsEarly) {
                    self.let_out()?;
                }
                return Ok(());
            }
            self.let_out()?;
            if !self.process.has_input() {
                break;
            }
        }
        self.set_wake();
        Ok(())
    }

    pub(super) fn journal_done(&mut self, life: u64) -> Result<(), Violation> {
        if life != self.process.life || !self.process.writing {
            return Ok(());
        }
        let before = self.process.disk.records().len();
        self.process.written()?;
        self.count(before);
        self.let_out()?;
        self.turn()
    }

    /// Effects and answers, once what they tell is durable.
    fn let_out(&mut self) -> Result<(), Violation> {
        let mut sent = 0;
        loop {
            if self.dies_at(Stage::Acting(sent))? {
                return Ok(());
            }
            match self.process.act()? {
                Some(effect) => self.send_out(effect),
                None => break,
            }
            sent += 1;
        }
        for reply in self.process.take_replies() {
            self.answered(reply)?;
        }
        Ok(())
    }

    fn send_out(&mut self, effect: Effect) {
        let life = self.process.life;
        let (worker, session, message) = match effect {
            Effect::Send { worker, session, message } => (worker, session, Down::Message(Box::new(message))),
            Effect::Close { worker, session } => (worker, session, Down::Closed),
            Effect::WriteManifest { .. } => return,
        };
        if let Some(at) = self.by_id.get(&worker).copied() {
            self.send_down(at, SessionKey { life, session }, message);
        }
    }

    fn answered(&mut self, reply: Reply) -> Result<(), Violation> {
        let life = self.process.life;
        match (reply.to, reply.answer) {
            (Asker::Session(worker, session), answer) => {
                let message = if answer.is_ok() { Down::Welcome } else { Down::Closed };
                if let Some(at) = self.by_id.get(&worker).copied() {
                    self.send_down(at, SessionKey { life, session }, message);
                }
            }
            (Asker::Submission(index), Ok(Answer::Run(run))) => {
                self.process.ledger.told_accepted(run)?;
                self.say(|| format!("submission {} is {run}", index + 1));
                self.submitted[index].get_or_insert(run);
            }
            (Asker::Token, Ok(Answer::Token(token))) => self.token = Some(token),
            (Asker::Box(at), Ok(Answer::Worker(worker))) => {
                self.say(|| format!("box {at} is {worker}"));
                self.workers[at].id = Some(worker);
                self.by_id.insert(worker, at);
                self.queue.push(self.now_ms, Happening::Dial(at));
            }
            _ => {}
        }
        Ok(())
    }

    fn set_wake(&mut self) {
        let forgets = self.scenario.sabotage == Some(Sabotage::ForgetsLeases);
        let Some(deadline_ms) = self.process.deadline_ms().filter(|_| !forgets) else { return };
        let at_ms = deadline_ms.max(self.now_ms + 1);
        if self.wake_at.is_none_or(|wake_at| at_ms < wake_at) {
            self.wake_at = Some(at_ms);
            self.queue.push(at_ms, Happening::Wake(at_ms));
        }
    }

    pub(super) fn count(&mut self, from: usize) {
        let (records, tally) = (self.process.disk.records(), &mut self.tally);
        for record in &records[from.min(records.len())..] {
            *tally.events.entry(record.event.kind()).or_default() += 1;
        }
        if self.trace.is_some() {
            let lines: Vec<_> = records[from.min(records.len())..].iter().map(|record| fact(&record.event)).collect();
            for line in lines {
                self.say(|| format!("    = {line}"));
            }
        }
    }
}
