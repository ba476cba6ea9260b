//! One file per command: its options, what it asks a library or the gateway, what it prints.

pub mod apply;
pub mod completion;
pub mod dashboard;
pub mod demo;
pub mod export;
pub mod gateway;
pub mod get;
pub mod init;
pub mod join;
pub mod logging;
pub mod proxy;
pub mod sample;
pub mod status;
pub mod store;
pub mod token;
pub mod version;
