//! What a DestinationRule means: subsets, and how a host's endpoints are used.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::service::Labels;
use crate::{Host, Namespace, ServiceName};

/// Policies of one host (Istio `networking.istio.io/v1 DestinationRule`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DestinationRule {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ServiceName,
    /// The host, fully qualified; may be a wildcard.
    pub host: Host,
    /// Policy of all subsets that say nothing else.
    pub policy: TrafficPolicy,
    /// Named subsets.
    pub subsets: Vec<Subset>,
    /// Namespaces it applies to (`.` own, `*` all).
    pub export_to: Vec<String>,
}

/// A named part of a host's endpoints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subset {
    /// Its name.
    pub name: String,
    /// Labels an endpoint must carry.
    pub labels: Labels,
    /// What differs from the rule's policy.
    pub policy: Option<TrafficPolicy>,
}

/// How one endpoint of several is chosen (Istio `LoadBalancerSettings.simple`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Balancing {
    /// The less busy of two drawn at random (Istio's default).
    #[default]
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// At random.
    Random,
    /// To the address that the caller dialled.
    Passthrough,
}

/// How a host's endpoints are used.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrafficPolicy {
    /// How an endpoint is chosen; `None` means not said.
    pub balancing: Option<Balancing>,
    /// Limit of connecting (`connectionPool.tcp.connectTimeout`, default 10 s).
    pub connect_timeout: Option<Duration>,
    /// Policies of single ports, by port number.
    pub ports: Vec<(u16, TrafficPolicy)>,
}
