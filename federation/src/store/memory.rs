//! A disk in memory that forgets what was not synced: the simulation's, and fast tests'.
//!
//! A crash drops every write since the last sync; a write that was under way is all there or not at all
//! (redb's transactions promise no less).

use std::sync::Arc;

use parking_lot::Mutex;

use super::{Durable, Loaded, Persist, Store, StoreError, check};
use crate::rng::Rng;

/// The platter: outlives the member that writes to it.
#[derive(Debug, Clone, Default)]
pub struct Platter(Arc<Mutex<State>>);

#[derive(Debug, Clone, Default)]
struct State {
    synced: Loaded,
    written: bool,
    unsynced: Vec<Persist>,
    /// Writes that will fail from now on, and how.
    fault: Option<Fault>,
    /// For proving that the oracle can see: claims durability without syncing.
    lies: bool,
}

/// How the next write goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// fsync reports an error; whether the data arrived is anybody's guess.
    Sync,
    /// The power fails during the write.
    Power,
}

impl Platter {
    /// Opens the disk for one run of a member.
    pub fn open(&self) -> MemoryStore {
        MemoryStore { platter: self.clone() }
    }

    /// The power failed: what was not synced is gone, except for a prefix that the drive wrote anyway.
    pub fn crash(&self, rng: &mut Rng) {
        let mut state = self.0.lock();
        let kept = rng.below(state.unsynced.len() as u64 + 1) as usize;
        let unsynced = std::mem::take(&mut state.unsynced);
        for persist in unsynced.iter().take(kept) {
            apply(&mut state.synced, persist);
        }
        state.written |= kept > 0;
        state.fault = None;
    }

    /// The disk was lost, and `isthmus store restore` put a fresh one in its place.
    pub fn restore(&self) {
        let mut state = self.0.lock();
        state.unsynced.clear();
        state.synced = Loaded { forgetful: true, ..Loaded::default() };
        state.written = true;
    }

    /// The next write fails.
    pub fn fail_next(&self, fault: Fault) {
        self.0.lock().fault = Some(fault);
    }

    /// From now on the disk acknowledges writes that it has not synced.
    pub fn lie(&self) {
        self.0.lock().lies = true;
    }
}

/// One member's view of its disk.
#[derive(Debug)]
pub struct MemoryStore {
    platter: Platter,
}

impl Store for MemoryStore {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let state = self.platter.0.lock();
        let mut loaded = state.synced.clone();
        for persist in &state.unsynced {
            apply(&mut loaded, persist);
        }
        loaded.fresh = !state.written && state.unsynced.is_empty();
        check(&loaded).map_err(|what| StoreError::Corrupt { file: "memory".into(), what })?;
        Ok(loaded)
    }

    fn write(&mut self, persist: &Persist) -> Result<Durable, StoreError> {
        let mut state = self.platter.0.lock();
        state.unsynced.push(persist.clone());
        if let Some(fault) = state.fault.take() {
            let what = format!("{fault:?} failure");
            return Err(StoreError::Io { file: "memory".into(), what });
        }
        if !persist.lazy && !state.lies {
            for persist in std::mem::take(&mut state.unsynced) {
                apply(&mut state.synced, &persist);
            }
            state.written = true;
        }
        Ok(persist.made_durable())
    }
}

fn apply(loaded: &mut Loaded, persist: &Persist) {
    if let Some(snapshot) = &persist.install {
        let meta = snapshot.metadata.clone().unwrap_or_default();
        loaded.entries.clear();
        loaded.base = (meta.index, meta.term);
        loaded.snapshot = snapshot.clone();
        loaded.hard_state.term = loaded.hard_state.term.max(meta.term);
        loaded.hard_state.commit = loaded.hard_state.commit.max(meta.index);
    }
    if let Some(first) = persist.entries.first() {
        let base = loaded.base.0;
        loaded.entries.truncate(first.index.saturating_sub(base + 1) as usize);
        loaded.entries.extend_from_slice(&persist.entries);
    }
    if let Some(hard_state) = &persist.hard_state {
        loaded.hard_state = hard_state.clone();
    }
    if let Some((snapshot, keep_from)) = &persist.compact {
        loaded.snapshot = snapshot.clone();
        let index = snapshot.metadata.as_ref().map_or(0, |meta| meta.index);
        let drop_to = keep_from.saturating_sub(1).min(index);
        let count = (drop_to.saturating_sub(loaded.base.0) as usize).min(loaded.entries.len());
        if let Some(last) = count.checked_sub(1).and_then(|last| loaded.entries.get(last)) {
            loaded.base = (last.index, last.term);
        }
        loaded.entries.drain(..count);
    }
    if let Some(forgetful) = persist.forgetful {
        loaded.forgetful = forgetful;
    }
    if let Some(in_group) = persist.in_group {
        loaded.in_group = in_group;
    }
}
