//! From all that a gateway knows to what one sidecar is told of a name.
//!
//! Pure: registry, own workloads, leases and links in, resources out. Nothing is removed because it
//! was not heard of: a cluster that has not spoken since the start makes its services *unknown*.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use isthmus_federation::registry::{ExportRecord, Registry};
use isthmus_model::merge::{Exported, Heard, merge};
use isthmus_model::service::{Labels, Location, Resolution, Service, ServiceEntry, ServicePort};
use isthmus_model::view::{Backends, Endpoint, Freshness, ResourceName, ServiceView, Target};
use isthmus_model::vip::Addresses;
use isthmus_model::{ClusterName, Host, Locality, Namespace, ServiceAccount};
use isthmus_wire::federation::EndpointHealth;

use crate::locals::{Local, Locals, ServiceKey, target_port};

/// Endpoints of one service and cluster that one sidecar hears of; a deterministic subset of more.
pub const ENDPOINTS_PER_CLUSTER: usize = 8;

/// What a cluster said of one of its services.
#[derive(Debug, Clone, PartialEq)]
pub enum Imported {
    /// Nothing yet since this gateway started.
    Unheard,
    /// It has no such service (any more).
    Gone,
    /// These endpoints.
    Heard(Freshness, Vec<EndpointHealth>),
}

/// Other clusters' words, as leases keep them.
pub trait Imports {
    /// What `cluster` said of `service`.
    fn of(&self, cluster: &ClusterName, service: &ServiceKey) -> Imported;
}

/// What is known of the path to a cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PathFacts {
    /// Whether any link is up.
    pub up: bool,
    /// Round trip in microseconds.
    pub rtt_us: u32,
    /// Lost packets per million.
    pub loss_ppm: u32,
}

/// All that views are made of.
pub struct Facts<'a, I> {
    /// This cluster.
    pub own: &'a ClusterName,
    /// Where it is.
    pub locality: &'a Locality,
    /// The log's state.
    pub registry: &'a Registry,
    /// The cluster's own services.
    pub services: &'a BTreeMap<ServiceKey, Service>,
    /// The cluster's own ServiceEntries.
    pub entries: &'a BTreeMap<ServiceKey, ServiceEntry>,
    /// The cluster's own workloads.
    pub locals: &'a Locals,
    /// Other clusters' words.
    pub imports: &'a I,
    /// Paths by cluster.
    pub paths: &'a BTreeMap<ClusterName, PathFacts>,
    /// Virtual addresses by host.
    pub addresses: &'a Addresses,
}

/// What is known of a host.
#[derive(Debug, Clone, PartialEq)]
pub enum Known {
    /// This.
    Service(Box<ServiceView>),
    /// It does not exist.
    Absent,
    /// Nobody who could know was heard yet.
    Unknown,
}

