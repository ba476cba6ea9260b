//! What the cluster's sidecars saw lately: cumulative reports in, rates over a sliding window out.
//!
//! Pure: `now` comes in. Clients report what they sent and where it went, so a failed call is counted
//! even if no server ever saw it. Summaries travel over the links; the last value wins.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use isthmus_wire::LATENCY_BUCKETS_MS;
use isthmus_wire::discovery::Edge;
use serde::{Deserialize, Serialize};

/// Rates are taken over this long: short enough to see a failover, long enough not to flicker.
pub const WINDOW: Duration = Duration::from_secs(10);
/// Destinations one sidecar may report; the rest is dropped (RELIABILITY: bounded label sets).
pub const EDGES_MAX: usize = 1_000;

const BUCKETS: usize = LATENCY_BUCKETS_MS.len() + 1;

/// Requests of one cluster to one host in one cluster, per second.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EdgeRate {
    /// The host that was called.
    pub host: String,
    /// The calling cluster.
    pub from: String,
    /// The cluster that answered, or should have; empty where none was chosen.
    pub to: String,
    /// Requests a second.
    pub rps: f64,
    /// Of these, failed (5xx and refused).
    pub errors: f64,
    /// Bytes a second, both ways.
    pub bytes: f64,
    /// Requests a second by response time, in the buckets of `LATENCY_BUCKETS_MS`.
    pub latency: Vec<f64>,
    /// Requests in all since the gateway started, answered by another cluster than the first choice.
    pub failovers: u64,
}

#[derive(Debug, Clone, Default)]
struct Counters {
    requests: u64,
    errors: u64,
    bytes: u64,
    failovers: u64,
    latency: [u64; BUCKETS],
}

impl Counters {
    fn of(edge: &Edge) -> Self {
        let mut latency = [0; BUCKETS];
        for (slot, count) in latency.iter_mut().zip(&edge.latency_counts) {
            *slot = *count;
        }
        Self {
            requests: edge.requests,
            errors: edge.errors,
            bytes: edge.bytes_sent.saturating_add(edge.bytes_received),
            failovers: edge.failovers,
            latency,
        }
    }

    /// What came since `last`; a restarted sidecar counts from zero again.
    fn since(&self, last: &Self) -> Self {
        if self.requests < last.requests {
            return self.clone();
        }
        let mut latency = [0; BUCKETS];
        for (slot, (new, old)) in latency.iter_mut().zip(self.latency.iter().zip(&last.latency)) {
            *slot = new.saturating_sub(*old);
        }
        Self {
            requests: self.requests - last.requests,
            errors: self.errors.saturating_sub(last.errors),
            bytes: self.bytes.saturating_sub(last.bytes),
            failovers: self.failovers.saturating_sub(last.failovers),
            latency,
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.bytes += other.bytes;
        self.failovers += other.failovers;
        for (slot, more) in self.latency.iter_mut().zip(&other.latency) {
            *slot += more;
        }
    }
}

type EdgeKey = (String, String);

/// The cluster's own traffic.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Last report of each session.
    last: HashMap<u64, HashMap<EdgeKey, Counters>>,
    window: VecDeque<(Instant, EdgeKey, Counters)>,
    failovers: BTreeMap<EdgeKey, u64>,
}

impl Traffic {
    /// A sidecar's cumulative report; `session` tells sidecars apart.
    pub fn report(&mut self, session: u64, edges: &[Edge], now: Instant) {
        let last = self.last.entry(session).or_default();
        for edge in edges.iter().filter(|edge| edge.direction == "outbound") {
            let key = (edge.destination_host.clone(), edge.destination_cluster.clone());
            if last.len() >= EDGES_MAX && !last.contains_key(&key) {
                continue;
            }
            let new = Counters::of(edge);
            let delta = match last.insert(key.clone(), new.clone()) {
                Some(old) => new.since(&old),
                None => new,
            };
            if delta.requests > 0 || delta.bytes > 0 {
                *self.failovers.entry(key.clone()).or_default() += delta.failovers;
                self.window.push_back((now, key, delta));
            }
        }
        self.expire(now);
    }

