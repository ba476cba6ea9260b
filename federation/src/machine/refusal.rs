//! Why an entry changes nothing: one word for machines, one sentence for people.

use isthmus_model::ClusterName;
use serde::{Deserialize, Serialize};

/// Why an entry changed nothing. It stays in the log; every member refuses it alike.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// Not an entry, or of a form that is not known.
    #[error("{0}")]
    Malformed(String),
    /// The log's first entry is not `Init`.
    #[error("this log founds no mesh yet; `isthmus init` writes its first entry")]
    NoMesh,
    /// A second `Init`.
    #[error("this log has founded a mesh already")]
    MeshExists,
    /// Written for another mesh.
    #[error("entry for mesh {meant:?} in the log of mesh {own:?}; its writer follows the wrong mesh")]
    OtherMesh {
        /// The mesh it names.
        meant: String,
        /// This one.
        own: String,
    },
    /// Signature or chain does not hold.
    #[error("not proven: {0}")]
    Unproven(String),
    /// The writer (or the cluster it is about) is not a member.
    #[error("{0} is not a cluster of this mesh; it may have left, or its join is not granted yet")]
    NotAMember(ClusterName),
    /// Only signers may do this.
    #[error("cluster {0} is not listed as a signer; an operator lists it with `isthmus signer add {0}`")]
    NotASigner(ClusterName),
    /// An older entry of the same writer, or one repeated.
    #[error("sequence {sequence} of this writer is not newer than {last}; sign the entry again")]
    Stale {
        /// Its number.
        sequence: u64,
        /// The writer's last.
        last: u64,
    },
    /// Somebody else's record.
    #[error("not the writer's own: {0}")]
    NotYours(String),
    /// Only operators may do this.
    #[error("{what} changes the whole mesh and needs an operator's certificate, not a cluster's")]
    OperatorOnly {
        /// The command.
        what: String,
    },
    /// Only the cluster itself may do this.
    #[error("{what} is written by the cluster it is about, not by an operator")]
    ClusterOnly {
        /// The command.
        what: String,
    },
    /// No such token.
    #[error("unknown join token; make a new one with `isthmus token create`")]
    TokenUnknown,
    /// Used before.
    #[error("join token {id} was used already (log position {index}); make a new one with `isthmus token create`")]
    TokenUsed {
        /// Its id.
        id: String,
        /// By which entry.
        index: u64,
    },
    /// Too old.
    #[error("join token {id} ended {ago_s} s ago; make a new one with `isthmus token create`")]
    TokenExpired {
        /// Its id.
        id: String,
        /// On the log's time.
        ago_s: u64,
    },
    /// Revoked.
    #[error("join token {0} was revoked; make a new one with `isthmus token create`")]
    TokenRevoked(String),
    /// Made for another name.
    #[error("this join token is for cluster {for_cluster}, not {asked}")]
    NameMismatch {
        /// The token's.
        for_cluster: ClusterName,
        /// The joiner's.
        asked: ClusterName,
    },
    /// There is one already.
    #[error("a cluster named {0} is in the mesh; choose another name, or `isthmus evict {0}` first")]
    NameTaken(ClusterName),
    /// Nothing was asked for.
    #[error("cluster {0} has no open certificate request")]
    NoRequest(ClusterName),
    /// A namespace that was not granted.
    #[error("cluster {cluster} may not export namespace {namespace}; its token allowed {allowed:?}")]
    NamespaceNotGranted {
        /// Which cluster.
        cluster: ClusterName,
        /// Which namespace.
        namespace: String,
        /// What it may.
        allowed: Vec<String>,
    },
    /// Nothing to delete.
    #[error("there is no {0}")]
    Absent(String),
    /// A value that cannot be.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which field.
        field: String,
        /// What is wrong, with the rule.
        problem: String,
    },
    /// A quota is used up.
    #[error("{what}: the limit of {max} is reached")]
    QuotaReached {
        /// Of what.
        what: String,
        /// The limit.
        max: usize,
    },
    /// Would leave the mesh without a member or signer.
    #[error("{0} is the last signer; list another one first with `isthmus signer add`")]
    LastSigner(ClusterName),
}

impl Rejection {
    /// A fixed word for metrics, statuses and the wire.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Malformed(_) => "malformed",
            Self::NoMesh => "no_mesh",
            Self::MeshExists => "mesh_exists",
            Self::OtherMesh { .. } => "other_mesh",
            Self::Unproven(_) => "unproven",
            Self::NotAMember(_) => "not_a_member",
            Self::NotASigner(_) => "not_a_signer",
            Self::Stale { .. } => "stale",
            Self::NotYours(_) => "not_yours",
            Self::OperatorOnly { .. } => "operator_only",
            Self::ClusterOnly { .. } => "cluster_only",
            Self::TokenUnknown => "token_unknown",
            Self::TokenUsed { .. } => "token_used",
            Self::TokenExpired { .. } => "token_expired",
            Self::TokenRevoked(_) => "token_revoked",
            Self::NameMismatch { .. } => "name_mismatch",
            Self::NameTaken(_) => "name_taken",
            Self::NoRequest(_) => "no_request",
            Self::NamespaceNotGranted { .. } => "namespace_not_granted",
            Self::Absent(_) => "absent",
            Self::Invalid { .. } => "invalid",
            Self::QuotaReached { .. } => "quota",
            Self::LastSigner(_) => "last_signer",
        }
    }

    pub(crate) fn invalid(field: &str, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }
}

/// A [`Rejection`] as it reaches the proposer, who may be on another member of another version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// [`Rejection::reason`].
    pub reason: String,
    /// Cause and fix.
    pub message: String,
}

impl From<&Rejection> for Refusal {
    fn from(refusal: &Rejection) -> Self {
        Self { reason: refusal.reason().into(), message: refusal.to_string() }
    }
}
