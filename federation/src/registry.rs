//! What the log says: the state that every member and follower arrives at.
//!
//! A value: no I/O, no clock. Cloning is cheap (shared maps), so that readers keep a snapshot.
//! How it changes is in [`crate::machine`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use isthmus_model::service::{Export, Patterns, ServiceEntry};
use isthmus_model::{ClusterId, ClusterName, TrustDomain};
use serde::{Deserialize, Serialize};

use crate::command::ClusterFacts;
use crate::der::{Der, Fingerprint};

/// Everything that the log has decided, up to and including [`Registry::index`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// The last log position applied; 0 before the first.
    pub index: u64,
    /// The hash chain's value there: equal on all who applied the same log.
    pub hash: Fingerprint,
    /// The log's own time: the latest that a leader stamped, in Unix seconds. Never runs backwards.
    pub unix_s: u64,
    /// The mesh, once `Init` is applied.
    pub mesh: Option<Arc<Mesh>>,
    /// Members by name.
    pub clusters: Arc<BTreeMap<ClusterName, Arc<ClusterRecord>>>,
    /// Clusters that have left or were evicted: their numbers rest, their certificates are void.
    pub gone: Arc<BTreeMap<ClusterId, Arc<GoneCluster>>>,
    /// Join tokens by id.
    pub tokens: Arc<BTreeMap<String, Arc<TokenRecord>>>,
    /// Requests that wait for a signer.
    pub requests: Arc<BTreeMap<ClusterName, Arc<CertificateRequest>>>,
    /// Exports by cluster, then by `namespace/name`.
    pub exports: Arc<BTreeMap<ClusterName, BTreeMap<String, Arc<ExportRecord>>>>,
    /// ServiceEntries by cluster, then by `namespace/name`.
    pub service_entries: Arc<BTreeMap<ClusterName, BTreeMap<String, Arc<ServiceEntryRecord>>>>,
    /// Mesh-wide configuration by `kind/namespace/name`.
    pub config: Arc<BTreeMap<String, Arc<ConfigRecord>>>,
    /// Mesh-wide writes, oldest first, at most [`crate::machine::AUDIT_MAX`].
    pub audit: Arc<VecDeque<AuditRecord>>,
    /// Each writer's last entries, by `cluster/NAME` or `operator/NAME`.
    pub writers: Arc<BTreeMap<String, WriterState>>,
}

impl Registry {
    /// The member with this number.
    pub fn cluster_by_id(&self, id: ClusterId) -> Option<&Arc<ClusterRecord>> {
        self.clusters.values().find(|record| record.id == id)
    }

    /// All exports of a mesh service, the oldest first: its ports win (KEP-1645).
    pub fn exporters(&self, service: &str) -> Vec<(&ClusterName, &Arc<ExportRecord>)> {
        let mut found: Vec<_> =
            self.exports.iter().filter_map(|(cluster, of)| of.get(service).map(|export| (cluster, export))).collect();
        found.sort_by_key(|(_, export)| export.first_index);
        found
    }
}

/// The mesh itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mesh {
    /// Its name.
    pub name: String,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Root certificates that members trust.
    pub roots: Vec<Der>,
}

/// One member.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRecord {
    /// Its number.
    pub id: ClusterId,
    /// Its name.
    pub name: ClusterName,
    /// Its intermediate, without the root; the first certificate's key signs its entries.
    pub chain: Vec<Der>,
    /// Intermediates that it had before and that may still be valid (one, while it renews).
    pub previous: Vec<Der>,
    /// What it says of itself.
    pub facts: ClusterFacts,
    /// Namespaces for which it may issue workload identities.
    pub may_issue: Patterns,
    /// Namespaces from which it may export services.
    pub may_export: Patterns,
    /// Whether it holds the root key, and so answers requests.
    pub signer: bool,
    /// The log position of its grant.
    pub joined_index: u64,
    /// When, on the log's time.
    pub joined_unix_s: u64,
}

/// A former member.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoneCluster {
    /// Its name then; free to be used again.
    pub name: ClusterName,
    /// Its intermediates, by fingerprint: whatever they issued is refused.
    pub issuers: Vec<Fingerprint>,
    /// When, on the log's time; its number is given again at the earliest 7 days later.
    pub left_unix_s: u64,
    /// Whether it was thrown out.
    pub evicted: bool,
}

/// A join token as the log knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRecord {
    /// [`crate::command::token_hash`] of its secret.
    pub hash: Fingerprint,
    /// The only name it serves.
    pub cluster: ClusterName,
    /// What the joiner may issue and export.
    pub namespaces: Patterns,
    /// When it ends, Unix seconds.
    pub expires_unix_s: u64,
    /// What became of it.
    pub state: TokenState,
}

/// What became of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenState {
    /// May be used once.
    Open,
    /// Used by the entry at this log position.
    Used(u64),
    /// Revoked.
    Revoked,
}

/// A request for an intermediate that no signer has answered yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateRequest {
    /// PKCS#10.
    pub csr: Der,
    /// For a new cluster: what it said of itself, and what its token allows. `None` renews.
    pub join: Option<(ClusterFacts, Patterns)>,
    /// Its log position.
    pub index: u64,
    /// When, on the log's time.
    pub unix_s: u64,
}

/// One cluster's export of one service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportRecord {
    /// What is exported.
    pub export: Export,
    /// Log position of the first write since it was last absent: the smallest wins conflicts.
    pub first_index: u64,
    /// Log position of the last write.
    pub index: u64,
    /// The writer's sequence number of the last write.
    pub version: u64,
}

/// One cluster's ServiceEntry.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceEntryRecord {
    /// What it says.
    pub entry: ServiceEntry,
    /// Log position of the first write since it was last absent.
    pub first_index: u64,
    /// Log position of the last write.
    pub index: u64,
}

/// One object of mesh-wide configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigRecord {
    /// Which.
    pub key: crate::command::ConfigKey,
    /// JSON of `model::view::Resource`.
    pub json: String,
    /// Log position of the last write.
    pub index: u64,
    /// Who wrote it.
    pub operator: String,
}

/// A mesh-wide write, for `isthmus get audit`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditRecord {
    /// Log position.
    pub index: u64,
    /// When, on the log's time.
    pub unix_s: u64,
    /// `operator/NAME` or `cluster/NAME`.
    pub writer: String,
    /// The command's kind.
    pub what: String,
    /// What it was about.
    pub subject: String,
}

/// A writer's last entries: what makes a repeated proposal harmless and a replayed one useless.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WriterState {
    /// Sequence numbers up to here are spent.
    pub floor: u64,
    /// The last [`crate::machine::WINDOW`] entries above it, by sequence number.
    pub recent: BTreeMap<u64, Applied>,
}

/// What one entry came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Applied {
    /// SHA-256 of the entry.
    pub entry: Fingerprint,
    /// Its outcome.
    pub outcome: Result<(), crate::machine::Rejection>,
}
