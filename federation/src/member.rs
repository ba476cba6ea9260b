//! A cluster's member of the federation, as the gateway holds it: open, run, ask.
//!
//! Decides nothing: [`crate::raft::driver`] does. `member/run.rs` owns the thread and the clock. The caller
//! owns the links and gives them as a [`Transport`].

mod mirror;
mod run;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use isthmus_model::{ClusterId, ClusterName, ServiceAccount};
use isthmus_wire::federation::{Call, CallResult, FollowFrame, FollowRequest, RaftFrame};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::command::SignedEntry;
use crate::machine::Refusal;
use crate::registry::Registry;
use crate::store::StoreError;

pub use mirror::Mirror;
pub use run::Member;

/// Requests that may wait for the member's thread; beyond it `busy`. One proposal takes one slot and
/// a disk write of under 20 ms serves many, so this is seconds of work.
pub const QUEUE_MAX: usize = 1024;

/// How a member reaches the others: implemented by the gateway over link streams.
pub trait Transport: Send + Sync + 'static {
    /// Sends a frame of class RAFT to a cluster's member. Never blocks; may drop (Raft repeats).
    fn send(&self, to: ClusterId, frame: RaftFrame);

    /// One call (class CALL) to a cluster's member.
    fn call(&self, to: ClusterId, call: Call) -> CallFuture;
}

/// The answer of a [`Transport::call`].
pub type CallFuture = Pin<Box<dyn Future<Output = Result<CallResult, TransportError>> + Send>>;

/// A member could not be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cluster {to} cannot be reached: {reason}")]
pub struct TransportError {
    /// Whom.
    pub to: ClusterId,
    /// Why, in words.
    pub reason: String,
}

/// What a member needs to know before it can read its own disk.
#[derive(Debug, Clone)]
pub struct MemberConfig {
    /// The mesh's name: frames of another mesh are refused.
    pub mesh: String,
    /// This cluster.
    pub cluster: ClusterName,
    /// Its number, from the grant (1 for the first cluster).
    pub cluster_id: ClusterId,
    /// Where the store lies: `registry.redb` in this directory (0700).
    pub dir: PathBuf,
    /// One tick of the consensus clock (default 100 ms; election after 10-20 ticks, heartbeat each 2nd).
    pub tick: Duration,
    /// The first entry of a new mesh, if this cluster founds it. Ignored once the store has a log.
    pub init: Option<SignedEntry>,
}

impl MemberConfig {
    /// A member with the usual clock.
    pub fn new(mesh: &str, cluster: ClusterName, cluster_id: ClusterId, dir: PathBuf) -> Self {
        Self { mesh: mesh.to_owned(), cluster, cluster_id, dir, tick: Duration::from_millis(100), init: None }
    }
}

/// A proposal's end.
#[derive(Debug, Clone, PartialEq)]
pub struct Committed {
    /// Its position in the log.
    pub index: u64,
    /// What applying it came to: the same on every member.
    pub outcome: Result<(), Refusal>,
}

/// Why a proposal has no known end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProposeError {
    /// No leader is known or reachable.
    #[error(
        "the registry has no leader that this cluster reaches: writes wait for a majority of its voters; reads and traffic go on. See `isthmus status`"
    )]
    NoLeader,
    /// Sent, but no answer came in time: it may yet be applied; the same entry may be proposed again.
    #[error("no answer within {0:?}; proposing the same entry again is safe")]
    Timeout(Duration),
    /// Asked of a gateway replica that is not its cluster's member.
    #[error("this gateway replica does not write to the registry; ask replica 0, the cluster's member")]
    NotMember,
    /// The only voter cannot leave.
    #[error(
        "this cluster holds the registry's only vote and no other cluster has caught up yet; see `isthmus status`, and try again when another one follows"
    )]
    LastVoter,
    /// Too much waits already.
    #[error("the registry's queue is full ({QUEUE_MAX} requests); try again in a second")]
    Busy,
    /// The member has stopped.
    #[error("the member has stopped: {0}")]
    Stopped(String),
    /// The entry is not one.
    #[error("refused before it was proposed: {0}")]
    Malformed(String),
}

