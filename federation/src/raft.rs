//! Consensus: the `raft` crate behind our own narrow interface.
//!
//! [`node`] wraps the library; what must be on disk before it is promised is a type there
//! ([`batch::Batch`]). [`driver`] is the whole member as a state machine: frames, proposals and ticks go in,
//! frames, answers and registries come out. Neither reads a clock or touches a disk by itself: the
//! driver is handed a [`crate::store::Store`].

pub mod batch;
pub mod driver;
pub mod group;
pub mod log;
pub mod node;
pub mod snapshot;
pub mod transport;
