//! Watches every cluster after every turn, and knows what must never happen. One invariant a file, each
//! with the place in the paper that it comes from.

pub mod acknowledged;
pub mod election;
pub mod leader_completeness;
pub mod log_matching;
pub mod single_writer;
pub mod state_machine;
pub mod token_once;

use crate::raft::driver::Driver;
use crate::registry::Registry;
use crate::store::Store;

/// An invariant that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "seed {seed}, at {at_ms} ms: {text}\nreplay: cargo run -p isthmus-federation --bin federation-sim -- --seed {seed}"
)]
pub struct Violation {
    /// The run.
    pub seed: u64,
    /// Virtual time.
    pub at_ms: u64,
    /// What was seen.
    pub text: String,
}

/// All invariants of one run.
#[derive(Default)]
pub struct Oracle {
    /// At most one leader a term.
    pub election: election::Election,
    /// Equal position and term mean equal logs.
    pub log_matching: log_matching::LogMatching,
    /// A leader has everything that is committed.
    pub leader_completeness: leader_completeness::LeaderCompleteness,
    /// One position, one state.
    pub state_machine: state_machine::StateMachine,
    /// What was acknowledged stays.
    pub acknowledged: acknowledged::Acknowledged,
    /// A record is its owner's.
    pub single_writer: single_writer::SingleWriter,
    /// A token admits one.
    pub joins: token_once::TokenOnce,
    deferred: Option<String>,
}

impl Oracle {
    /// Looks at a cluster after its turn.
    ///
    /// # Errors
    /// What must not be.
    pub fn look<S: Store>(&mut self, id: u16, driver: &Driver<S>) -> Result<(), String> {
        if let Some(text) = self.deferred.take() {
            return Err(text);
        }
        if let Some(node) = driver.consensus() {
            self.election.look(id, node)?;
            self.log_matching.look(id, node)?;
            self.leader_completeness.look(id, node)?;
            self.state_machine.committed(id, node, driver.registry().index)?;
        }
        self.state_machine.look(id, driver.registry())
    }

    /// A cluster came back: what it holds is looked at afresh.
    pub fn restarted(&mut self, id: u16) {
        self.log_matching.restarted(id);
        self.state_machine.restarted(id);
        self.leader_completeness.restarted(id);
    }

    /// A client was told that its entry stands at `index`.
    ///
    /// # Errors
    /// If something else stands there.
    pub fn acknowledge(&mut self, index: u64, entry: &[u8], outcome: &Result<(), String>) -> Result<(), String> {
        self.acknowledged.note(index, entry);
        self.joins.answered(entry, outcome)?;
        self.single_writer.answered(entry, outcome)
    }

    /// An entry was written in somebody else's name.
    pub fn forged(&mut self, entry: &[u8]) {
        self.single_writer.forged(entry);
    }

    /// Reports `text` at the next look.
    pub fn defer(&mut self, text: String) {
        self.deferred = Some(text);
    }

    /// Changes of the group in the log.
    pub fn group_changes(&self) -> u64 {
        self.state_machine.group_changes()
    }

    /// The end: what the mesh agreed on, against all that was seen.
    ///
    /// # Errors
    /// What is missing or should not be there.
    pub fn final_look(&self, registry: &Registry) -> Result<(), String> {
        self.acknowledged.final_look(&self.state_machine)?;
        self.single_writer.final_look(registry, &self.state_machine)?;
        self.joins.final_look(registry)
    }
}
