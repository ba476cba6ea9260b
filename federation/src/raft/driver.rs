//! One member as a state machine: frames, proposals and ticks in; frames, answers and registries out.
//!
//! No clock, no task, no socket: the member's thread ([`crate::member`]) and the simulation
//! ([`crate::sim`]) drive the same code. The only effect is [`Store::write`]. After inputs, call
//! [`Driver::turn`], which writes, then sends, then applies; many inputs share one write. [`Driver::tidy`]
//! takes snapshots.
//!
//! A cluster outside the Raft group follows the committed log instead: see `driver/follow.rs`.
//! Which clusters are in the group is decided in [`crate::membership`], and proposed in `driver/members.rs`.

mod apply;
mod follow;
mod members;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use isthmus_model::ClusterId;
use isthmus_wire::federation::RaftFrame;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, MessageType};

use super::group::{self, FOUNDER, GroupTracker};
use super::log::Log;
use super::node::{ELECTION_TICKS, Node, NotTaken};
use super::transport::{self, Receiver, Standing};
use crate::command::{SignedEntry, Stamped};
use crate::der::Fingerprint;
use crate::machine::Machine;
use crate::member::{Committed, FrameError, ProposeError, Role, Status};
use crate::registry::Registry;
use crate::rng::Rng;
use crate::store::{Persist, Store, StoreError};
use crate::verify::Verify;

/// Names a request until its answer comes out.
pub type RequestId = u64;

/// Ticks after which a proposal or read without an end is given back to its caller, who may repeat it.
const PATIENCE_TICKS: u64 = 50;
/// Proposals and reads under way at once.
const WAITING_MAX: usize = 4096;
/// A snapshot is taken once the log holds this many entries more than the last one ...
pub const SNAPSHOT_ENTRIES: usize = 4096;
/// ... or this many bytes.
pub const SNAPSHOT_BYTES: usize = 4 * 1024 * 1024;
/// Ticks without a leader after which a member of the group asks others for the committed log.
const LEADERLESS_TICKS: u64 = 50;

/// What a driver is told at its start.
#[derive(Clone)]
pub struct Setup {
    /// The mesh's name.
    pub mesh: String,
    /// This cluster's number.
    pub id: ClusterId,
    /// The first entry of a new mesh, if this cluster founds it and the store is fresh.
    pub init: Option<SignedEntry>,
    /// For election timeouts.
    pub seed: u64,
    /// Milliseconds of one tick.
    pub tick_ms: u64,
    /// Entries after which a snapshot is taken, [`SNAPSHOT_ENTRIES`] but in tests.
    pub snapshot_entries: usize,
    /// Judges signatures.
    pub verify: Arc<dyn Verify>,
}

/// What a driver hands out.
#[derive(Debug)]
pub enum Output {
    /// To another cluster's member, class RAFT.
    Send(ClusterId, RaftFrame),
    /// A proposal's end.
    Proposed(RequestId, Result<Committed, ProposeError>),
    /// A linearizable read's position, applied here already.
    Read(RequestId, Result<u64, ProposeError>),
}

#[expect(clippy::large_enum_variant, reason = "there is one of it in a process")]
enum Part {
    Group(Box<Node>),
    Follower(Log, GroupTracker),
    /// Between the two, and after a failure: never seen by a caller.
    None,
}

/// One member.
pub struct Driver<S> {
    setup: Setup,
    store: S,
    part: Part,
    machine: Machine,
    rng: Rng,
    ticks: u64,
    unix_s: u64,
    leaderless_since: u64,
    next_context: u64,
    proposals: BTreeMap<u64, (RequestId, u64)>,
    reads: BTreeMap<u64, (RequestId, u64)>,
    reads_ready: Vec<(RequestId, u64)>,
    outputs: VecDeque<Output>,
    heard: BTreeMap<u64, u64>,
    /// Hash chain and group by position, as far back as the log goes: what followers are served from.
    hashes: BTreeMap<u64, Fingerprint>,
    groups: BTreeMap<u64, ConfState>,
    /// Clusters that are about to leave the mesh, until when: they get no vote meanwhile.
    leaving: BTreeMap<u64, u64>,
    /// The store was restored and has forgotten votes and promises: no place in the group until the group
    /// has given up on this cluster.
    forgetful: bool,
    /// Highest commit seen on a follow stream.
    followed_commit: u64,
    /// The commit position that is certainly on disk, and the tick when that was last seen to.
    saved_commit: (u64, u64),
    failed: Option<String>,
}

