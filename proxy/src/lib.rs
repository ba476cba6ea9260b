//! The sidecar: it stands beside a workload, takes its connections, and carries each request to a
//! sidecar of the mesh under the workload's own identity.
//!
//! Decisions (route, balance, retry, what may enter) are pure and work on an immutable
//! [`View`](isthmus_model::view::View); the drivers around them own sockets and clocks.
//! It never passes a mesh destination on in plaintext, and never needs a gateway to keep routing on
//! what it already knows. Start at [`run()`], then `outbound` and `inbound`, top to bottom.

pub mod access_log;
pub mod admin;
pub mod balance;
pub mod capture;
pub mod carrier;
pub mod config;
pub mod copy;
pub mod destination;
pub mod detect;
pub mod discovery;
pub mod dns;
pub mod exports;
pub mod forward;
pub mod headers;
pub mod health;
pub mod identity;
pub mod inbound;
pub mod metrics;
pub mod outbound;
pub mod path;
pub mod replay;
pub mod report;
pub mod retry;
pub mod run;
pub mod server;
pub mod told;

pub use config::Config;
pub use discovery::{Answer, Mesh};
pub use run::{RunError, run};
