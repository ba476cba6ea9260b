//! What every isthmus process needs around its work: signals, readiness, admin, metrics, logging.
//!
//! Knows nothing of meshes: components hand in their conditions, counters and closures. All servers
//! here speak plain HTTP/1.1 with bounded connections, end with their token and leave no task behind.
//! Start at [`HttpServer`]; the pages it serves are [`Readiness::router`], [`metrics::router`] and
//! [`Admin::router`].

pub mod admin;
pub mod config_file;
pub mod http;
pub mod logging;
pub mod memory;
pub mod metrics;
pub mod readiness;
pub mod shutdown;
pub mod watched;

pub use admin::Admin;
pub use http::{BindError, HttpServer};
pub use logging::{LogFormat, LogHandle};
pub use readiness::{Condition, Readiness};
