//! Applies committed entries to the registry: deterministic, no clock, no I/O.
//!
//! Every member runs the same bytes through [`Machine::apply`] and arrives at the same registry and the
//! same refusals. A bad leader can delay an entry; it cannot forge one.

use serde::{Deserialize, Serialize};

/// Mesh-wide writes that are kept for `isthmus get audit`: about a year of an active mesh.
pub const AUDIT_MAX: usize = 1_000;

/// Why an entry changed nothing. It stays in the log; every member refuses it alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A fixed word, see the constants of [`reason`].
    pub reason: String,
    /// Cause and fix.
    pub message: String,
}
