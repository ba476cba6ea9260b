//! Following the committed log from outside the group, and serving those who do.
//!
//! Every frame is chained to what the follower has by the hash of its last position, so a server can
//! withhold entries but not invent, drop or reorder any; each entry's signature is checked in apply as
//! everywhere. Any member or follower serves: the leader's work does not grow with the mesh.

use isthmus_model::ClusterId;
use isthmus_wire::federation::{Entries, FollowFrame, FollowRequest, Snapshot as SnapshotFrame, follow_frame};
use prost011::Message as _;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot, SnapshotMetadata};

use super::{Driver, Part};
use crate::der::Fingerprint;
use crate::machine::Machine;
use crate::member::FrameError;
use crate::raft::group::{GroupTracker, contains};
use crate::raft::log::Log;
use crate::raft::{snapshot, transport};
use crate::store::{Persist, Store};

/// Entries in one frame.
const FRAME_ENTRIES: u64 = 512;
/// Bytes of entries in one frame, far below a link frame's 8 MiB.
const FRAME_BYTES: u64 = 1024 * 1024;

impl<S: Store> Driver<S> {
    /// What to ask of another member's log: everything after what is applied here.
    pub fn follow_request(&self) -> FollowRequest {
        let registry = self.machine.registry();
        FollowRequest { next_index: registry.index + 1, last_hash: registry.hash.0.to_vec() }
    }

    /// What brings the asker forward; `None` if it has all that is applied here.
    pub fn serve_follow(&self, request: &FollowRequest) -> Option<FollowFrame> {
        let log = match &self.part {
            Part::Group(node) => node.log(),
            Part::Follower(log, _) => log,
            Part::None => return None,
        };
        let applied = self.machine.registry().index;
        let last = request.next_index.checked_sub(1)?;
        if last >= applied {
            return None;
        }
        let known = self.hashes.get(&last).is_some_and(|hash| hash.0[..] == request.last_hash[..]);
        let high = applied.min(last.saturating_add(FRAME_ENTRIES)) + 1;
        let slice = known.then(|| log.slice(last + 1, high, FRAME_BYTES)).flatten();
        match slice {
            Some(entries) if !entries.is_empty() => {
                let frame = follow_frame::Frame::Entries(self.entries_frame(entries, applied)?);
                Some(FollowFrame { frame: Some(frame) })
            }
            _ => self.snapshot_frame(log),
        }
    }

    /// The present state, whole. None inside a joint change, which lasts for a round trip.
    fn snapshot_frame(&self, log: &Log) -> Option<FollowFrame> {
        let registry = self.machine.registry();
        let group = log.conf_state().clone();
        transport::check_group(&group).ok()?;
        let taken = SnapshotFrame {
            index: registry.index,
            term: log.term_at(registry.index)?,
            hash: registry.hash.0.to_vec(),
            data: snapshot::pack(registry).ok()?,
            last: true,
            voters: group.voters,
            learners: group.learners,
        };
        Some(FollowFrame { frame: Some(follow_frame::Frame::Snapshot(taken)) })
    }

    fn entries_frame(&self, entries: &[Entry], applied: u64) -> Option<Entries> {
        let (first, last) = (entries.first()?.index, entries.last()?.index);
        Some(Entries {
            first_index: first,
            entries: entries.iter().map(prost011::Message::encode_to_vec).collect(),
            hash: self.hashes.get(&last)?.0.to_vec(),
            commit: applied,
        })
    }

    /// A frame of class FOLLOW from `link`.
    ///
    /// # Errors
    /// [`FrameError`] if it does not continue what is here; nothing has changed then.
    pub fn followed(&mut self, link: ClusterId, frame: FollowFrame) -> Result<(), FrameError> {
        let refuse = |reason, detail: String| Err(FrameError { from: link, reason, detail });
        match frame.frame {
            Some(follow_frame::Frame::Entries(entries)) => self.followed_entries(link, entries),
            Some(follow_frame::Frame::Snapshot(taken)) => self.followed_snapshot(link, taken),
            None => refuse("malformed", "an empty frame".into()),
        }
    }

    /// A member of the group learns from its leader. Only one that has had none for long takes follow
    /// frames: it may have been removed while it was away, or a leader may have gone without telling it
    /// what was committed. Stepping out of the group and back is a restart that knows more: term, vote and
    /// everything that was acknowledged stay.
    fn may_follow(&mut self) -> bool {
        if matches!(self.part, Part::Group(_)) && !self.leads() && self.status().wants_follow {
            self.leave_group();
        }
        matches!(self.part, Part::Follower(..))
    }

    /// A follower that finds itself a voter takes its place, once it knows all that the other side does.
    fn return_to_group(&mut self, commit: u64) {
        let me = u64::from(self.setup.id.0);
        let Part::Follower(log, _) = &self.part else { return };
        let group = log.conf_state();
        let votes = group.voters.contains(&me) || group.voters_outgoing.contains(&me);
        if self.machine.registry().index < commit {
            return;
        }
        if self.forgetful && !contains(group, me) {
            // The group counts without this cluster: nothing it forgot is counted on any more.
            let persist = Persist { forgetful: Some(false), ..Persist::default() };
            match self.store.write(&persist) {
                Ok(_) => self.forgetful = false,
                Err(error) => self.fail(&error),
            }
        } else if votes && !self.forgetful {
            self.leaderless_since = self.ticks;
            self.enter_group();
        }
    }

