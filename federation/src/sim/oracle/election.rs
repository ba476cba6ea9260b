//! Election safety: at most one leader is elected in a term (Raft paper, figure 3).

use std::collections::BTreeMap;

use crate::raft::node::Node;

/// Leaders seen, by term.
#[derive(Debug, Default)]
pub struct Election {
    leaders: BTreeMap<u64, u16>,
}

impl Election {
    /// Looks at one cluster.
    ///
    /// # Errors
    /// If another one led in the same term.
    pub fn look(&mut self, id: u16, node: &Node) -> Result<(), String> {
        if !node.leads() {
            return Ok(());
        }
        match *self.leaders.entry(node.term()).or_insert(id) {
            leader if leader == id => Ok(()),
            leader => Err(format!("election safety: clusters {leader} and {id} both lead term {}", node.term())),
        }
    }

    /// Terms that had a leader.
    pub fn terms(&self) -> u64 {
        self.leaders.len() as u64
    }
}
