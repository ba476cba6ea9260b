//! What may enter the log: commands, signed by their writer.
//!
//! Nothing here decides whether a command is allowed; that is [`crate::machine`], which reads the
//! same bytes on every member and comes to the same answer.

use std::fmt;

use isthmus_model::service::{Export, Patterns, ServiceEntry};
use isthmus_model::{ClusterName, Locality, Namespace, ServiceName, TrustDomain};
use prost::Message as _;
use serde::{Deserialize, Serialize};

use crate::der::{Der, Fingerprint};

/// The highest form of log entries that this build reads and writes.
pub const FORM_MAX: u32 = 1;
/// Longest entry: far above the largest legal export (64 ports, 64 accounts), far below a link's frame.
pub const ENTRY_LEN_MAX: usize = 256 * 1024;

/// Who signed an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Writer {
    /// A cluster, by the key of its intermediate; the certificate is its record's, or `Init`'s own.
    Cluster(ClusterName),
    /// An operator: certificate chain without the root, leaf first.
    Operator(Vec<Der>),
}

/// One command, its writer and the signature: the bytes that are proposed, committed and verified.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SignedEntry {
    #[prost(uint32, tag = "1")]
    form: u32,
    #[prost(string, tag = "2")]
    cluster: String,
    #[prost(bytes = "vec", repeated, tag = "3")]
    operator_chain: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "4")]
    payload: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    signature: Vec<u8>,
}

/// Signs an entry: ECDSA P-256 over SHA-256, ASN.1 form, by the key of the writer's certificate.
pub trait Signer: Send + Sync {
    /// Signs `message`.
    ///
    /// # Errors
    /// [`SignError`] if the key cannot be used (a hook that does not answer, for example).
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError>;
}

/// The writer's key could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("signing failed: {0}")]
pub struct SignError(pub String);

/// Why bytes are no entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// Longer than [`ENTRY_LEN_MAX`].
    #[error("a log entry of {0} bytes is longer than {ENTRY_LEN_MAX}")]
    TooLong(usize),
    /// Not an entry.
    #[error("not a log entry: {0}")]
    Malformed(String),
    /// Written in a form that this build does not know.
    #[error("log entry of form {0}, this build knows up to {FORM_MAX}: upgrade this gateway")]
    UnknownForm(u32),
}

impl SignedEntry {
    /// Writes and signs `command`.
    ///
    /// `sequence` is the writer's Unix time in microseconds, but greater than in all of its entries before:
    /// an entry is applied once, whoever repeats it. Up to [`crate::machine::WINDOW`] may be under way;
    /// await one write of a record before signing the next of the same record.
    ///
    /// # Errors
    /// Those of the signer, and a command longer than [`ENTRY_LEN_MAX`].
    pub fn sign(
        writer: &Writer,
        mesh: &str,
        sequence: u64,
        command: Command,
        signer: &dyn Signer,
    ) -> Result<Self, SignError> {
        let payload = Payload { mesh: mesh.to_owned(), sequence, command };
        let payload = serde_json::to_vec(&payload).map_err(|error| SignError(error.to_string()))?;
        let mut entry = Self { form: FORM_MAX, payload, ..Self::default() };
        match writer {
            Writer::Cluster(name) => entry.cluster = name.to_string(),
            Writer::Operator(chain) => entry.operator_chain = chain.iter().map(|der| der.0.clone()).collect(),
        }
        entry.signature = signer.sign(&entry.signed_bytes())?;
        match entry.encoded_len() {
            len if len > ENTRY_LEN_MAX => Err(SignError(EntryError::TooLong(len).to_string())),
            _ => Ok(entry),
        }
    }

