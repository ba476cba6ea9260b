//! The group's membership, computed from the log: what followers do without running consensus.

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfState, Entry, EntryType};
use raft::{Changer, ProgressTracker};

use super::log::Log;
use super::transport::conf_change;

/// The number of the cluster that founds a mesh: the group at position 0 is this voter alone.
pub const FOUNDER: u64 = 1;

/// The group before the first entry.
pub fn founding() -> ConfState {
    ConfState { voters: vec![FOUNDER], ..ConfState::default() }
}

/// Whether a cluster takes part, with or without a vote, before or after a joint change.
pub fn contains(group: &ConfState, id: u64) -> bool {
    [&group.voters, &group.learners, &group.voters_outgoing, &group.learners_next].iter().any(|ids| ids.contains(&id))
}

/// Applies changes of the group in log order, by the library's own rules.
#[derive(Clone)]
pub struct GroupTracker(ProgressTracker);

impl GroupTracker {
    /// Starts from a group that is not joint.
    pub fn new(group: &ConfState) -> Self {
        let mut tracker = Self(ProgressTracker::new(0));
        let voters = group.voters.iter().map(|id| (*id, ConfChangeType::AddNode));
        let learners = group.learners.iter().map(|id| (*id, ConfChangeType::AddLearnerNode));
        for (node_id, kind) in voters.chain(learners) {
            let single = ConfChangeSingle { change_type: kind as i32, node_id };
            if let Ok((conf, changes)) = Changer::new(&tracker.0).simple(&[single]) {
                tracker.0.apply_conf(conf, changes, 1);
            }
        }
        tracker
    }

    /// The group after everything up to `applied`, from the log's snapshot on.
    pub fn replay(log: &Log, applied: u64) -> Self {
        let mut tracker = Self::new(log.snapshot_group());
        let from = log.snapshot_index() + 1;
        for entry in log.slice(from, applied + 1, u64::MAX).unwrap_or_default() {
            tracker.apply(entry);
        }
        tracker
    }

    /// An entry of the log; only changes of the group matter. Returns the group if it changed.
    pub fn apply(&mut self, entry: &Entry) -> Option<ConfState> {
        if entry.entry_type == EntryType::EntryNormal as i32 {
            return None;
        }
        let change = conf_change(entry).ok()?;
        let mut changer = Changer::new(&self.0);
        let done = if change.leave_joint() {
            changer.leave_joint()
        } else if let Some(auto_leave) = change.enter_joint() {
            changer.enter_joint(auto_leave, &change.changes)
        } else {
            changer.simple(&change.changes)
        };
        // What the library refuses, it refuses everywhere.
        let (conf, changes) = done.ok()?;
        self.0.apply_conf(conf, changes, 1);
        Some(self.group())
    }

    /// The group now.
    pub fn group(&self) -> ConfState {
        self.0.conf().to_conf_state()
    }
}
