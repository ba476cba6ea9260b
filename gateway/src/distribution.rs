//! What sidecars are told: subscriptions, deltas, tickets, keys, trust.
//!
//! [`session`] decides what a sidecar hears next; `server` owns the streams.

pub mod server;
pub mod session;
pub mod sidecars;
