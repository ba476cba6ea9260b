//! What a PeerAuthentication means: whether a workload accepts plaintext from inside its cluster.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::service::Labels;
use crate::{Namespace, ServiceName};

/// Which transports a workload accepts (Istio `PeerAuthentication.mtls.mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum MtlsMode {
    /// mTLS only: the default everywhere.
    Strict,
    /// mTLS and plaintext.
    Permissive,
    /// Plaintext only. Traffic from other clusters is mTLS whatever is said here.
    Disable,
}

/// A PeerAuthentication (Istio `security.istio.io/v1`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerAuthentication {
    /// Its namespace; the root namespace `isthmus-system` makes it mesh-wide.
    pub namespace: Namespace,
    /// Its name.
    pub name: ServiceName,
    /// Workloads it applies to; empty means the whole namespace.
    pub selector: Labels,
    /// The mode; `None` inherits.
    pub mode: Option<MtlsMode>,
    /// Modes of single workload ports.
    pub ports: BTreeMap<u16, MtlsMode>,
}
