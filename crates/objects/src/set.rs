//! All objects of one source together: by kind and name, and whether they fit each other.

use std::collections::{BTreeMap, BTreeSet};

use isthmus_model::authn::PeerAuthentication;
use isthmus_model::destination::DestinationRule;
use isthmus_model::route::{VirtualService, WeightedDestination};
use isthmus_model::service::{Service, ServiceEntry, Workload};
use isthmus_model::{Host, Namespace, ObjectName, ServiceName, WorkloadName};

use crate::document::{read_placed, refuse_duplicates};
use crate::object::{Object, ObjectKey, ServiceExport};
use crate::report::{CROSS, Place, Refusal, Report, Warning};

/// Objects by kind, namespace and name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ObjectSet {
    /// Kubernetes `Service`.
    pub services: BTreeMap<(Namespace, ServiceName), Service>,
    /// Istio `WorkloadEntry`.
    pub workloads: BTreeMap<(Namespace, WorkloadName), Workload>,
    /// Istio `ServiceEntry`.
    pub service_entries: BTreeMap<(Namespace, ServiceName), ServiceEntry>,
    /// MCS `ServiceExport`.
    pub exports: BTreeMap<(Namespace, ServiceName), ServiceExport>,
    /// Istio `VirtualService`.
    pub virtual_services: BTreeMap<(Namespace, ObjectName), VirtualService>,
    /// Istio `DestinationRule`.
    pub destination_rules: BTreeMap<(Namespace, ObjectName), DestinationRule>,
    /// Istio `PeerAuthentication`.
    pub peer_authentications: BTreeMap<(Namespace, ObjectName), PeerAuthentication>,
}

impl ObjectSet {
    /// Reads all files of a source as one: all of them or none.
    ///
    /// # Errors
    /// All problems of all files; an object that two files have is one.
    pub fn read<'a>(
        files: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<(Self, Vec<Warning>), Vec<Refusal>> {
        let mut set = Self::default();
        let mut places = BTreeMap::new();
        let mut warnings = Vec::new();
        let mut refusals = Vec::new();
        for (file, bytes) in files {
            match read_placed(file, bytes) {
                Ok((objects, mut found)) => {
                    let mut report = Report::new(file);
                    refuse_duplicates(&objects, &mut places, &mut report);
                    refusals.append(&mut report.refusals);
                    warnings.append(&mut found);
                    for (object, _) in objects {
                        set.insert(object);
                    }
                }
                Err(mut found) => refusals.append(&mut found),
            }
        }
        if !refusals.is_empty() {
            return Err(refusals);
        }
        warnings.extend(set.contradictions().into_iter().map(|(key, message)| {
            let nowhere = || Place { file: key.to_string(), line: 0, column: 0, path: String::new() };
            Warning { code: CROSS, place: places.get(&key).cloned().unwrap_or_else(nowhere), message }
        }));
        Ok((set, warnings))
    }

    /// Adds an object; one of the same key is replaced and returned.
    pub fn insert(&mut self, object: Object) -> Option<Object> {
        macro_rules! put {
            ($map:ident, $kind:ident, $one:ident) => {
                self.$map.insert(($one.namespace.clone(), $one.name.clone()), $one).map(Object::$kind)
            };
        }
        match object {
            Object::Service(one) => put!(services, Service, one),
            Object::WorkloadEntry(one) => put!(workloads, WorkloadEntry, one),
            Object::ServiceEntry(one) => put!(service_entries, ServiceEntry, one),
            Object::ServiceExport(one) => put!(exports, ServiceExport, one),
            Object::VirtualService(one) => put!(virtual_services, VirtualService, one),
            Object::DestinationRule(one) => put!(destination_rules, DestinationRule, one),
            Object::PeerAuthentication(one) => put!(peer_authentications, PeerAuthentication, one),
        }
    }

