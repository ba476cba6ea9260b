//! Services, workloads and exports of one cluster, as proven values: what `objects` reads and `federation` stores.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Host, Locality, Namespace, ServiceAccount, ServiceName, WorkloadName};

/// Label names and values, as Kubernetes has them.
pub type Labels = BTreeMap<String, String>;

/// Whether `labels` carry all of `wanted`; nothing wanted means every one (Istio's subsets and selectors).
pub fn selects_all(wanted: &Labels, labels: &Labels) -> bool {
    wanted.iter().all(|(name, value)| labels.get(name) == Some(value))
}

/// How a port speaks (Istio's protocol selection: `appProtocol`, port name prefix, `protocol`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Not said: detected from the first bytes (HTTP/1, HTTP/2, TLS, else bytes).
    #[default]
    Auto,
    /// HTTP/1.1.
    Http,
    /// HTTP/2.
    Http2,
    /// gRPC over HTTP/2.
    Grpc,
    /// TLS, routed by SNI; HTTPS means the same.
    Tls,
    /// Bytes; server-first protocols belong here.
    Tcp,
    /// Datagrams.
    Udp,
}

impl Protocol {
    /// Whether requests are routed one by one.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc)
    }
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServicePort {
    /// The port callers use, 1-65535.
    pub number: u16,
    /// The port's name; may be empty.
    pub name: String,
    /// How it speaks.
    pub protocol: Protocol,
    /// The workload's port; `number` where nothing else is said.
    pub target: u16,
}

/// A service of this cluster (Kubernetes `Service`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ServiceName,
    /// Labels a workload must carry; a service without any selects nothing.
    pub selector: Labels,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Its own labels.
    pub labels: Labels,
    /// `spec.clusterIP` where one was given.
    pub address: Option<IpAddr>,
}

/// A workload that is not a pod (Istio `WorkloadEntry`), or a sidecar that registered itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: WorkloadName,
    /// IP address or host name.
    pub address: String,
    /// Port name -> port number (`WorkloadEntry.ports`).
    pub ports: BTreeMap<String, u16>,
    /// Labels, matched by selectors and subsets.
    pub labels: Labels,
    /// Where it runs.
    pub locality: Locality,
    /// Relative weight, 1 where nothing is said (`WorkloadEntry.weight`).
    pub weight: u32,
    /// Whom it runs as.
    pub account: ServiceAccount,
}

/// Clusters or namespaces by name; `*` means every one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Patterns(pub Vec<String>);

impl Patterns {
    /// Everything.
    pub fn all() -> Self {
        Self(vec!["*".into()])
    }

    /// Whether `name` is covered: `*`, an exact name, or a prefix ending in `*`.
    pub fn cover(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => pattern == name,
        })
    }
}

/// What one cluster exports under one mesh host: the value of its record in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// The service's namespace.
    pub namespace: Namespace,
    /// The service's name.
    pub name: ServiceName,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// The accounts its servers run as: clients accept exactly these.
    pub accounts: Vec<ServiceAccount>,
    /// The clusters that may call it.
    pub visible_to: Patterns,
}

impl Export {
    /// The mesh host: `<name>.<namespace>.svc.clusterset.local`.
    pub fn host(&self) -> Host {
        Host::mesh(&self.namespace, &self.name)
    }
}

/// How a ServiceEntry's endpoints are found (Istio `ServiceEntry.resolution`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Resolution {
    /// To the address the caller dialled.
    #[default]
    None,
    /// To the listed endpoints.
    Static,
    /// To all addresses the names resolve to.
    Dns,
    /// To the next address of the names.
    DnsRoundRobin,
}

/// Whether a ServiceEntry's hosts belong to the mesh (Istio `ServiceEntry.location`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Location {
    /// Outside: no mTLS of the mesh.
    #[default]
    MeshExternal,
    /// Inside: mTLS with mesh identities.
    MeshInternal,
}

/// A ServiceEntry (Istio), owned by the cluster that wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceEntry {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ServiceName,
    /// Hosts it answers for; wildcards only with resolution NONE.
    pub hosts: Vec<Host>,
    /// Addresses or CIDR ranges of the hosts.
    pub addresses: Vec<ipnet::IpNet>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// Inside or outside the mesh.
    pub location: Location,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Listed endpoints.
    pub endpoints: Vec<Workload>,
    /// Selects workloads of its namespace instead of listing endpoints.
    pub workload_selector: Labels,
    /// Namespaces that see it (`.` own, `*` all).
    pub export_to: Vec<String>,
    /// Server identities accepted (`subjectAltNames`).
    pub subject_alt_names: Vec<String>,
}
