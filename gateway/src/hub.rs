//! What the gateway knows, in one place: sessions, links and the log write, everybody reads.
//!
//! One short lock, never held across an await. Every change bumps a generation that readers wait for;
//! what sidecars are told is computed once per generation and name, then shared by all sessions.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use isthmus_federation::registry::Registry;
use isthmus_model::authn;
use isthmus_model::service::{Export, Patterns};
use isthmus_model::view::{Resource, ResourceName};
use isthmus_model::vip::Addresses;
use isthmus_model::{ClusterId, ClusterName, Host, Locality, Namespace};
use isthmus_wire::discovery::{Edge, Gone};
use isthmus_wire::federation::{DialNotice, HealthDelta, ServiceHealth};
use parking_lot::Mutex;
use tokio::sync::{broadcast, watch};
use xxhash_rust::xxh3::xxh3_64;

use crate::distribution::session::{Encoded, Lookup, Source};
use crate::imports::{ImportError, ImportTable, Taken};
use crate::locals::{self, Local, Locals, Served, ServiceKey, WorkloadKey};
use crate::publish::Wanted;
use crate::summary::{Link, Report};
use crate::traffic::{EdgeRate, Traffic, WINDOW};
use crate::view::{Facts, Known, PathFacts, health_of};
use isthmus_objects::ObjectSet;

/// Gone endpoints and notices that a slow session may lag behind; it hears the rest by health deltas.
const EVENTS_MAX: usize = 1_024;

/// The shared knowledge of one gateway.
pub struct Hub {
    own: ClusterName,
    locality: Locality,
    state: Mutex<State>,
    generation: watch::Sender<u64>,
    gone: broadcast::Sender<Gone>,
    notices: broadcast::Sender<DialNotice>,
}

struct State {
    registry: Arc<Registry>,
    objects: Arc<ObjectSet>,
    locals: Locals,
    imports: ImportTable,
    paths: BTreeMap<ClusterName, PathFacts>,
    addresses: Arc<Addresses>,
    traffic: Traffic,
    reports: BTreeMap<ClusterName, (Instant, Report)>,
    cache: HashMap<(Namespace, ResourceName), Lookup>,
}

impl Hub {
    /// A gateway of `own` that knows `registry`, `objects` and the addresses it gave before.
    pub fn new(
        own: ClusterName,
        locality: Locality,
        registry: Arc<Registry>,
        objects: Arc<ObjectSet>,
        addresses: Addresses,
    ) -> Arc<Self> {
        let state = State {
            registry,
            objects,
            locals: Locals::default(),
            imports: ImportTable::default(),
            paths: BTreeMap::new(),
            addresses: Arc::new(addresses),
            traffic: Traffic::default(),
            reports: BTreeMap::new(),
            cache: HashMap::new(),
        };
        let hub = Self {
            own,
            locality,
            state: Mutex::new(state),
            generation: watch::Sender::new(0),
            gone: broadcast::Sender::new(EVENTS_MAX),
            notices: broadcast::Sender::new(EVENTS_MAX),
        };
        Arc::new(hub)
    }

    /// This cluster.
    pub fn own(&self) -> &ClusterName {
        &self.own
    }

    /// This cluster's number; zero until the log has it.
    pub fn own_id(&self) -> ClusterId {
        self.read(|state| state.registry.clusters.get(&self.own).map_or(ClusterId(0), |record| record.id))
    }

    /// Bumped by every change.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// The log's state.
    pub fn registry(&self) -> Arc<Registry> {
        self.read(|state| state.registry.clone())
    }

    /// The cluster's own objects.
    pub fn objects(&self) -> Arc<ObjectSet> {
        self.read(|state| state.objects.clone())
    }

    /// The log moved on.
    pub fn set_registry(&self, registry: Arc<Registry>) {
        self.change(|state| {
            state.imports.retain_clusters(|cluster| registry.clusters.contains_key(cluster));
            state.registry = registry;
        });
    }

    /// The cluster's objects were replaced.
    pub fn set_objects(&self, objects: Arc<ObjectSet>) {
        self.change(|state| {
            state.locals.set_entries(objects.workloads.values().cloned().collect());
            state.objects = objects;
        });
    }

    /// A sidecar registered. A process that it replaces is gone, which is told at once.
    pub fn register(&self, key: WorkloadKey, local: Local) {
        let replaced = self.change(|state| state.locals.insert(key, local));
        if let Some(process) = replaced {
            self.tell_gone(self.own_id(), process);
        }
    }

