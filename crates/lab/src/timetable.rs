//! Things that are due at a time, first come first served among equals. Pure.

use std::{cmp::Ordering, collections::BinaryHeap, time::Duration};

/// Items ordered by when they are due; holds at most [`IN_FLIGHT_MAX`].
#[derive(Debug)]
pub struct Timetable<T> {
    heap: BinaryHeap<Entry<T>>,
    next_number: u64,
}

impl<T> Default for Timetable<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), next_number: 0 }
    }
}

impl<T> Timetable<T> {
    /// Files an item; gives it back if the table is full.
    ///
    /// # Errors
    /// The item itself.
    pub fn put(&mut self, due: Duration, item: T) -> Result<(), T> {
        if self.heap.len() >= IN_FLIGHT_MAX {
            return Err(item);
        }
        self.heap.push(Entry { due, number: self.next_number, item });
        self.next_number += 1;
        Ok(())
    }

    /// The next item if it is due at `now`, and when it was due.
    pub fn pop_due(&mut self, now: Duration) -> Option<(Duration, T)> {
        if self.next_due()? > now {
            return None;
        }
        self.heap.pop().map(|entry| (entry.due, entry.item))
    }

    /// When the next item is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.heap.peek().map(|entry| entry.due)
    }
}

#[derive(Debug)]
struct Entry<T> {
    due: Duration,
    number: u64,
    item: T,
}

// `BinaryHeap` gives the greatest first, so the earliest must compare as the greatest.
impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for Entry<T> {}

/// 1 Gbit/s of 1500-byte packets is 83,000 a second: three seconds of flight, or 400 MB.
pub const IN_FLIGHT_MAX: usize = 262_144;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_leave_when_due_and_equals_in_the_order_they_came() {
        let mut table = Timetable::default();
        for (due, item) in [(30, 'c'), (10, 'a'), (30, 'd'), (20, 'b')] {
            table.put(Duration::from_millis(due), item).unwrap();
        }
        assert_eq!(table.pop_due(Duration::from_millis(9)), None);
        assert_eq!(table.next_due(), Some(Duration::from_millis(10)));
        let all: String =
            std::iter::from_fn(|| table.pop_due(Duration::from_millis(30))).map(|(_, item)| item).collect();
        assert_eq!(all, "abcd");
    }
}
