//! State machine safety: no two clusters apply different entries at one position (Raft paper, figure 3),
//! and equal logs lead to equal registries.

use std::collections::BTreeMap;

use raft::eraftpb::EntryType;

use crate::command::Stamped;
use crate::der::Fingerprint;
use crate::raft::node::Node;
use crate::registry::Registry;

/// Positions whose registries are compared whole: every one would cost more than it shows.
const COMPARE_EVERY: u64 = 8;

/// What was applied, by position.
#[derive(Debug, Default)]
pub struct StateMachine {
    hashes: BTreeMap<u64, Fingerprint>,
    contents: BTreeMap<u64, Fingerprint>,
    /// The signed entry (not the leader's stamp), for those that were applied from a log.
    entries: BTreeMap<u64, Vec<u8>>,
    group_changes: BTreeMap<u64, ()>,
    applied: BTreeMap<u16, u64>,
    noted: BTreeMap<u16, u64>,
}

impl StateMachine {
    /// Notes the entries that a member of the group has committed and applied.
    ///
    /// # Errors
    /// If another entry was applied at that position.
    pub fn committed(&mut self, id: u16, node: &Node, applied: u64) -> Result<(), String> {
        let from = self.noted.insert(id, applied).unwrap_or(0) + 1;
        let log = node.log();
        for entry in log.slice(from.max(log.first()), applied + 1, u64::MAX).unwrap_or_default() {
            let signed = Stamped::from_bytes(&entry.data).map(|stamped| stamped.entry).unwrap_or_default();
            if entry.entry_type != EntryType::EntryNormal as i32 {
                self.group_changes.insert(entry.index, ());
            }
            if *self.entries.entry(entry.index).or_insert_with(|| signed.clone()) != signed {
                return Err(format!("state machine safety: cluster {id} applied another entry at {}", entry.index));
            }
        }
        Ok(())
    }

    /// Compares one cluster's registry.
    ///
    /// # Errors
    /// If it differs from another's at the same position.
    pub fn look(&mut self, id: u16, registry: &Registry) -> Result<(), String> {
        let last = self.applied.insert(id, registry.index);
        if last.is_some_and(|last| registry.index < last) {
            return Err(format!("state machine safety: cluster {id} went back from {last:?} to {}", registry.index));
        }
        if last == Some(registry.index) {
            return Ok(());
        }
        let hash = *self.hashes.entry(registry.index).or_insert(registry.hash);
        if hash != registry.hash {
            return Err(format!("state machine safety: cluster {id} applied another entry at {}", registry.index));
        }
        if registry.index.is_multiple_of(COMPARE_EVERY) {
            let json = serde_json::to_vec(registry).map_err(|error| error.to_string())?;
            let content = Fingerprint::of(&json);
            if *self.contents.entry(registry.index).or_insert(content) != content {
                return Err(format!("state machine safety: cluster {id} has another registry at {}", registry.index));
            }
        }
        Ok(())
    }

    /// A cluster came back from its disk, where its commit position may lag.
    pub fn restarted(&mut self, id: u16) {
        self.applied.remove(&id);
        self.noted.remove(&id);
    }

    /// The signed entry applied at a position, if one was seen.
    pub fn entry(&self, index: u64) -> Option<&[u8]> {
        self.entries.get(&index).map(Vec::as_slice)
    }

    /// Changes of the group seen in the log.
    pub fn group_changes(&self) -> u64 {
        self.group_changes.len() as u64
    }
}
