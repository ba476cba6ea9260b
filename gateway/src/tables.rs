//! From what the gateway knows to what `isthmus get`, `status` and the dashboard show. Decides nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use isthmus_federation::member::Status;
use isthmus_federation::registry::{Registry, TokenState};
use isthmus_model::ClusterName;
use isthmus_model::merge::merge;
use isthmus_model::service::{Export, ServicePort};
use isthmus_model::view::{Freshness, ServiceView, Target};

use crate::distribution::sidecars::Connected;
use crate::hub::Hub;
use crate::imports::Age;
use crate::rows::{EndpointRow, ExportRow, ImportRow, PortRow, ProxyRow, TokenRow};
use crate::summary::{Cluster, ClusterState, Event, Import, Link, Service, ServiceEdge, Store, Summary, Traffic};
use crate::traffic::{EdgeRate, quantile};
use crate::view::{Imported, Imports, Known, exported};

/// What a link is, as its owner measures it.
pub type LinkTable = Vec<Link>;

/// Everything at a glance.
pub struct Glance<'a> {
    /// What is known.
    pub hub: &'a Hub,
    /// Where the member stands.
    pub status: &'a Status,
    /// This gateway's links.
    pub links: LinkTable,
    /// What happened lately, newest first.
    pub events: Vec<Event>,
    /// Where this gateway serves the dashboard.
    pub dashboard: String,
    /// Now.
    pub now: Instant,
    /// Now, Unix milliseconds.
    pub now_unix_ms: u64,
}

impl Glance<'_> {
    /// The summary of the mesh as this gateway sees it.
    pub fn summary(&self) -> Summary {
        let registry = self.hub.registry();
        let rates = self.hub.all_traffic(self.now);
        Summary {
            mesh: registry.mesh.as_ref().map(|mesh| mesh.name.clone()).unwrap_or_default(),
            cluster: self.hub.own().to_string(),
            generated_at: self.now_unix_ms,
            dashboard: self.dashboard.clone(),
            traffic: traffic(&rates.iter().collect::<Vec<_>>()),
            clusters: registry.clusters.keys().map(|name| self.cluster(&registry, name)).collect(),
            services: services(&registry, &rates),
            imports: self.imports(&registry),
            store: Store {
                leader: self.status.leader.and_then(|id| name_of(&registry, id)),
                voters: self.status.voters.iter().filter_map(|id| name_of(&registry, *id)).collect(),
                commit: self.status.commit,
                applied: self.status.applied,
            },
            links: self.links.iter().cloned().chain(self.hub.reported_links(self.now)).collect(),
            events: self.events.clone(),
        }
    }

    fn cluster(&self, registry: &Registry, name: &ClusterName) -> Cluster {
        let Some(record) = registry.clusters.get(name) else { return Cluster::default() };
        let is_self = name == self.hub.own();
        let age = self.hub.imports(|imports| imports.age(name, self.now));
        let up = self.hub.paths().get(name).is_some_and(|path| path.up);
        let (state, reason) = match (is_self, age, up) {
            (true, ..) | (false, Some(Age { freshness: Freshness::Fresh, .. }), true) => {
                (ClusterState::Ready, String::new())
            }
            (false, _, false) => (ClusterState::Down, "no link to any of its gateways is up".to_owned()),
            (false, Some(Age { freshness: Freshness::Draining, .. }), _) => (ClusterState::Draining, String::new()),
            (false, Some(age), true) => {
                (ClusterState::Degraded, format!("its link is up, but it said nothing for {} s", age.since.as_secs()))
            }
            (false, None, true) => {
                (ClusterState::Unknown, "its link is up, its services were not heard yet".to_owned())
            }
        };
        Cluster {
            name: name.to_string(),
            id: record.id.0,
            locality: record.facts.locality.to_string(),
            provider: record.facts.provider.clone(),
            state,
            reason,
            is_self,
            is_leader: self.status.leader == Some(record.id),
            voter: self.status.voters.contains(&record.id),
            gateways: record.facts.addresses.clone(),
            version: record.facts.version.clone(),
            age_ms: if is_self { Some(0) } else { age.map(|age| millis(age.since)) },
            exports: registry.exports.get(name).map_or(0, |of| u32::try_from(of.len()).unwrap_or(u32::MAX)),
        }
    }

    fn imports(&self, registry: &Registry) -> Vec<Import> {
        let mut all: BTreeMap<String, Import> = BTreeMap::new();
        for row in imports(self.hub, registry, self.now) {
            let import = all.entry(row.cluster.clone()).or_insert_with(|| Import {
                cluster: row.cluster.clone(),
                age_ms: row.age_ms,
                freshness: row.freshness.clone(),
                ..Import::default()
            });
            import.services += 1;
            import.endpoints += row.endpoints;
            import.endpoints_healthy += row.endpoints_healthy;
        }
        all.into_values().collect()
    }
}

