//! Applies committed entries to the registry: deterministic, no clock, no I/O.
//!
//! Every member runs the same bytes through [`Machine::apply`] and arrives at the same registry and the
//! same refusals. A bad leader can delay an entry; it cannot forge, change or repeat one. Which writer may
//! do what is in `machine/clusters.rs` (membership, tokens, certificates) and `machine/records.rs`
//! (exports, ServiceEntries, config).

mod clusters;
mod records;
mod refusal;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use isthmus_model::ClusterName;

use crate::command::{Command, EntryError, Payload, SignedEntry, Stamped, Writer};
use crate::der::Fingerprint;
use crate::registry::{Applied, AuditRecord, ClusterRecord, Registry};
use crate::verify::{Trust, Verify};

pub use clusters::{CLUSTERS_MAX, NUMBER_REST_S, TOKEN_TTL_MAX_S, TOKENS_MAX};
pub use records::{CONFIG_LEN_MAX, CONFIG_MAX, EXPORTS_MAX, SERVICE_ENTRIES_MAX};
pub use refusal::{Refusal, Rejection};

/// Mesh-wide writes that are kept for `isthmus get audit`: about a year of an active mesh.
pub const AUDIT_MAX: usize = 1_000;
/// Entries of one writer that may be under way at once: they may arrive in any order. Two writes of one
/// record are the exception: its writer awaits the first before it signs the second.
pub const WINDOW: usize = 64;
/// How far a leader's clock may run ahead of a writer's and still move the log's time.
pub const CLOCK_SPREAD_MAX_S: u64 = 300;

/// What applying an entry came to.
pub type Outcome = Result<(), Rejection>;

/// The registry and what changes it.
#[derive(Clone)]
pub struct Machine {
    registry: Registry,
    verify: Arc<dyn Verify>,
}

/// Who wrote an entry, proven.
pub(crate) enum Author {
    Cluster(ClusterName),
    Operator(String),
}

impl Author {
    fn key(&self) -> String {
        match self {
            Self::Cluster(name) => format!("cluster/{name}"),
            Self::Operator(name) => format!("operator/{name}"),
        }
    }
}

/// Where in the log an entry stands while it is applied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At {
    pub(crate) index: u64,
    pub(crate) unix_s: u64,
    pub(crate) sequence: u64,
}

impl Machine {
    /// An empty registry.
    pub fn new(verify: Arc<dyn Verify>) -> Self {
        Self { registry: Registry::default(), verify }
    }

    /// A registry as restored from a snapshot.
    pub fn restored(registry: Registry, verify: Arc<dyn Verify>) -> Self {
        Self { registry, verify }
    }

    /// The state after the last entry applied.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Applies the entry at `index`, which must be the next one. Empty data only moves the hash chain.
    pub fn apply(&mut self, index: u64, data: &[u8]) -> Outcome {
        debug_assert_eq!(index, self.registry.index + 1, "entries are applied in order");
        self.registry.hash = self.registry.hash.chain(index, data);
        self.registry.index = index;
        if data.is_empty() {
            return Ok(());
        }
        let stamped = Stamped::from_bytes(data)?;
        self.apply_entry(index, stamped.unix_s, &stamped.entry)
    }

    /// Chains the entry at `index` without running it: a change of the Raft group, which is no command.
    pub fn skip(&mut self, index: u64, data: &[u8]) {
        self.registry.hash = self.registry.hash.chain(index, data);
        self.registry.index = index;
    }

