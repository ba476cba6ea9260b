//! Workload tokens of one cluster: used once, decided by the one member that holds the store.

use isthmus_model::ServiceAccount;
use serde::{Deserialize, Serialize};

/// A workload token as stored, by the hash of its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkloadToken {
    /// Whom its bearer becomes.
    pub account: ServiceAccount,
    /// When it ends, Unix seconds.
    pub expires_unix_s: u64,
    /// Whether it was used.
    pub used: bool,
}