fn name_of(registry: &Registry, id: isthmus_model::ClusterId) -> Option<String> {
    registry.cluster_by_id(id).map(|record| record.name.to_string())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn summed(rates: &[&EdgeRate]) -> (f64, f64, f64, Vec<f64>) {
    let mut latency = vec![0.0; isthmus_wire::LATENCY_BUCKETS_MS.len() + 1];
    for rate in rates {
        for (slot, count) in latency.iter_mut().zip(&rate.latency) {
            *slot += count;
        }
    }
    // From 0.0 on: an empty sum of floats is -0.0, and would be shown as such.
    let sum = |of: fn(&EdgeRate) -> f64| rates.iter().fold(0.0, |sum, rate| sum + of(rate));
    (sum(|rate| rate.rps), sum(|rate| rate.errors), sum(|rate| rate.bytes), latency)
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

fn traffic(rates: &[&EdgeRate]) -> Traffic {
    let (rps, errors, _, latency) = summed(rates);
    let crossing = rates.iter().filter(|rate| rate.from != rate.to).fold(0.0, |sum, rate| sum + rate.rps);
    Traffic {
        rps,
        error_ratio: ratio(errors, rps),
        p50_ms: quantile(&latency, 0.5),
        p99_ms: quantile(&latency, 0.99),
        cross_cluster_ratio: ratio(crossing, rps),
    }
}

fn services(registry: &Registry, rates: &[EdgeRate]) -> Vec<Service> {
    let mut by_host: BTreeMap<String, Vec<&EdgeRate>> = BTreeMap::new();
    for rate in rates {
        by_host.entry(rate.host.clone()).or_default().push(rate);
    }
    let mut exporters: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for of in registry.exports.values() {
        for (service, record) in of {
            let host = record.export.host().to_string();
            by_host.entry(host.clone()).or_default();
            let names = || registry.exporters(service).into_iter().map(|(cluster, _)| cluster.to_string()).collect();
            exporters.entry(host).or_insert_with(names);
        }
    }
    let edge = |rate: &&EdgeRate| ServiceEdge {
        from: rate.from.clone(),
        to: rate.to.clone(),
        rps: rate.rps,
        error_ratio: ratio(rate.errors, rate.rps),
        p50_ms: quantile(&rate.latency, 0.5),
        p99_ms: quantile(&rate.latency, 0.99),
        bytes_per_s: rate.bytes,
    };
    by_host
        .into_iter()
        .map(|(host, rates)| Service {
            exporters: exporters.remove(&host).unwrap_or_default(),
            traffic: traffic(&rates),
            edges: rates.iter().map(edge).collect(),
            host,
        })
        .collect()
}

fn ports(ports: &[ServicePort]) -> Vec<PortRow> {
    let row = |port: &ServicePort| PortRow {
        number: port.number,
        name: port.name.clone(),
        protocol: serde_json::to_value(port.protocol)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default(),
    };
    ports.iter().map(row).collect()
}

/// `get exports`: every cluster's, with the conflicts of each.
pub fn exports(registry: &Registry) -> Vec<ExportRow> {
    let mut rows = Vec::new();
    for (cluster, of) in registry.exports.iter() {
        for record in of.values() {
            rows.push(ExportRow {
                namespace: record.export.namespace.to_string(),
                name: record.export.name.to_string(),
                host: record.export.host().to_string(),
                cluster: cluster.to_string(),
                ports: ports(&record.export.ports),
                visible_to: record.export.visible_to.0.clone(),
                index: record.index,
                conflicts: conflicts(registry, &record.export),
            });
        }
    }
    rows
}

/// Ports that clusters export differently: the oldest export's is used (KEP-1645).
fn conflicts(registry: &Registry, export: &Export) -> Vec<String> {
    let exports = exported(registry, &(export.namespace.clone(), export.name.clone()), |_| None);
    let merged = merge(&export.host(), &[], exports, None);
    merged.map(|merged| merged.conflicts.iter().map(ToString::to_string).collect()).unwrap_or_default()
}

/// `get imports`: services of other clusters that can be called from here.
pub fn imports(hub: &Hub, registry: &Registry, now: Instant) -> Vec<ImportRow> {
    let mut rows = Vec::new();
    for (cluster, of) in registry.exports.iter().filter(|(cluster, _)| *cluster != hub.own()) {
        let age = hub.imports(|imports| imports.age(cluster, now));
        for record in of.values().filter(|record| record.export.visible_to.cover(hub.own().as_str())) {
            let key = (record.export.namespace.clone(), record.export.name.clone());
            let (freshness, endpoints) = match hub.imports(|imports| imports.of(cluster, &key)) {
                Imported::Heard(freshness, endpoints) => (freshness_word(freshness), endpoints),
                Imported::Gone => (age.map_or("unknown", |age| freshness_word(age.freshness)), Vec::new()),
                Imported::Unheard => ("unknown", Vec::new()),
            };
            let healthy = endpoints.iter().filter(|one| one.healthy && !one.draining).count();
            rows.push(ImportRow {
                host: record.export.host().to_string(),
                cluster: cluster.to_string(),
                ports: ports(&record.export.ports),
                endpoints: u32::try_from(endpoints.len()).unwrap_or(u32::MAX),
                endpoints_healthy: u32::try_from(healthy).unwrap_or(u32::MAX),
                freshness: freshness.to_owned(),
                age_ms: age.map(|age| millis(age.since)),
            });
        }
    }
    rows
}

fn freshness_word(freshness: Freshness) -> &'static str {
    match freshness {
        Freshness::Fresh => "fresh",
        Freshness::Draining => "draining",
        Freshness::Suspect => "suspect",
    }
}

/// `get endpoints`: of every host, as sidecars of this cluster are told.
pub fn endpoints(hub: &Hub) -> Vec<EndpointRow> {
    let locals = hub.locals();
    let mut rows = Vec::new();
    for host in hub.hosts() {
        let Known::Service(view) = hub.service(&host) else { continue };
        let ServiceView { backends, .. } = *view;
        for of in backends {
            for endpoint in of.endpoints {
                let own = match endpoint.target {
                    Target::Direct(address) => locals.iter().find(|(_, local)| local.mtls_address == address),
                    _ => None,
                };
                let (handle, incarnation) = match (&endpoint.target, own) {
                    (Target::Tunnel { handle, incarnation }, _) => (*handle, *incarnation),
                    (_, Some((_, local))) => (local.handle, local.incarnation),
                    _ => (0, 0),
                };
                rows.push(EndpointRow {
                    host: host.to_string(),
                    cluster: of.cluster.to_string(),
                    workload: own.map(|((namespace, name), _)| format!("{namespace}/{name}")).unwrap_or_default(),
                    handle,
                    incarnation,
                    weight: endpoint.weight,
                    locality: endpoint.locality.as_ref().unwrap_or(&of.locality).to_string(),
                    healthy: endpoint.healthy,
                    labels: endpoint.labels,
                });
            }
        }
    }
    rows
}

/// `get tokens`: join tokens of the mesh.
pub fn tokens(registry: &Registry, now_unix_s: u64) -> Vec<TokenRow> {
    let row = |(id, token): (&String, &std::sync::Arc<isthmus_federation::registry::TokenRecord>)| TokenRow {
        id: id.clone(),
        kind: "cluster".into(),
        subject: token.cluster.to_string(),
        state: match token.state {
            TokenState::Used(_) => "used",
            TokenState::Revoked => "revoked",
            TokenState::Open if token.expires_unix_s <= now_unix_s => "expired",
            TokenState::Open => "open",
        }
        .into(),
        expires_unix_s: token.expires_unix_s,
        namespaces: token.namespaces.0.clone(),
    };
    registry.tokens.iter().map(row).collect()
}

/// `get proxies`: the sidecars connected to this gateway.
pub fn proxies(hub: &Hub, connected: &[Connected], now: Instant) -> Vec<ProxyRow> {
    let locals = hub.locals();
    let row = |one: &Connected| {
        let local = locals.get(&one.key);
        ProxyRow {
            workload: format!("{}/{}", one.key.0, one.key.1),
            account: local.map(|local| local.account.to_string()).unwrap_or_default(),
            address: local.map(|local| local.tunnel_address.to_string()).unwrap_or_default(),
            handle: one.process.0,
            incarnation: one.process.1,
            state: match &one.progress {
                progress if progress.refused.is_some() => "ERROR",
                progress if progress.acked < progress.sent => "STALE",
                _ => "SYNCED",
            }
            .into(),
            error: one.progress.refused.clone().unwrap_or_default(),
            version_sent: one.progress.sent,
            version_acked: one.progress.acked,
            connected_s: now.saturating_duration_since(one.since).as_secs(),
            version: one.version.clone(),
        }
    };
    connected.iter().map(row).collect()
}
