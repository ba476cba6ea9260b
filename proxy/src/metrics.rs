//! What the sidecar counts: Istio's series, its own, and the edges it tells the gateway.
//!
//! The data path asks for an [`Edge`] once per route and endpoint, keeps it, and counts on it without
//! a lock. Everything else is one method per event here. Names of series are public API. No label
//! ever holds an error text, a path or an address.

mod edge;
mod export;
mod flags;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use isthmus_runtime::metrics::register;
use isthmus_wire::discovery::Telemetry;
use parking_lot::Mutex;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};
use rustc_hash::FxHashMap;

pub use edge::{Edge, EdgeLabels, Party, Reporter, RequestEnd, RequestProtocol, SIZE_BUCKETS, Security};
pub use flags::Flags;

use edge::Budget;

/// Edges told apart; more are counted as one. A workload talks to some ten services in some three
/// clusters; each edge with byte streams is four series: 1,024 at most.
pub const EDGES_MAX: usize = 256;
/// Kinds of responses (code, flags, gRPC status) told apart over all edges; each is 41 series (a
/// counter, 22 of duration, 9 each of two sizes): 8,200 at most, so that a scrape stays below 10^4.
pub const RESPONSES_MAX: u64 = 200;

/// The sidecar's counters. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    edges: Mutex<FxHashMap<EdgeLabels, Arc<Edge>>>,
    /// Where edges beyond [`EDGES_MAX`] are counted, per reporter.
    overflow: [Arc<Edge>; 2],
    budget: Arc<Budget>,
    series: Series,
    /// Unix milliseconds; 0 means never.
    config_changed: AtomicU64,
    /// Unix seconds; 0 means none.
    certificate_ends: AtomicU64,
}

/// The sidecar's own series.
#[derive(Debug)]
struct Series {
    tunnels: IntGauge,
    dials: IntCounterVec,
    failovers: IntCounterVec,
    dns: IntCounterVec,
    dns_in_flight: IntGauge,
    connections: IntGaugeVec,
    refused: IntCounterVec,
    capture: IntGaugeVec,
    log_dropped: IntCounter,
    config_age: Gauge,
    certificate_expiry: Gauge,
    overflowed: IntCounter,
}

impl Metrics {
    /// Counters that are shown by `registry`.
    pub fn new(registry: &Registry) -> Self {
        let budget = Arc::new(Budget { responses_left: AtomicU64::new(RESPONSES_MAX), overflowed: AtomicU64::new(0) });
        let overflow = [Reporter::Source, Reporter::Destination].map(|reporter| {
            let other = Arc::new(Party { workload: "other".into(), ..Party::default() });
            let (source, destination) = (Arc::clone(&other), other);
            let labels = EdgeLabels { reporter, source, destination, service: None, security: Security::Unknown };
            Edge::new(labels, Arc::clone(&budget), None)
        });
        let metrics = Self(Arc::new(Inner {
            edges: Mutex::default(),
            overflow,
            budget,
            series: Series::new(registry),
            config_changed: AtomicU64::new(0),
            certificate_ends: AtomicU64::new(0),
        }));
        register(registry, Scrape::new(metrics.clone()));
        metrics
    }

    /// The counters of one edge. Takes a lock: look it up once per route and endpoint, and keep it.
    pub fn edge(&self, labels: &EdgeLabels) -> Arc<Edge> {
        let overflow = &self.0.overflow[usize::from(labels.reporter == Reporter::Destination)];
        let mut edges = self.0.edges.lock();
        if let Some(edge) = edges.get(labels) {
            return Arc::clone(edge);
        }
        if edges.len() >= EDGES_MAX {
            return Arc::clone(overflow);
        }
        let edge = Edge::new(labels.clone(), Arc::clone(&self.0.budget), Some(Arc::clone(overflow)));
        edges.insert(labels.clone(), Arc::clone(&edge));
        edge
    }

    /// What the gateway is told each second: cumulative since the process started.
    pub fn telemetry(&self) -> Telemetry {
        export::telemetry(self.all_edges().iter().map(|edge| &**edge))
    }

    /// A tunnel was opened.
    pub fn tunnel_opened(&self) {
        self.0.series.tunnels.inc();
    }

    /// A tunnel ended.
    pub fn tunnel_closed(&self) {
        self.0.series.tunnels.dec();
    }

    /// A dial ended. `result` is a fixed word: `ok`, `timeout`, `not_exported`, ...
    pub fn dialled(&self, result: &'static str) {
        self.0.series.dials.with_label_values(&[result]).inc();
    }

    /// A request or stream went to another cluster than the preferred one; `reason` is a fixed word.
    pub fn failed_over(&self, reason: &'static str) {
        self.0.series.failovers.with_label_values(&[reason]).inc();
    }

    /// A DNS question was answered; `zone` is `mesh` or `other`, `rcode` as in RFC 1035 or `DROPPED`.
    pub fn dns_answered(&self, zone: &'static str, rcode: &'static str) {
        self.0.series.dns.with_label_values(&[zone, rcode]).inc();
    }

