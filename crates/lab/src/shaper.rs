//! What a WAN does to a packet: one direction of one path. Pure.
//!
//! A packet and the time go in, the times of its arrivals come out (none, one, or two when it is
//! duplicated). No clock, no I/O, and the random numbers come from a seed: the same seed and the
//! same packets give the same network. Drivers: [`crate::wan`] (TUN devices), [`crate::relay`]
//! (loopback sockets).
//!
//! Order of events: partition, loss (independent, then bursts), queue at the bottleneck, delay and
//! jitter, reordering, duplication. Without `reorder` a path keeps the order of its packets, as
//! one that jitters by its queues does.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::Xoshiro256PlusPlus};
use serde::{Deserialize, Serialize};

/// How one direction of a path treats packets. The default is a perfect wire.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathConfig {
    /// One-way delay.
    pub delay: Duration,
    /// Added to the delay, uniform in `0..=jitter`.
    pub jitter: Duration,
    /// Probability that a packet is lost, independent of all others.
    pub loss: f64,
    /// Losses that come in bursts, on top of `loss`.
    pub burst: Option<Burst>,
    /// Bits per second of the bottleneck; `None` is unlimited.
    pub rate_bps: Option<u64>,
    /// Bytes that wait at the bottleneck before packets are dropped (only with a rate).
    pub queue_bytes: u64,
    /// Probability that a packet is held back, so that later ones overtake it.
    pub reorder: f64,
    /// How long such a packet is held back at most.
    pub reorder_by: Duration,
    /// Probability that a packet arrives twice.
    pub duplicate: f64,
    /// Nothing passes: one direction of a partition.
    pub blocked: bool,
    /// UDP does not pass: a firewall that knows only TCP.
    pub udp_blocked: bool,
}

impl Default for PathConfig {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            burst: None,
            rate_bps: None,
            queue_bytes: QUEUE_BYTES_DEFAULT,
            reorder: 0.0,
            reorder_by: Duration::from_millis(5),
            duplicate: 0.0,
            blocked: false,
            udp_blocked: false,
        }
    }
}

impl PathConfig {
    /// A clean path with this one-way delay.
    pub fn delay(delay: Duration) -> Self {
        Self { delay, ..Self::default() }
    }

    /// The same, with independent loss.
    #[must_use]
    pub fn loss(mut self, probability: f64) -> Self {
        self.loss = probability;
        self
    }

    /// The same, with jitter.
    #[must_use]
    pub fn jitter(mut self, jitter: Duration) -> Self {
        self.jitter = jitter;
        self
    }

    /// The same, with a bottleneck of this rate and queue.
    #[must_use]
    pub fn rate(mut self, bits_per_second: u64, queue_bytes: u64) -> Self {
        self.rate_bps = Some(bits_per_second);
        self.queue_bytes = queue_bytes;
        self
    }

    /// The same, with bursts of loss.
    #[must_use]
    pub fn bursts(mut self, burst: Burst) -> Self {
        self.burst = Some(burst);
        self
    }
}

/// Gilbert-Elliott: a path that is good, or bad for a while.
///
/// The state moves once per packet. Mean loss = `enter / (enter + leave)` times `loss_bad` (plus
/// the good state's); mean burst = `1 / leave` packets.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Burst {
    /// Probability, per packet, to turn bad.
    pub enter: f64,
    /// Probability, per packet, to turn good.
    pub leave: f64,
    /// Loss while bad.
    pub loss_bad: f64,
    /// Loss while good.
    #[serde(default)]
    pub loss_good: f64,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It arrives at this time after the epoch.
    Deliver(Duration),
    /// It arrives twice.
    Twice(Duration, Duration),
    /// It never arrives.
    Drop(DropReason),
}

/// Why a packet never arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// The path is partitioned, or closed for its protocol.
    Blocked,
    /// Lost at random.
    Loss,
    /// Lost in a burst.
    Burst,
    /// The queue at the bottleneck was full.
    Queue,
}

/// What a direction did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PathStats {
    /// Packets offered.
    pub offered: u64,
    /// Packets that arrive (a duplicated one counts once).
    pub delivered: u64,
    /// Bytes of those.
    pub delivered_bytes: u64,
    /// Lost at random or in bursts.
    pub lost: u64,
    /// Dropped by a full queue.
    pub overflowed: u64,
    /// Dropped by a partition or a firewall.
    pub blocked: u64,
    /// Duplicated.
    pub duplicated: u64,
    /// Held back.
    pub reordered: u64,
}

/// The state of one direction of a path.
#[derive(Debug)]
pub struct Shaper {
    config: PathConfig,
    rng: Xoshiro256PlusPlus,
    /// When the bottleneck has sent all that it accepted.
    wire_free_at: Duration,
    /// Arrival of the latest packet that kept its place; nothing in order arrives before it.
    last_arrival: Duration,
    bad: bool,
    stats: PathStats,
}