impl<I: Imports> Facts<'_, I> {
    /// The host that an address belongs to.
    pub fn host_of(&self, address: IpAddr) -> Option<Host> {
        self.addresses
            .host_of(address)
            .cloned()
            .or_else(|| {
                let service = self.services.values().find(|service| service.address == Some(address))?;
                Some(Host::cluster(&service.namespace, &service.name))
            })
            .or_else(|| {
                let contains = |entry: &&ServiceEntry| entry.addresses.iter().any(|net| net.contains(&address));
                self.all_entries().find(contains).and_then(|entry| entry.hosts.first().cloned())
            })
    }

    /// What is known of `name`; addresses are answered as the host they belong to.
    pub fn lookup(&self, name: &ResourceName) -> Known {
        match name {
            ResourceName::Host(host) => self.host(host),
            ResourceName::Address(address) => match self.host_of(*address) {
                Some(host) => self.host(&host),
                None => Known::Absent,
            },
        }
    }

    /// What is known of `host`.
    pub fn host(&self, host: &Host) -> Known {
        let declared = || match self.entry(host) {
            Some(entry) => Known::Service(Box::new(self.entry_view(host, entry))),
            None => Known::Absent,
        };
        let Some((service, namespace)) = host.service() else { return declared() };
        let key = (namespace, service);
        let known = if host.is_mesh() { self.mesh_view(host, &key) } else { self.cluster_view(host, &key) };
        if known == Known::Absent { declared() } else { known }
    }

    /// Every host that some sidecar of this cluster could ask for.
    pub fn hosts(&self) -> Vec<Host> {
        let local = self.services.keys().map(|(namespace, name)| Host::cluster(namespace, name));
        let mesh = self.registry.exports.iter().flat_map(|(cluster, of)| {
            of.values()
                .filter(move |record| cluster == self.own || record.export.visible_to.cover(self.own.as_str()))
                .map(|record| record.export.host())
        });
        let declared = self.all_entries().flat_map(|entry| entry.hosts.iter().cloned());
        let mut all: Vec<Host> = local.chain(mesh).chain(declared).collect();
        all.sort();
        all.dedup();
        all
    }

    fn all_entries(&self) -> impl Iterator<Item = &ServiceEntry> {
        let others = self.registry.service_entries.iter().filter(|(cluster, _)| *cluster != self.own);
        self.entries.values().chain(others.flat_map(|(_, of)| of.values().map(|record| &record.entry)))
    }

    /// The ServiceEntry of `host`: an exact host before a wildcard, the own cluster's before others'.
    fn entry(&self, host: &Host) -> Option<&ServiceEntry> {
        self.all_entries()
            .find(|entry| entry.hosts.contains(host))
            .or_else(|| self.all_entries().find(|entry| entry.hosts.iter().any(|one| one.covers(host))))
    }

    fn cluster_view(&self, host: &Host, key: &ServiceKey) -> Known {
        let Some(service) = self.services.get(key) else { return Known::Absent };
        let view = ServiceView {
            host: host.clone(),
            addresses: service.address.map_or_else(|| self.virtual_addresses(host), |address| vec![address]),
            ports: service.ports.clone(),
            location: Location::MeshInternal,
            resolution: Resolution::Static,
            backends: vec![self.own_backends(
                &service.ports,
                self.accounts(&service.namespace, &service.selector),
                self.endpoints(&service.namespace, &service.selector),
            )],
        };
        Known::Service(Box::new(view))
    }

    fn mesh_view(&self, host: &Host, key: &ServiceKey) -> Known {
        let exports = exported(self.registry, key, |cluster| self.heard(cluster, key));
        let Some(merged) = merge(host, &self.virtual_addresses(host), exports, Some(self.own)) else {
            // Before the log was heard nobody can say that there is no such export.
            return if self.registry.mesh.is_some() { Known::Absent } else { Known::Unknown };
        };
        let mut service = merged.service;
        if service.backends.is_empty() && !merged.unheard.is_empty() {
            return Known::Unknown;
        }
        for of in &mut service.backends {
            if of.cluster == *self.own {
                // Known here before the log has it.
                let own = self.services.get(key).map(|service| self.accounts(&service.namespace, &service.selector));
                let all: BTreeSet<_> = own.into_iter().flatten().chain(std::mem::take(&mut of.accounts)).collect();
                of.accounts = all.into_iter().collect();
            } else {
                of.endpoints = subset(self.own, std::mem::take(&mut of.endpoints));
            }
        }
        Known::Service(Box::new(service))
    }

    /// What is known of `cluster`'s endpoints of a service.
    fn heard(&self, cluster: &ClusterName, key: &ServiceKey) -> Option<Heard> {
        if cluster == self.own {
            let service = self.services.get(key);
            let endpoints = service.map(|service| self.endpoints(&service.namespace, &service.selector));
            return Some(Heard { freshness: Freshness::Fresh, rtt_us: None, endpoints: endpoints.unwrap_or_default() });
        }
        let (freshness, endpoints) = match self.imports.of(cluster, key) {
            Imported::Heard(freshness, endpoints) => (freshness, endpoints),
            Imported::Gone => (Freshness::Fresh, Vec::new()),
            Imported::Unheard => return None,
        };
        let rtt_us = self.paths.get(cluster).filter(|path| path.up).map(|path| path.rtt_us);
        Some(Heard { freshness, rtt_us, endpoints: endpoints.iter().map(tunnel_endpoint).collect() })
    }

    /// The own cluster's workloads that a selector picks, as endpoints.
    fn endpoints(&self, namespace: &Namespace, selector: &Labels) -> Vec<Endpoint> {
        self.locals.selected(namespace, selector).map(|(_, local)| direct_endpoint(local)).collect()
    }

    /// Whom those workloads run as.
    fn accounts(&self, namespace: &Namespace, selector: &Labels) -> Vec<ServiceAccount> {
        let all: BTreeSet<ServiceAccount> =
            self.locals.selected(namespace, selector).map(|(_, local)| local.account.clone()).collect();
        all.into_iter().collect()
    }

    /// What the own cluster has behind `ports`.
    fn own_backends(&self, ports: &[ServicePort], accounts: Vec<ServiceAccount>, endpoints: Vec<Endpoint>) -> Backends {
        Backends {
            cluster: self.own.clone(),
            cluster_id: self.registry.clusters.get(self.own).map_or(isthmus_model::ClusterId(0), |own| own.id),
            locality: self.locality.clone(),
            freshness: Freshness::Fresh,
            rtt_us: None,
            ports: ports.iter().map(|port| port.number).collect(),
            accounts,
            endpoints,
        }
    }

    fn entry_view(&self, host: &Host, entry: &ServiceEntry) -> ServiceView {
        let named =
            entry.hosts.iter().find(|one| *one == host).or_else(|| entry.hosts.iter().find(|one| one.covers(host)));
        let listed = entry.endpoints.iter().map(|endpoint| Endpoint {
            target: Target::Plain(endpoint.address.clone()),
            weight: endpoint.weight.max(1),
            locality: Some(endpoint.locality.clone()).filter(|locality| *locality != Locality::default()),
            labels: endpoint.labels.clone(),
            healthy: true,
        });
        // Istio: without endpoints the host itself is resolved.
        let resolved = matches!(entry.resolution, Resolution::Dns | Resolution::DnsRoundRobin);
        let by_name = (entry.endpoints.is_empty() && resolved).then(|| Endpoint {
            target: Target::Plain(host.to_string()),
            weight: 1,
            locality: None,
            labels: BTreeMap::new(),
            healthy: true,
        });
        let selected = self.endpoints(&entry.namespace, &entry.workload_selector);
        let endpoints = listed.chain(by_name).chain(selected).collect();
        let accounts = self.accounts(&entry.namespace, &entry.workload_selector);
        let declared: Vec<IpAddr> = entry.addresses.iter().filter(|net| is_single(net)).map(|net| net.addr()).collect();
        ServiceView {
            host: named.unwrap_or(host).clone(),
            addresses: if declared.is_empty() { self.virtual_addresses(named.unwrap_or(host)) } else { declared },
            ports: entry.ports.clone(),
            location: entry.location,
            resolution: entry.resolution,
            backends: vec![self.own_backends(&entry.ports, accounts, endpoints)],
        }
    }

    fn virtual_addresses(&self, host: &Host) -> Vec<IpAddr> {
        self.addresses.by_host().get(host).cloned().unwrap_or_default()
    }
}