impl<S: Store> Driver<S> {
    /// Opens the store and replays what it holds.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot be trusted: the process must not start with less than it had.
    pub fn open(setup: Setup, mut store: S) -> Result<Self, StoreError> {
        let mut loaded = store.load()?;
        let mut rng = Rng::new(setup.seed);
        if loaded.fresh && setup.init.is_some() {
            found(&setup, &mut store)?;
            loaded = store.load()?;
        }
        let machine = match loaded.snapshot.data.as_slice() {
            [] => Machine::new(setup.verify.clone()),
            data => Machine::restored(super::snapshot::unpack(data).map_err(corrupt)?, setup.verify.clone()),
        };
        let log = Log::from_loaded(&loaded);
        let node_rng = rng.fork();
        let next_context = rng.draw();
        let mut driver = Self {
            part: Part::None,
            machine,
            rng,
            ticks: 0,
            unix_s: 0,
            leaderless_since: 0,
            next_context,
            proposals: BTreeMap::new(),
            reads: BTreeMap::new(),
            reads_ready: Vec::new(),
            outputs: VecDeque::new(),
            heard: BTreeMap::new(),
            hashes: BTreeMap::new(),
            groups: BTreeMap::new(),
            leaving: BTreeMap::new(),
            forgetful: loaded.forgetful,
            followed_commit: 0,
            saved_commit: (loaded.hard_state.commit, 0),
            failed: None,
            store,
            setup,
        };
        driver.remember_base(&log);
        if loaded.in_group {
            driver.part = Part::Group(Box::new(driver.node(log, node_rng).map_err(corrupt)?));
        } else {
            driver.part = Part::Follower(log.clone(), GroupTracker::replay(&log, driver.machine.registry().index));
            driver.replay_follower();
        }
        Ok(driver)
    }

    fn node(&self, log: Log, rng: Rng) -> raft::Result<Node> {
        Node::new(u64::from(self.setup.id.0), log, rng)
    }

    fn remember_base(&mut self, log: &Log) {
        let index = self.machine.registry().index;
        self.hashes = [(index, self.machine.registry().hash)].into();
        self.groups = [(index, log.snapshot_group().clone())].into();
    }

    /// A tick of the consensus clock; `unix_s` is the wall clock, which only stamps proposals.
    pub fn tick(&mut self, unix_s: u64) {
        self.ticks += 1;
        self.unix_s = unix_s;
        let Part::Group(node) = &mut self.part else { return };
        node.tick();
        // A learner never forgets its leader in the library: only what was heard tells whether there is one.
        let leader = node.leader();
        let heard = self.heard.get(&leader).copied().unwrap_or(0);
        if node.leads() || leader != 0 && self.ticks - heard <= 2 * ELECTION_TICKS as u64 {
            self.leaderless_since = self.ticks;
        }
        if self.ticks.is_multiple_of(GROUP_TICKS) {
            self.tend_group();
            self.leave_if_removed();
        }
        let ticks = self.ticks;
        self.leaving.retain(|_, until| *until > ticks);
        self.expire();
    }

    /// Gives up on requests whose leader changed or that take too long: callers repeat them.
    fn expire(&mut self) {
        let (ticks, leads) = (self.ticks, self.leads());
        let over = |since: u64| !leads || ticks.saturating_sub(since) > PATIENCE_TICKS;
        let outputs = &mut self.outputs;
        self.proposals.retain(|_, (request, since)| {
            let over = over(*since);
            if over {
                outputs.push_back(Output::Proposed(*request, Err(ProposeError::NoLeader)));
            }
            !over
        });
        self.reads.retain(|_, (request, since)| {
            let over = over(*since);
            if over {
                outputs.push_back(Output::Read(*request, Err(ProposeError::NoLeader)));
            }
            !over
        });
    }

    /// A frame of class RAFT from `link`.
    ///
    /// # Errors
    /// [`FrameError`]; the frame changed nothing.
    pub fn deliver(&mut self, link: ClusterId, frame: &RaftFrame) -> Result<(), FrameError> {
        let refuse = |reason, detail: String| Err(FrameError { from: link, reason, detail });
        if let Some(why) = &self.failed {
            return refuse("stopped", why.clone());
        }
        let receiver = Receiver { mesh: &self.setup.mesh, id: u64::from(self.setup.id.0) };
        let message = transport::checked(receiver, link, frame)?;
        self.may_speak(link)?;
        self.heard.insert(message.from, self.ticks);
        if let Part::Follower(..) = self.part {
            let from_leader = [MessageType::MsgAppend, MessageType::MsgHeartbeat, MessageType::MsgSnapshot];
            if !from_leader.iter().any(|kind| *kind as i32 == message.msg_type) {
                return refuse("not_member", "this cluster is not in the group".into());
            }
            if self.forgetful {
                return refuse("restored", "the store was restored: waiting to be taken out of the group".into());
            }
            self.enter_group();
        }
        let Part::Group(node) = &mut self.part else { return refuse("stopped", "the member has failed".into()) };
        let own = Standing { term: node.term(), committed: node.committed(), last: node.last_index() };
        if let Err(detail) = transport::fits(&message, own, |index| node.term_at(index)) {
            return refuse("misfit", detail);
        }
        if let Some(snapshot) = &message.snapshot
            && let Err(error) = super::snapshot::unpack(&snapshot.data)
        {
            return refuse("malformed", error.to_string());
        }
        node.step(message);
        Ok(())
    }

