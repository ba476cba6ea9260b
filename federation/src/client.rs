//! Proposals and linearizable reads, wherever the leader is: to this member's thread if it leads, else by
//! a call to the leader, else by asking the voters who leads.
//!
//! An entry is applied once however often it is proposed (its writer's sequence number sees to that), so
//! everything here may be repeated.

use std::time::Duration;

use isthmus_model::ClusterId;
use isthmus_wire::federation::{Call, CallResult, call};
use tokio::time::{Instant, sleep, timeout_at};

use crate::command::SignedEntry;
use crate::machine::Refusal;
use crate::member::{Committed, MemberHandle, ProposeError, Request};

/// How long a proposal is tried: two elections and a few round trips.
pub const PROPOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between attempts: a heartbeat, in which a new leader makes itself known.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// One attempt: then the leader is taken for lost and the next voter asked.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);

impl MemberHandle {
    /// Brings an entry into the log and waits until it is applied on the leader.
    ///
    /// # Errors
    /// [`ProposeError`]; after [`ProposeError::Timeout`] the same entry may be proposed again.
    pub async fn propose(&self, entry: SignedEntry) -> Result<Committed, ProposeError> {
        let call = Call { call: Some(call::Call::Propose(entry.to_bytes())) };
        let result = self.anywhere(call).await?;
        let outcome = match result.error.as_str() {
            "refused" => Err(Refusal { reason: result.reason, message: result.message }),
            _ => Ok(()),
        };
        Ok(Committed { index: result.index, outcome })
    }

    /// A log position such that whoever has applied it sees every write finished before this call
    /// (Raft dissertation §6.4). Wait for it with [`Self::applied`].
    ///
    /// # Errors
    /// [`ProposeError`] if no majority answers.
    pub async fn read_index(&self) -> Result<u64, ProposeError> {
        let call = Call { call: Some(call::Call::ReadIndex(true)) };
        self.anywhere(call).await.map(|result| result.index)
    }

    /// Waits until [`Self::registry`] has reached `index`.
    ///
    /// # Errors
    /// [`ProposeError::Timeout`] after `patience`.
    pub async fn applied(&self, index: u64, patience: Duration) -> Result<(), ProposeError> {
        let mut registry = self.registry();
        let reached = registry.wait_for(|registry| registry.index >= index);
        match tokio::time::timeout(patience, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ProposeError::Stopped("shut down".into())),
            Err(_) => Err(ProposeError::Timeout(patience)),
        }
    }

    /// Another member's call (class CALL) arrived: does it if this member leads, else says who does.
    pub async fn answer(&self, call: Call) -> CallResult {
        match self.local(call).await {
            Ok(result) => result,
            Err(error) => CallResult {
                index: self.status().leader.map_or(0, |leader| u64::from(leader.0)),
                error: error.reason().into(),
                message: error.to_string(),
                reason: String::new(),
            },
        }
    }

    async fn anywhere(&self, call: Call) -> Result<CallResult, ProposeError> {
        if !self.is_member() {
            return Err(ProposeError::NotMember);
        }
        let deadline = Instant::now() + PROPOSE_TIMEOUT;
        let mut sent = false;
        let mut turn = 0;
        while Instant::now() < deadline {
            let attempt = (Instant::now() + ATTEMPT_TIMEOUT).min(deadline);
            match timeout_at(attempt, self.attempt(&call, turn)).await {
                Ok(Ok(result)) => return Ok(result),
                Ok(Err(ProposeError::NoLeader)) => sleep(RETRY_PAUSE).await,
                Ok(Err(error)) => return Err(error),
                Err(_) => sent = true,
            }
            turn += 1;
        }
        Err(if sent { ProposeError::Timeout(PROPOSE_TIMEOUT) } else { ProposeError::NoLeader })
    }

    /// One attempt: at home, at the leader, or at the next voter.
    async fn attempt(&self, call: &Call, turn: usize) -> Result<CallResult, ProposeError> {
        let status = self.status();
        if status.leader == Some(self.config.cluster_id) {
            return self.local(call.clone()).await;
        }
        let others: Vec<ClusterId> =
            status.voters.iter().copied().filter(|voter| *voter != self.config.cluster_id).collect();
        let to = match status.leader {
            Some(leader) if turn.is_multiple_of(2) => leader,
            _ if others.is_empty() => return Err(ProposeError::NoLeader),
            _ => others[turn % others.len()],
        };
        let mut result = self.remote(to, call).await?;
        // A voter that does not lead names the leader instead.
        if result.error == "no_leader" && result.index != 0 {
            let leader = u16::try_from(result.index).map_err(|_| ProposeError::NoLeader)?;
            result = self.remote(ClusterId(leader), call).await?;
        }
        match result.error.as_str() {
            "" | "refused" => Ok(result),
            "last_voter" => Err(ProposeError::LastVoter),
            "malformed" => Err(ProposeError::Malformed(result.message)),
            _ => Err(ProposeError::NoLeader),
        }
    }

    async fn remote(&self, to: ClusterId, call: &Call) -> Result<CallResult, ProposeError> {
        self.transport.call(to, call.clone()).await.map_err(|error| {
            tracing::debug!(%error, "registry call failed");
            ProposeError::NoLeader
        })
    }

    async fn local(&self, call: Call) -> Result<CallResult, ProposeError> {
        let stopped = |_| ProposeError::Stopped("shut down".into());
        match call.call {
            Some(call::Call::Propose(bytes)) => {
                let entry =
                    SignedEntry::from_bytes(&bytes).map_err(|error| ProposeError::Malformed(error.to_string()))?;
                let committed = self.ask(|reply| Request::Propose(entry, reply))?.await.map_err(stopped)??;
                let (error, refusal) = match committed.outcome {
                    Ok(()) => (String::new(), Refusal { reason: String::new(), message: String::new() }),
                    Err(refusal) => ("refused".into(), refusal),
                };
                Ok(CallResult { index: committed.index, error, message: refusal.message, reason: refusal.reason })
            }
            Some(call::Call::ReadIndex(_)) => {
                let index = self.ask(Request::ReadIndex)?.await.map_err(stopped)??;
                Ok(CallResult { index, ..CallResult::default() })
            }
            None => Err(ProposeError::Malformed("an empty call".into())),
        }
    }
}
