//! The workloads of the own cluster: who registered, which service selects whom, what each one serves.
//!
//! Pure. Fed by sidecar sessions and objects; read by exports, health deltas and distribution.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use isthmus_model::service::{Export, Labels, Patterns, Service, ServicePort, Workload, selects_all};
use isthmus_model::{ClusterName, Host, Locality, Namespace, ServiceAccount, ServiceName, WorkloadName};

/// A workload's labels.
pub type LabelsOf = Labels;
/// A workload by namespace and name.
pub type WorkloadKey = (Namespace, WorkloadName);
/// A service by namespace and name.
pub type ServiceKey = (Namespace, ServiceName);

/// A registered sidecar and the workload behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    /// Its number for other clusters.
    pub handle: u32,
    /// The process behind the number.
    pub incarnation: u16,
    /// Whom it runs as: proved by its certificate.
    pub account: ServiceAccount,
    /// Labels, matched by selectors and subsets.
    pub labels: Labels,
    /// Port name -> number.
    pub ports: BTreeMap<String, u16>,
    /// Where sidecars of this cluster reach it.
    pub mtls_address: SocketAddr,
    /// Where gateways send its datagrams.
    pub tunnel_address: SocketAddr,
    /// Its own place, where it said so.
    pub locality: Option<Locality>,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Whether its application answers.
    pub healthy: bool,
    /// Whether it asks for no new requests.
    pub draining: bool,
}

/// All workloads of the own cluster: as their sidecars registered, with what WorkloadEntries say of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locals {
    registered: BTreeMap<WorkloadKey, Local>,
    entries: Vec<Workload>,
    /// What comes of both.
    workloads: BTreeMap<WorkloadKey, Local>,
}

impl Locals {
    /// Adds or replaces a workload; returns the process it replaced, if that was another one.
    pub fn insert(&mut self, key: WorkloadKey, local: Local) -> Option<(u32, u16)> {
        let process = (local.handle, local.incarnation);
        self.workloads.insert(key.clone(), described(&self.entries, &key, &local));
        let old = self.registered.insert(key, local)?;
        ((old.handle, old.incarnation) != process).then_some((old.handle, old.incarnation))
    }

    /// Removes a workload, if it is still the process `(handle, incarnation)`.
    pub fn remove(&mut self, key: &WorkloadKey, process: (u32, u16)) -> bool {
        let same = self.registered.get(key).is_some_and(|local| (local.handle, local.incarnation) == process);
        if same {
            self.registered.remove(key);
            self.workloads.remove(key);
        }
        same
    }

    /// A sidecar says how its application is.
    pub fn set_health(&mut self, key: &WorkloadKey, healthy: bool, draining: bool) {
        let both = [self.registered.get_mut(key), self.workloads.get_mut(key)];
        for local in both.into_iter().flatten() {
            (local.healthy, local.draining) = (healthy, draining);
        }
    }

    /// The cluster's WorkloadEntries, all of them.
    pub fn set_entries(&mut self, entries: Vec<Workload>) {
        self.entries = entries;
        let of = |(key, local): (&WorkloadKey, &Local)| (key.clone(), described(&self.entries, key, local));
        self.workloads = self.registered.iter().map(of).collect();
    }

    /// Whether a registered workload is the one that `entry` describes.
    pub fn has(&self, entry: &Workload) -> bool {
        self.registered.iter().any(|(key, local)| describes(entry, key, local))
    }

    /// A workload.
    pub fn get(&self, key: &WorkloadKey) -> Option<&Local> {
        self.workloads.get(key)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&WorkloadKey, &Local)> {
        self.workloads.iter()
    }

    /// The workloads of `namespace` that carry all labels of `selector`; an empty selector selects nothing.
    pub fn selected<'a>(
        &'a self,
        namespace: &'a Namespace,
        selector: &'a Labels,
    ) -> impl Iterator<Item = (&'a WorkloadKey, &'a Local)> {
        self.workloads.iter().filter(move |((ns, _), local)| ns == namespace && selects(selector, &local.labels))
    }
}

/// Whether `entry` is about the workload `key`: by its name, or by its sidecar's address.
fn describes(entry: &Workload, key: &WorkloadKey, local: &Local) -> bool {
    entry.namespace == key.0 && (entry.name == key.1 || entry.address == local.mtls_address.ip().to_string())
}

