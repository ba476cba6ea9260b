//! Whether a path is alive, how long and lossy it is, and which of several a packet takes.
//!
//! Sans-I/O: `now` comes in, probes to send go out. A path is one gateway replica as a sidecar sees it, or one flow
//! of a link. "Heard something lately" proves nothing, for paths are asymmetric: only the answer to a probe does.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Between gateways, and to the gateways while nothing waits for an answer it is [`INTERVAL_IDLE`].
pub const INTERVAL_LINK: Duration = Duration::from_millis(200);
/// From a sidecar while packets are outstanding.
pub const INTERVAL_BUSY: Duration = Duration::from_millis(50);
/// From a sidecar otherwise.
pub const INTERVAL_IDLE: Duration = Duration::from_secs(1);
/// Unanswered probes that are remembered; older ones are lost by then.
const OUTSTANDING_MAX: usize = 32;
/// Weight of one probe in the loss estimate: about the last 128.
const LOSS_WEIGHT: f32 = 1.0 / 128.0;

/// Liveness and quality of one path.
#[derive(Debug, Clone)]
pub struct PathHealth {
    interval: Duration,
    next: Instant,
    sequence: u64,
    outstanding: VecDeque<(u64, Instant)>,
    state: PathState,
    srtt: Option<Duration>,
    loss: f32,
}

/// What is known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// Not answered yet, and not given up: used like a live one, for waiting would cost the first packets.
    Untried,
    /// Answers.
    Live,
    /// Answers, and asks to be left.
    Draining,
    /// Missed its answers. Still probed.
    Dead,
}

impl PathHealth {
    /// A path to be probed from now on. `sequence` must be higher than any used before on this path (a wall clock
    /// in milliseconds will do): receivers take each number once.
    pub fn new(now: Instant, interval: Duration, sequence: u64) -> Self {
        Self {
            interval,
            next: now,
            sequence,
            outstanding: VecDeque::new(),
            state: PathState::Untried,
            srtt: None,
            loss: 0.0,
        }
    }

    /// When [`PathHealth::poll_probe`] has something to do next.
    pub fn next_timeout(&self) -> Instant {
        match self.outstanding.front() {
            Some(&(_, sent)) => self.next.min(sent + self.patience()),
            None => self.next,
        }
    }

    /// Probes at this interval from now on; a shorter one takes effect at once.
    pub fn set_interval(&mut self, now: Instant, interval: Duration) {
        if interval != self.interval {
            self.interval = interval;
            self.next = self.next.min(now + interval);
        }
    }

    /// Counts what went unanswered; the sequence number of the probe to be sent now, if it is time.
    pub fn poll_probe(&mut self, now: Instant) -> Option<u64> {
        self.expire(now);
        if now < self.next {
            return None;
        }
        self.next = now + self.interval;
        self.sequence += 1;
        if self.outstanding.len() == OUTSTANDING_MAX {
            self.outstanding.pop_front();
        }
        self.outstanding.push_back((self.sequence, now));
        Some(self.sequence)
    }

    /// An authentic answer came. Returns the round trip if it answers a probe that was waited for.
    pub fn on_reply(&mut self, now: Instant, sequence: u64, draining: bool) -> Option<Duration> {
        let at = self.outstanding.iter().position(|&(sent, _)| sent == sequence)?;
        // Those before it are lost: later ones are answered already. What is left was all sent after this one.
        let (_, sent) = self.outstanding.drain(..=at).next_back()?;
        let rtt = now.saturating_duration_since(sent);
        // RFC 6298: a new sample weighs an eighth.
        self.srtt = Some(self.srtt.map_or(rtt, |srtt| (srtt * 7 + rtt) / 8));
        (0..at).for_each(|_| self.count(true));
        self.count(false);
        self.state = if draining { PathState::Draining } else { PathState::Live };
        Some(rtt)
    }

    /// How long the oldest unanswered probe is waited for. By then two more were sent and not answered either, so
    /// that one lost packet kills no path: 110 ms at the busy interval on a short path.
    fn patience(&self) -> Duration {
        match self.srtt {
            Some(srtt) => self.interval * 2 + (self.interval / 5).max(srtt * 2),
            // Its length is not known yet.
            None => self.interval * 10,
        }
    }

    fn expire(&mut self, now: Instant) {
        let patience = self.patience();
        while let Some(&(_, sent)) = self.outstanding.front() {
            if now.saturating_duration_since(sent) < patience {
                break;
            }
            self.outstanding.pop_front();
            self.count(true);
            self.state = PathState::Dead;
        }
    }