    /// Former members are refused, unless the group has yet to learn it. A cluster that this member has not
    /// heard of is taken on the link's word: it may have joined, and lead, while this one was away.
    fn may_speak(&self, link: ClusterId) -> Result<(), FrameError> {
        let registry = self.machine.registry();
        let left = registry.gone.contains_key(&link) && registry.cluster_by_id(link).is_none();
        let in_group = matches!(&self.part, Part::Group(node) if group::contains(node.conf_state(), u64::from(link.0)));
        if !left || in_group {
            return Ok(());
        }
        Err(FrameError { from: link, reason: "not_member", detail: format!("cluster {link} has left the mesh") })
    }

    /// Proposes an entry; the end comes as [`Output::Proposed`].
    pub fn propose(&mut self, request: RequestId, entry: &SignedEntry) {
        if let Some(why) = self.failed.clone() {
            return self.outputs.push_back(Output::Proposed(request, Err(ProposeError::Stopped(why))));
        }
        if let Err(error) = self.make_way(entry) {
            return self.outputs.push_back(Output::Proposed(request, Err(error)));
        }
        let stamped = Stamped { unix_s: self.unix_s, entry: entry.to_bytes() }.to_bytes();
        self.next_context = self.next_context.wrapping_add(1);
        let context = self.next_context;
        let full = self.proposals.len() >= WAITING_MAX;
        let taken = match &mut self.part {
            _ if full => Err(ProposeError::Busy),
            Part::Group(node) => {
                node.propose(context.to_be_bytes().to_vec(), stamped).map_err(|not_taken| match not_taken {
                    NotTaken::NotLeader => ProposeError::NoLeader,
                    NotTaken::Full => ProposeError::Busy,
                })
            }
            _ => Err(ProposeError::NoLeader),
        };
        match taken {
            Ok(()) => {
                self.proposals.insert(context, (request, self.ticks));
            }
            Err(error) => self.outputs.push_back(Output::Proposed(request, Err(error))),
        }
    }

    /// Asks for a linearizable position; the end comes as [`Output::Read`].
    pub fn read_index(&mut self, request: RequestId) {
        self.next_context = self.next_context.wrapping_add(1);
        let context = self.next_context;
        let taken = match &mut self.part {
            Part::Group(node) if self.reads.len() < WAITING_MAX => node.read_index(context.to_be_bytes().to_vec()),
            _ => Err(NotTaken::NotLeader),
        };
        match taken {
            Ok(()) => {
                self.reads.insert(context, (request, self.ticks));
            }
            Err(_) => self.outputs.push_back(Output::Read(request, Err(ProposeError::NoLeader))),
        }
    }

    /// Hands the lead to the voter that is furthest and still in the mesh, if this member leads.
    pub fn transfer_leader(&mut self) {
        let me = u64::from(self.setup.id.0);
        let members: BTreeSet<u64> = self.machine.registry().clusters.values().map(|c| u64::from(c.id.0)).collect();
        let Part::Group(node) = &mut self.part else { return };
        let voters = node.conf_state().voters.clone();
        let others =
            voters.into_iter().filter(|id| *id != me && members.contains(id) && !self.leaving.contains_key(id));
        let alive = |id: &u64| node.progress(*id).filter(|(_, active)| *active).map(|(matched, _)| (matched, *id));
        if node.leads()
            && let Some((_, to)) = others.filter_map(|id| alive(&id)).max()
        {
            node.transfer_leader(to);
        }
    }