    /// All objects, by kind, then namespace and name.
    pub fn iter(&self) -> impl Iterator<Item = Object> + '_ {
        let services = self.services.values().cloned().map(Object::Service);
        let workloads = self.workloads.values().cloned().map(Object::WorkloadEntry);
        let entries = self.service_entries.values().cloned().map(Object::ServiceEntry);
        let exports = self.exports.values().cloned().map(Object::ServiceExport);
        let routes = self.virtual_services.values().cloned().map(Object::VirtualService);
        let rules = self.destination_rules.values().cloned().map(Object::DestinationRule);
        let authn = self.peer_authentications.values().cloned().map(Object::PeerAuthentication);
        services.chain(workloads).chain(entries).chain(exports).chain(routes).chain(rules).chain(authn)
    }

    /// The virtual service that a caller in `namespace` uses for `host`: of those that it sees, an exact
    /// host before a wildcard, a longer wildcard before a shorter, then the first by namespace and name.
    pub fn virtual_service(&self, host: &Host, namespace: &Namespace) -> Option<&VirtualService> {
        let seen = self.virtual_services.values().filter(|one| sees(namespace, &one.namespace, &one.export_to));
        let ranked = seen.filter_map(|one| Some((one.hosts.iter().filter_map(|h| precision(h, host)).max()?, one)));
        first_of_best(ranked)
    }

    /// The destination rule that a caller in `namespace` uses for `host`: the caller's own namespace
    /// first, then the service's, then any other that it sees; then as for [`ObjectSet::virtual_service`].
    pub fn destination_rule(&self, host: &Host, namespace: &Namespace) -> Option<&DestinationRule> {
        let service = host.service().map(|(_, namespace)| namespace);
        let near = |one: &DestinationRule| {
            if one.namespace == *namespace { 2 } else { u8::from(Some(&one.namespace) == service.as_ref()) }
        };
        let seen = self.destination_rules.values().filter(|one| sees(namespace, &one.namespace, &one.export_to));
        first_of_best(seen.filter_map(|one| Some(((near(one), precision(&one.host, host)?), one))))
    }

    /// What objects say of each other that cannot be meant, each with the object that says it.
    pub fn contradictions(&self) -> Vec<(ObjectKey, String)> {
        let mut found = Vec::new();
        for one in self.virtual_services.values() {
            let key = Object::VirtualService(one.clone()).key();
            let http = one.http.iter().map(|route| &route.destinations);
            let tls = one.tls.iter().map(|route| &route.destinations);
            let tcp = one.tcp.iter().map(|route| &route.destinations);
            let all: BTreeSet<String> =
                http.chain(tls).chain(tcp).flatten().filter_map(|to| self.missing(to, &one.namespace)).collect();
            found.extend(all.into_iter().map(|message| (key.clone(), message)));
        }
        for key in self.exports.keys().filter(|key| !self.services.contains_key(key)) {
            let object = Object::ServiceExport(self.exports[key].clone());
            found.push((object.key(), format!("there is no Service {}/{} to export", key.0, key.1)));
        }
        found.extend(self.rivals());
        found
    }

    /// Why `to` leads nowhere, as far as the objects here can tell.
    fn missing(&self, to: &WeightedDestination, namespace: &Namespace) -> Option<String> {
        let host = &to.host;
        if host.is_cluster() {
            let (name, space) = host.service()?;
            let service = self.services.get(&(space, name));
            if service.is_none() && !self.service_entries.values().any(|entry| entry.hosts.contains(host)) {
                return Some(format!("destination {host} is no service of this cluster"));
            }
            let port =
                to.port.filter(|port| service.is_some_and(|one| one.ports.iter().all(|have| have.number != *port)));
            if let Some(port) = port {
                return Some(format!("destination {host} has no port {port}"));
            }
        }
        let subset = to.subset.as_deref()?;
        match self.destination_rule(host, namespace) {
            None => Some(format!("subset {subset:?} of {host}: there is no DestinationRule for this host")),
            Some(rule) if rule.subset(subset).is_none() => {
                let known = rule.subsets.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", ");
                Some(format!(
                    "subset {subset:?} of {host} is not in DestinationRule {}/{} (it has: {known})",
                    rule.namespace, rule.name
                ))
            }
            Some(_) => None,
        }
    }

    /// Objects that speak of one host and of which only the first is used.
    fn rivals(&self) -> Vec<(ObjectKey, String)> {
        let mut found = Vec::new();
        let mut routed: BTreeMap<&Host, &VirtualService> = BTreeMap::new();
        for one in self.virtual_services.values() {
            for host in &one.hosts {
                match routed.get(host) {
                    Some(first) if first.export_to == one.export_to => {
                        let message = format!(
                            "host {host} is routed by VirtualService {}/{} already",
                            first.namespace, first.name
                        );
                        found.push((Object::VirtualService(one.clone()).key(), message));
                    }
                    Some(_) => {}
                    None => {
                        routed.insert(host, one);
                    }
                }
            }
        }
        let mut ruled: BTreeMap<(&Namespace, &Host), &DestinationRule> = BTreeMap::new();
        for one in self.destination_rules.values() {
            match ruled.get(&(&one.namespace, &one.host)) {
                Some(first) => {
                    let message =
                        format!("host {} has DestinationRule {}/{} already", one.host, first.namespace, first.name);
                    found.push((Object::DestinationRule(one.clone()).key(), message));
                }
                None => {
                    ruled.insert((&one.namespace, &one.host), one);
                }
            }
        }
        found
    }
}

/// Whether a caller in `caller` sees an object of `owner` that is exported to `export_to`.
fn sees(caller: &Namespace, owner: &Namespace, export_to: &[String]) -> bool {
    export_to.is_empty()
        || export_to.iter().any(|one| one == "*" || one == caller.as_str() || (one == "." && caller == owner))
}

/// How exactly `pattern` names `host`; longer is better, exact is best.
fn precision(pattern: &Host, host: &Host) -> Option<usize> {
    if pattern == host { Some(usize::MAX) } else { pattern.covers(host).then_some(pattern.as_str().len()) }
}

/// The first of those that rank highest.
fn first_of_best<T, R: Ord>(ranked: impl Iterator<Item = (R, T)>) -> Option<T> {
    let better = |best: Option<(R, T)>, next: (R, T)| match best {
        Some(best) if best.0 >= next.0 => Some(best),
        _ => Some(next),
    };
    ranked.fold(None, better).map(|(_, one)| one)
}