    /// How many DNS questions are being answered.
    pub fn dns_in_flight(&self, count: usize) {
        self.0.series.dns_in_flight.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// The workload's connections that are open; held by the connection, dropped with it.
    pub fn connection_opened(&self, direction: Direction) -> OpenConnection {
        let gauge = self.0.series.connections.with_label_values(&[direction.as_str()]);
        gauge.inc();
        OpenConnection(gauge)
    }

    /// A connection or stream was refused before routing; `reason` is a fixed word.
    pub fn refused(&self, direction: Direction, reason: &'static str) {
        self.0.series.refused.with_label_values(&[direction.as_str(), reason]).inc();
    }

    /// Whether packet filter rules bring us the workload's connections; `mode` as in the config.
    pub fn capturing(&self, mode: &'static str) {
        self.0.series.capture.with_label_values(&[mode]).set(1);
    }

    /// A line of the access log was not written, because its reader is too slow.
    pub fn log_line_dropped(&self) {
        self.0.series.log_dropped.inc();
    }

    /// A gateway confirmed at `now` that the view is up to date.
    pub fn config_confirmed(&self, now: SystemTime) {
        let millis = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
        self.0.config_changed.store(u64::try_from(millis).unwrap_or(u64::MAX), Relaxed);
    }

    /// The workload has a certificate that ends at `not_after`.
    pub fn certificate(&self, not_after: SystemTime) {
        let seconds = not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.0.certificate_ends.store(seconds, Relaxed);
    }

    fn all_edges(&self) -> Vec<Arc<Edge>> {
        let mut edges: Vec<_> = self.0.edges.lock().values().cloned().collect();
        edges.extend(self.0.overflow.iter().cloned());
        edges
    }

    /// Brings the series that depend on the time up to `now`.
    fn refresh(&self, now: SystemTime) {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let series = &self.0.series;
        let changed = Duration::from_millis(self.0.config_changed.load(Relaxed));
        series.config_age.set(if changed.is_zero() { f64::NAN } else { now.saturating_sub(changed).as_secs_f64() });
        let ends = self.0.certificate_ends.load(Relaxed);
        series.certificate_expiry.set(if ends == 0 { f64::NAN } else { ends as f64 - now.as_secs_f64() });
        let overflowed = self.0.budget.overflowed.load(Relaxed);
        series.overflowed.inc_by(overflowed.saturating_sub(series.overflowed.get()));
    }
}

/// Which way a connection goes, seen from the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the workload.
    Outbound,
    /// To the workload.
    Inbound,
}

impl Direction {
    fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// Counts a connection as open until it is dropped.
#[derive(Debug)]
pub struct OpenConnection(IntGauge);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Series {
    fn new(registry: &Registry) -> Self {
        let gauge = |name: &str, help: &str| shown(registry, IntGauge::new(name, help));
        // Read at every scrape, and so shown by `Scrape`: collectors are asked in no order.
        let float = |name: &str, help: &str| valid(Gauge::new(name, help));
        let counter = |name: &str, help: &str| shown(registry, IntCounter::new(name, help));
        let counters = |name, help, labels: &[&str]| shown(registry, IntCounterVec::new(Opts::new(name, help), labels));
        let gauges = |name, help, labels: &[&str]| shown(registry, IntGaugeVec::new(Opts::new(name, help), labels));
        Self {
            tunnels: gauge("isthmus_proxy_tunnels", "Open tunnels"),
            dials: counters("isthmus_proxy_dials_total", "Dials of tunnels that ended", &["result"]),
            failovers: counters("isthmus_failover_total", "Requests served by another cluster", &["reason"]),
            dns: counters("isthmus_dns_queries_total", "DNS questions answered", &["zone", "rcode"]),
            dns_in_flight: gauge("isthmus_dns_in_flight", "DNS questions being answered"),
            connections: gauges("isthmus_proxy_connections", "Open connections of the workload", &["direction"]),
            refused: counters("isthmus_proxy_refused_total", "Refused connections", &["direction", "reason"]),
            capture: gauges("isthmus_proxy_capture_info", "1, with how connections are captured", &["mode"]),
            log_dropped: counter("isthmus_proxy_access_log_dropped_total", "Access log lines not written"),
            config_age: float("isthmus_config_age_seconds", "Since a gateway last confirmed the view"),
            certificate_expiry: float("isthmus_cert_expiry_seconds", "Until the workload's certificate ends"),
            overflowed: valid(IntCounter::new(
                "isthmus_proxy_requests_overflow_total",
                "Requests whose labels became other",
            )),
        }
    }
}

fn valid<C>(collector: prometheus::Result<C>) -> C {
    // Names and labels are constants of this file, and a test makes all of them.
    collector.expect("a metric's name and labels are valid")
}

fn shown<C: Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> C {
    let collector = valid(collector);
    register(registry, collector.clone());
    collector
}

impl Series {
    /// Those that are brought up to date by a scrape.
    fn refreshed(&self) -> [&dyn Collector; 3] {
        [&self.config_age, &self.certificate_expiry, &self.overflowed]
    }
}

/// Makes Istio's series out of edges when somebody scrapes, and brings ages up to date.
struct Scrape {
    metrics: Metrics,
    descriptions: Vec<Desc>,
}

impl Scrape {
    fn new(metrics: Metrics) -> Self {
        let describe = |(name, help, _): &(&str, &str, _)| {
            Desc::new((*name).to_owned(), (*help).to_owned(), Vec::new(), std::collections::HashMap::new()).ok()
        };
        let mut descriptions: Vec<Desc> = export::FAMILIES.iter().filter_map(describe).collect();
        let refreshed = metrics.0.series.refreshed();
        descriptions.extend(refreshed.iter().flat_map(|one| one.desc()).cloned());
        Self { metrics, descriptions }
    }
}

impl Collector for Scrape {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.metrics.refresh(SystemTime::now());
        let mut families = export::families(self.metrics.all_edges().iter().map(|edge| &**edge));
        families.extend(self.metrics.0.series.refreshed().iter().flat_map(|one| one.collect()));
        families
    }
}

#[cfg(test)]
mod tests;