    fn followed_entries(&mut self, link: ClusterId, frame: Entries) -> Result<(), FrameError> {
        let refuse = |reason, detail: String| Err(FrameError { from: link, reason, detail });
        let applied = self.machine.registry().index;
        if frame.first_index != applied + 1 || frame.entries.len() as u64 > FRAME_ENTRIES {
            return refuse("gap", format!("entries from {}, this log ends at {applied}", frame.first_index));
        }
        let (entries, hash) = match decode(&frame, self.machine.registry().hash) {
            Ok(decoded) => decoded,
            Err(detail) => return refuse("malformed", detail),
        };
        if hash.0[..] != frame.hash[..] {
            return refuse("hash", format!("the hash chain breaks between {applied} and {}", frame.commit));
        }
        if self.may_follow() {
            self.take_entries(&entries, frame.commit);
            self.return_to_group(frame.commit);
        }
        Ok(())
    }

    fn take_entries(&mut self, entries: &[Entry], commit: u64) {
        let Part::Follower(log, _) = &mut self.part else { return };
        let Some(last) = entries.last() else { return };
        // What the log holds already stays, and so does what comes after it: as a voter, this cluster may
        // have promised it. Only an entry that contradicts a committed one goes, with all after it.
        let held = entries.iter().take_while(|entry| log.term_at(entry.index) == Some(entry.term)).count();
        let new = &entries[held..];
        let mut hard_state = log.hard_state().clone();
        if last.term > hard_state.term {
            hard_state = HardState { term: last.term, vote: 0, commit: hard_state.commit };
        }
        hard_state.commit = hard_state.commit.max(last.index);
        let persist = Persist { entries: new.to_vec(), hard_state: Some(hard_state.clone()), ..Persist::default() };
        if let Err(error) = self.store.write(&persist) {
            return self.fail(&error);
        }
        log.append(new);
        log.set_hard_state(hard_state);
        self.followed_commit = self.followed_commit.max(commit);
        for entry in entries {
            self.apply_entry(entry);
        }
    }

    fn followed_snapshot(&mut self, link: ClusterId, frame: SnapshotFrame) -> Result<(), FrameError> {
        let refuse = |reason, detail: String| Err(FrameError { from: link, reason, detail });
        let applied = self.machine.registry().index;
        let group = ConfState { voters: frame.voters, learners: frame.learners, ..ConfState::default() };
        let registry = match snapshot::unpack(&frame.data) {
            Ok(registry) => registry,
            Err(error) => return refuse("malformed", error.to_string()),
        };
        if let Err(detail) = transport::check_group(&group) {
            return refuse("malformed", detail);
        }
        let sound = registry.index == frame.index && registry.hash.0[..] == frame.hash[..] && frame.term > 0;
        if !sound || frame.index <= applied {
            return refuse("malformed", format!("a snapshot at {} over {applied}", frame.index));
        }
        if registry.mesh.as_ref().is_none_or(|mesh| mesh.name != self.setup.mesh) {
            return refuse("mesh", "a snapshot of another mesh".into());
        }
        if !self.may_follow() {
            return Ok(());
        }
        let index = frame.index;
        if let Part::Follower(log, _) = &self.part
            && log.term_at(index) == Some(frame.term)
        {
            // This log reaches that far: the snapshot only says that it is committed.
            let entries = log.slice(applied + 1, index + 1, u64::MAX).map(<[Entry]>::to_vec).unwrap_or_default();
            self.take_entries(&entries, index);
            self.return_to_group(index);
            return Ok(());
        }
        let metadata = SnapshotMetadata { conf_state: Some(group), index: frame.index, term: frame.term };
        self.take_snapshot(Snapshot { data: frame.data, metadata: Some(metadata) }, registry);
        self.return_to_group(index);
        Ok(())
    }

    fn take_snapshot(&mut self, taken: Snapshot, registry: crate::registry::Registry) {
        let persist = Persist { install: Some(taken.clone()), ..Persist::default() };
        if let Err(error) = self.store.write(&persist) {
            return self.fail(&error);
        }
        let Part::Follower(log, tracker) = &mut self.part else { return };
        log.install(taken);
        *tracker = GroupTracker::new(log.snapshot_group());
        self.followed_commit = self.followed_commit.max(registry.index);
        let log = log.clone();
        self.machine = Machine::restored(registry, self.setup.verify.clone());
        self.remember_base(&log);
    }

    /// After a start: applies what was followed before.
    pub(super) fn replay_follower(&mut self) {
        let Part::Follower(log, _) = &self.part else { return };
        let commit = log.hard_state().commit;
        let applied = self.machine.registry().index;
        let entries = log.slice(applied + 1, commit + 1, u64::MAX).map(<[Entry]>::to_vec).unwrap_or_default();
        for entry in &entries {
            self.apply_entry(entry);
        }
    }
}

/// Reads a frame's entries and runs the hash chain over them.
fn decode(frame: &Entries, from: Fingerprint) -> Result<(Vec<Entry>, Fingerprint), String> {
    let mut hash = from;
    let mut entries = Vec::with_capacity(frame.entries.len());
    let mut term = 1;
    for (offset, bytes) in frame.entries.iter().enumerate() {
        let entry = Entry::decode(bytes.as_slice()).map_err(|error| error.to_string())?;
        let expected = frame.first_index + offset as u64;
        if entry.index != expected || entry.term < term {
            return Err(format!("entry {} of term {} at {expected}", entry.index, entry.term));
        }
        match EntryType::from_i32(entry.entry_type) {
            Some(EntryType::EntryNormal) => {}
            Some(_) => drop(transport::conf_change(&entry)?),
            None => return Err(format!("entry type {}", entry.entry_type)),
        }
        term = entry.term;
        hash = hash.chain(entry.index, &entry.data);
        entries.push(entry);
    }
    match entries.is_empty() {
        true => Err("no entries".into()),
        false => Ok((entries, hash)),
    }
}
