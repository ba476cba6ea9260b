//! What is counted per caller and destination: the cells behind Istio's series and the gateway's edges.
//!
//! Counting takes no lock: an [`Edge`] is looked up once per route and endpoint and kept, its cells
//! are atomics. Labels are held once per edge and turned into text only when somebody scrapes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwap;
use isthmus_model::service::Labels;
use isthmus_model::{ClusterName, Host, Namespace, SpiffeId};
use isthmus_wire::LATENCY_BUCKETS_MS;
use rustc_hash::FxHashMap;

use super::Flags;

/// Who counted (label `reporter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The caller's sidecar.
    Source,
    /// The server's sidecar.
    Destination,
}

impl Reporter {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How the connection was protected (label `connection_security_policy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Security {
    /// Both sides proved a SPIFFE identity.
    MutualTls,
    /// Plaintext.
    None,
    /// Not ours to say: nothing was reached, or TLS of the application itself.
    Unknown,
}

impl Security {
    /// The label's value, as Istio's dashboards filter on it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::None => "none",
            Self::Unknown => "unknown",
        }
    }
}

/// One side of an edge (labels `source_*` or `destination_*`). Empty text means unknown.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Party {
    /// Name of the workload.
    pub workload: Box<str>,
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its proven identity, `spiffe://...`.
    pub principal: Box<str>,
    /// Label `app`.
    pub app: Box<str>,
    /// Label `version`.
    pub version: Box<str>,
    /// Istio's canonical service.
    pub canonical_service: Box<str>,
    /// Istio's canonical revision.
    pub canonical_revision: Box<str>,
    /// Its cluster.
    pub cluster: Box<str>,
}

impl Party {
    /// What the mesh knows of a workload; `workload` may be empty where only its labels are known.
    pub fn new(
        workload: &str,
        namespace: Option<&Namespace>,
        labels: &Labels,
        principal: Option<&SpiffeId>,
        cluster: Option<&ClusterName>,
    ) -> Self {
        let first = |names: &[&str]| names.iter().find_map(|name| labels.get(*name)).map_or("", String::as_str);
        let service = first(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"]);
        let revision = first(&["service.istio.io/canonical-revision", "app.kubernetes.io/version", "version"]);
        Self {
            workload: workload.into(),
            namespace: namespace.map_or("", Namespace::as_str).into(),
            principal: principal.map(ToString::to_string).unwrap_or_default().into(),
            app: first(&["app"]).into(),
            version: first(&["version"]).into(),
            canonical_service: if service.is_empty() { workload } else { service }.into(),
            canonical_revision: if revision.is_empty() { "latest" } else { revision }.into(),
            cluster: cluster.map_or("", ClusterName::as_str).into(),
        }
    }
}

/// What tells one edge from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EdgeLabels {
    /// Who counts.
    pub reporter: Reporter,
    /// The caller.
    pub source: Arc<Party>,
    /// The server.
    pub destination: Arc<Party>,
    /// The host that was asked for (`destination_service`), if any.
    pub service: Option<Host>,
    /// How the connection was protected.
    pub security: Security,
}

/// What a request spoke (label `request_protocol`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RequestProtocol {
    /// HTTP/1 or HTTP/2.
    Http,
    /// gRPC.
    Grpc,
}

impl RequestProtocol {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
        }
    }
}

/// How one request ended.
#[derive(Debug, Clone, Copy)]
pub struct RequestEnd {
    /// What it spoke.
    pub protocol: RequestProtocol,
    /// Status that the caller saw; 0 if it saw none.
    pub code: u16,
    /// `grpc-status`, if there was one.
    pub grpc_status: Option<u16>,
    /// Why, if something went wrong.
    pub flags: Flags,
    /// From the first byte of the request to the last of the response.
    pub duration: Duration,
    /// Size of the request's body.
    pub request_bytes: u64,
    /// Size of the response's body.
    pub response_bytes: u64,
}

/// Upper bounds of the size histograms. Istio has its time buckets here too; six powers of ten say
/// more about sizes and keep a scrape at half its length.
pub const SIZE_BUCKETS: [f64; 6] = [100.0, 1e3, 1e4, 1e5, 1e6, 1e7];

/// What tells two responses of one edge apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct ResponseKey {
    pub protocol: RequestProtocol,
    pub code: u16,
    pub grpc_status: Option<u16>,
    pub flags: Flags,
}

/// Cells of one histogram: a count per bucket and one beyond, not cumulated, and a sum.
#[derive(Debug)]
pub(super) struct Cells<const N: usize> {
    pub buckets: [AtomicU64; N],
    pub beyond: AtomicU64,
    pub sum: AtomicU64,
}

impl<const N: usize> Cells<N> {
    fn new() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; N], beyond: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }

    /// Counts `value` in its bucket and adds `amount`, in the histogram's smallest unit, to the sum.
    fn observe(&self, bounds: &[f64; N], value: f64, amount: u64) {
        let bucket = bounds.iter().position(|bound| value <= *bound);
        bucket.map_or(&self.beyond, |index| &self.buckets[index]).fetch_add(1, Relaxed);
        self.sum.fetch_add(amount, Relaxed);
    }
}

