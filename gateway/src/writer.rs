//! Writes to the log in this cluster's name: signs, proposes, and says what became of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use isthmus_federation::command::{Command, SignError, SignedEntry, Signer, Writer};
use isthmus_federation::machine::Refusal;
use isthmus_federation::member::{MemberHandle, ProposeError};
use isthmus_model::ClusterName;

/// Why something was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The registry said no; the same on every member.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// It is not known what became of it.
    #[error(transparent)]
    Unknown(#[from] ProposeError),
    /// It could not be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
}

impl WriteError {
    /// A fixed word for statuses and metric labels.
    pub fn reason(&self) -> &str {
        match self {
            Self::Refused(refusal) => &refusal.reason,
            Self::Unknown(error) => error.reason(),
            Self::Sign(_) => "sign",
        }
    }
}

/// This cluster as a writer of the log. Cheap to clone.
#[derive(Clone)]
pub struct ClusterWriter {
    mesh: Arc<str>,
    own: ClusterName,
    signer: Arc<dyn Signer>,
    member: MemberHandle,
    last: Arc<AtomicU64>,
}

impl ClusterWriter {
    /// A writer for `own`, whose intermediate's key is behind `signer`.
    pub fn new(mesh: &str, own: ClusterName, signer: Arc<dyn Signer>, member: MemberHandle) -> Self {
        Self { mesh: mesh.into(), own, signer, member, last: Arc::default() }
    }

    /// Writes one command and waits until it is applied; returns its log position.
    ///
    /// # Errors
    /// [`WriteError`]; after [`WriteError::Unknown`] it may yet be applied.
    pub async fn write(&self, command: Command) -> Result<u64, WriteError> {
        let writer = Writer::Cluster(self.own.clone());
        let entry = SignedEntry::sign(&writer, &self.mesh, self.next_sequence(), command, &*self.signer)?;
        let committed = self.member.propose(entry).await?;
        committed.outcome.map_err(WriteError::Refused)?;
        Ok(committed.index)
    }

    /// Microseconds of Unix time, but always more than the last: entries apply in the writer's order.
    fn next_sequence(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_micros() as u64);
        let step = |last| Some(now.max(last + 1));
        let last = self.last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, step).unwrap_or_default();
        now.max(last + 1)
    }
}
