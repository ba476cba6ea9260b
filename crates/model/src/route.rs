//! What a VirtualService means: which destinations a request may go to, and under which limits.
//!
//! How a request finds its route is in [`matching`]; which endpoint it then takes in [`crate::select`].

pub mod matching;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::service::Labels;
use crate::{Host, Namespace, ObjectName};

/// Routes of the hosts of one VirtualService (Istio `networking.istio.io/v1 VirtualService`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtualService {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ObjectName,
    /// Hosts it applies to, fully qualified.
    pub hosts: Vec<Host>,
    /// Routes of HTTP requests; the first that matches wins.
    pub http: Vec<HttpRoute>,
    /// Routes of TLS connections by SNI.
    pub tls: Vec<TlsRoute>,
    /// Routes of TCP connections.
    pub tcp: Vec<TcpRoute>,
    /// Namespaces it applies to (`.` own, `*` all).
    pub export_to: Vec<String>,
}

/// How a text is compared (Istio `StringMatch`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// Ends with.
    Suffix(String),
    /// RE2 expression that matches the whole text.
    Regex(String),
    /// The header or parameter exists.
    Present,
}

/// Conditions of one HTTP match; all must hold (Istio `HTTPMatchRequest`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HttpMatch {
    /// The path.
    pub uri: Option<StringMatch>,
    /// Whether `uri` ignores case.
    pub ignore_uri_case: bool,
    /// The method.
    pub method: Option<StringMatch>,
    /// The authority.
    pub authority: Option<StringMatch>,
    /// The scheme.
    pub scheme: Option<StringMatch>,
    /// Headers that must match.
    pub headers: Vec<(String, StringMatch)>,
    /// Headers that must not match.
    pub without_headers: Vec<(String, StringMatch)>,
    /// Query parameters that must match.
    pub query_params: Vec<(String, StringMatch)>,
    /// The port of the destination.
    pub port: Option<u16>,
    /// Labels of the calling workload.
    pub source_labels: Labels,
    /// Namespace of the calling workload.
    pub source_namespace: Option<Namespace>,
}

/// A destination and its share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedDestination {
    /// The host, fully qualified.
    pub host: Host,
    /// A subset named by the host's DestinationRule.
    pub subset: Option<String>,
    /// The port, if not the one the caller used.
    pub port: Option<u16>,
    /// Relative weight.
    pub weight: u32,
}

/// One HTTP route.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpRoute {
    /// Its name, shown in the access log.
    pub name: Option<String>,
    /// Any of these; none means every request.
    pub matches: Vec<HttpMatch>,
    /// Where requests go.
    pub destinations: Vec<WeightedDestination>,
    /// From request to end of response; `None` means without limit (Istio's default).
    pub timeout: Option<Duration>,
    /// Retries; `None` means Istio's default of 2 where that is safe.
    pub retries: Option<RetryPolicy>,
}

/// An explicit retry policy (Istio `HTTPRetry`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryPolicy {
    /// Tries after the first; 0 switches retries off.
    pub attempts: u32,
    /// Limit of one try.
    pub per_try_timeout: Option<Duration>,
    /// Conditions, as Envoy names them (`5xx`, `connect-failure`, `503`, ...); none means Istio's default.
    pub retry_on: Vec<String>,
}

/// Conditions on a connection that every TLS or TCP match may name; all must hold (Istio `L4MatchAttributes`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ConnectionMatch {
    /// The port of the destination.
    pub port: Option<u16>,
    /// Addresses that the caller dialled; none means every one.
    pub destination_subnets: Vec<ipnet::IpNet>,
    /// Labels of the calling workload.
    pub source_labels: Labels,
    /// Namespace of the calling workload.
    pub source_namespace: Option<Namespace>,
}

/// One match of a TLS route (Istio `TLSMatchAttributes`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsMatch {
    /// Server names, wildcards allowed; any of them.
    pub sni_hosts: Vec<Host>,
    /// What must hold beside the name.
    pub connection: ConnectionMatch,
}

/// A TLS route: by SNI, bytes passed on as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsRoute {
    /// Any of these; at least one.
    pub matches: Vec<TlsMatch>,
    /// Where connections go.
    pub destinations: Vec<WeightedDestination>,
}

/// A TCP route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpRoute {
    /// Any of these; none means every connection.
    pub matches: Vec<ConnectionMatch>,
    /// Where connections go.
    pub destinations: Vec<WeightedDestination>,
}