impl Shaper {
    /// A direction whose dice are thrown by `seed`.
    pub fn new(config: PathConfig, seed: u64) -> Self {
        Self {
            config,
            rng: Xoshiro256PlusPlus::seed_from_u64(seed),
            wire_free_at: Duration::ZERO,
            last_arrival: Duration::ZERO,
            bad: false,
            stats: PathStats::default(),
        }
    }

    /// The config in force.
    pub fn config(&self) -> &PathConfig {
        &self.config
    }

    /// Changes the path under way. Packets already on it keep their arrival times, and a shorter
    /// delay does not let new ones overtake them.
    pub fn reconfigure(&mut self, config: PathConfig) {
        if config.rate_bps != self.config.rate_bps {
            self.wire_free_at = Duration::ZERO;
        }
        self.config = config;
    }

    /// What happened so far.
    pub fn stats(&self) -> PathStats {
        self.stats
    }

    /// Offers a packet of `len` bytes at `now` (since any epoch that never changes).
    pub fn offer(&mut self, now: Duration, len: usize, is_udp: bool) -> Fate {
        self.stats.offered += 1;
        if let Some(reason) = self.lost(is_udp) {
            return self.dropped(reason);
        }
        let Some(sent_at) = self.through_bottleneck(now, len) else {
            return self.dropped(DropReason::Queue);
        };
        let arrival = self.arrival(sent_at);
        self.stats.delivered += 1;
        self.stats.delivered_bytes += len as u64;
        if self.throw(self.config.duplicate) {
            self.stats.duplicated += 1;
            return Fate::Twice(arrival, arrival + DUPLICATE_AFTER);
        }
        Fate::Deliver(arrival)
    }

    fn lost(&mut self, is_udp: bool) -> Option<DropReason> {
        if self.config.blocked || (self.config.udp_blocked && is_udp) {
            return Some(DropReason::Blocked);
        }
        if self.throw(self.config.loss) {
            return Some(DropReason::Loss);
        }
        let burst = self.config.burst?;
        let moves = if self.bad { burst.leave } else { burst.enter };
        self.bad ^= self.throw(moves);
        let loss = if self.bad { burst.loss_bad } else { burst.loss_good };
        self.throw(loss).then_some(DropReason::Burst)
    }

    /// When the last bit has left the bottleneck; `None` if its queue is full.
    fn through_bottleneck(&mut self, now: Duration, len: usize) -> Option<Duration> {
        let Some(rate) = self.config.rate_bps.filter(|rate| *rate > 0) else { return Some(now) };
        let starts = self.wire_free_at.max(now);
        let waiting_bytes = ((starts - now).as_nanos() * u128::from(rate) / NANOS_PER_SECOND / 8) as u64;
        if waiting_bytes + len as u64 > self.config.queue_bytes.max(len as u64) {
            return None;
        }
        let on_wire = (len as u128 * 8 * NANOS_PER_SECOND / u128::from(rate)) as u64;
        self.wire_free_at = starts + Duration::from_nanos(on_wire);
        Some(self.wire_free_at)
    }

    fn arrival(&mut self, sent_at: Duration) -> Duration {
        let jitter = self.up_to(self.config.jitter);
        let due = sent_at + self.config.delay + jitter;
        if self.throw(self.config.reorder) {
            self.stats.reordered += 1;
            return due + self.up_to(self.config.reorder_by);
        }
        self.last_arrival = self.last_arrival.max(due);
        self.last_arrival
    }

    fn dropped(&mut self, reason: DropReason) -> Fate {
        match reason {
            DropReason::Blocked => self.stats.blocked += 1,
            DropReason::Loss | DropReason::Burst => self.stats.lost += 1,
            DropReason::Queue => self.stats.overflowed += 1,
        }
        Fate::Drop(reason)
    }

    fn throw(&mut self, probability: f64) -> bool {
        // No number is drawn for what never happens, so a feature that is off leaves the dice of the others alone.
        probability > 0.0 && self.rng.random::<f64>() < probability
    }

    fn up_to(&mut self, max: Duration) -> Duration {
        if max.is_zero() { Duration::ZERO } else { max.mul_f64(self.rng.random::<f64>()) }
    }
}