    fn count(&mut self, lost: bool) {
        self.loss += (if lost { 1.0 } else { 0.0 } - self.loss) * LOSS_WEIGHT;
    }

    /// What is known of it.
    pub fn state(&self) -> PathState {
        self.state
    }

    /// Whether packets may be sent on it.
    pub fn usable(&self) -> bool {
        matches!(self.state, PathState::Live | PathState::Untried)
    }

    /// Smoothed round trip.
    pub fn rtt(&self) -> Option<Duration> {
        self.srtt
    }

    /// Share of probes that went unanswered lately, 0 to 1.
    pub fn loss(&self) -> f32 {
        self.loss
    }
}

/// Which of `candidates` the ID with this spread takes: rendezvous hashing, so that a path's death moves only the
/// packets that were on it, and its return moves only those back. Each candidate brings a number that is its own.
pub fn choose<I>(spread: u64, candidates: I) -> Option<usize>
where
    I: IntoIterator<Item = u64>,
{
    let weight = |id: u64| {
        // splitmix64's finaliser over both.
        let mut mixed = spread ^ id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    candidates.into_iter().enumerate().max_by_key(|&(_, id)| weight(id)).map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = INTERVAL_BUSY;

    #[test]
    fn three_missed_answers_make_a_path_dead_and_one_answer_revives_it() {
        let start = Instant::now();
        let mut path = PathHealth::new(start, STEP, 100);
        let first = path.poll_probe(start).expect("due at once");
        assert_eq!(first, 101);
        assert!(path.usable(), "untried paths are used");
        assert_eq!(path.on_reply(start + Duration::from_millis(1), first, false), Some(Duration::from_millis(1)));
        let (mut now, mut asked, mut last) = (start, 0, first);
        while path.usable() {
            now = path.next_timeout();
            if let Some(sequence) = path.poll_probe(now) {
                (asked, last) = (asked + 1, sequence);
            }
        }
        assert_eq!((asked, now), (3, start + Duration::from_millis(160)));
        assert!(path.loss() > 0.0);
        path.on_reply(now, last, false).expect("was waited for");
        assert_eq!(path.state(), PathState::Live);
    }

    #[test]
    fn single_losses_kill_no_path_and_are_counted() {
        let start = Instant::now();
        let mut path = PathHealth::new(start, STEP, 0);
        for step in 0..1000 {
            let now = start + STEP * step;
            let sequence = path.poll_probe(now).expect("due");
            if step % 3 == 0 {
                path.on_reply(now, sequence, false).expect("was waited for");
            }
            assert!(path.usable(), "step {step}");
        }
        assert!((0.6..0.72).contains(&path.loss()), "{}", path.loss());
    }

    #[test]
    fn a_long_path_is_given_its_round_trip() {
        let start = Instant::now();
        let rtt = Duration::from_millis(300);
        let mut path = PathHealth::new(start, INTERVAL_LINK, 0);
        let mut in_flight = VecDeque::new();
        for step in 0..100u32 {
            let now = start + INTERVAL_LINK * step;
            while in_flight.front().is_some_and(|&(_, sent)| now - sent >= rtt) {
                let (sequence, sent): (u64, Instant) = in_flight.pop_front().expect("checked");
                path.on_reply(sent + rtt, sequence, false);
            }
            in_flight.push_back((path.poll_probe(now).expect("due"), now));
            assert!(path.usable(), "step {step}");
        }
    }

    #[test]
    fn an_answer_to_nothing_counts_for_nothing() {
        let start = Instant::now();
        let mut path = PathHealth::new(start, STEP, 0);
        assert_eq!(path.on_reply(start, 1, false), None);
        let sequence = path.poll_probe(start).expect("due");
        assert!(path.on_reply(start, sequence, true).is_some());
        assert_eq!(path.on_reply(start, sequence, false), None, "a replayed answer");
        assert_eq!(path.state(), PathState::Draining);
    }

    #[test]
    fn the_death_of_one_path_moves_only_its_own_packets() {
        let all = [3u64, 5, 8, 13];
        let mut moved = 0;
        for spread in (0..1000u64).map(|n| n.wrapping_mul(0x1234_5678_9abc_def1)) {
            let before = all[choose(spread, all).expect("some")];
            let left: Vec<u64> = all.into_iter().filter(|&id| id != 5).collect();
            let after = left[choose(spread, left.iter().copied()).expect("some")];
            if before != 5 {
                assert_eq!(before, after);
            } else {
                moved += 1;
            }
        }
        assert!((150..350).contains(&moved), "about a quarter: {moved}");
        assert_eq!(choose(1, []), None);
    }
}
