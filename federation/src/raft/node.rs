//! One member of the Raft group: the `raft` crate with its sharp edges behind a narrow interface.
//!
//! No clock (ticks come in), no I/O (see [`super::batch`]), no randomness of its own: election timeouts
//! come from the seed, so that a run repeats. Messages come in only through [`super::transport::checked`].

use raft::eraftpb::{ConfChangeV2, ConfState, Entry, HardState, Message, MessageType, Snapshot};
use raft::{Config, RawNode, SnapshotStatus, StateRole};

use super::batch::{Batch, Promised, Released};
use super::log::Log;
use crate::rng::Rng;
use crate::store::{Durable, Persist};

/// Ticks without a leader after which a voter stands for election, at least.
pub const ELECTION_TICKS: usize = 10;
/// Ticks between heartbeats.
pub const HEARTBEAT_TICKS: usize = 2;
/// Bytes of entries in one message: one link frame, with room to spare.
const MESSAGE_LEN_MAX: u64 = 1024 * 1024;
/// Messages on their way to one member.
const INFLIGHT_MAX: usize = 64;
/// Bytes of proposals that are not committed yet; further ones are dropped with an error.
const UNCOMMITTED_LEN_MAX: u64 = 16 * 1024 * 1024;
/// Bytes of entries applied in one turn.
const COMMITTED_LEN_MAX: u64 = 4 * 1024 * 1024;
/// The library draws election timeouts below this from its own randomness. It is so far above ours
/// that a value of its own is always recognised, and replaced before the next tick.
const LIBRARY_TIMEOUT_TICKS: usize = 1 << 40;
/// Ticks after which a snapshot that was sent and not acknowledged counts as lost.
const SNAPSHOT_TICKS: u64 = 30;

/// Why a proposal was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotTaken {
    /// This member does not lead, or is handing the lead over.
    NotLeader,
    /// Too much is not committed yet.
    Full,
}

/// A member of the group.
pub struct Node {
    raw: RawNode<Log>,
    rng: Rng,
    ticks: u64,
    snapshots_sent: Vec<(u64, u64)>,
}

impl Node {
    /// Starts from what is on disk; `log`'s snapshot is what the registry has applied.
    ///
    /// # Errors
    /// If the library cannot start from it.
    pub fn new(id: u64, log: Log, rng: Rng) -> raft::Result<Self> {
        let applied = log.snapshot_now().metadata.as_ref().map_or(0, |meta| meta.index);
        let config = Config {
            id,
            applied,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            min_election_tick: ELECTION_TICKS,
            max_election_tick: LIBRARY_TIMEOUT_TICKS,
            max_size_per_msg: MESSAGE_LEN_MAX,
            max_inflight_msgs: INFLIGHT_MAX,
            max_uncommitted_size: UNCOMMITTED_LEN_MAX,
            max_committed_size_per_ready: COMMITTED_LEN_MAX,
            // A member that comes back from a partition must not depose a working leader (§9.6), and a
            // leader that lost its majority must notice (§6.2).
            pre_vote: true,
            check_quorum: true,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&config, log, &logger)?;
        let mut node = Self { raw, rng, ticks: 0, snapshots_sent: Vec::new() };
        node.redraw_timeout();
        Ok(node)
    }

    fn redraw_timeout(&mut self) {
        if self.raw.raft.randomized_election_timeout() >= 2 * ELECTION_TICKS {
            let ticks = ELECTION_TICKS + self.rng.below(ELECTION_TICKS as u64) as usize;
            self.raw.raft.set_randomized_election_timeout(ticks);
        }
    }

    /// One tick of the clock passed.
    pub fn tick(&mut self) {
        self.ticks += 1;
        self.raw.tick();
        self.redraw_timeout();
        let due = self.ticks;
        let lost: Vec<u64> = self.snapshots_sent.iter().filter(|(at, _)| *at <= due).map(|(_, to)| *to).collect();
        self.snapshots_sent.retain(|(at, _)| *at > due);
        for to in lost {
            // Harmless if it did arrive: the library then sees the acknowledged position.
            self.raw.report_snapshot(to, SnapshotStatus::Failure);
        }
    }

    /// Takes a message that [`super::transport::checked`] has passed.
    pub fn step(&mut self, message: Message) {
        // The library's errors here mean "stale" or "not from a member": nothing to do about either.
        let _ = self.raw.step(message);
        self.redraw_timeout();
    }

    /// Proposes an entry; `context` comes back with it when it is committed.
    ///
    /// # Errors
    /// [`NotTaken`].
    pub fn propose(&mut self, context: Vec<u8>, data: Vec<u8>) -> Result<(), NotTaken> {
        if !self.leads() {
            return Err(NotTaken::NotLeader);
        }
        match self.raw.propose(context, data) {
            Ok(()) => Ok(()),
            Err(_) if self.raw.raft.lead_transferee.is_some() => Err(NotTaken::NotLeader),
            Err(_) => Err(NotTaken::Full),
        }
    }

