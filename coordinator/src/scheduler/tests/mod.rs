//! The scheduler's tests: a builder DSL ([`lab`]), scenarios one failure each ([`scenarios`], [`orders`]), and generated
//! histories ([`histories`]) of a small cluster ([`world`]) in which everything may fail; [`purity`] reads the source.

mod heap;
mod histories;
mod lab;
mod orders;
mod placing;
mod purity;
mod scenarios;
mod trainings;
mod world;
