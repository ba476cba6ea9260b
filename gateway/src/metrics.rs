//! The gateway's series, read when they are scraped: nothing on the packet path knows of Prometheus.

use std::sync::Arc;
use std::time::Instant;

use isthmus_federation::member::MemberHandle;
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};

use crate::distribution::sidecars::Sidecars;
use crate::hub::Hub;
use crate::links::LinksHandle;
use crate::router::RouterShared;
use crate::summary::LinkState;

/// All series of one gateway.
pub fn registry(
    router: Arc<RouterShared>,
    hub: Arc<Hub>,
    sidecars: Arc<Sidecars>,
    member: MemberHandle,
    links: LinksHandle,
) -> Registry {
    let registry = isthmus_runtime::metrics::registry("gateway");
    isthmus_runtime::metrics::register(&registry, Scrape { router, hub, sidecars, member, links });
    registry
}

struct Scrape {
    router: Arc<RouterShared>,
    hub: Arc<Hub>,
    sidecars: Arc<Sidecars>,
    member: MemberHandle,
    links: LinksHandle,
}

impl Collector for Scrape {
    /// Nothing is described beforehand: the families are made anew at each scrape.
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        [self.routed(), self.linked(), self.registered(), self.distributed()].concat()
    }
}

impl Scrape {
    fn routed(&self) -> Vec<MetricFamily> {
        let stats = self.router.stats();
        let mut families = Vec::new();
        let datagrams = counters("isthmus_router_datagrams_total", "Datagrams, by what became of them", &["result"]);
        let count = |result: &str, value: u64| datagrams.with_label_values(&[result]).inc_by(value);
        count("received", stats.datagrams);
        count("to_local", stats.to_local);
        count("to_link", stats.to_links);
        count("to_control", stats.to_control);
        count("probe", stats.probes);
        families.extend(datagrams.collect());
        let dropped = counters("isthmus_router_dropped_total", "Datagrams dropped, by reason", &["reason"]);
        for (reason, value) in &stats.dropped {
            dropped.with_label_values(&[reason.as_str()]).inc_by(*value);
        }
        dropped.with_label_values(&["egress_full"]).inc_by(stats.egress_full);
        dropped.with_label_values(&["too_big"]).inc_by(stats.too_big);
        dropped.with_label_values(&["send_failed"]).inc_by(stats.send_failed);
        dropped.with_label_values(&["queue_full"]).inc_by(stats.queue_full);
        families.extend(dropped.collect());
        families.extend(gauge("isthmus_router_offload", "1 if GSO and GRO work", f64::from(u8::from(stats.offload))));
        families
    }

    fn linked(&self) -> Vec<MetricFamily> {
        let labels = ["destination_cluster"];
        let rtt = gauges("isthmus_link_rtt_seconds", "Round trip of a link", &labels);
        let loss = gauges("isthmus_link_loss_ratio", "Part of a link's probes that were lost", &labels);
        let state = gauges("isthmus_link_state", "1 if the link is up", &["destination_cluster", "transport"]);
        for link in self.links.table() {
            if let Some(rtt_us) = link.rtt_us {
                rtt.with_label_values(&[&link.to]).set(f64::from(rtt_us) / 1e6);
            }
            loss.with_label_values(&[&link.to]).set(f64::from(link.loss_ppm) / 1e6);
            state
                .with_label_values(&[&link.to, &"quic".to_owned()])
                .set(f64::from(u8::from(link.state == LinkState::Up)));
        }
        [rtt.collect(), loss.collect(), state.collect()].concat()
    }

    fn registered(&self) -> Vec<MetricFamily> {
        let status = self.member.status();
        let mut families = gauge("isthmus_raft_term", "Term of the registry's Raft group", status.term as f64);
        families.extend(gauge("isthmus_raft_commit_index", "Highest committed position known", status.commit as f64));
        let lag = status.commit.saturating_sub(status.applied);
        families.extend(gauge("isthmus_raft_apply_lag", "Committed entries not yet applied", lag as f64));
        let registry = self.hub.registry();
        let services = gauges("isthmus_registry_services", "Exported services, by their owner", &["origin"]);
        let age = gauges("isthmus_config_age_seconds", "Age of what is known of a cluster", &["source_cluster"]);
        for cluster in registry.clusters.keys() {
            let count = registry.exports.get(cluster).map_or(0, std::collections::BTreeMap::len);
            services.with_label_values(&[cluster.as_str()]).set(count as f64);
            if let Some(known) = self.hub.imports(|imports| imports.age(cluster, Instant::now())) {
                age.with_label_values(&[cluster.as_str()]).set(known.since.as_secs_f64());
            }
        }
        families.extend(services.collect());
        families.extend(age.collect());
        families
    }

    fn distributed(&self) -> Vec<MetricFamily> {
        let sessions = IntGaugeVec::new(
            Opts::new("isthmus_gateway_sessions", "Sidecar sessions, by how far their config is"),
            &["state"],
        )
        .expect("a constant name and label");
        for connected in self.sidecars.connected() {
            let state = match &connected.progress {
                progress if progress.refused.is_some() => "error",
                progress if progress.acked < progress.sent => "stale",
                _ => "synced",
            };
            sessions.with_label_values(&[state]).inc();
        }
        sessions.collect()
    }
}

fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    IntCounterVec::new(Opts::new(name, help), labels).expect("a constant name and labels")
}

fn gauges(name: &str, help: &str, labels: &[&str]) -> GaugeVec {
    GaugeVec::new(Opts::new(name, help), labels).expect("a constant name and labels")
}

fn gauge(name: &str, help: &str, value: f64) -> Vec<MetricFamily> {
    let gauge = Gauge::with_opts(Opts::new(name, help)).expect("a constant name");
    gauge.set(value);
    gauge.collect()
}