    /// A sidecar ended its last session here. If it was draining its process ends; else it has only left this
    /// replica, and says so to the others itself.
    pub fn unregister(&self, key: &WorkloadKey, process: (u32, u16)) {
        let draining = self.read(|state| state.locals.get(key).is_some_and(|local| local.draining));
        match draining {
            true => self.lost(key, process),
            false => drop(self.change(|state| state.locals.remove(key, process))),
        }
    }

    /// A sidecar's last session broke: its process is dead.
    pub fn lost(&self, key: &WorkloadKey, process: (u32, u16)) {
        if self.change(|state| state.locals.remove(key, process)) {
            self.tell_gone(self.own_id(), process);
        }
    }

    /// A sidecar says how its application is.
    pub fn report_health(&self, key: &WorkloadKey, healthy: bool, draining: bool) {
        let same = self.read(|state| {
            state.locals.get(key).is_none_or(|local| (local.healthy, local.draining) == (healthy, draining))
        });
        if !same {
            self.change(|state| {
                state.locals.set_health(key, healthy, draining);
            });
        }
    }

    /// Time passed for leases.
    pub fn expire_imports(&self, now: Instant) {
        if self.state.lock().imports.handle_timeout(now) {
            self.change(|_| ());
        }
    }

    /// A health frame of `cluster` arrived over a link with its replica `replica`.
    ///
    /// # Errors
    /// [`ImportError`]; nothing of the frame is taken then.
    pub fn take_health(
        &self,
        cluster: &ClusterName,
        replica: u8,
        frame: HealthDelta,
        now: Instant,
    ) -> Result<Taken, ImportError> {
        let taken = self.state.lock().imports.take(cluster, replica, frame, now)?;
        if taken.changed {
            self.change(|_| ());
        }
        Ok(taken)
    }

    /// Reads what other clusters said.
    pub fn imports<T>(&self, work: impl FnOnce(&ImportTable) -> T) -> T {
        self.read(|state| work(&state.imports))
    }

    /// The path to a cluster changed. Small movements of its figures wait for the next change.
    pub fn set_path(&self, cluster: &ClusterName, path: PathFacts) {
        let close = |old: u32, new: u32| old.abs_diff(new) * 5 <= old.max(new);
        let minor = self.read(|state| {
            state.paths.get(cluster).is_some_and(|old| old.up == path.up && close(old.rtt_us, path.rtt_us))
        });
        if !minor {
            self.change(|state| state.paths.insert(cluster.clone(), path));
        }
    }

    /// Paths by cluster.
    pub fn paths(&self) -> BTreeMap<ClusterName, PathFacts> {
        self.read(|state| state.paths.clone())
    }

    /// All registered workloads.
    pub fn locals(&self) -> Locals {
        self.read(|state| state.locals.clone())
    }

    /// What a workload serves, to whom.
    pub fn served(&self, key: &WorkloadKey) -> Vec<Served> {
        self.read(|state| {
            let Some(local) = state.locals.get(key) else { return Vec::new() };
            let exports = state.own_exports(&self.own);
            locals::served(&key.0, local, state.objects.services.values(), &exports, &self.own)
        })
    }

    /// Which clusters may call the endpoint behind `handle`: by its services' exports.
    pub fn visible_to(&self, key: &WorkloadKey) -> Patterns {
        let mut clusters: Vec<String> =
            self.served(key).into_iter().filter(|one| one.host.is_mesh()).flat_map(|one| one.visible_to).collect();
        clusters.retain(|cluster| cluster != self.own.as_str());
        clusters.sort();
        clusters.dedup();
        Patterns(clusters)
    }

    /// What the cluster wants to stand in its key space of the log.
    pub fn wanted(&self) -> Wanted {
        self.read(|state| {
            let exported = state.registry.exports.get(&self.own);
            let exports = state.objects.exports.iter().filter_map(|(key, wanted)| {
                let service = state.objects.services.get(key)?;
                let record = exported.and_then(|of| of.get(&format!("{}/{}", key.0, key.1)));
                let known = record.map(|record| record.export.accounts.clone()).unwrap_or_default();
                let export = locals::export_of(service, &state.locals, wanted.visible_to.clone(), &known);
                // Without an account nobody could be accepted: wait for the first workload.
                (!export.accounts.is_empty()).then(|| (key.clone(), export))
            });
            Wanted { exports: exports.collect(), entries: state.objects.service_entries.clone(), facts: None }
        })
    }