    fn apply_entry(&mut self, index: u64, stamp_s: u64, bytes: &[u8]) -> Outcome {
        let entry = SignedEntry::from_bytes(bytes)?;
        let payload = entry.payload()?;
        let print = Fingerprint::of(bytes);
        // The time moves only as far as leader and writer agree, so neither alone can age the mesh.
        let unix_s = self.registry.unix_s.max(stamp_s.min(payload.unix_s().saturating_add(CLOCK_SPREAD_MAX_S)));
        let author = self.prove(&entry, &payload, unix_s)?;
        let key = author.key();
        if let Some(writer) = self.registry.writers.get(&key) {
            match writer.recent.get(&payload.sequence) {
                // The same entry proposed twice (its first answer was lost): done already, and said so.
                Some(applied) if applied.entry == print => return applied.outcome.clone(),
                Some(_) => return Err(Rejection::Stale { sequence: payload.sequence, last: payload.sequence }),
                None if payload.sequence <= writer.floor => {
                    return Err(Rejection::Stale { sequence: payload.sequence, last: writer.floor });
                }
                None => {}
            }
        }
        self.registry.unix_s = unix_s;
        let at = At { index, unix_s, sequence: payload.sequence };
        let (what, subject) = (payload.command.kind(), payload.command.subject());
        let mesh_wide = payload.command.is_mesh_wide();
        let outcome = self.run(at, &author, payload.command);
        // A cluster that has just left keeps no writer state: its name may be used again.
        if !matches!(&author, Author::Cluster(name) if !self.registry.clusters.contains_key(name)) {
            self.remember(&key, at.sequence, Applied { entry: print, outcome: outcome.clone() });
        }
        if mesh_wide && outcome.is_ok() {
            self.note(AuditRecord { index, unix_s, writer: key, what: what.into(), subject });
        }
        outcome
    }

    fn remember(&mut self, writer: &str, sequence: u64, applied: Applied) {
        let writers = Arc::make_mut(&mut self.registry.writers);
        let state = writers.entry(writer.to_owned()).or_default();
        state.recent.insert(sequence, applied);
        while state.recent.len() > WINDOW {
            if let Some((spent, _)) = state.recent.pop_first() {
                state.floor = spent;
            }
        }
    }

    fn note(&mut self, record: AuditRecord) {
        let audit = Arc::make_mut(&mut self.registry.audit);
        if audit.len() == AUDIT_MAX {
            audit.pop_front();
        }
        audit.push_back(record);
    }

    /// Checks mesh, signature and chain.
    fn prove(&self, entry: &SignedEntry, payload: &Payload, unix_s: u64) -> Result<Author, Rejection> {
        let unproven = |error: crate::verify::Unproven| Rejection::Unproven(error.to_string());
        let (mesh, roots) = match (&self.registry.mesh, &payload.command) {
            (None, Command::Init { mesh, chain, trust_domain, roots, cluster, .. }) => {
                let trust = Trust { domain: trust_domain, roots, unix_s };
                let named = self.verify.cluster(trust, chain).map_err(unproven)?;
                let writer = entry.writer()?;
                let first = chain.first().ok_or(Rejection::Unproven("an empty chain".into()))?;
                self.verify.signature(first, &entry.signed_bytes(), entry.signature()).map_err(unproven)?;
                if writer != Writer::Cluster(cluster.clone()) || named != *cluster || *mesh != payload.mesh {
                    return Err(Rejection::NotYours("the first cluster's chain, writer and name differ".into()));
                }
                return Ok(Author::Cluster(named));
            }
            (None, _) => return Err(Rejection::NoMesh),
            (Some(_), Command::Init { .. }) => return Err(Rejection::MeshExists),
            (Some(mesh), _) => (mesh, &mesh.roots),
        };
        if payload.mesh != mesh.name {
            return Err(Rejection::OtherMesh {
                meant: payload.mesh.chars().take(64).collect(),
                own: mesh.name.clone(),
            });
        }
        let trust = Trust { domain: &mesh.trust_domain, roots, unix_s };
        match entry.writer()? {
            Writer::Cluster(name) => {
                let record = self.member(&name)?;
                self.signed_by_cluster(record, entry)?;
                Ok(Author::Cluster(name))
            }
            Writer::Operator(chain) => {
                let name = self.verify.operator(trust, &chain).map_err(unproven)?;
                let leaf = chain.first().ok_or(Rejection::Unproven("an empty chain".into()))?;
                self.verify.signature(leaf, &entry.signed_bytes(), entry.signature()).map_err(unproven)?;
                Ok(Author::Operator(name))
            }
        }
    }

