//! The daemon of a box: async, light, no ML inside, so that it starts anywhere and never waits for a computation.
//!
//! The decisions are a value, [`core::Agent`]; everything else here is I/O around it. Executors compute, the agent
//! publishes, sends and removes what they write. It outlives coordinator restarts: work goes on, what is finished waits on
//! local disk until the store has it and the coordinator has it in its journal.
//!
//! Layout:
//! - [`core`]: seats, executors, what is held: inputs → effects. [`run`]: the loop that feeds it and carries effects out.
//! - [`session`]: the coordinator's connection. [`peer`]: packets from and to other workers.
//! - [`supervisor`]: executor processes. [`command`]: programs of researchers. [`outbox`], [`publish`]: finished work on its
//!   way to the store.
//! - [`inventory`], [`nvml`]: devices and how they are. `shapes`: sizes of models. `question`: asking an executor's binary.
//!   [`state_dir`], [`joining`]: who this box is. [`terms`]: on what terms it is lent.
//! - [`cli`], [`doctor`], [`models`]: the commands.

pub mod backoff;
pub mod cli;
pub mod command;
pub mod core;
pub mod doctor;
pub(crate) mod gather;
pub mod inventory;
pub mod joining;
pub mod models;
pub mod nvml;
pub mod outbox;
pub mod output;
pub mod peer;
pub mod publish;
mod question;
pub mod run;
pub mod session;
mod shapes;
pub mod state_dir;
pub mod supervisor;
pub mod terms;
pub mod way;