    /// What the signature covers: a fixed prefix, the form, the writer and the payload.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let mut bytes = b"isthmus log entry\0".to_vec();
        bytes.extend_from_slice(&self.form.to_be_bytes());
        bytes.extend_from_slice(&(self.cluster.len() as u64).to_be_bytes());
        bytes.extend_from_slice(self.cluster.as_bytes());
        bytes.extend_from_slice(&self.payload);
        bytes
    }

    /// The bytes that travel and are stored.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Reads an entry. The signature is not checked here.
    ///
    /// # Errors
    /// [`EntryError`]; never panics.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, EntryError> {
        if bytes.len() > ENTRY_LEN_MAX {
            return Err(EntryError::TooLong(bytes.len()));
        }
        let entry = Self::decode(bytes).map_err(|error| EntryError::Malformed(error.to_string()))?;
        match entry.form {
            1..=FORM_MAX => Ok(entry),
            form => Err(EntryError::UnknownForm(form)),
        }
    }

    /// Who claims to have written it.
    ///
    /// # Errors
    /// [`EntryError::Malformed`] if neither or both kinds of writer are named.
    pub fn writer(&self) -> Result<Writer, EntryError> {
        match (self.cluster.as_str(), self.operator_chain.as_slice()) {
            ("", []) => Err(EntryError::Malformed("no writer".into())),
            ("", chain) => Ok(Writer::Operator(chain.iter().cloned().map(Der).collect())),
            (name, []) => name.parse().map(Writer::Cluster).map_err(|e| EntryError::Malformed(format!("{e}"))),
            _ => Err(EntryError::Malformed("two writers".into())),
        }
    }

    /// The command and what binds it to its mesh and place.
    ///
    /// # Errors
    /// [`EntryError::Malformed`], naming the line and column.
    pub fn payload(&self) -> Result<Payload, EntryError> {
        serde_json::from_slice(&self.payload).map_err(|error| EntryError::Malformed(error.to_string()))
    }

    /// The signature's bytes.
    pub fn signature(&self) -> &[u8] {
        &self.signature
    }
}

/// What the writer signed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    /// The mesh it is meant for.
    pub mesh: String,
    /// The writer's clock in microseconds of Unix time, greater than in every entry of its before. The log's
    /// time moves only as far as writer and leader agree.
    pub sequence: u64,
    /// What to do.
    pub command: Command,
}

impl Payload {
    /// The writer's clock, Unix seconds.
    pub fn unix_s(&self) -> u64 {
        self.sequence / 1_000_000
    }
}

/// A change of the registry. Who may write which is said at each, and enforced by [`crate::machine`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Command {
    /// Founds the mesh; the first entry of its log, signed by the first cluster.
    Init {
        /// The mesh's name.
        mesh: String,
        /// Its trust domain.
        trust_domain: TrustDomain,
        /// Root certificates.
        roots: Vec<Der>,
        /// The first cluster; it is a signer.
        cluster: ClusterName,
        /// Its intermediate, without the root.
        chain: Vec<Der>,
        /// What else is known of it.
        facts: ClusterFacts,
    },
    /// Lets a cluster join once. By an operator, or by a signer (which holds the root key anyway).
    AddToken {
        /// Names the token in tables and in `RevokeToken`.
        id: String,
        /// [`token_hash`] of its secret.
        hash: Fingerprint,
        /// The only name it can be used for.
        cluster: ClusterName,
        /// For which namespaces the new cluster may issue identities and export services.
        namespaces: Patterns,
        /// When it ends, Unix seconds.
        expires_unix_s: u64,
    },
    /// Makes a token useless. By whom `AddToken` is.
    RevokeToken {
        /// Which.
        id: String,
    },
    /// A cluster asks to join, through any gateway of the mesh; consumes the token.
    JoinRequest {
        /// The token's secret: worthless once this entry is applied.
        secret: String,
        /// The name asked for.
        cluster: ClusterName,
        /// PKCS#10 request for its intermediate.
        csr: Der,
        /// What else is known of it.
        facts: ClusterFacts,
    },
    /// A cluster asks for a new intermediate before its own ends. By itself.
    RenewRequest {
        /// PKCS#10 request.
        csr: Der,
    },
    /// Answers a `JoinRequest` or `RenewRequest`. By a signer.
    Grant {
        /// Whose request.
        cluster: ClusterName,
        /// The intermediate, without the root.
        chain: Vec<Der>,
    },
    /// Its own addresses, place and versions. By the cluster.
    UpdateCluster {
        /// The new facts.
        facts: ClusterFacts,
    },
    /// Lists another cluster as signer, or ends that. By an operator.
    SetSigner {
        /// Which cluster.
        cluster: ClusterName,
        /// Whether it holds the root key.
        signer: bool,
    },
    /// Exports a service or changes an export. By the exporting cluster.
    PutExport {
        /// The export.
        export: Export,
    },
    /// Ends an export. By the exporting cluster.
    DeleteExport {
        /// Namespace of the service.
        namespace: Namespace,
        /// Its name.
        name: ServiceName,
    },
    /// Writes a ServiceEntry. By the cluster that owns it.
    PutServiceEntry {
        /// The entry.
        entry: ServiceEntry,
    },
    /// Removes a ServiceEntry. By the cluster that owns it.
    DeleteServiceEntry {
        /// Its namespace.
        namespace: Namespace,
        /// Its name.
        name: ServiceName,
    },
    /// Writes mesh-wide configuration. By an operator.
    PutConfig {
        /// Which object.
        key: ConfigKey,
        /// JSON of `model::view::Resource`.
        json: String,
    },
    /// Removes mesh-wide configuration. By an operator.
    DeleteConfig {
        /// Which object.
        key: ConfigKey,
    },
    /// Leaves the mesh. By the cluster itself.
    Leave {},
    /// Throws a cluster out. By an operator.
    Evict {
        /// Which.
        cluster: ClusterName,
        /// Why, for the audit log; at most 256 bytes.
        reason: String,
    },
}

