//! The scheduler's tests: a builder DSL ([`lab`]), scenarios one failure each ([`scenarios`], [`orders`]).

mod lab;
mod orders;
mod scenarios;
