//! Leader completeness: an entry committed in a term is in the logs of the leaders of all later terms (Raft
//! paper, figure 3, §5.4).

use std::collections::{BTreeMap, BTreeSet};

use crate::raft::node::Node;

/// What was seen committed, and which leaders were looked at.
#[derive(Debug, Default)]
pub struct LeaderCompleteness {
    /// Term of the committed entry, by position.
    committed: BTreeMap<u64, u64>,
    looked: BTreeSet<(u16, u64)>,
    upto: BTreeMap<u16, u64>,
}

impl LeaderCompleteness {
    /// Notes what one cluster holds committed; if it has just been elected, compares its log.
    ///
    /// # Errors
    /// If a committed entry is missing from a new leader's log.
    pub fn look(&mut self, id: u16, node: &Node) -> Result<(), String> {
        if node.leads() && self.looked.insert((id, node.term())) {
            for (&index, &term) in self.committed.range(node.log().first()..) {
                if term < node.term() && node.term_at(index) != Some(term) {
                    return Err(format!(
                        "leader completeness: cluster {id} leads term {} without entry {index} of term {term}, which was committed",
                        node.term()
                    ));
                }
            }
        }
        let from = self.upto.get(&id).copied().unwrap_or(0) + 1;
        for index in from.max(node.log().first())..=node.committed() {
            let Some(term) = node.term_at(index) else { break };
            match *self.committed.entry(index).or_insert(term) {
                known if known == term => {}
                known => {
                    return Err(format!(
                        "leader completeness: entry {index} was committed with term {known}, cluster {id} has {term}"
                    ));
                }
            }
        }
        self.upto.insert(id, node.committed());
        Ok(())
    }

    /// A cluster came back from its disk.
    pub fn restarted(&mut self, id: u16) {
        self.upto.remove(&id);
    }
}