    /// Writes, then sends, then applies, until nothing is left to do.
    ///
    /// A failed write ends the member: it answers no more, keeps its registry, and says why in its status.
    pub fn turn(&mut self) {
        while let Part::Group(node) = &mut self.part {
            let Some(batch) = node.batch() else { break };
            let (persist, promised) = batch.split();
            let proof = match self.store.write(&persist) {
                Ok(proof) => proof,
                Err(error) => return self.fail(&error),
            };
            let released = node.complete(persist, promised, &proof);
            if released.committed.iter().any(|entry| entry.entry_type != EntryType::EntryNormal as i32) {
                // A commit position may be lost in a crash, but not one that changes the group: a member
                // that restarts with the group of before could elect itself by that group's majority.
                let persist = Persist { hard_state: Some(node.hard_state()), ..Persist::default() };
                if let Err(error) = self.store.write(&persist) {
                    return self.fail(&error);
                }
            }
            for message in &released.messages {
                if let Ok(to) = u16::try_from(message.to) {
                    let frame = transport::frame(&self.setup.mesh, message);
                    self.outputs.push_back(Output::Send(ClusterId(to), frame));
                }
            }
            self.apply(released);
        }
    }

    fn fail(&mut self, error: &StoreError) {
        self.failed = Some(error.to_string());
        self.part = Part::None;
        for (request, _) in std::mem::take(&mut self.proposals).into_values() {
            self.outputs.push_back(Output::Proposed(request, Err(ProposeError::Stopped(error.to_string()))));
        }
        for (request, _) in std::mem::take(&mut self.reads).into_values() {
            self.outputs.push_back(Output::Read(request, Err(ProposeError::Stopped(error.to_string()))));
        }
    }

    /// The next output, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// The registry as applied.
    pub fn registry(&self) -> &Registry {
        self.machine.registry()
    }

    /// The store, for what lies beside the log.
    pub fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    /// Whether this member leads.
    pub fn leads(&self) -> bool {
        matches!(&self.part, Part::Group(node) if node.leads())
    }

    /// The consensus part, for an oracle.
    pub fn consensus(&self) -> Option<&Node> {
        match &self.part {
            Part::Group(node) => Some(node),
            _ => None,
        }
    }

    /// Where the member stands.
    pub fn status(&self) -> Status {
        let ids = |ids: &[u64]| ids.iter().filter_map(|id| u16::try_from(*id).ok()).map(ClusterId).collect();
        let applied = self.machine.registry().index;
        let group = self.groups.last_key_value().map(|(_, group)| group.clone()).unwrap_or_default();
        let mut status = Status {
            applied,
            voters: ids(&group.voters),
            learners: ids(&group.learners),
            failed: self.failed.clone(),
            ..Status::default()
        };
        match &self.part {
            Part::Group(node) => {
                status.term = node.term();
                status.leader = u16::try_from(node.leader()).ok().filter(|id| *id != 0).map(ClusterId);
                status.commit = node.committed();
                status.role = match status.voters.contains(&self.setup.id) {
                    _ if node.leads() => Role::Leader,
                    true if node.stands() => Role::Candidate,
                    true => Role::Voter,
                    false => Role::Learner,
                };
                status.wants_follow = self.ticks.saturating_sub(self.leaderless_since) > LEADERLESS_TICKS;
            }
            Part::Follower(log, _) => {
                status.restored = self.forgetful;
                status.term = log.hard_state().term;
                status.commit = self.followed_commit.max(applied);
                status.wants_follow = true;
            }
            Part::None => {}
        }
        status
    }
}

/// Ticks between two looks at the group's membership.
const GROUP_TICKS: u64 = 10;

fn corrupt(error: impl std::fmt::Display) -> StoreError {
    StoreError::Corrupt { file: "registry.redb".into(), what: error.to_string() }
}

/// Writes the first state of a new mesh: this cluster alone votes, and `Init` is entry 1, committed.
fn found<S: Store>(setup: &Setup, store: &mut S) -> Result<(), StoreError> {
    let Some(init) = &setup.init else { return Ok(()) };
    // The first entry cannot be judged by a clock yet: its own writer's time stands for the leader's.
    let unix_s = init.payload().map(|payload| payload.unix_s()).map_err(corrupt)?;
    if u64::from(setup.id.0) != FOUNDER {
        return Err(corrupt(format!("a mesh is founded by cluster {FOUNDER}, not {}", setup.id)));
    }
    let data = Stamped { unix_s, entry: init.to_bytes() }.to_bytes();
    let first = Entry { index: 1, term: 1, data, ..Entry::default() };
    let persist = Persist {
        entries: vec![first],
        hard_state: Some(HardState { term: 1, vote: u64::from(setup.id.0), commit: 1 }),
        in_group: Some(true),
        ..Persist::default()
    };
    let _proof = store.write(&persist)?;
    Ok(())
}
