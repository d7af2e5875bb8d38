//! The journal's disk: records that are durable, and a batch that is being written. A batch survives a kill whole or not at
//! all, as the real journal promises.

use crate::scheduler::{Event, Record};

use super::check::Violation;
use super::sabotage::Sabotage;

/// The disk.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    durable: Vec<Record>,
    writing: Vec<Record>,
    sabotage: Option<Sabotage>,
    forged: bool,
}

impl Disk {
    /// An empty disk.
    pub fn new(sabotage: Option<Sabotage>) -> Self {
        Self { sabotage, ..Self::default() }
    }

    /// Begins to write a batch. `checked`: each record's text must read as what it was.
    ///
    /// # Errors
    /// If one does not.
    pub fn begin(&mut self, batch: Vec<Record>, checked: bool) -> Result<(), Violation> {
        for record in batch.iter().filter(|_| checked) {
            let text = serde_json::to_string(record).map_err(|error| unreadable(record, &error))?;
            let read: Record = serde_json::from_str(&text).map_err(|error| unreadable(record, &error))?;
            if read != *record {
                return Err(unreadable(record, &"it reads as something else"));
            }
        }
        self.writing = batch;
        self.spoil();
        Ok(())
    }

    /// The batch is durable; gives it.
    pub fn finish(&mut self) -> &[Record] {
        let before = self.durable.len();
        self.durable.append(&mut self.writing);
        &self.durable[before..]
    }

    /// The process was killed.
    pub fn killed(&mut self) {
        self.writing.clear();
        if self.sabotage == Some(Sabotage::LosesWritten) {
            let outcome = |record: &Record| matches!(record.event, Event::SeatCompleted(_));
            let kept = self.durable.iter().position(outcome).unwrap_or(self.durable.len());
            self.durable.truncate(kept);
        }
    }

    /// Every durable record.
    pub fn records(&self) -> &[Record] {
        &self.durable
    }

    fn spoil(&mut self) {
        match self.sabotage {
            Some(Sabotage::WritesWrong) => {
                for record in &mut self.writing {
                    if let Event::AttemptPlaced(placed) = &mut record.event {
                        placed.seats[0].reserved_bytes += 1;
                    }
                }
            }
            Some(Sabotage::CommitsTwice) if !self.forged => {
                let commit = self.writing.iter().find(|record| matches!(record.event, Event::ShardCommitted { .. }));
                if let Some(commit) = commit.cloned() {
                    self.forged = true;
                    self.writing.push(commit);
                }
            }
            _ => {}
        }
    }
}

fn unreadable(record: &Record, error: &dyn std::fmt::Display) -> Violation {
    Violation::new("a_record_reads_as_written", format!("record {} ({}): {error}", record.seq, record.event.kind()))
}
