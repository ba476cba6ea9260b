//! The log as the `raft` crate reads it: a mirror in memory of what the store holds.
//!
//! Bounded by snapshots: [`crate::raft::driver`] compacts it once it exceeds its limits. Reads therefore
//! never wait for a disk, and the store only ever appends.

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::{Error, GetEntriesContext, RaftState, Storage, StorageError};

use super::group::{contains, founding};
use crate::store::Loaded;

/// Entries since the last snapshot, and that snapshot.
#[derive(Debug, Clone, Default)]
pub struct Log {
    hard_state: HardState,
    conf_state: ConfState,
    /// Position of the last entry that the snapshot contains.
    base_index: u64,
    base_term: u64,
    entries: Vec<Entry>,
    bytes: usize,
    /// Registry at `snapshot_index`, as [`crate::raft::snapshot`] writes it.
    snapshot: Snapshot,
}

impl Log {
    /// What the store found on disk.
    pub fn from_loaded(loaded: &Loaded) -> Self {
        let mut log = Self {
            hard_state: loaded.hard_state.clone(),
            conf_state: ConfState::default(),
            base_index: loaded.base.0,
            base_term: loaded.base.1,
            snapshot: loaded.snapshot.clone(),
            ..Self::default()
        };
        if log.snapshot_index() == 0 {
            let metadata = SnapshotMetadata { conf_state: Some(founding()), ..SnapshotMetadata::default() };
            log.snapshot.metadata = Some(metadata);
        }
        log.conf_state = log.snapshot_group().clone();
        log.append(&loaded.entries);
        log
    }

    /// Appends, replacing whatever conflicts.
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let keep = usize::try_from(first.index.saturating_sub(self.base_index + 1)).unwrap_or(usize::MAX);
        debug_assert!(keep <= self.entries.len(), "a gap in the log: {} after {}", first.index, self.last());
        if keep < self.entries.len() {
            self.bytes -= self.entries[keep..].iter().map(|entry| entry.data.len()).sum::<usize>();
            self.entries.truncate(keep);
        }
        self.bytes += entries.iter().map(|entry| entry.data.len()).sum::<usize>();
        self.entries.extend_from_slice(entries);
    }

    /// Sets term, vote and commit.
    pub fn set_hard_state(&mut self, hard_state: HardState) {
        self.hard_state = hard_state;
    }

    /// Term, vote and commit.
    pub fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    /// The group as of the last applied entry.
    pub fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    /// The group changed.
    pub fn set_conf_state(&mut self, conf_state: ConfState) {
        self.conf_state = conf_state;
    }

    /// Replaces everything up to the snapshot's position (and all else, if the log does not reach it).
    pub fn install(&mut self, snapshot: Snapshot) {
        let meta = snapshot.metadata.clone().unwrap_or_default();
        self.entries.clear();
        self.bytes = 0;
        self.base_index = meta.index;
        self.base_term = meta.term;
        self.conf_state = meta.conf_state.unwrap_or_default();
        self.hard_state.term = self.hard_state.term.max(meta.term);
        self.hard_state.commit = self.hard_state.commit.max(meta.index);
        self.snapshot = snapshot;
    }

    /// Keeps a snapshot of our own and drops entries up to `keep_from`, exclusive.
    ///
    /// A tail is kept so that a member that lags a little needs no snapshot.
    pub fn compact(&mut self, snapshot: Snapshot, keep_from: u64) {
        self.snapshot = snapshot;
        let drop_to = keep_from.saturating_sub(1).min(self.snapshot_index());
        if drop_to <= self.base_index {
            return;
        }
        let count = usize::try_from(drop_to - self.base_index).unwrap_or(usize::MAX).min(self.entries.len());
        if let Some(last) = count.checked_sub(1).and_then(|last| self.entries.get(last)) {
            self.base_term = last.term;
            self.base_index = last.index;
        }
        self.bytes -= self.entries[..count].iter().map(|entry| entry.data.len()).sum::<usize>();
        self.entries.drain(..count);
    }

    /// The snapshot that the log starts from; empty before the first.
    pub fn snapshot_now(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The snapshot's position; 0 before the first.
    pub fn snapshot_index(&self) -> u64 {
        self.snapshot.metadata.as_ref().map_or(0, |meta| meta.index)
    }

    /// The group at the snapshot's position.
    pub fn snapshot_group(&self) -> &ConfState {
        static NONE: std::sync::LazyLock<ConfState> = std::sync::LazyLock::new(ConfState::default);
        self.snapshot.metadata.as_ref().and_then(|meta| meta.conf_state.as_ref()).unwrap_or(&NONE)
    }

    /// Entries held, and the bytes in them.
    pub fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }

    /// Position of the first entry held.
    pub fn first(&self) -> u64 {
        self.base_index + 1
    }

    /// Position of the last entry.
    pub fn last(&self) -> u64 {
        self.base_index + self.entries.len() as u64
    }

    /// The term at a position, if it is known.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        match index.checked_sub(self.base_index)? {
            0 => Some(self.base_term),
            offset => self.entries.get(usize::try_from(offset - 1).ok()?).map(|entry| entry.term),
        }
    }

    /// Entries from `low` on, at most `count` and about `bytes`; `None` if `low` is compacted away.
    pub fn slice(&self, low: u64, high: u64, bytes: u64) -> Option<&[Entry]> {
        let start = usize::try_from(low.checked_sub(self.first())?).ok()?;
        let end = usize::try_from(high.checked_sub(self.first())?).ok()?.min(self.entries.len());
        let all = self.entries.get(start..end.max(start))?;
        let mut total = 0u64;
        let fits = |entry: &&Entry| {
            total = total.saturating_add(entry.data.len() as u64 + ENTRY_OVERHEAD);
            total <= bytes
        };
        let count = all.iter().take_while(fits).count().max(1).min(all.len());
        Some(&all[..count])
    }
}

/// Bytes of an entry besides its data, roughly.
const ENTRY_OVERHEAD: u64 = 24;

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        // The group as of the snapshot, from which the library replays the log's own changes.
        Ok(RaftState::new(self.hard_state.clone(), self.snapshot_group().clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(Error::Store(StorageError::Compacted));
        }
        let bytes = max_size.into().unwrap_or(u64::MAX);
        self.slice(low, high, bytes).map(<[Entry]>::to_vec).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.base_index {
            return Err(Error::Store(StorageError::Compacted));
        }
        self.term_at(index).ok_or(Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let index = self.snapshot_index();
        if index == 0 || index < request_index || !contains(self.snapshot_group(), to) {
            // The driver writes one at its next turn, and raft asks again.
            return Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable));
        }
        Ok(self.snapshot.clone())
    }
}