    /// By the current intermediate's key, or the one before it: a renewal must not void what is on its way.
    fn signed_by_cluster(&self, record: &ClusterRecord, entry: &SignedEntry) -> Result<(), Rejection> {
        let message = entry.signed_bytes();
        let keys = record.chain.first().into_iter().chain(record.previous.first());
        let mut last = Rejection::Unproven("the cluster has no certificate".into());
        for certificate in keys {
            match self.verify.signature(certificate, &message, entry.signature()) {
                Ok(()) => return Ok(()),
                Err(error) => last = Rejection::Unproven(format!("cluster {}: {error}", record.name)),
            }
        }
        Err(last)
    }

    fn member(&self, name: &ClusterName) -> Result<&Arc<ClusterRecord>, Rejection> {
        self.registry.clusters.get(name).ok_or_else(|| Rejection::NotAMember(name.clone()))
    }

    fn run(&mut self, at: At, author: &Author, command: Command) -> Outcome {
        match author {
            Author::Cluster(name) => self.run_as_cluster(at, name, command),
            Author::Operator(name) => self.run_as_operator(at, name, command),
        }
    }

    fn run_as_cluster(&mut self, at: At, writer: &ClusterName, command: Command) -> Outcome {
        match command {
            Command::Init { mesh, trust_domain, roots, cluster, chain, facts } => {
                self.init(at, mesh, trust_domain, roots, cluster, chain, facts)
            }
            Command::JoinRequest { secret, cluster, csr, facts } => self.join_request(at, &secret, cluster, csr, facts),
            Command::RenewRequest { csr } => self.renew_request(at, writer, csr),
            Command::Grant { cluster, chain } => self.signer(writer).and_then(|()| self.grant(at, cluster, chain)),
            Command::AddToken { id, hash, cluster, namespaces, expires_unix_s } => {
                self.signer(writer)?;
                self.add_token(at, id, hash, cluster, namespaces, expires_unix_s)
            }
            Command::RevokeToken { id } => self.signer(writer).and_then(|()| self.revoke_token(&id)),
            Command::UpdateCluster { facts } => self.update_cluster(writer, facts),
            Command::PutExport { export } => self.put_export(at, writer, export),
            Command::DeleteExport { namespace, name } => self.delete_export(writer, &namespace, &name),
            Command::PutServiceEntry { entry } => self.put_service_entry(at, writer, entry),
            Command::DeleteServiceEntry { namespace, name } => self.delete_service_entry(writer, &namespace, &name),
            Command::Leave {} => self.remove(at, writer.clone(), false),
            Command::PutConfig { .. }
            | Command::DeleteConfig { .. }
            | Command::Evict { .. }
            | Command::SetSigner { .. } => Err(Rejection::OperatorOnly { what: command.kind().into() }),
        }
    }

    fn run_as_operator(&mut self, at: At, operator: &str, command: Command) -> Outcome {
        match command {
            Command::AddToken { id, hash, cluster, namespaces, expires_unix_s } => {
                self.add_token(at, id, hash, cluster, namespaces, expires_unix_s)
            }
            Command::RevokeToken { id } => self.revoke_token(&id),
            Command::SetSigner { cluster, signer } => self.set_signer(&cluster, signer),
            Command::PutConfig { key, json } => self.put_config(at, operator, key, json),
            Command::DeleteConfig { key } => self.delete_config(&key),
            Command::Evict { cluster, .. } => self.remove(at, cluster, true),
            other => Err(Rejection::ClusterOnly { what: other.kind().into() }),
        }
    }

    fn signer(&self, writer: &ClusterName) -> Outcome {
        match self.member(writer)?.signer {
            true => Ok(()),
            false => Err(Rejection::NotASigner(writer.clone())),
        }
    }
}

impl From<EntryError> for Rejection {
    fn from(error: EntryError) -> Self {
        Self::Malformed(error.to_string())
    }
}