/// 4 MiB: a bottleneck that a home router or a small cloud gateway may have.
const QUEUE_BYTES_DEFAULT: u64 = 4 << 20;
/// A duplicate follows its original by this much.
const DUPLICATE_AFTER: Duration = Duration::from_micros(100);
const NANOS_PER_SECOND: u128 = 1_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn arrivals(shaper: &mut Shaper, packets: u64, gap: Duration) -> Vec<Fate> {
        (0..packets).map(|n| shaper.offer(gap * n as u32, 1000, true)).collect()
    }

    #[test]
    fn a_clean_path_only_delays() {
        let mut shaper = Shaper::new(PathConfig::delay(ms(25)), 1);
        assert_eq!(shaper.offer(ms(3), 100, true), Fate::Deliver(ms(28)));
        assert_eq!(shaper.offer(ms(4), 100, false), Fate::Deliver(ms(29)));
    }

    #[test]
    fn the_same_seed_gives_the_same_network() {
        let config = PathConfig { reorder: 0.1, duplicate: 0.1, ..PathConfig::delay(ms(10)).loss(0.2).jitter(ms(5)) };
        let run = |seed| arrivals(&mut Shaper::new(config.clone(), seed), 500, ms(1));
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn independent_loss_is_as_frequent_as_asked() {
        for seed in 0..8 {
            let mut shaper = Shaper::new(PathConfig::default().loss(0.01), seed);
            arrivals(&mut shaper, 100_000, Duration::ZERO);
            let lost = shaper.stats().lost;
            // 1000 expected, standard deviation 31.
            assert!((850..1150).contains(&lost), "seed {seed} lost {lost}");
        }
    }

    #[test]
    fn bursts_lose_as_much_as_asked_but_in_runs() {
        let burst = Burst { enter: 0.0025, leave: 0.24, loss_bad: 1.0, loss_good: 0.0 };
        for seed in 0..8 {
            let mut shaper = Shaper::new(PathConfig::default().bursts(burst), seed);
            let fates = arrivals(&mut shaper, 200_000, Duration::ZERO);
            let is_lost = |fate: &Fate| matches!(fate, Fate::Drop(DropReason::Burst));
            let lost = fates.iter().filter(|fate| is_lost(fate)).count();
            let runs = fates.windows(2).filter(|pair| !is_lost(&pair[0]) && is_lost(&pair[1])).count();
            let share = lost as f64 / fates.len() as f64;
            let mean_run = lost as f64 / runs as f64;
            assert!((0.007..0.014).contains(&share), "seed {seed}: {share}");
            assert!((3.5..5.0).contains(&mean_run), "seed {seed}: {mean_run}");
        }
    }

    #[test]
    fn a_bottleneck_paces_packets_and_drops_what_its_queue_cannot_hold() {
        // 8 Mbit/s: 1000 bytes take 1 ms; the queue holds 5 packets.
        let mut shaper = Shaper::new(PathConfig::default().rate(8_000_000, 5_000), 1);
        let fates = arrivals(&mut shaper, 7, Duration::ZERO);
        let expected: Vec<_> = (1..=5).map(|n| Fate::Deliver(ms(n))).collect();
        assert_eq!(fates[..5], expected);
        assert_eq!(fates[5..], [Fate::Drop(DropReason::Queue); 2]);
        assert_eq!(shaper.offer(ms(2), 1000, true), Fate::Deliver(ms(6)), "room again after two left");
    }

    #[test]
    fn jitter_alone_never_reorders_and_reordering_does() {
        let times = |config: PathConfig| -> Vec<Duration> {
            arrivals(&mut Shaper::new(config, 3), 2_000, Duration::from_micros(100))
                .into_iter()
                .filter_map(|fate| if let Fate::Deliver(at) = fate { Some(at) } else { None })
                .collect()
        };
        let jittered = PathConfig::delay(ms(20)).jitter(ms(10));
        assert!(times(jittered.clone()).is_sorted());
        assert!(!times(PathConfig { reorder: 0.05, ..jittered }).is_sorted());
    }

    #[test]
    fn a_shorter_delay_does_not_let_packets_overtake_those_under_way() {
        let mut shaper = Shaper::new(PathConfig::delay(ms(50)), 1);
        assert_eq!(shaper.offer(ms(0), 100, true), Fate::Deliver(ms(50)));
        shaper.reconfigure(PathConfig::delay(ms(5)));
        assert_eq!(shaper.offer(ms(1), 100, true), Fate::Deliver(ms(50)));
        assert_eq!(shaper.offer(ms(60), 100, true), Fate::Deliver(ms(65)));
    }

    #[test]
    fn a_partition_drops_all_and_a_firewall_only_udp() {
        let mut shaper = Shaper::new(PathConfig { udp_blocked: true, ..PathConfig::default() }, 1);
        assert_eq!(shaper.offer(ms(1), 100, true), Fate::Drop(DropReason::Blocked));
        assert_eq!(shaper.offer(ms(1), 100, false), Fate::Deliver(ms(1)));
        shaper.reconfigure(PathConfig { blocked: true, ..PathConfig::default() });
        assert_eq!(shaper.offer(ms(2), 100, false), Fate::Drop(DropReason::Blocked));
        assert_eq!(shaper.stats().blocked, 2);
    }

    #[test]
    fn a_duplicate_arrives_right_after_its_original() {
        let mut shaper = Shaper::new(PathConfig { duplicate: 1.0, ..PathConfig::delay(ms(1)) }, 1);
        assert_eq!(shaper.offer(ms(0), 10, true), Fate::Twice(ms(1), ms(1) + DUPLICATE_AFTER));
    }
}
