//! Where a captured or proxied connection is meant to go: a service of the mesh, out of it, or nowhere. Pure.
//!
//! The rule that nothing meant for the mesh leaves in plaintext is here: an address inside the mesh's ranges
//! that nobody knows goes nowhere, whatever the outbound policy says.

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use isthmus_model::Host;
use isthmus_model::route::WeightedDestination;
use isthmus_model::route::matching::{ConnectionFacts, RequestFacts, pick};
use isthmus_model::service::{Labels, Protocol};
use isthmus_model::view::{ServiceView, View};
use rand::Rng;

use crate::config::OutboundPolicy;
use crate::discovery::{Answer, Known};

/// Virtual addresses of the mesh, whatever the gateways say.
static VIRTUAL_RANGES: LazyLock<[IpNet; 1]> = LazyLock::new(|| ["240.240.0.0/12".parse().expect("a network")]);

/// Taken for the mesh's until a gateway has told its ranges: private, shared and virtual addresses.
static CAUTIOUS_RANGES: LazyLock<Vec<IpNet>> = LazyLock::new(|| {
    let networks = ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "240.0.0.0/4", "fc00::/7"];
    networks.iter().map(|network| network.parse().expect("a network")).collect()
});

/// Whether `address` belongs to the mesh, known or not.
pub fn is_in_mesh(view: &View, address: IpAddr) -> bool {
    let told =
        if view.version == 0 && view.mesh_ranges.is_empty() { &CAUTIOUS_RANGES[..] } else { &view.mesh_ranges[..] };
    VIRTUAL_RANGES.iter().chain(told).any(|network| network.contains(&address))
}

/// The verdict on a destination.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// A service.
    Service(Arc<ServiceView>),
    /// Out of the mesh, untouched.
    Outside,
    /// Nowhere: the mesh's, and unknown.
    Unknown,
    /// Nowhere: outside, and only the registry's hosts may be called.
    Blocked,
}

/// Judges an address that the mesh was asked about.
pub fn judge_address(view: &View, address: IpAddr, answer: Answer, policy: OutboundPolicy) -> Verdict {
    match answer {
        Answer::Known(service) => Verdict::Service(service),
        _ if is_in_mesh(view, address) => Verdict::Unknown,
        _ => outside(policy),
    }
}

/// Judges a name that the mesh was asked about.
pub fn judge_host(host: &Host, answer: Answer, policy: OutboundPolicy) -> Verdict {
    match answer {
        Answer::Known(service) => Verdict::Service(service),
        _ if host.is_mesh() || host.is_cluster() => Verdict::Unknown,
        _ => outside(policy),
    }
}

fn outside(policy: OutboundPolicy) -> Verdict {
    match policy {
        OutboundPolicy::AllowAny => Verdict::Outside,
        OutboundPolicy::RegistryOnly => Verdict::Blocked,
    }
}

/// How `port` of `service` speaks; an unknown port is detected.
pub fn protocol(service: &ServiceView, port: u16) -> Protocol {
    service.ports.iter().find(|one| one.number == port).map_or(Protocol::Auto, |one| one.protocol)
}

/// Where routing sends a request or connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routed {
    /// The host.
    pub host: Host,
    /// Its port.
    pub port: u16,
    /// A subset of its endpoints, by name.
    pub subset: Option<String>,
}

impl Routed {
    fn straight(service: &ServiceView, asked: Option<&Host>, port: u16) -> Self {
        // A wildcard stands for the host that was asked for.
        let host = if service.host.is_wildcard() { asked.unwrap_or(&service.host) } else { &service.host };
        Self { host: host.clone(), port, subset: None }
    }

    fn to(destination: &WeightedDestination, port: u16) -> Self {
        let WeightedDestination { host, subset, port: other, .. } = destination;
        Self { host: host.clone(), port: other.unwrap_or(port), subset: subset.clone() }
    }
}

