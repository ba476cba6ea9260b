//! The group's membership: proposed by the leader, entered and left by everyone else.

use std::collections::BTreeSet;

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};

use super::{Driver, Part};
use crate::command::{Command, SignedEntry, Stamped, Writer};
use crate::member::ProposeError;
use crate::membership::{Candidate, Change, Group, next};
use crate::raft::group::{GroupTracker, contains};
use crate::store::{Persist, Store};

/// How long a vote is kept from a cluster that wants to leave: the proposer asks again within it.
const LEAVING_TICKS: u64 = 100;
/// A member heard from within these ticks is there: three elections' time.
const SPEAKS_TICKS: u64 = 30;
/// A learner this close to the leader's commit has caught up.
const CAUGHT_UP_ENTRIES: u64 = 64;

impl<S: Store> Driver<S> {
    /// The leader's look at the group: leaves a joint change that nobody left, else proposes the next.
    pub(super) fn tend_group(&mut self) {
        let registry = self.machine.registry();
        let me = u64::from(self.setup.id.0);
        let gone = registry.mesh.is_some() && registry.cluster_by_id(self.setup.id).is_none();
        let left = gone || self.leaving.contains_key(&me);
        if left && self.leads() && self.ticks.is_multiple_of(2 * super::GROUP_TICKS) {
            // This cluster leaves the mesh: better that another voter leads its removal. Every second look
            // only, since a transfer that hangs blocks the removal that this leader could do itself.
            return self.transfer_leader();
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
            // What a member acknowledged once says nothing of today: its disk may be gone.
            let speaks = self.heard.contains_key(&id) && self.ticks - heard <= SPEAKS_TICKS;
            Candidate {
                id,
                region: record.facts.locality.region.clone(),
                provider: record.facts.provider.clone(),
                caught_up: id == me || speaks && matched > 0 && matched + CAUGHT_UP_ENTRIES >= committed,
                silent_ms: if id == me { 0 } else { (self.ticks - heard) * self.setup.tick_ms },
            }
        };
        let stays = |candidate: &Candidate| !self.leaving.contains_key(&candidate.id);
        self.machine.registry().clusters.values().map(|record| of(record)).filter(stays).collect()
    }

    /// A voter gives up its vote before it leaves the mesh. The other way round, links to it would be
    /// refused while the group still counts on it, and a mesh whose only voter left could never write
    /// again. Until that is done the entry waits outside the log, and its proposer asks again.
    pub(super) fn make_way(&mut self, entry: &SignedEntry) -> Result<(), ProposeError> {
        let Some(id) = self.departing(entry) else { return Ok(()) };
        let Part::Group(node) = &self.part else { return Ok(()) };
        let state = node.conf_state();
        if !node.leads() || !(state.voters.contains(&id) || state.voters_outgoing.contains(&id)) {
            return Ok(());
        }
        let others = |candidate: &Candidate| candidate.id != id && candidate.caught_up;
        if state.voters == [id] && !self.candidates(node.committed()).iter().any(others) {
            return Err(ProposeError::LastVoter);
        }
        self.leaving.insert(id, self.ticks + LEAVING_TICKS);
        self.tend_group();
        Err(ProposeError::NoLeader)
    }

    /// The cluster that `entry` takes out of the mesh, if it would be applied.
    fn departing(&self, entry: &SignedEntry) -> Option<u64> {
        let payload = entry.payload().ok()?;
        let name = match (payload.command, entry.writer().ok()?) {
            (Command::Leave {}, Writer::Cluster(name)) => name,
            (Command::Evict { cluster, .. }, Writer::Operator(_)) => cluster,
            _ => return None,
        };
        let registry = self.machine.registry();
        let record = registry.clusters.get(&name)?;
        // A rehearsal on a copy: a forged entry must not move anybody's vote.
        let stamped = Stamped { unix_s: self.unix_s, entry: entry.to_bytes() }.to_bytes();
        self.machine.clone().apply(registry.index + 1, &stamped).ok()?;
        Some(u64::from(record.id.0))
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