    /// The health of every exported service that `importer` may call, as its owner says it.
    pub fn health_for(&self, importer: &ClusterName) -> BTreeMap<ServiceKey, ServiceHealth> {
        self.read(|state| {
            let exports = state.own_exports(&self.own);
            let visible = exports.iter().filter(|(_, export)| export.visible_to.cover(importer.as_str()));
            let health = visible.filter_map(|(key, _)| {
                let service = state.objects.services.get(key)?;
                let endpoints = state.locals.selected(&service.namespace, &service.selector);
                let health = ServiceHealth {
                    namespace: key.0.to_string(),
                    name: key.1.to_string(),
                    version: 0,
                    endpoints: endpoints.map(|(_, local)| health_of(service, local)).collect(),
                    tombstone: false,
                };
                Some((key.clone(), health))
            });
            health.collect()
        })
    }

    /// Tells every session and link that a process is no more.
    pub fn tell_gone(&self, cluster: ClusterId, process: (u32, u16)) {
        let gone = Gone { cluster_id: cluster.0.into(), handle: process.0, incarnation: process.1.into() };
        // Fails only if nobody listens.
        let _ = self.gone.send(gone);
    }

    /// Processes that are no more, of all clusters.
    pub fn gone(&self) -> broadcast::Receiver<Gone> {
        self.gone.subscribe()
    }

    /// A dial of one of this cluster's sidecars was refused by its destination.
    pub fn tell_notice(&self, notice: DialNotice) {
        let _ = self.notices.send(notice);
    }

    /// Refused dials.
    pub fn notices(&self) -> broadcast::Receiver<DialNotice> {
        self.notices.subscribe()
    }

    /// A sidecar's counters.
    pub fn report_traffic(&self, session: u64, edges: &[Edge], now: Instant) {
        self.state.lock().traffic.report(session, edges, now);
    }

    /// A sidecar's session ended.
    pub fn forget_traffic(&self, session: u64) {
        self.state.lock().traffic.forget(session);
    }

    /// Another cluster's report arrived; the last value wins.
    pub fn set_report(&self, cluster: ClusterName, report: Report, now: Instant) {
        self.state.lock().reports.insert(cluster, (now, report));
    }

    /// The own cluster's rates.
    pub fn own_traffic(&self, now: Instant) -> Vec<EdgeRate> {
        self.state.lock().traffic.rates(self.own.as_str(), now)
    }

    /// All clusters' rates that are not older than three windows.
    pub fn all_traffic(&self, now: Instant) -> Vec<EdgeRate> {
        let mut state = self.state.lock();
        let mut rates = state.traffic.rates(self.own.as_str(), now);
        rates.extend(fresh_reports(&state.reports, now).flat_map(|report| report.rates.clone()));
        rates
    }

    /// The links that other clusters reported, not older than three windows.
    pub fn reported_links(&self, now: Instant) -> Vec<Link> {
        let state = self.state.lock();
        fresh_reports(&state.reports, now).flat_map(|report| report.links.clone()).collect()
    }

    /// What is known of `host`, for tables.
    pub fn service(&self, host: &Host) -> Known {
        self.read(|state| state.facts(&self.own, &self.locality).host(host))
    }

    /// Every host that a sidecar of this cluster could ask for.
    pub fn hosts(&self) -> Vec<Host> {
        self.read(|state| state.facts(&self.own, &self.locality).hosts())
    }

    /// The virtual addresses as they must be kept.
    pub fn addresses(&self) -> Arc<Addresses> {
        self.read(|state| state.addresses.clone())
    }

    /// The member's addresses, at another replica.
    pub fn set_addresses(&self, addresses: Addresses) {
        if *self.addresses() != addresses {
            self.change(|state| state.addresses = Arc::new(addresses));
        }
    }

    /// Gives every known host its virtual addresses, and lets those of hosts rest that their owner deleted;
    /// says whether anything changed.
    pub fn allocate_addresses(&self, now_unix_s: u64) -> bool {
        let hosts: BTreeSet<Host> = self.hosts().into_iter().filter(|host| !host.is_wildcard()).collect();
        let mut next = Addresses::clone(&self.addresses());
        let gone: Vec<Host> = next.by_host().keys().filter(|host| !hosts.contains(host)).cloned().collect();
        // Before the log was heard nobody can say that a host is gone.
        let known = self.registry().mesh.is_some();
        let mut changed = next.forget_rested(now_unix_s);
        for host in gone.iter().filter(|_| known) {
            changed |= next.release(host, now_unix_s);
        }
        match next.allocate(&hosts, now_unix_s) {
            Ok(new) => changed |= new,
            Err(error) => {
                tracing::warn!(%error, "some hosts have no virtual address");
                changed = true;
            }
        }
        if changed && *self.addresses() != next {
            self.change(|state| state.addresses = Arc::new(next));
            return true;
        }
        false
    }