/// All exports of a service as the merge takes them.
pub fn exported<'a>(
    registry: &'a Registry,
    key: &ServiceKey,
    heard: impl Fn(&ClusterName) -> Option<Heard>,
) -> Vec<Exported<'a>> {
    let exported = |(cluster, record): (&'a ClusterName, &'a Arc<ExportRecord>)| {
        let member = registry.clusters.get(cluster)?;
        Some(Exported {
            cluster,
            cluster_id: member.id,
            locality: &member.facts.locality,
            export: &record.export,
            first_index: record.first_index,
            heard: heard(cluster),
        })
    };
    registry.exporters(&format!("{}/{}", key.0, key.1)).into_iter().filter_map(exported).collect()
}

fn is_single(net: &ipnet::IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

fn direct_endpoint(local: &Local) -> Endpoint {
    Endpoint {
        target: Target::Direct(local.mtls_address),
        weight: local.weight.max(1),
        locality: local.locality.clone(),
        labels: local.labels.clone(),
        healthy: local.healthy && !local.draining,
    }
}

fn tunnel_endpoint(health: &EndpointHealth) -> Endpoint {
    Endpoint {
        target: Target::Tunnel { handle: health.handle, incarnation: u16::try_from(health.incarnation).unwrap_or(0) },
        weight: health.weight.max(1),
        locality: Some(health.locality.as_str()).filter(|text| !text.is_empty()).map(Locality::parse),
        labels: health.labels.clone().into_iter().collect(),
        healthy: health.healthy && !health.draining,
    }
}

/// At most [`ENDPOINTS_PER_CLUSTER`] endpoints, the same ones for the same cluster every time, healthy ones first.
fn subset(own: &ClusterName, mut endpoints: Vec<Endpoint>) -> Vec<Endpoint> {
    if endpoints.len() > ENDPOINTS_PER_CLUSTER {
        let rank = |endpoint: &Endpoint| {
            use std::hash::{Hash, Hasher};
            let mut hasher = rustc_hash::FxHasher::default();
            (own.as_str(), &endpoint.target).hash(&mut hasher);
            (!endpoint.healthy, hasher.finish())
        };
        endpoints.sort_by_key(rank);
        endpoints.truncate(ENDPOINTS_PER_CLUSTER);
    }
    endpoints
}

/// The health record of one of the own cluster's endpoints, as importers hear it.
pub fn health_of(service: &Service, local: &Local) -> EndpointHealth {
    EndpointHealth {
        handle: local.handle,
        incarnation: local.incarnation.into(),
        weight: local.weight,
        locality: local.locality.as_ref().map(ToString::to_string).unwrap_or_default(),
        labels: local.labels.clone().into_iter().collect(),
        healthy: local.healthy,
        draining: local.draining,
        ports: service.ports.iter().map(|port| target_port(port, &local.ports).into()).collect(),
        account: local.account.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use isthmus_federation::command::ClusterFacts;
    use isthmus_federation::registry::ClusterRecord;
    use isthmus_model::ClusterId;
    use isthmus_model::service::{Export, Patterns};

    use super::*;
    use crate::imports::ImportTable;
    use crate::locals::tests::local;

    fn member(name: &ClusterName) -> ClusterRecord {
        ClusterRecord {
            id: ClusterId(1),
            name: name.clone(),
            chain: Vec::new(),
            previous: Vec::new(),
            facts: ClusterFacts::default(),
            may_issue: Patterns::all(),
            may_export: Patterns::all(),
            signer: true,
            joined_index: 1,
            joined_unix_s: 0,
        }
    }

    #[test]
    fn all_of_the_own_clusters_endpoints_are_told_of_an_exported_service() {
        let own: ClusterName = "aws-eu".parse().expect("valid");
        let key: ServiceKey = ("shop".parse().expect("valid"), "cart".parse().expect("valid"));
        let service = Service {
            namespace: key.0.clone(),
            name: key.1.clone(),
            selector: Labels::from([("app".to_owned(), "cart".to_owned())]),
            ports: Vec::new(),
            labels: Labels::new(),
            address: None,
        };
        let mut locals = Locals::default();
        for number in 1..=ENDPOINTS_PER_CLUSTER as u32 + 4 {
            let mut workload = local(number, ("app", "cart"));
            workload.mtls_address = format!("10.0.1.{number}:15008").parse().expect("valid");
            let name = format!("cart-{number}").parse().expect("valid");
            locals.insert((key.0.clone(), name), workload);
        }
        let export = Export {
            namespace: key.0.clone(),
            name: key.1.clone(),
            ports: Vec::new(),
            accounts: Vec::new(),
            visible_to: Patterns::all(),
        };
        let record = Arc::new(ExportRecord { export, first_index: 2, index: 2, version: 1 });
        let registry = Registry {
            clusters: Arc::new(BTreeMap::from([(own.clone(), Arc::new(member(&own)))])),
            exports: Arc::new(BTreeMap::from([(own.clone(), BTreeMap::from([("shop/cart".to_owned(), record)]))])),
            ..Registry::default()
        };
        let facts = Facts {
            own: &own,
            locality: &Locality::default(),
            registry: &registry,
            services: &BTreeMap::from([(key, service)]),
            entries: &BTreeMap::new(),
            locals: &locals,
            imports: &ImportTable::default(),
            paths: &BTreeMap::new(),
            addresses: &Addresses::new("demo"),
        };
        let host = "cart.shop.svc.clusterset.local".parse().expect("valid");
        let Known::Service(view) = facts.host(&host) else { panic!("it is exported") };
        assert_eq!(view.backends[0].endpoints.len(), ENDPOINTS_PER_CLUSTER + 4, "the subset is for other clusters'");
        assert_eq!(view.backends[0].accounts.len(), 1, "known here before the log has it");
    }
}
