//! A whole federation from one seed: clusters with their disks, a network that delays, loses, repeats and
//! cuts, crashes, joins raced, members leaving; and an oracle that watches every step.
//!
//! Runs the same [`crate::raft::driver::Driver`] that a gateway runs. Nothing here knows real time: a run
//! is a function of its seed, and a failing seed fails again. `cargo run -p isthmus-federation --bin
//! federation-sim -- --seed N` replays one.

pub mod keys;
pub mod network;
pub mod oracle;
mod schedule;
pub mod world;

pub use oracle::Violation;
pub use world::{Mutation, Report, World};

/// Runs one seed to its end.
///
/// # Errors
/// The first invariant that did not hold.
pub fn run(seed: u64, mutation: Mutation) -> Result<Report, Violation> {
    World::new(seed, mutation).run()
}
