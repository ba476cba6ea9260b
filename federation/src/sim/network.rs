//! A network in virtual time: delay, reorder, loss, duplicates, and cuts that may be one-way.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_wire::federation::{FollowFrame, FollowRequest, RaftFrame};

use crate::command::SignedEntry;
use crate::rng::Rng;

/// What travels between clusters.
#[derive(Debug, Clone)]
pub enum Packet {
    /// Class RAFT.
    Raft(RaftFrame),
    /// Class CALL: a proposal, answered by `Answer` or never.
    Propose(u64, SignedEntry),
    /// The proposal's end: log position and whether it was refused, or no leader there.
    Answer(u64, Option<(u64, Result<(), String>)>),
    /// Class FOLLOW, asking.
    Ask(FollowRequest),
    /// Class FOLLOW, serving.
    Follow(FollowFrame),
}

/// What the network does to packets, per mille.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// Lost.
    pub loss: u64,
    /// Delivered twice.
    pub duplicate: u64,
    /// Shortest way, ms.
    pub delay_ms_min: u64,
    /// Longest way, ms; packets overtake each other by the difference.
    pub delay_ms_max: u64,
}

/// Packets on their way.
#[derive(Debug, Default)]
pub struct Network {
    /// By arrival time, then by order of sending.
    due: BTreeMap<(u64, u64), (u16, u16, Packet)>,
    sent: u64,
    cut: BTreeSet<(u16, u16)>,
}

/// Packets on their way at once; beyond it new ones are lost, as in a full queue.
const QUEUE_MAX: usize = 20_000;

impl Network {
    /// Sends, if the weather lets it.
    pub fn send(&mut self, now_ms: u64, (from, to): (u16, u16), packet: Packet, weather: Weather, rng: &mut Rng) {
        if self.cut.contains(&(from, to)) || rng.chance(weather.loss) || self.due.len() >= QUEUE_MAX {
            return;
        }
        let copies = 1 + u64::from(rng.chance(weather.duplicate));
        for _ in 0..copies {
            let delay = weather.delay_ms_min + rng.below(weather.delay_ms_max - weather.delay_ms_min + 1);
            self.sent += 1;
            self.due.insert((now_ms + delay, self.sent), (from, to, packet.clone()));
        }
    }

    /// The next packet that has arrived by `now_ms` and whose path is not cut meanwhile.
    pub fn arrived(&mut self, now_ms: u64) -> Option<(u16, u16, Packet)> {
        loop {
            let (&key, _) = self.due.first_key_value()?;
            if key.0 > now_ms {
                return None;
            }
            let (from, to, packet) = self.due.remove(&key)?;
            if !self.cut.contains(&(from, to)) {
                return Some((from, to, packet));
            }
        }
    }

    /// When the next packet arrives.
    pub fn next_arrival(&self) -> Option<u64> {
        self.due.first_key_value().map(|((at, _), _)| *at)
    }

    /// Cuts one direction.
    pub fn cut(&mut self, from: u16, to: u16) {
        self.cut.insert((from, to));
    }

    /// Cuts both directions between two sides.
    pub fn split(&mut self, left: &[u16], right: &[u16]) {
        for a in left {
            for b in right {
                self.cut.insert((*a, *b));
                self.cut.insert((*b, *a));
            }
        }
    }

    /// All paths are whole again.
    pub fn heal(&mut self) {
        self.cut.clear();
    }

    /// Whether anything is cut.
    pub fn is_cut(&self) -> bool {
        !self.cut.is_empty()
    }
}
