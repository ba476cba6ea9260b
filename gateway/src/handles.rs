//! Handles: the numbers by which other clusters know this cluster's endpoints, and the processes behind them.
//!
//! Pure: time comes in as Unix seconds, nothing is read or written. The member alone assigns; every
//! replica accepts what the member has signed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A handle that was given up is not given again for this long: clients may still hold tickets to it.
pub const HANDLE_QUARANTINE_S: u64 = 24 * 3600;

/// Workloads of one cluster; far above any real one, it bounds the table.
pub const HANDLES_MAX: usize = 100_000;

/// One assigned handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// The number; never 0.
    pub handle: u32,
    /// The last incarnation given.
    pub incarnation: u16,
    /// The process the incarnation belongs to.
    pub process: Vec<u8>,
    /// When it was last seen registered.
    pub seen_unix_s: u64,
}

/// Why no handle was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandleError {
    /// The table is full.
    #[error("this cluster has {HANDLES_MAX} workloads already; remove some, or split the cluster")]
    Full,
}

/// Which workload has which handle.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleTable {
    /// By `namespace/workload`.
    assigned: BTreeMap<String, Assigned>,
    /// Given up, and when.
    resting: BTreeMap<u32, u64>,
    last: u32,
}

impl HandleTable {
    /// The handle and incarnation of `workload`'s process `process`: as before for a process that is
    /// known, a new incarnation for a new process, a new handle for a new workload.
    ///
    /// # Errors
    /// [`HandleError::Full`].
    pub fn assign(&mut self, workload: &str, process: &[u8], now_unix_s: u64) -> Result<(u32, u16), HandleError> {
        if let Some(known) = self.assigned.get_mut(workload) {
            known.seen_unix_s = now_unix_s;
            if known.process != process {
                known.process = process.to_vec();
                // Wraps after 65,535 restarts; a ticket to the first incarnation is long gone by then.
                known.incarnation = known.incarnation.wrapping_add(1).max(1);
            }
            return Ok((known.handle, known.incarnation));
        }
        if self.assigned.len() >= HANDLES_MAX {
            return Err(HandleError::Full);
        }
        let handle = self.free(now_unix_s);
        let assigned = Assigned { handle, incarnation: 1, process: process.to_vec(), seen_unix_s: now_unix_s };
        self.assigned.insert(workload.to_owned(), assigned);
        Ok((handle, 1))
    }

    /// Whether the table already says that `workload`'s process `process` is `assigned`.
    pub fn says(&self, workload: &str, assigned: (u32, u16), process: &[u8]) -> bool {
        self.assigned
            .get(workload)
            .is_some_and(|known| (known.handle, known.incarnation) == assigned && known.process == process)
    }

    /// Gives the handle of `workload` up.
    pub fn release(&mut self, workload: &str, now_unix_s: u64) {
        if let Some(assigned) = self.assigned.remove(workload) {
            self.resting.insert(assigned.handle, now_unix_s);
        }
    }

    fn free(&mut self, now_unix_s: u64) -> u32 {
        self.resting.retain(|_, since| now_unix_s.saturating_sub(*since) < HANDLE_QUARANTINE_S);
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            let taken = self.resting.contains_key(&self.last)
                || self.assigned.values().any(|assigned| assigned.handle == self.last);
            if !taken {
                return self.last;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_another_incarnation_of_the_same_handle() {
        let mut table = HandleTable::default();
        assert_eq!(table.assign("shop/cart", b"p1", 0), Ok((1, 1)));
        assert_eq!(table.assign("shop/cart", b"p1", 5), Ok((1, 1)), "the same process, another replica or session");
        assert_eq!(table.assign("shop/cart", b"p2", 9), Ok((1, 2)));
        assert_eq!(table.assign("shop/web", b"p3", 9), Ok((2, 1)));
    }

    #[test]
    fn a_handle_rests_a_day_before_it_is_given_again() {
        let mut table = HandleTable::default();
        table.assign("a/a", b"p", 0).expect("room");
        table.release("a/a", 100);
        table.last = 0;
        assert_eq!(table.assign("b/b", b"p", 101).expect("room").0, 2);
        table.last = 0;
        assert_eq!(table.assign("c/c", b"p", 100 + HANDLE_QUARANTINE_S).expect("room").0, 1);
    }
}
