//! No acknowledged write is lost: what a client was told stands in the log stands there at the end
//! (Raft paper, §8: linearizable semantics).

use std::collections::BTreeMap;

use super::state_machine::StateMachine;

/// Entries that clients were told about, by the position they were told.
#[derive(Debug, Default)]
pub struct Acknowledged {
    entries: BTreeMap<u64, Vec<u8>>,
}

impl Acknowledged {
    /// A client was told.
    pub fn note(&mut self, index: u64, entry: &[u8]) {
        self.entries.insert(index, entry.to_vec());
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.entries.len() as u64
    }

    /// The highest position acknowledged.
    pub fn highest(&self) -> u64 {
        self.entries.last_key_value().map_or(0, |(index, _)| *index)
    }

    /// Everything acknowledged must be what was applied there.
    ///
    /// # Errors
    /// What is missing.
    pub fn final_look(&self, applied: &StateMachine) -> Result<(), String> {
        for (index, entry) in &self.entries {
            match applied.entry(*index) {
                Some(found) if found == entry => {}
                Some([]) => {
                    return Err(format!("acknowledged write at {index} was replaced by a leader's empty entry"));
                }
                Some(_) => return Err(format!("acknowledged write at {index} was replaced by another")),
                None => return Err(format!("acknowledged write at {index} is lost")),
            }
        }
        Ok(())
    }
}
