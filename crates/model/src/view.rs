//! What one sidecar knows of the mesh: immutable, replaced whole, shared behind an `Arc`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::authn::PeerAuthentication;
use crate::destination::DestinationRule;
use crate::route::VirtualService;
use crate::service::{Labels, Location, Resolution, ServicePort};
use crate::{ClusterId, ClusterName, Host, Locality, ServiceAccount};

/// All that is known of one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceView {
    /// The host, or the wildcard.
    pub host: Host,
    /// Virtual or declared addresses, stable as long as the host is known.
    pub addresses: Vec<IpAddr>,
    /// The ports of all clusters united; per port the oldest export's protocol.
    pub ports: Vec<ServicePort>,
    /// Inside or outside the mesh.
    pub location: Location,
    /// How endpoints are found.
    pub resolution: Resolution,
    /// Where it runs; the own cluster included if it does there.
    pub backends: Vec<Backends>,
}

/// How far the word of a cluster about its endpoints can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Freshness {
    /// Within its lease.
    #[default]
    Fresh,
    /// The cluster asks for no new requests.
    Draining,
    /// The lease has run out: used last.
    Suspect,
}

/// The endpoints of a service in one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backends {
    /// The cluster.
    pub cluster: ClusterName,
    /// Its number.
    pub cluster_id: ClusterId,
    /// Where the cluster is.
    pub locality: Locality,
    /// Whether its data is within its lease.
    pub freshness: Freshness,
    /// Round trip of the link to it in microseconds, as last measured; `None` for the own cluster.
    pub rtt_us: Option<u32>,
    /// The port numbers it serves.
    pub ports: Vec<u16>,
    /// The accounts its servers may have: exactly these are accepted.
    pub accounts: Vec<ServiceAccount>,
    /// Its endpoints (a deterministic subset of large services).
    pub endpoints: Vec<Endpoint>,
}

/// Where an endpoint is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Target {
    /// A sidecar of another cluster, through the gateways.
    Tunnel {
        /// The handle its cluster gave it.
        handle: u32,
        /// The process behind the handle.
        incarnation: u16,
    },
    /// A sidecar of the own cluster: its mTLS address (port 15008).
    Direct(SocketAddr),
    /// Outside the mesh: host name or IP address; ports as in the service.
    Plain(String),
}

/// One endpoint of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Endpoint {
    /// Where it is reached.
    pub target: Target,
    /// Relative weight, at least 1.
    pub weight: u32,
    /// Its own locality, where it differs from the cluster's.
    pub locality: Option<Locality>,
    /// Labels that subsets select by.
    pub labels: Labels,
    /// Whether it passed its last health check.
    pub healthy: bool,
}

/// Everything a sidecar was told so far.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Services by host; wildcards by their full text (`*.example.com`).
    pub services: FxHashMap<Host, std::sync::Arc<ServiceView>>,
    /// Which host an address belongs to.
    pub by_address: FxHashMap<IpAddr, Host>,
    /// VirtualServices by host.
    pub routes: FxHashMap<Host, std::sync::Arc<VirtualService>>,
    /// DestinationRules by host.
    pub destinations: FxHashMap<Host, std::sync::Arc<DestinationRule>>,
    /// PeerAuthentication that applies to this workload, widest scope first.
    pub peer_authentication: Vec<PeerAuthentication>,
    /// Address ranges of the mesh: an unknown address inside is refused, never passed on in plaintext.
    pub mesh_ranges: Vec<ipnet::IpNet>,
    /// The version of the last change.
    pub version: u64,
}

/// One change to a sidecar's view. Serialised as JSON inside `isthmus.discovery.v1.Resource`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Resource {
    /// A service was added or changed.
    Service(ServiceView),
    /// A VirtualService was added or changed.
    VirtualService(VirtualService),
    /// A DestinationRule was added or changed.
    DestinationRule(DestinationRule),
    /// The PeerAuthentications that apply to the workload were changed.
    PeerAuthentication(Vec<PeerAuthentication>),
    /// The mesh's address ranges were changed.
    MeshRanges(Vec<ipnet::IpNet>),
}

/// What may be asked for or taken away by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ResourceName {
    /// A host: its service, VirtualService and DestinationRule.
    Host(Host),
    /// The service of an address.
    Address(IpAddr),
}

/// What a sidecar tells of a link to a cluster, for choosing between clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathQuality {
    /// Round trip time.
    pub rtt: Duration,
    /// Lost packets per million.
    pub loss_ppm: u32,
}
