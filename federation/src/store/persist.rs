//! What is written in one go, and the proof that it was.

use raft::eraftpb::{Entry, HardState, Snapshot};

/// What must be safe on disk before anything else of its batch happens.
#[derive(Debug, Clone, Default)]
pub struct Persist {
    /// The batch it belongs to; 0 outside batches.
    pub number: u64,
    /// Term, vote and commit, if they changed.
    pub hard_state: Option<HardState>,
    /// Entries to append; whatever lies at or after the first one's position is replaced.
    pub entries: Vec<Entry>,
    /// A snapshot that replaces the log; written before the entries.
    pub install: Option<Snapshot>,
    /// A snapshot of our own, and the first position to keep: entries before it are dropped.
    pub compact: Option<(Snapshot, u64)>,
    /// Whether this store's cluster takes part in the Raft group from now on, or no longer.
    pub in_group: Option<bool>,
    /// Whether the store was restored and must not take part yet.
    pub forgetful: Option<bool>,
    /// Whether a crash may lose it: only where nothing promised depends on it (a commit position).
    pub lazy: bool,
}

impl Persist {
    /// An empty one, of the batch with this number.
    pub fn numbered(number: u64) -> Self {
        Self { number, ..Self::default() }
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.hard_state.is_none()
            && self.entries.is_empty()
            && self.install.is_none()
            && self.compact.is_none()
            && self.in_group.is_none()
            && self.forgetful.is_none()
    }

    /// Stores make this, after the write; nobody else can.
    pub(super) fn made_durable(&self) -> Durable {
        Durable { number: self.number }
    }
}

/// Proof that one [`Persist`] is safe.
#[derive(Debug)]
#[must_use = "a proof is there to be redeemed"]
pub struct Durable {
    number: u64,
}

impl Durable {
    /// The batch it proves.
    pub fn number(&self) -> u64 {
        self.number
    }
}
