//! The east-west gateway of a cluster: packet router, links, registry member, trust, distribution.
//!
//! It never holds a key that decrypts traffic between sidecars. What decides is pure and in
//! `isthmus-model`, `isthmus-tunnel` and `isthmus-federation`; this crate owns sockets and clocks.
//! Start reading at [`config`].

pub mod cluster_files;
pub mod config;
pub mod dashboard;
pub mod distribution;
pub mod handles;
mod join;
pub mod locals;
pub mod publish;
pub mod router;
pub mod rows;
pub mod summary;
mod tls_incoming;
pub mod traffic;
pub mod view;
mod writer;