impl Command {
    /// A fixed word for metrics, logs and the audit table.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Init { .. } => "init",
            Self::AddToken { .. } => "add_token",
            Self::RevokeToken { .. } => "revoke_token",
            Self::JoinRequest { .. } => "join_request",
            Self::RenewRequest { .. } => "renew_request",
            Self::Grant { .. } => "grant",
            Self::UpdateCluster { .. } => "update_cluster",
            Self::SetSigner { .. } => "set_signer",
            Self::PutExport { .. } => "put_export",
            Self::DeleteExport { .. } => "delete_export",
            Self::PutServiceEntry { .. } => "put_service_entry",
            Self::DeleteServiceEntry { .. } => "delete_service_entry",
            Self::PutConfig { .. } => "put_config",
            Self::DeleteConfig { .. } => "delete_config",
            Self::Leave {} => "leave",
            Self::Evict { .. } => "evict",
        }
    }
}

impl Command {
    /// Whether it touches more than the writer's own records, and so is kept in the audit log.
    pub fn is_mesh_wide(&self) -> bool {
        !matches!(
            self,
            Self::UpdateCluster { .. }
                | Self::PutExport { .. }
                | Self::DeleteExport { .. }
                | Self::PutServiceEntry { .. }
                | Self::DeleteServiceEntry { .. }
        )
    }

    /// What it is about, for the audit table.
    pub fn subject(&self) -> String {
        match self {
            Self::Init { mesh, .. } => mesh.clone(),
            Self::AddToken { id, cluster, .. } => format!("{id} for {cluster}"),
            Self::RevokeToken { id } => id.clone(),
            Self::JoinRequest { cluster, .. } | Self::Grant { cluster, .. } | Self::SetSigner { cluster, .. } => {
                cluster.to_string()
            }
            Self::Evict { cluster, reason } => format!("{cluster}: {}", reason.chars().take(256).collect::<String>()),
            Self::PutExport { export } => format!("{}/{}", export.namespace, export.name),
            Self::PutServiceEntry { entry } => format!("{}/{}", entry.namespace, entry.name),
            Self::DeleteExport { namespace, name } | Self::DeleteServiceEntry { namespace, name } => {
                format!("{namespace}/{name}")
            }
            Self::PutConfig { key, .. } | Self::DeleteConfig { key } => key.to_string(),
            Self::RenewRequest { .. } | Self::UpdateCluster { .. } | Self::Leave {} => String::new(),
        }
    }
}

/// An entry as it lies in the log: with the time of the leader that proposed it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stamped {
    /// The leader's clock, Unix seconds.
    #[prost(uint64, tag = "1")]
    pub unix_s: u64,
    /// The [`SignedEntry`]'s bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub entry: Vec<u8>,
}

impl Stamped {
    /// The bytes that lie in the log.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Reads them back.
    ///
    /// # Errors
    /// [`EntryError::Malformed`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, EntryError> {
        Self::decode(bytes).map_err(|error| EntryError::Malformed(error.to_string()))
    }
}

/// What a cluster says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFacts {
    /// Where other clusters reach its gateways, `host:port`; empty if it can only dial out. At most 16.
    pub addresses: Vec<String>,
    /// Where it runs.
    pub locality: Locality,
    /// The cloud or operator that runs it (`aws`, `gcp`, `onprem`); voters are spread over these.
    #[serde(default)]
    pub provider: String,
    /// The version of its gateways.
    pub version: String,
    /// The highest form of entries, deltas and streams that all of them read.
    pub form_max: u32,
}

/// Names one object of mesh-wide configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigKey {
    /// Its kind, as in YAML (`VirtualService`).
    pub kind: String,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ConfigKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

/// What the log keeps of a token's secret.
pub fn token_hash(secret: &str) -> Fingerprint {
    Fingerprint::of(format!("isthmus join token\0{secret}").as_bytes())
}
