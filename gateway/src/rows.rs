//! Rows of `isthmus get`: what the operator service answers and the CLI prints.
//!
//! Plain data, part of the CLI's JSON form `isthmus.io/cli/v1`: fields are added, never renamed.
//! `get status` is a [`Summary`](crate::summary::Summary); `clusters`, `links` and `services` are its
//! parts; the others are arrays of the rows below.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A service port, short.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PortRow {
    /// The number callers use.
    pub number: u16,
    /// Its name; may be empty.
    #[serde(default)]
    pub name: String,
    /// `HTTP`, `TCP`, ... as Istio writes them.
    pub protocol: String,
}

/// `get exports`: one service exported by one cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ExportRow {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The mesh host.
    pub host: String,
    /// The exporting cluster.
    pub cluster: String,
    /// Its ports.
    pub ports: Vec<PortRow>,
    /// Clusters that may call it; `*` is every one.
    pub visible_to: Vec<String>,
    /// Log position of the last write.
    pub index: u64,
    /// Where exports of other clusters differ and which one won, one sentence each.
    #[serde(default)]
    pub conflicts: Vec<String>,
}

/// `get imports`: one service of another cluster, as it can be called from here.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImportRow {
    /// The mesh host.
    pub host: String,
    /// The exporting cluster.
    pub cluster: String,
    /// Its ports.
    pub ports: Vec<PortRow>,
    /// Endpoints known.
    pub endpoints: u32,
    /// Of these, healthy.
    pub endpoints_healthy: u32,
    /// `fresh`, `suspect`, `draining` or `unknown`.
    pub freshness: String,
    /// How old what is known is, in milliseconds; `None` if never heard.
    pub age_ms: Option<u64>,
}

/// `get endpoints`: one sidecar, of this cluster or behind a handle of another.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// The host it serves; a sidecar of several hosts has a row for each.
    pub host: String,
    /// Its cluster.
    pub cluster: String,
    /// `namespace/workload`; empty for other clusters' endpoints, which stay opaque.
    #[serde(default)]
    pub workload: String,
    /// Its handle.
    pub handle: u32,
    /// The process behind the handle.
    pub incarnation: u16,
    /// Relative weight.
    pub weight: u32,
    /// Where it runs.
    pub locality: String,
    /// Whether it passed its last health check.
    pub healthy: bool,
    /// Labels that subsets select by.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// `get tokens` and `token list`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TokenRow {
    /// Names it in `token revoke`.
    pub id: String,
    /// `cluster` or `workload`.
    pub kind: String,
    /// The cluster's name, or `ns/NS/sa/SA`.
    #[serde(rename = "for")]
    pub subject: String,
    /// `open`, `used`, `revoked` or `expired`.
    pub state: String,
    /// When it ends, Unix seconds.
    pub expires_unix_s: u64,
    /// Namespaces that a cluster may issue and export for.
    #[serde(default)]
    pub namespaces: Vec<String>,
}

/// `get config`: one object of this cluster or of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ConfigRow {
    /// Its kind, as in YAML.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Where it comes from: a file, `applied`, or `mesh`.
    pub origin: String,
    /// `active`, or `refused` while an older form or nothing is in force.
    pub state: String,
    /// Why it was refused, or what to know of it; empty if nothing.
    #[serde(default)]
    pub message: String,
}

/// `get proxies`: one sidecar's session with this gateway.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxyRow {
    /// `namespace/workload`.
    pub workload: String,
    /// Whom it proves to be.
    pub account: String,
    /// Where gateways send its datagrams.
    pub address: String,
    /// Its handle.
    pub handle: u32,
    /// The process behind the handle.
    pub incarnation: u16,
    /// `SYNCED`, `STALE` (sent, not yet acknowledged), `ERROR` (refused) or `GONE`.
    pub state: String,
    /// Why it refused the last change; empty if it did not.
    #[serde(default)]
    pub error: String,
    /// The last version sent.
    pub version_sent: u64,
    /// The last version acknowledged.
    pub version_acked: u64,
    /// How long it has been connected, in seconds.
    pub connected_s: u64,
    /// The version it runs.
    pub version: String,
}
