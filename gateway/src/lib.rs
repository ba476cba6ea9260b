//! The east-west gateway of a cluster: packet router, links, registry member, trust, distribution.
//!
//! It never holds a key that decrypts traffic between sidecars. What decides is pure and in
//! `isthmus-model`, `isthmus-tunnel` and `isthmus-federation`; this crate owns sockets and clocks.
//! Start reading at [`mod@run`], which says what is started in which order; [`view`] says what sidecars are told.

pub mod cluster_files;
pub mod config;
pub mod dashboard;
pub mod distribution;
pub mod handles;
pub mod hub;
pub mod imports;
pub mod issue;
mod join;
pub mod keys;
mod links;
mod local_table;
pub mod locals;
mod metrics;
pub mod object_store;
mod operator;
pub mod peers;
pub mod publish;
mod publisher;
pub mod replication;
pub mod router;
pub mod rows;
mod run;
mod signer;
pub mod summary;
pub mod tables;
mod tls_incoming;
pub mod traffic;
pub mod view;
mod writer;

pub use run::run;
