//! Log matching: if two logs hold an entry of the same position and term, they are equal up to it (Raft
//! paper, figure 3, §5.3).

use std::collections::BTreeMap;

use crate::der::Fingerprint;
use crate::raft::node::Node;

/// Every entry seen, by position and term: its data, and the term before it (which chains the rest).
#[derive(Debug, Default)]
pub struct LogMatching {
    entries: BTreeMap<(u64, u64), (Fingerprint, Option<u64>)>,
    /// Where each cluster's log was looked at last: its end, and that entry's term.
    seen: BTreeMap<u16, (u64, u64)>,
}

impl LogMatching {
    /// Looks at what is new in one cluster's log.
    ///
    /// # Errors
    /// If an entry contradicts one seen elsewhere.
    pub fn look(&mut self, id: u16, node: &Node) -> Result<(), String> {
        let log = node.log();
        let (end, term) = self.seen.get(&id).copied().unwrap_or((0, 0));
        // An unchanged entry where we stopped means nothing before it changed: that is what is proven here.
        let from = if log.term_at(end) == Some(term) { end + 1 } else { log.first() };
        let from = from.max(log.first());
        for entry in log.slice(from, log.last() + 1, u64::MAX).unwrap_or_default() {
            let before = log.term_at(entry.index - 1);
            let found = (Fingerprint::of(&entry.data), before);
            let known = self.entries.entry((entry.index, entry.term)).or_insert(found);
            let same_before = known.1.is_none() || before.is_none() || known.1 == before;
            if known.0 != found.0 || !same_before {
                let (index, term) = (entry.index, entry.term);
                return Err(format!("log matching: cluster {id} holds another entry at {index} of term {term}"));
            }
        }
        self.seen.insert(id, (log.last(), log.term_at(log.last()).unwrap_or(0)));
        Ok(())
    }

    /// A cluster came back from its disk.
    pub fn restarted(&mut self, id: u16) {
        self.seen.remove(&id);
    }
}