    /// Proposes a change of the group.
    ///
    /// # Errors
    /// [`NotTaken`]; a change while another one is under way is silently made empty by the library.
    pub fn propose_change(&mut self, change: ConfChangeV2) -> Result<(), NotTaken> {
        if !self.leads() {
            return Err(NotTaken::NotLeader);
        }
        self.raw.propose_conf_change(Vec::new(), change).map_err(|_| NotTaken::NotLeader)
    }

    /// Asks for a linearizable read position (Raft dissertation §6.4); only a leader that has committed in
    /// its own term answers.
    ///
    /// # Errors
    /// [`NotTaken::NotLeader`].
    pub fn read_index(&mut self, context: Vec<u8>) -> Result<(), NotTaken> {
        if !self.leads() || !self.raw.raft.commit_to_current_term() {
            return Err(NotTaken::NotLeader);
        }
        self.raw.read_index(context);
        Ok(())
    }

    /// Hands the lead over.
    pub fn transfer_leader(&mut self, to: u64) {
        self.raw.transfer_leader(to);
    }

    /// Stands for election at once.
    pub fn campaign(&mut self) {
        let _ = self.raw.campaign();
        self.redraw_timeout();
    }

    /// The next batch, if there is anything to write, send or apply.
    pub fn batch(&mut self) -> Option<Batch> {
        self.raw.has_ready().then(|| Batch::new(self.raw.ready()))
    }

    /// Redeems a batch: mirrors what was written and lets out what waited for it.
    pub fn complete(&mut self, persist: Persist, promised: Promised, proof: &Durable) -> Released {
        let mut ready = promised.redeem(proof);
        let log = self.raw.mut_store();
        if let Some(snapshot) = persist.install.clone() {
            log.install(snapshot);
        }
        log.append(&persist.entries);
        if let Some(hard_state) = persist.hard_state {
            log.set_hard_state(hard_state);
        }
        let mut released = Released {
            messages: ready.take_messages(),
            committed: ready.take_committed_entries(),
            reads: ready.take_read_states(),
            installed: persist.install,
        };
        released.messages.append(&mut ready.take_persisted_messages());
        let mut light = self.raw.advance_append(ready);
        released.messages.append(&mut light.take_messages());
        released.committed.append(&mut light.take_committed_entries());
        self.redraw_timeout();
        for message in &released.messages {
            if message.msg_type == MessageType::MsgSnapshot as i32 {
                self.snapshots_sent.push((self.ticks + SNAPSHOT_TICKS, message.to));
            }
        }
        released
    }

    /// Everything up to `index` is applied.
    pub fn applied(&mut self, index: u64) {
        self.raw.advance_apply_to(index);
    }

    /// A committed change of the group takes effect. `None` if the library refuses it, as everywhere else.
    pub fn apply_change(&mut self, entry: &Entry) -> Option<ConfState> {
        let change = super::transport::conf_change(entry).ok()?;
        let state = self.raw.apply_conf_change(&change).ok()?;
        self.raw.mut_store().set_conf_state(state.clone());
        self.redraw_timeout();
        Some(state)
    }

    /// Ends taking part: the log as it stands.
    pub fn into_log(self) -> Log {
        self.raw.store().clone()
    }

    /// Keeps a snapshot of our own: call after it is on disk.
    pub fn compacted(&mut self, snapshot: Snapshot, keep_from: u64) {
        self.raw.mut_store().compact(snapshot, keep_from);
    }

    /// The log as mirrored in memory.
    pub fn log(&self) -> &Log {
        self.raw.store()
    }

    /// Whether this member leads.
    pub fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Whether it stands for election.
    pub fn stands(&self) -> bool {
        matches!(self.raw.raft.state, StateRole::Candidate | StateRole::PreCandidate)
    }

    /// The leader, 0 if none is known.
    pub fn leader(&self) -> u64 {
        self.raw.raft.leader_id
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// Term, vote and commit as of now.
    pub fn hard_state(&self) -> HardState {
        self.raw.raft.hard_state()
    }

    /// The commit position.
    pub fn committed(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// Whether a change of the group is proposed and not applied yet.
    pub fn pending_change(&self) -> bool {
        self.raw.raft.has_pending_conf()
    }

    /// Whether this leader has committed an entry of its own term.
    pub fn committed_in_term(&self) -> bool {
        self.raw.raft.commit_to_current_term()
    }

    /// The group as of the last applied entry.
    pub fn conf_state(&self) -> &ConfState {
        self.raw.store().conf_state()
    }

    /// On the leader: how far a member has come, and whether it was heard from lately.
    pub fn progress(&self, id: u64) -> Option<(u64, bool)> {
        self.raw.raft.prs().get(id).map(|progress| (progress.matched, progress.recent_active))
    }

    /// How far the library has handed out entries and was told that they are applied.
    pub fn applied_index(&self) -> u64 {
        self.raw.raft.raft_log.applied
    }

    /// Position of the last entry in the log, committed or not.
    pub fn last_index(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }

    /// The term of an entry in the log; `None` if it is compacted away or not there yet.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        // The library answers 0 outside its range.
        self.raw.raft.raft_log.term(index).ok().filter(|term| *term != 0)
    }
}