/// `local` with what the first WorkloadEntry about it says. Whom it runs as is proved, never said.
fn described(entries: &[Workload], key: &WorkloadKey, local: &Local) -> Local {
    let mut local = local.clone();
    if let Some(entry) = entries.iter().find(|entry| describes(entry, key, &local)) {
        local.labels.extend(entry.labels.clone());
        local.ports.extend(entry.ports.clone());
        // 1 is what it is where nothing is said.
        if entry.weight != 1 {
            local.weight = entry.weight.max(1);
        }
        if entry.locality != Locality::default() {
            local.locality = Some(entry.locality.clone());
        }
    }
    local
}

/// Whether `labels` carry all of `selector`; an empty selector selects nothing (Kubernetes `Service`).
pub fn selects(selector: &Labels, labels: &Labels) -> bool {
    !selector.is_empty() && selects_all(selector, labels)
}

/// The target port of `port` at a workload that names its ports (`WorkloadEntry.ports`).
pub fn target_port(port: &ServicePort, workload_ports: &BTreeMap<String, u16>) -> u16 {
    workload_ports.get(&port.name).copied().filter(|_| !port.name.is_empty()).unwrap_or(port.target)
}

/// One service that a workload serves under one host, and the clusters that may call it there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Served {
    /// The host.
    pub host: Host,
    /// The port callers name.
    pub port: u16,
    /// The workload's own port.
    pub target: u16,
    /// How it speaks, as in `model::service::Protocol`'s text form.
    pub protocol: String,
    /// Clusters that may call it.
    pub visible_to: Vec<String>,
}

/// What `local` serves: its services' local hosts to the own cluster, exported ones to those they are visible to.
pub fn served<'a>(
    namespace: &Namespace,
    local: &Local,
    services: impl Iterator<Item = &'a Service>,
    exports: &BTreeMap<ServiceKey, Export>,
    own: &ClusterName,
) -> Vec<Served> {
    let mut all = BTreeSet::new();
    for service in
        services.filter(|service| service.namespace == *namespace && selects(&service.selector, &local.labels))
    {
        let export = exports.get(&(service.namespace.clone(), service.name.clone()));
        for port in &service.ports {
            let served = |host: Host, visible_to: Vec<String>| Served {
                host,
                port: port.number,
                target: target_port(port, &local.ports),
                protocol: serde_json::to_value(port.protocol)
                    .ok()
                    .and_then(|value| value.as_str().map(str::to_owned))
                    .unwrap_or_default(),
                visible_to,
            };
            all.insert(served(Host::cluster(&service.namespace, &service.name), vec![own.to_string()]));
            if let Some(export) = export {
                let mut visible_to = export.visible_to.0.clone();
                visible_to.push(own.to_string());
                all.insert(served(export.host(), visible_to));
            }
        }
    }
    all.into_iter().collect()
}

