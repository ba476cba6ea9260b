//! Which tickets were used: a receiving sidecar's memory of the last minute.
//!
//! Pure: `now` comes in. Bounded: when it is full, new tickets are refused rather than old ones forgotten, for a
//! forgotten ticket could be used twice.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustc_hash::FxHashSet;

use crate::cid::Cid;

/// Longer than any ticket is good for: validity, one unit of rounding, and clocks that differ a little.
const REMEMBERED: Duration = Duration::from_secs(80);
/// 200 dials a second for 80 s; about 1 MiB when full.
pub const SEEN_MAX: usize = 16_384;

/// Tickets seen lately.
#[derive(Debug, Default)]
pub struct SeenTickets {
    seen: FxHashSet<Cid>,
    order: VecDeque<(Instant, Cid)>,
}

/// What a ticket is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Never seen: the dial may go on.
    First,
    /// Used before.
    Again,
    /// Too many dials to remember this one.
    Full,
}

impl SeenTickets {
    /// Marks `ticket` as used.
    pub fn mark(&mut self, ticket: Cid, now: Instant) -> Seen {
        while let Some(&(since, old)) = self.order.front() {
            if now.saturating_duration_since(since) < REMEMBERED {
                break;
            }
            self.order.pop_front();
            self.seen.remove(&old);
        }
        if self.seen.contains(&ticket) {
            return Seen::Again;
        }
        if self.order.len() >= SEEN_MAX {
            return Seen::Full;
        }
        self.seen.insert(ticket);
        self.order.push_back((now, ticket));
        Seen::First
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(number: u32) -> Cid {
        let mut bytes = [0; 20];
        bytes[4..8].copy_from_slice(&number.to_be_bytes());
        Cid::from_slice(&bytes).expect("20 bytes")
    }

    #[test]
    fn a_ticket_is_good_once_and_a_full_memory_refuses() {
        let (mut seen, start) = (SeenTickets::default(), Instant::now());
        assert_eq!(seen.mark(ticket(0), start), Seen::First);
        assert_eq!(seen.mark(ticket(0), start), Seen::Again);
        for number in 1..SEEN_MAX as u32 {
            assert_eq!(seen.mark(ticket(number), start), Seen::First);
        }
        assert_eq!(seen.mark(ticket(u32::MAX), start), Seen::Full);
        assert_eq!(seen.mark(ticket(0), start), Seen::Again, "being full forgets nothing");
        assert_eq!(seen.mark(ticket(u32::MAX), start + REMEMBERED), Seen::First);
        assert_eq!(seen.order.len(), 1, "what is too old is gone");
    }
}
