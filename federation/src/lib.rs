//! The replicated registry of a mesh: a Raft log of signed commands, and the state it leads to.
//!
//! [`member`] is what a gateway runs and asks. [`command`] is what may enter the log, [`machine`] what
//! becomes of it, [`registry`] the state. Everything that decides is free of clocks, sockets and disks:
//! [`sim`] runs whole federations from one seed.

pub mod client;
pub mod command;
pub mod der;
pub mod machine;
pub mod member;
pub mod membership;
pub mod raft;
pub mod registry;
pub mod rng;
pub mod sim;
pub mod store;
pub mod verify;

pub use command::{Command, SignedEntry, Writer};
pub use der::{Der, Fingerprint};
pub use member::{Member, MemberConfig, MemberHandle, Status, Transport};
pub use registry::Registry;