/// Cells of one kind of response on one edge.
#[derive(Debug)]
pub(super) struct ResponseCells {
    pub requests: AtomicU64,
    /// Sum in microseconds.
    pub duration: Cells<{ LATENCY_BUCKETS_MS.len() }>,
    pub request_bytes: Cells<{ SIZE_BUCKETS.len() }>,
    pub response_bytes: Cells<{ SIZE_BUCKETS.len() }>,
}

impl ResponseCells {
    fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            duration: Cells::new(),
            request_bytes: Cells::new(),
            response_bytes: Cells::new(),
        }
    }
}

/// Cells of the byte streams of one edge.
#[derive(Debug, Default)]
pub(super) struct TcpCells {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    /// From the server to the caller, Istio's `sent`.
    pub sent: AtomicU64,
    pub received: AtomicU64,
    /// Of the closed ones, those that ended with a flag.
    pub failed: AtomicU64,
}

/// The counters of one caller, destination and host. Kept by whoever counts: see the module.
#[derive(Debug)]
pub struct Edge {
    pub(super) labels: EdgeLabels,
    /// Read without a lock; copied when a new kind of response is first seen.
    pub(super) responses: ArcSwap<FxHashMap<ResponseKey, Arc<ResponseCells>>>,
    pub(super) tcp: TcpCells,
    pub(super) failovers: AtomicU64,
    budget: Arc<Budget>,
    /// Where kinds of responses go that would exceed the budget; `None` in that edge itself.
    overflow: Option<Arc<Edge>>,
}

/// How many kinds of responses the process may still tell apart.
#[derive(Debug)]
pub(super) struct Budget {
    pub responses_left: AtomicU64,
    /// Requests counted as `other`.
    pub overflowed: AtomicU64,
}

impl Budget {
    fn take(&self) -> bool {
        self.responses_left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

impl Edge {
    pub(super) fn new(labels: EdgeLabels, budget: Arc<Budget>, overflow: Option<Arc<Edge>>) -> Arc<Self> {
        Arc::new(Self {
            labels,
            responses: ArcSwap::default(),
            tcp: TcpCells::default(),
            failovers: AtomicU64::new(0),
            budget,
            overflow,
        })
    }

    /// What this edge stands for.
    pub fn labels(&self) -> &EdgeLabels {
        &self.labels
    }

    /// A request ended.
    pub fn request_ended(&self, end: &RequestEnd) {
        let key =
            ResponseKey { protocol: end.protocol, code: end.code, grpc_status: end.grpc_status, flags: end.flags };
        if let Some(cells) = self.responses.load().get(&key) {
            return cells.count(end);
        }
        match &self.overflow {
            Some(overflow) if !self.budget.take() => {
                self.budget.overflowed.fetch_add(1, Relaxed);
                overflow.cells(key.coarse()).count(end);
            }
            _ => self.cells(key).count(end),
        }
    }

    /// A byte stream was opened.
    pub fn tcp_opened(&self) {
        self.tcp.opened.fetch_add(1, Relaxed);
    }

    /// Bytes passed in a stream that is still open: long streams show before they end.
    pub fn tcp_bytes(&self, to_server: u64, to_caller: u64) {
        self.tcp.received.fetch_add(to_server, Relaxed);
        self.tcp.sent.fetch_add(to_caller, Relaxed);
    }

    /// A byte stream ended, `flags` saying why if not by its own will.
    pub fn tcp_closed(&self, flags: Flags) {
        self.tcp.closed.fetch_add(1, Relaxed);
        if !flags.is_empty() {
            self.tcp.failed.fetch_add(1, Relaxed);
        }
    }

    /// A request or stream came to this edge because a nearer cluster could not serve it.
    pub fn failed_over(&self) {
        self.failovers.fetch_add(1, Relaxed);
    }

    fn cells(&self, key: ResponseKey) -> Arc<ResponseCells> {
        let fresh = Arc::new(ResponseCells::new());
        // Two threads may race for one new key: the later one finds and keeps the earlier's cells.
        self.responses.rcu(|map| {
            let mut map = FxHashMap::clone(map);
            map.entry(key).or_insert_with(|| Arc::clone(&fresh));
            map
        });
        self.responses.load().get(&key).map_or(fresh, Arc::clone)
    }
}

impl ResponseKey {
    /// Few enough to need no budget: protocol, and the code's class.
    fn coarse(self) -> Self {
        let class = if (100..600).contains(&self.code) { self.code / 100 * 100 } else { 0 };
        Self { protocol: self.protocol, code: class, grpc_status: None, flags: Flags::NONE }
    }
}

impl ResponseCells {
    fn count(&self, end: &RequestEnd) {
        self.requests.fetch_add(1, Relaxed);
        let micros = u64::try_from(end.duration.as_micros()).unwrap_or(u64::MAX);
        self.duration.observe(&LATENCY_BUCKETS_MS, micros as f64 / 1e3, micros);
        self.request_bytes.observe(&SIZE_BUCKETS, end.request_bytes as f64, end.request_bytes);
        self.response_bytes.observe(&SIZE_BUCKETS, end.response_bytes as f64, end.response_bytes);
    }
}
