//! Programs of researchers (kind `command`): started in their seat's directory on the device they were placed on, watched,
//! ended with everything that they started, and what they made picked up.
//!
//! One thread does all of it, however many programs run: a program costs no thread and no fork of the agent, only what
//! starting a process costs. Decides nothing about seats: [`super::core`] does.
//!
//! A program gets a clean environment: `PATH`, `HOME`, `LANG`, `TMPDIR` and `LD_LIBRARY_PATH` of the agent, what the sweep
//! says, and what it may want to know of its place (`BONEPILE_…`, `CUDA_VISIBLE_DEVICES`, `OMP_NUM_THREADS`). It is the
//! head of a process group of its own, which ends with it, and with the agent.
//!
//! Layout: [`runner`] holds it together; [`child`] starts and buries one process; [`places`] are where it works; [`output`] takes what it writes;
//! [`collect`] finds the files it made; [`verdict`] says how it failed; [`warden`] ends programs when the agent was killed.

pub mod child;
pub mod collect;
pub mod output;
pub mod places;
pub mod runner;
pub mod verdict;
pub mod warden;