    /// A session ended.
    pub fn forget(&mut self, session: u64) {
        self.last.remove(&session);
    }

    /// Rates over the last [`WINDOW`], as seen from cluster `from`.
    pub fn rates(&mut self, from: &str, now: Instant) -> Vec<EdgeRate> {
        self.expire(now);
        let mut sums: BTreeMap<EdgeKey, Counters> = BTreeMap::new();
        for (_, key, counters) in &self.window {
            sums.entry(key.clone()).or_default().add(counters);
        }
        let seconds = WINDOW.as_secs_f64();
        let rate = |count: u64| count as f64 / seconds;
        sums.into_iter()
            .map(|((host, to), sum)| EdgeRate {
                failovers: self.failovers.get(&(host.clone(), to.clone())).copied().unwrap_or_default(),
                host,
                from: from.to_owned(),
                to,
                rps: rate(sum.requests),
                errors: rate(sum.errors),
                bytes: rate(sum.bytes),
                latency: sum.latency.iter().copied().map(rate).collect(),
            })
            .collect()
    }

    fn expire(&mut self, now: Instant) {
        while self.window.front().is_some_and(|(at, _, _)| now.saturating_duration_since(*at) > WINDOW) {
            self.window.pop_front();
        }
    }
}

/// The response time in milliseconds below which `share` (0-1) of the requests of `latency` lie,
/// interpolated within its bucket; `None` without requests.
pub fn quantile(latency: &[f64], share: f64) -> Option<f64> {
    let total: f64 = latency.iter().sum();
    if total <= 0.0 {
        return None;
    }
    let mut below = 0.0;
    let mut lower = 0.0;
    for (index, count) in latency.iter().enumerate() {
        let upper = LATENCY_BUCKETS_MS.get(index).copied().unwrap_or(lower);
        if below + count >= share * total && *count > 0.0 {
            return Some(lower + (upper - lower) * ((share * total - below) / count).clamp(0.0, 1.0));
        }
        below += count;
        lower = upper;
    }
    Some(lower)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(requests: u64, errors: u64) -> Edge {
        let mut latency_counts = vec![0; BUCKETS];
        latency_counts[1] = requests;
        Edge {
            destination_host: "cart.shop.svc.clusterset.local".into(),
            destination_cluster: "gcp-us".into(),
            direction: "outbound".into(),
            requests,
            errors,
            latency_counts,
            ..Edge::default()
        }
    }

    #[test]
    fn rates_come_from_differences_of_reports() {
        let start = Instant::now();
        let mut traffic = Traffic::default();
        traffic.report(1, &[edge(100, 0)], start);
        traffic.report(1, &[edge(200, 10)], start + Duration::from_secs(1));
        let rates = traffic.rates("aws-eu", start + Duration::from_secs(1));
        assert_eq!((rates[0].rps, rates[0].errors, rates[0].from.as_str()), (20.0, 1.0, "aws-eu"));
        assert!(traffic.rates("aws-eu", start + WINDOW * 2).is_empty(), "old traffic is forgotten");
    }

    #[test]
    fn a_restarted_sidecar_counts_from_zero() {
        let start = Instant::now();
        let mut traffic = Traffic::default();
        traffic.report(1, &[edge(1000, 0)], start);
        traffic.report(1, &[edge(10, 0)], start + Duration::from_secs(1));
        assert_eq!(traffic.rates("a", start + Duration::from_secs(1))[0].rps, 101.0);
    }

    #[test]
    fn quantiles_lie_within_their_bucket() {
        let mut latency = vec![0.0; BUCKETS];
        assert_eq!(quantile(&latency, 0.5), None);
        latency[5] = 10.0;
        let p50 = quantile(&latency, 0.5).expect("requests");
        assert!((25.0..=50.0).contains(&p50), "{p50}");
    }
}
