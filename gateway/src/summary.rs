//! What the dashboard and `isthmus status` show of the whole mesh, as one cluster's gateway knows it.
//!
//! Plain data: nothing here is measured or decided. Times are ages, never another cluster's clock.
//! The gateway replaces the value whole in a `watch` channel; [`crate::dashboard`] serves it.

use serde::{Deserialize, Serialize};

use crate::traffic::EdgeRate;

/// The mesh as this cluster sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The mesh's name; empty until the registry is known.
    pub mesh: String,
    /// The cluster whose gateway made this summary.
    pub cluster: String,
    /// When it was made, Unix milliseconds.
    pub generated_at: u64,
    /// Where this gateway serves the dashboard, `http://IP:port`.
    #[serde(default)]
    pub dashboard: String,
    /// All requests of the mesh together.
    pub traffic: Traffic,
    /// Members, by name.
    pub clusters: Vec<Cluster>,
    /// Both directions of each link that some gateway reports.
    pub links: Vec<Link>,
    /// Services that are exported or called, by host.
    pub services: Vec<Service>,
    /// Clusters whose services are imported here, and how old what is known of them is.
    pub imports: Vec<Import>,
    /// The replicated registry.
    pub store: Store,
    /// What happened lately, newest first, at most [`EVENTS_MAX`].
    pub events: Vec<Event>,
}

/// Events kept: an hour of a busy day, a page of the dashboard.
pub const EVENTS_MAX: usize = 50;

/// Requests a second and how they fare.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// Requests a second.
    pub rps: f64,
    /// Failed part of the requests, 0-1.
    pub error_ratio: f64,
    /// Half of the requests are answered within this many milliseconds; `None` without requests.
    pub p50_ms: Option<f64>,
    /// 99 of 100 are.
    pub p99_ms: Option<f64>,
    /// Part of the requests that left their cluster, 0-1.
    pub cross_cluster_ratio: f64,
}

/// How a cluster does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// Its lease is fresh and its link up.
    Ready,
    /// Reached, but not as it should be (TCP fallback, a relay, an old version).
    Degraded,
    /// It asks for no new requests.
    Draining,
    /// Silent: its lease has run out.
    Down,
    /// Not heard of since this gateway started.
    #[default]
    Unknown,
}

/// A member of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u16,
    /// `region/zone`.
    pub locality: String,
    /// The cloud or operator that runs it; empty if it did not say.
    #[serde(default)]
    pub provider: String,
    /// How it does, as seen from here.
    pub state: ClusterState,
    /// Why it is not ready; empty if it is.
    #[serde(default)]
    pub reason: String,
    /// Whether it made this summary.
    #[serde(rename = "self")]
    pub is_self: bool,
    /// Whether it leads the Raft group.
    pub is_leader: bool,
    /// Whether it votes in the Raft group.
    pub voter: bool,
    /// Its gateways' addresses; none if it can only dial out.
    pub gateways: Vec<String>,
    /// The version its gateways run.
    pub version: String,
    /// How long ago it was last heard, in milliseconds; `None` if never.
    pub age_ms: Option<u64>,
    /// Services it exports.
    #[serde(default)]
    pub exports: u32,
}

/// What a link's packets travel in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// UDP, directly.
    #[default]
    Quic,
    /// TLS over TCP, where UDP does not pass.
    Tcp,
    /// Through a third cluster's gateway.
    Relay,
}

/// How a link does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// Packets pass.
    Up,
    /// Packets pass, on a path that is not the first choice.
    Degraded,
    /// Nothing passes.
    #[default]
    Down,
}

/// A link as one end sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Link {
    /// The cluster that reports it.
    pub from: String,
    /// The other end.
    pub to: String,
    /// What packets travel in.
    pub transport: Transport,
    /// Round trip in microseconds; `None` before the first measurement.
    pub rtt_us: Option<u32>,
    /// Packets lost per million.
    pub loss_ppm: u32,
    /// Forwarded bytes a second from `to`.
    pub bytes_in_per_s: f64,
    /// Forwarded bytes a second to `to`.
    pub bytes_out_per_s: f64,
    /// How it does.
    pub state: LinkState,
    /// UDP flows it is spread over.
    pub flows: u32,
}

/// What a gateway tells those of other clusters each second, so that each can show the whole mesh.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What its own sidecars call.
    pub rates: Vec<EdgeRate>,
    /// Its own links.
    pub links: Vec<Link>,
}

impl Report {
    /// Leaves what `cluster` may speak of: its own calls, its own ends of links.
    pub fn retain_own(&mut self, cluster: &str) {
        self.rates.retain(|rate| rate.from == cluster);
        self.links.retain(|link| link.from == cluster);
    }
}

/// A service of the mesh.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Its host.
    pub host: String,
    /// Clusters that export it, the oldest export first.
    pub exporters: Vec<String>,
    /// All its requests.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Who calls it where.
    pub edges: Vec<ServiceEdge>,
}

/// Requests of one cluster to a service in one cluster.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceEdge {
    /// The calling cluster.
    pub from: String,
    /// The answering one; empty where none could be chosen.
    pub to: String,
    /// Requests a second.
    pub rps: f64,
    /// Failed part, 0-1.
    pub error_ratio: f64,
    /// Median response time in milliseconds.
    pub p50_ms: Option<f64>,
    /// 99th percentile.
    pub p99_ms: Option<f64>,
    /// Bytes a second, both ways.
    pub bytes_per_s: f64,
}

/// What is known of a cluster whose services are imported.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Import {
    /// The owner.
    pub cluster: String,
    /// Age of the oldest of its records, in milliseconds; `None` if it was not heard since start.
    pub age_ms: Option<u64>,
    /// `fresh`, `suspect`, `draining` or `unknown`.
    pub freshness: String,
    /// Services imported from it.
    #[serde(default)]
    pub services: u32,
    /// Healthy endpoints of these.
    #[serde(default)]
    pub endpoints_healthy: u32,
    /// Endpoints of these.
    #[serde(default)]
    pub endpoints: u32,
}

/// The replicated registry as this member or follower sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Store {
    /// The cluster that leads; `None` while none is known: reads go on, writes are refused.
    pub leader: Option<String>,
    /// Clusters that vote.
    pub voters: Vec<String>,
    /// Highest position known to be committed.
    pub commit: u64,
    /// Highest position applied here.
    pub applied: u64,
}

/// Something that happened.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When, Unix milliseconds of this gateway.
    pub at: u64,
    /// A fixed word: `link_up`, `link_down`, `cluster_joined`, `failover`, `leader_changed`, ...
    pub kind: String,
    /// One sentence.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_speaks_of_its_own_cluster_only() {
        let rate = |from: &str| EdgeRate { from: from.into(), ..EdgeRate::default() };
        let link = |from: &str, to: &str| Link { from: from.into(), to: to.into(), ..Link::default() };
        let mut report = Report {
            rates: vec![rate("gcp-us"), rate("aws-eu")],
            links: vec![link("gcp-us", "aws-eu"), link("aws-eu", "gcp-us"), link("onprem", "gcp-us")],
        };
        report.retain_own("gcp-us");
        assert_eq!(report, Report { rates: vec![rate("gcp-us")], links: vec![link("gcp-us", "aws-eu")] });
    }
}