/// No route of the VirtualService wants the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoRoute;

/// Routes an HTTP request for `port` of `service`. Returns the destination and the index of the route.
///
/// # Errors
/// [`NoRoute`].
pub fn route_http<R: Rng + ?Sized>(
    known: &Known,
    service: &ServiceView,
    asked: Option<&Host>,
    facts: &RequestFacts<'_>,
    rng: &mut R,
) -> Result<(Routed, Option<usize>), NoRoute> {
    let Some(routes) = known.routes.get(&service.host).filter(|routes| routes.routes_http()) else {
        return Ok((Routed::straight(service, asked, facts.port), None));
    };
    let route = routes.http(facts).ok_or(NoRoute)?;
    let index = routes.source().http.iter().position(|one| std::ptr::eq(one, route));
    match pick(&route.destinations, rng) {
        Some(destination) => Ok((Routed::to(destination, facts.port), index)),
        None => Err(NoRoute),
    }
}

/// Routes a connection for `port` of `service`; with `sni` if it is TLS.
pub fn route_connection<R: Rng + ?Sized>(
    known: &Known,
    service: &ServiceView,
    sni: Option<&Host>,
    facts: &ConnectionFacts<'_>,
    rng: &mut R,
) -> Routed {
    let straight = || Routed::straight(service, sni, facts.port);
    let Some(routes) = known.routes.get(&service.host) else { return straight() };
    let tls = sni.and_then(|sni| routes.tls(sni, facts)).map(|route| &route.destinations);
    let destinations = tls.or_else(|| routes.tcp(facts).map(|route| &route.destinations));
    match destinations.and_then(|destinations| pick(destinations, rng)) {
        Some(destination) => Routed::to(destination, facts.port),
        None => straight(),
    }
}

/// Labels of a subset; `None` if the DestinationRule does not have it.
pub fn subset_labels(view: &View, host: &Host, subset: Option<&str>) -> Option<Labels> {
    match subset {
        None => Some(Labels::new()),
        Some(name) => Some(view.destinations.get(host)?.subset(name)?.labels.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn an_unknown_address_of_the_mesh_goes_nowhere_whatever_the_policy() {
        let mut view = View { version: 1, mesh_ranges: vec!["10.1.0.0/16".parse().expect("valid")], ..View::default() };
        for policy in [OutboundPolicy::AllowAny, OutboundPolicy::RegistryOnly] {
            for address in ["10.1.2.3", "240.240.0.9"] {
                for answer in [Answer::Absent, Answer::Unanswered] {
                    assert!(matches!(judge_address(&view, ip(address), answer, policy), Verdict::Unknown), "{address}");
                }
            }
        }
        let outside = |view: &View, address, policy| judge_address(view, ip(address), Answer::Unanswered, policy);
        assert!(matches!(outside(&view, "10.2.0.1", OutboundPolicy::AllowAny), Verdict::Outside));
        assert!(matches!(outside(&view, "10.2.0.1", OutboundPolicy::RegistryOnly), Verdict::Blocked));
        view = View::default();
        assert!(
            matches!(outside(&view, "10.2.0.1", OutboundPolicy::AllowAny), Verdict::Unknown),
            "ranges not told yet"
        );
        assert!(matches!(outside(&view, "198.51.100.1", OutboundPolicy::AllowAny), Verdict::Outside));
    }

    #[test]
    fn an_unknown_name_of_the_mesh_goes_nowhere() {
        let host = |text: &str| text.parse::<Host>().expect("valid");
        let judge = |text: &str| judge_host(&host(text), Answer::Unanswered, OutboundPolicy::AllowAny);
        assert!(matches!(judge("cart.shop.svc.clusterset.local"), Verdict::Unknown));
        assert!(matches!(judge("cart.shop.svc.cluster.local"), Verdict::Unknown));
        assert!(matches!(judge("example.com"), Verdict::Outside));
    }
}