impl ProposeError {
    /// A fixed word for metric labels and the wire.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoLeader => "no_leader",
            Self::Timeout(_) => "timeout",
            Self::NotMember => "not_member",
            Self::LastVoter => "last_voter",
            Self::Busy => "busy",
            Self::Stopped(_) => "stopped",
            Self::Malformed(_) => "malformed",
        }
    }
}

/// What part a member plays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Outside the Raft group: follows the committed log.
    #[default]
    Follower,
    /// In the group, without a vote.
    Learner,
    /// In the group, with a vote.
    Voter,
    /// A voter that stands for election.
    Candidate,
    /// The leader.
    Leader,
}

impl Role {
    /// A fixed word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Follower => "follower",
            Self::Learner => "learner",
            Self::Voter => "voter",
            Self::Candidate => "candidate",
            Self::Leader => "leader",
        }
    }
}

/// The member at a glance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Raft term.
    pub term: u64,
    /// The leader, if known.
    pub leader: Option<ClusterId>,
    /// Highest committed position known.
    pub commit: u64,
    /// Highest applied position.
    pub applied: u64,
    /// Voters, as of `applied`.
    pub voters: Vec<ClusterId>,
    /// Learners, as of `applied`.
    pub learners: Vec<ClusterId>,
    /// This member's part.
    pub role: Role,
    /// Whether it should follow another member's log now: outside the group, or in it without a leader
    /// for 5 s. See [`MemberHandle::follow_request`].
    pub wants_follow: bool,
    /// Whether its store was restored and it waits to be taken out of the group (or evicted and joined
    /// again) before it takes part: it may have forgotten a vote.
    pub restored: bool,
    /// Why it stopped, if it did: it serves what it knows and votes no more.
    pub failed: Option<String>,
}

/// Why a frame from a link was refused; the link may stay.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("frame from cluster {from} refused: {reason}: {detail}")]
pub struct FrameError {
    /// The link's cluster.
    pub from: ClusterId,
    /// A fixed word.
    pub reason: &'static str,
    /// What was wrong.
    pub detail: String,
}

/// Asks a running [`Member`]. Cheap to clone.
#[derive(Clone)]
pub struct MemberHandle {
    /// `None` for a mirror, behind which is no member.
    pub(crate) requests: Option<SyncSender<Request>>,
    pub(crate) registry: watch::Receiver<Arc<Registry>>,
    pub(crate) status: watch::Receiver<Status>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) config: Arc<MemberConfig>,
}

/// What the member's thread is asked to do.
pub(crate) enum Request {
    Deliver(ClusterId, RaftFrame, oneshot::Sender<Result<(), FrameError>>),
    Propose(SignedEntry, oneshot::Sender<Result<Committed, ProposeError>>),
    ReadIndex(oneshot::Sender<Result<u64, ProposeError>>),
    Serve(FollowRequest, oneshot::Sender<Vec<FollowFrame>>),
    Follow(oneshot::Sender<FollowRequest>),
    Followed(ClusterId, FollowFrame, oneshot::Sender<Result<(), FrameError>>),
    MintWorkload {
        hash: [u8; 32],
        account: ServiceAccount,
        expires_unix_s: u64,
        reply: oneshot::Sender<Result<(), StoreError>>,
    },
    UseWorkload {
        hash: [u8; 32],
        reply: oneshot::Sender<Result<ServiceAccount, WorkloadTokenError>>,
    },
    TransferLeader(oneshot::Sender<()>),
}

/// Why a workload's token does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkloadTokenError {
    /// Nothing of that hash.
    #[error("unknown workload token: it belongs to another cluster, or was never made")]
    Unknown,
    /// Used before.
    #[error("this workload token was used already; make a new one with `isthmus token create --workload`")]
    Used,
    /// Too old.
    #[error("this workload token expired at {0} (Unix seconds); make a new one with `isthmus token create --workload`")]
    Expired(u64),
    /// The store failed.
    #[error("the store failed")]
    Store(#[source] StoreError),
    /// The member has stopped.
    #[error("the member has stopped")]
    Stopped,
}

impl WorkloadTokenError {
    /// A fixed word for statuses on the wire.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unknown => "token_unknown",
            Self::Used => "token_used",
            Self::Expired(_) => "token_expired",
            Self::Store(_) => "store",
            Self::Stopped => "stopped",
        }
    }
}