/// The export record of `service`: its ports, and the accounts its servers run as.
///
/// `known` are the accounts of the last record: they stay, so that a service whose last workload is
/// restarting does not change the log twice.
pub fn export_of(service: &Service, locals: &Locals, visible_to: Patterns, known: &[ServiceAccount]) -> Export {
    let mut accounts: BTreeSet<ServiceAccount> = known.iter().cloned().collect();
    accounts.extend(locals.selected(&service.namespace, &service.selector).map(|(_, local)| local.account.clone()));
    Export {
        namespace: service.namespace.clone(),
        name: service.name.clone(),
        ports: service.ports.clone(),
        accounts: accounts.into_iter().collect(),
        visible_to,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A workload of account `cart` with one label.
    pub(crate) fn local(handle: u32, label: (&str, &str)) -> Local {
        Local {
            handle,
            incarnation: 1,
            account: "ns/shop/sa/cart".parse().expect("valid"),
            labels: Labels::from([(label.0.to_owned(), label.1.to_owned())]),
            ports: BTreeMap::from([("http".to_owned(), 9090)]),
            mtls_address: "10.0.0.9:15008".parse().expect("valid"),
            tunnel_address: "10.0.0.9:15008".parse().expect("valid"),
            locality: None,
            weight: 1,
            healthy: true,
            draining: false,
        }
    }

    fn service() -> Service {
        Service {
            namespace: "shop".parse().expect("valid"),
            name: "cart".parse().expect("valid"),
            selector: Labels::from([("app".to_owned(), "cart".to_owned())]),
            ports: vec![ServicePort {
                number: 80,
                name: "http".into(),
                protocol: isthmus_model::service::Protocol::Http,
                target: 8080,
            }],
            labels: Labels::new(),
            address: None,
        }
    }

    #[test]
    fn a_workload_serves_what_selects_it_and_only_exports_reach_other_clusters() {
        let own: ClusterName = "aws-eu".parse().expect("valid");
        let service = service();
        let cart = local(1, ("app", "cart"));
        let alone = served(&service.namespace, &cart, [&service].into_iter(), &BTreeMap::new(), &own);
        assert_eq!(alone.len(), 1);
        assert_eq!((alone[0].port, alone[0].target), (80, 9090), "the workload's own port of that name");
        assert_eq!(alone[0].visible_to, ["aws-eu"]);

        let export = export_of(&service, &Locals::default(), Patterns(vec!["gcp-us".into()]), &[]);
        let exports = BTreeMap::from([((service.namespace.clone(), service.name.clone()), export)]);
        let both = served(&service.namespace, &cart, [&service].into_iter(), &exports, &own);
        assert_eq!(both.len(), 2);
        assert!(both.iter().any(|one| one.host.is_mesh() && one.visible_to == ["gcp-us", "aws-eu"]));

        let other = local(2, ("app", "web"));
        assert!(served(&service.namespace, &other, [&service].into_iter(), &exports, &own).is_empty());
    }

    #[test]
    fn accounts_of_an_export_stay_while_its_workload_restarts() {
        let mut locals = Locals::default();
        let key: WorkloadKey = ("shop".parse().expect("valid"), "cart-1".parse().expect("valid"));
        locals.insert(key.clone(), local(1, ("app", "cart")));
        let first = export_of(&service(), &locals, Patterns::all(), &[]);
        assert_eq!(first.accounts.len(), 1);
        assert!(locals.remove(&key, (1, 1)));
        assert_eq!(export_of(&service(), &locals, Patterns::all(), &first.accounts), first);
    }

    #[test]
    fn a_workload_entry_adds_to_what_the_sidecar_of_its_name_or_address_said() {
        let key: WorkloadKey = ("shop".parse().expect("valid"), "vm-7".parse().expect("valid"));
        let entry = |name: &str, address: &str| Workload {
            namespace: key.0.clone(),
            name: name.parse().expect("valid"),
            address: address.into(),
            ports: BTreeMap::from([("http".to_owned(), 7070)]),
            labels: Labels::from([("version".to_owned(), "v2".to_owned())]),
            locality: Locality::parse("eu-west-1/b"),
            weight: 5,
            account: "ns/shop/sa/other".parse().expect("valid"),
        };
        for described in [entry("vm-7", "10.9.9.9"), entry("cart-vm", "10.0.0.9")] {
            let mut locals = Locals::default();
            locals.insert(key.clone(), local(1, ("app", "cart")));
            assert!(locals.has(&described));
            locals.set_entries(vec![described]);
            let found = locals.get(&key).expect("registered");
            assert_eq!((found.labels.len(), found.ports["http"], found.weight), (2, 7070, 5));
            assert_eq!(found.account.to_string(), "ns/shop/sa/cart", "identity is proved, not said");
            locals.set_health(&key, false, false);
            locals.set_entries(Vec::new());
            let found = locals.get(&key).expect("registered");
            assert_eq!((found.labels.len(), found.ports["http"], found.healthy), (1, 9090, false));
        }
        assert!(!Locals::default().has(&entry("vm-7", "10.0.0.9")));
    }

    #[test]
    fn a_session_that_ends_late_does_not_remove_its_successor() {
        let mut locals = Locals::default();
        let key: WorkloadKey = ("shop".parse().expect("valid"), "cart-1".parse().expect("valid"));
        locals.insert(key.clone(), local(1, ("app", "cart")));
        let mut next = local(1, ("app", "cart"));
        next.incarnation = 2;
        assert_eq!(locals.insert(key.clone(), next), Some((1, 1)));
        assert!(!locals.remove(&key, (1, 1)));
        assert!(locals.get(&key).is_some());
    }
}
