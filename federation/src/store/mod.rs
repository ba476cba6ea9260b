//! What must survive a crash: log, term and vote, snapshot, and the cluster's own workload tokens.
//!
//! [`Store`] is the seam: [`disk`] is redb, [`memory`] a disk that forgets what was not synced, for the
//! simulation. Stores only load and append; reads are served from memory ([`crate::raft::log`]).

pub mod disk;
pub mod memory;
mod persist;
mod tokens;

use raft::eraftpb::{Entry, HardState, Snapshot};

pub use disk::restore;
pub use persist::{Durable, Persist};
pub use tokens::WorkloadToken;

/// What a store holds when it is opened.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// Term, vote and commit.
    pub hard_state: HardState,
    /// Position and term of the entry before the first one held.
    pub base: (u64, u64),
    /// The log from there.
    pub entries: Vec<Entry>,
    /// The newest snapshot; empty (position 0) before the first.
    pub snapshot: Snapshot,
    /// Whether this cluster takes part in the Raft group.
    pub in_group: bool,
    /// Whether the store was restored and must not take part yet.
    pub forgetful: bool,
    /// Whether nothing was ever written.
    pub fresh: bool,
}

/// Durable storage of one member.
pub trait Store {
    /// Reads everything, checking it.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if anything is missing, damaged or contradicts itself.
    fn load(&mut self) -> Result<Loaded, StoreError>;

    /// Makes `persist` safe, all or nothing, and proves it.
    ///
    /// # Errors
    /// After any error the store is useless: the caller stops and never tries again (a failed fsync may
    /// have dropped the pages it failed on).
    fn write(&mut self, persist: &Persist) -> Result<Durable, StoreError>;
}

/// Why the store cannot be used. The member stops voting and keeps serving what it knows.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file is damaged.
    #[error(
        "{file} is damaged: {what}. This member will not start from it: a shorter log could lose acknowledged writes. Restore it with `isthmus store restore --config GATEWAY.YAML`: the log then comes from the other clusters"
    )]
    Corrupt {
        /// Which file.
        file: String,
        /// Where and what.
        what: String,
    },
    /// It belongs to another mesh or cluster.
    #[error("{file} belongs to {found}, this gateway is {expected}; check `state_dir`")]
    Foreign {
        /// Which file.
        file: String,
        /// Whose it is.
        found: String,
        /// Who asked.
        expected: String,
    },
    /// Reading or writing failed; a failed write is never tried again.
    #[error(
        "{file}: {what}; the member stops (a failed write is never tried again), free or repair the disk and restart"
    )]
    Io {
        /// Which file.
        file: String,
        /// The system's words.
        what: String,
    },
    /// Another process has it open.
    #[error("{file} is open in another process: two members of one cluster must never run")]
    Busy {
        /// Which file.
        file: String,
    },
}

/// The log must be gapless from its base, and contain what it claims to have committed.
pub(crate) fn check(loaded: &Loaded) -> Result<(), String> {
    let mut expected = loaded.base.0 + 1;
    let mut term = loaded.base.1;
    for entry in &loaded.entries {
        if entry.index != expected || entry.term < term {
            return Err(format!(
                "log position {expected} holds entry {} of term {} after term {term}",
                entry.index, entry.term
            ));
        }
        (expected, term) = (expected + 1, entry.term);
    }
    let snapshot = loaded.snapshot.metadata.as_ref().map_or(0, |meta| meta.index);
    if snapshot < loaded.base.0 || snapshot >= expected {
        return Err(format!("snapshot at {snapshot}, log from {} to {}", loaded.base.0 + 1, expected - 1));
    }
    if loaded.hard_state.commit >= expected {
        return Err(format!("committed {}, but the log ends at {}", loaded.hard_state.commit, expected - 1));
    }
    if term > loaded.hard_state.term {
        return Err(format!("last entry of term {term}, but the term is {}", loaded.hard_state.term));
    }
    Ok(())
}
