//! Committed entries: to the registry, to whoever proposed them, and into snapshots.

use raft::eraftpb::{Entry, EntryType};

use super::{Driver, Output, Part};
use crate::machine::{Machine, Refusal};
use crate::member::Committed;
use crate::raft::batch::Released;
use crate::raft::group::contains;
use crate::raft::snapshot;
use crate::store::{Persist, Store};

/// Entries kept before a snapshot, so that a member or follower that lags a little needs none.
const TAIL_ENTRIES: u64 = 1024;

impl<S: Store> Driver<S> {
    pub(super) fn apply(&mut self, released: Released) {
        if let Some(installed) = &released.installed {
            // Checked when it arrived; a failure here would mean memory went bad.
            match snapshot::unpack(&installed.data) {
                Ok(registry) => {
                    self.machine = Machine::restored(registry, self.setup.verify.clone());
                    let log = match &self.part {
                        Part::Group(node) => node.log().clone(),
                        _ => return,
                    };
                    self.remember_base(&log);
                    if let Part::Group(node) = &mut self.part {
                        node.applied(log.snapshot_index());
                    }
                }
                Err(error) => return self.fail(&super::corrupt(error)),
            }
        }
        for entry in &released.committed {
            self.apply_entry(entry);
        }
        if let (Some(last), Part::Group(node)) = (released.committed.last(), &mut self.part) {
            node.applied(last.index);
        }
        for read in released.reads {
            let context = read.request_ctx.as_slice().try_into().map(u64::from_be_bytes);
            if let Some((request, _)) = context.ok().and_then(|context| self.reads.remove(&context)) {
                self.reads_ready.push((request, read.index));
            }
        }
        let applied = self.machine.registry().index;
        let (now, later) = std::mem::take(&mut self.reads_ready).into_iter().partition(|(_, index)| *index <= applied);
        self.reads_ready = later;
        for (request, index) in Vec::from_iter::<Vec<(u64, u64)>>(now) {
            self.outputs.push_back(Output::Read(request, Ok(index)));
        }
        self.leave_if_removed();
    }

    /// One committed entry. After a restart the library hands out again what the registry has already:
    /// changes of the group are then repeated, commands are not.
    pub(super) fn apply_entry(&mut self, entry: &Entry) {
        let fresh = entry.index > self.machine.registry().index;
        let is_command = entry.entry_type == EntryType::EntryNormal as i32;
        let changed = match &mut self.part {
            _ if is_command => None,
            Part::Group(node) => node.apply_change(entry),
            Part::Follower(log, tracker) => tracker.apply(entry).inspect(|group| log.set_conf_state(group.clone())),
            Part::None => None,
        };
        if let Some(group) = changed {
            self.groups.insert(entry.index, group);
        }
        if !fresh {
            return;
        }
        // The data of a group change is chained like any other but holds no command.
        let outcome = match is_command {
            true => self.machine.apply(entry.index, &entry.data),
            false => {
                self.machine.skip(entry.index, &entry.data);
                Ok(())
            }
        };
        self.hashes.insert(entry.index, self.machine.registry().hash);
        let context = entry.context.as_slice().try_into().map(u64::from_be_bytes).ok();
        if let Some((request, _)) = context.and_then(|context| self.proposals.remove(&context)) {
            let outcome = outcome.map_err(|rejection| Refusal::from(&rejection));
            self.outputs.push_back(Output::Proposed(request, Ok(Committed { index: entry.index, outcome })));
        }
    }

    /// Writes a commit position that lazy writes left behind, at most once a tick. Raft would learn it again
    /// from its leader; until then a restarted member would show an older registry than before.
    fn save_commit(&mut self) {
        let Part::Group(node) = &self.part else { return };
        let (commit, (saved, at)) = (node.committed(), self.saved_commit);
        if commit <= saved || at == self.ticks {
            return;
        }
        let persist = Persist { hard_state: Some(node.hard_state()), ..Persist::default() };
        match self.store.write(&persist) {
            Ok(_) => self.saved_commit = (commit, self.ticks),
            Err(error) => self.fail(&error),
        }
    }

    /// Takes a snapshot and drops old entries when the log has grown enough since the last: after turns.
    pub fn tidy(&mut self) {
        self.save_commit();
        let applied = self.machine.registry().index;
        let log = match &self.part {
            // A follower that was taken into the group has applied more than the library knows of: what is
            // still to be handed out again must stay in the log.
            Part::Group(node) if node.applied_index() < applied => return,
            Part::Group(node) => node.log(),
            Part::Follower(log, _) => log,
            Part::None => return,
        };
        let last = log.snapshot_now().metadata.as_ref().map_or(0, |meta| meta.index);
        let grown = applied.saturating_sub(last) as usize;
        let (_, bytes) = log.size();
        let group = log.conf_state().clone();
        // The library ignores a snapshot whose group does not name its receiver: whoever was taken in since
        // the last one could never catch up by it.
        let known = log.snapshot_group();
        let newcomer = last > 0 && group.voters.iter().chain(&group.learners).any(|id| !contains(known, *id));
        if grown < self.setup.snapshot_entries && (bytes < super::SNAPSHOT_BYTES || grown < 64) && !newcomer {
            return;
        }
        // Never inside a joint change: such a group cannot be checked by who receives it.
        if !group.voters_outgoing.is_empty() || group.voters.is_empty() {
            return;
        }
        let Some(term) = log.term_at(applied) else { return };
        let taken = match snapshot::of(self.machine.registry(), term, group) {
            Ok(taken) => taken,
            Err(error) => return tracing::warn!(%error, "no snapshot"),
        };
        let tail = TAIL_ENTRIES.min(self.setup.snapshot_entries as u64 / 2);
        let keep_from = (applied + 1).saturating_sub(tail);
        let mut hard_state = log.hard_state().clone();
        hard_state.commit = hard_state.commit.max(applied);
        let persist =
            Persist { compact: Some((taken.clone(), keep_from)), hard_state: Some(hard_state), ..Persist::default() };
        if let Err(error) = self.store.write(&persist) {
            return self.fail(&error);
        }
        let first = match &mut self.part {
            Part::Group(node) => {
                node.compacted(taken, keep_from);
                node.log().first()
            }
            Part::Follower(log, _) => {
                log.compact(taken, keep_from);
                log.first()
            }
            Part::None => return,
        };
        self.hashes = self.hashes.split_off(&first.saturating_sub(1));
        let keep_group = self.groups.range(..=first).next_back().map_or(first, |(index, _)| *index);
        self.groups = self.groups.split_off(&keep_group);
    }
}
