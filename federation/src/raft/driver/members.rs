//! The group's membership: proposed by the leader, entered and left by everyone else.

use std::collections::BTreeSet;

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};

use super::{Driver, Part};
use crate::membership::{Candidate, Change, Group, next};
use crate::raft::group::{GroupTracker, contains};
use crate::store::{Persist, Store};

/// A learner this close to the leader's commit has caught up.
const CAUGHT_UP_ENTRIES: u64 = 64;

impl<S: Store> Driver<S> {
    /// The leader's look at the group: leaves a joint change that nobody left, else proposes the next.
    pub(super) fn tend_group(&mut self) {
        if self.leads()
            && self.machine.registry().mesh.is_some()
            && self.machine.registry().cluster_by_id(self.setup.id).is_none()
        {
            // This cluster has left the mesh: another voter leads its removal.
            self.transfer_leader();
        }
        let Some(change) = self.next_change() else { return };
        if let Part::Group(node) = &mut self.part {
            // A refusal only means that the lead was lost: the next leader looks again.
            let _ = node.propose_change(change);
        }
    }

    fn next_change(&self) -> Option<ConfChangeV2> {
        let Part::Group(node) = &self.part else { return None };
        // Only in its own term does a leader know what is committed (Raft dissertation §6.4; the
        // single-server bug of 2015 was a change before that).
        if !node.leads() || node.pending_change() || !node.committed_in_term() {
            return None;
        }
        let state = node.conf_state();
        if !state.voters_outgoing.is_empty() {
            // The library leaves a joint change by itself only if the leader that entered it still leads.
            return Some(ConfChangeV2::default());
        }
        let me = u64::from(self.setup.id.0);
        let group = Group {
            voters: state.voters.iter().copied().collect(),
            learners: state.learners.iter().copied().collect(),
            leader: me,
        };
        next(&group, &self.candidates(node.committed())).map(|change| wire(&change))
    }

    fn candidates(&self, committed: u64) -> Vec<Candidate> {
        let me = u64::from(self.setup.id.0);
        let Part::Group(node) = &self.part else { return Vec::new() };
        let of = |record: &crate::registry::ClusterRecord| {
            let id = u64::from(record.id.0);
            let matched = node.progress(id).map_or(0, |(matched, _)| matched);
            let heard = self.heard.get(&id).copied().unwrap_or(0);
            Candidate {
                id,
                region: record.facts.locality.region.clone(),
                provider: record.facts.provider.clone(),
                caught_up: id == me || matched + CAUGHT_UP_ENTRIES >= committed && matched > 0,
                silent_ms: if id == me { 0 } else { (self.ticks - heard) * self.setup.tick_ms },
            }
        };
        self.machine.registry().clusters.values().map(|record| of(record)).collect()
    }

    /// A leader speaks to a cluster outside the group: it has been taken in.
    pub(super) fn enter_group(&mut self) {
        let Part::Follower(log, _) = std::mem::replace(&mut self.part, Part::None) else { return };
        let persist = Persist { in_group: Some(true), ..Persist::default() };
        if let Err(error) = self.store.write(&persist) {
            return self.fail(&error);
        }
        let rng = self.rng.fork();
        match self.node(log, rng) {
            Ok(node) => self.part = Part::Group(Box::new(node)),
            Err(error) => self.fail(&super::corrupt(error)),
        }
    }

    /// Applied its own removal: from now on it follows.
    pub(super) fn leave_if_removed(&mut self) {
        let me = u64::from(self.setup.id.0);
        let Part::Group(node) = &self.part else { return };
        // A learner that is only being added does not find itself in the group yet either: it leaves only
        // if it was in it. A leader leaves at once: the library panics when a leader without a place in the
        // group counts its commit (0.7.0, `maybe_commit`); the rest, who have the entry, elect another.
        let was = self.groups.values().any(|group| contains(group, me));
        if was && !contains(node.conf_state(), me) {
            self.leave_group();
        }
    }

    pub(super) fn leave_group(&mut self) {
        let Part::Group(node) = std::mem::replace(&mut self.part, Part::None) else { return };
        let persist = Persist { in_group: Some(false), ..Persist::default() };
        match self.store.write(&persist) {
            Ok(_) => {
                let log = node.into_log();
                let tracker = GroupTracker::replay(&log, self.machine.registry().index);
                self.part = Part::Follower(log, tracker);
            }
            Err(error) => self.fail(&error),
        }
    }
}

fn wire(change: &Change) -> ConfChangeV2 {
    let single = |kind: ConfChangeType, id: &u64| ConfChangeSingle { change_type: kind as i32, node_id: *id };
    let promote = change.promote.iter().map(|id| single(ConfChangeType::AddNode, id));
    let learn = change.learn.iter().map(|id| single(ConfChangeType::AddLearnerNode, id));
    let remove = change.remove.iter().map(|id| single(ConfChangeType::RemoveNode, id));
    let changes: Vec<_> = promote.chain(learn).chain(remove).collect();
    debug_assert_eq!(changes.iter().map(|one| one.node_id).collect::<BTreeSet<_>>().len(), changes.len());
    ConfChangeV2 { changes, ..ConfChangeV2::default() }
}