impl MemberHandle {
    pub(crate) fn ask<T>(
        &self,
        make: impl FnOnce(oneshot::Sender<T>) -> Request,
    ) -> Result<oneshot::Receiver<T>, ProposeError> {
        let (reply, answer) = oneshot::channel();
        let Some(requests) = &self.requests else { return Err(ProposeError::NotMember) };
        match requests.try_send(make(reply)) {
            Ok(()) => Ok(answer),
            Err(TrySendError::Full(_)) => Err(ProposeError::Busy),
            Err(TrySendError::Disconnected(_)) => Err(ProposeError::Stopped(self.why_stopped())),
        }
    }

    fn why_stopped(&self) -> String {
        self.status.borrow().failed.clone().unwrap_or_else(|| "shut down".into())
    }

    /// Whether a member is behind it, not a [`Mirror`].
    pub fn is_member(&self) -> bool {
        self.requests.is_some()
    }

    /// The registry as this member knows it; changes arrive in log order.
    pub fn registry(&self) -> watch::Receiver<Arc<Registry>> {
        self.registry.clone()
    }

    /// Where the member stands.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Changes of [`Self::status`].
    pub fn status_changes(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// A frame of class RAFT arrived on a link with `from`.
    ///
    /// # Errors
    /// [`FrameError`] if mesh, version, sender or content are wrong. Never panics.
    pub async fn deliver(&self, from: ClusterId, frame: RaftFrame) -> Result<(), FrameError> {
        let lost = |detail: String| FrameError { from, reason: "busy", detail };
        let answer = self.ask(|reply| Request::Deliver(from, frame, reply)).map_err(|e| lost(e.to_string()))?;
        answer.await.unwrap_or_else(|_| Err(lost(self.why_stopped())))
    }

    /// What to ask another member's log, when [`Status::wants_follow`].
    pub async fn follow_request(&self) -> Result<FollowRequest, ProposeError> {
        let answer = self.ask(Request::Follow)?;
        answer.await.map_err(|_| ProposeError::Stopped(self.why_stopped()))
    }

    /// A follower asks: frames that bring it forward, at most one snapshot or a few hundred entries.
    /// Empty if it has everything: serve again when [`Self::registry`] changes.
    pub async fn serve_follow(&self, request: FollowRequest) -> Result<Vec<FollowFrame>, ProposeError> {
        let answer = self.ask(|reply| Request::Serve(request, reply))?;
        answer.await.map_err(|_| ProposeError::Stopped(self.why_stopped()))
    }

    /// A frame of class FOLLOW arrived from `from`.
    ///
    /// # Errors
    /// [`FrameError`] if it does not continue this member's log: ask again with a new request.
    pub async fn followed(&self, from: ClusterId, frame: FollowFrame) -> Result<(), FrameError> {
        let lost = |detail: String| FrameError { from, reason: "busy", detail };
        let answer = self.ask(|reply| Request::Followed(from, frame, reply)).map_err(|e| lost(e.to_string()))?;
        answer.await.unwrap_or_else(|_| Err(lost(self.why_stopped())))
    }

    /// Keeps a workload token of this cluster until it is used or expires.
    pub async fn mint_workload_token(
        &self,
        hash: [u8; 32],
        account: ServiceAccount,
        expires_unix_s: u64,
    ) -> Result<(), WorkloadTokenError> {
        let answer = self
            .ask(|reply| Request::MintWorkload { hash, account, expires_unix_s, reply })
            .map_err(|_| WorkloadTokenError::Stopped)?;
        answer.await.map_err(|_| WorkloadTokenError::Stopped)?.map_err(WorkloadTokenError::Store)
    }

    /// Uses a workload token: raced by many, exactly one gets the account, and that is on disk before.
    pub async fn use_workload_token(&self, hash: [u8; 32]) -> Result<ServiceAccount, WorkloadTokenError> {
        let answer = self.ask(|reply| Request::UseWorkload { hash, reply }).map_err(|_| WorkloadTokenError::Stopped)?;
        answer.await.map_err(|_| WorkloadTokenError::Stopped)?
    }

    /// Hands the leadership to another voter, if this member leads: before a planned stop.
    pub async fn transfer_leader(&self) {
        if let Ok(answer) = self.ask(Request::TransferLeader) {
            let _ = answer.await;
        }
    }
}