    /// What one workload is told: the source of its session.
    pub fn source<'a>(&'a self, key: &'a WorkloadKey, labels: &'a locals::LabelsOf) -> SessionSource<'a> {
        SessionSource { hub: self, namespace: &key.0, labels }
    }

    fn read<T>(&self, work: impl FnOnce(&State) -> T) -> T {
        work(&self.state.lock())
    }

    fn change<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let result = {
            let mut state = self.state.lock();
            state.cache.clear();
            work(&mut state)
        };
        self.generation.send_modify(|generation| *generation += 1);
        result
    }
}

impl State {
    fn facts<'a>(&'a self, own: &'a ClusterName, locality: &'a Locality) -> Facts<'a, ImportTable> {
        Facts {
            own,
            locality,
            registry: &self.registry,
            services: &self.objects.services,
            entries: &self.objects.service_entries,
            locals: &self.locals,
            imports: &self.imports,
            paths: &self.paths,
            addresses: &self.addresses,
        }
    }

    fn own_exports(&self, own: &ClusterName) -> BTreeMap<ServiceKey, Export> {
        let of = self.registry.exports.get(own).into_iter().flat_map(BTreeMap::values);
        of.map(|record| ((record.export.namespace.clone(), record.export.name.clone()), record.export.clone()))
            .collect()
    }

    /// The resources of `name`: its service, VirtualService and DestinationRule.
    fn resources(&self, own: &ClusterName, locality: &Locality, namespace: &Namespace, name: &ResourceName) -> Lookup {
        let view = match self.facts(own, locality).lookup(name) {
            Known::Service(view) => view,
            Known::Absent => return Lookup::Absent,
            Known::Unknown => return Lookup::Unknown,
        };
        let host = view.host.clone();
        let mut resources = vec![encoded(format!("service/{host}"), &Resource::Service(*view))];
        if let Some(route) = self.objects.virtual_service(&host, namespace) {
            resources.push(encoded(format!("virtual-service/{host}"), &Resource::VirtualService(route.clone())));
        }
        if let Some(rule) = self.objects.destination_rule(&host, namespace) {
            resources.push(encoded(format!("destination-rule/{host}"), &Resource::DestinationRule(rule.clone())));
        }
        Lookup::Found(resources)
    }
}

/// What one workload may hear.
pub struct SessionSource<'a> {
    hub: &'a Hub,
    namespace: &'a Namespace,
    labels: &'a locals::LabelsOf,
}

impl Source for SessionSource<'_> {
    fn lookup(&self, name: &ResourceName) -> Lookup {
        let mut state = self.hub.state.lock();
        let key = (self.namespace.clone(), name.clone());
        if let Some(known) = state.cache.get(&key) {
            return known.clone();
        }
        let found = state.resources(&self.hub.own, &self.hub.locality, self.namespace, name);
        state.cache.insert(key, found.clone());
        found
    }

    fn common(&self) -> Vec<Encoded> {
        self.hub.read(|state| {
            let all = state.objects.peer_authentications.values();
            let policies = authn::applicable(all, self.namespace, self.labels).into_iter().cloned().collect();
            vec![
                encoded("mesh-ranges".into(), &Resource::MeshRanges(state.addresses.ranges().to_vec())),
                encoded("peer-authentication".into(), &Resource::PeerAuthentication(policies)),
            ]
        })
    }
}

fn encoded(name: String, resource: &Resource) -> Encoded {
    // Serialising our own plain values into memory cannot fail; an empty body would be refused by the reader.
    let body = serde_json::to_vec(resource).map(Bytes::from).unwrap_or_default();
    Encoded { name, version: xxh3_64(&body), body }
}

/// Reports of clusters that are still heard.
fn fresh_reports(reports: &BTreeMap<ClusterName, (Instant, Report)>, now: Instant) -> impl Iterator<Item = &Report> {
    reports.values().filter(move |(at, _)| now.saturating_duration_since(*at) < 3 * WINDOW).map(|(_, report)| report)
}
