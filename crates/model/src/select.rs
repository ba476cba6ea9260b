//! Chooses the endpoint of a request: first how good each one is for this caller, then one of the best.
//!
//! Pure: the view, what the caller knows of its own tries, and random numbers go in. Order: the own
//! cluster first, then others by distance and round trip; what is doubtful (draining, lease run out, no
//! path, tunnel silent) comes after all that is not, and is still used when nothing better answers.
//! Unhealthy endpoints are never chosen. [`explain`] says of each endpoint why it was or was not chosen.

use std::fmt;
use std::net::IpAddr;

use rand::{Rng, RngExt as _};

use crate::destination::Balancing;
use crate::service::{Labels, selects_all};
use crate::view::{Backends, Endpoint, Freshness, ServiceView, Target};
use crate::{ClusterId, ClusterName, Locality};

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The service's port.
    pub port: u16,
    /// Labels of the DestinationRule's subset; empty means all endpoints.
    pub subset: &'a Labels,
    /// How one of equally good endpoints is chosen.
    pub balancing: Balancing,
    /// The caller's cluster.
    pub cluster: &'a ClusterName,
    /// Where the caller runs.
    pub locality: &'a Locality,
    /// Endpoints that this request has tried: chosen again only if there is no other.
    pub tried: &'a [(ClusterId, Target)],
    /// Counts the caller's requests to this service: the turn of round robin.
    pub turn: u64,
    /// The address that the caller dialled, for [`Balancing::Passthrough`].
    pub dialled: Option<IpAddr>,
}

/// What the caller knows of an endpoint from its own use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Condition {
    /// Nothing against it.
    #[default]
    Good,
    /// Its tunnel is silent, or it failed a moment ago: others first.
    Suspect,
    /// It refused or could not be reached just now: everything else first.
    Down,
}

/// What the caller knows of endpoints from its own use. A handle is one only within its cluster.
pub trait Observed {
    /// Requests that wait for an answer.
    fn in_flight(&self, cluster: ClusterId, target: &Target) -> u32;
    /// How it behaved lately.
    fn condition(&self, cluster: ClusterId, target: &Target) -> Condition;
}

/// A caller that has seen nothing yet.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observed for Unobserved {
    fn in_flight(&self, _: ClusterId, _: &Target) -> u32 {
        0
    }
    fn condition(&self, _: ClusterId, _: &Target) -> Condition {
        Condition::Good
    }
}

/// The endpoint to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice<'a> {
    /// Its cluster.
    pub backends: &'a Backends,
    /// The endpoint.
    pub endpoint: &'a Endpoint,
    /// Whether another cluster serves although the own one has the service.
    pub failover: bool,
    /// Whether this request has tried it before.
    pub repeated: bool,
}

/// Why there is nothing to choose. `reason` is for metric labels and response flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoEndpoint {
    /// No cluster that may be used serves the port.
    #[error("no cluster serves port {port}")]
    NoPort {
        /// The port asked for.
        port: u16,
    },
    /// None carries the subset's labels.
    #[error("no endpoint carries the labels of the subset")]
    NoSubset,
    /// There are none, or none is healthy.
    #[error("no healthy endpoint in any cluster")]
    NoHealthy,
}

impl NoEndpoint {
    /// A fixed word for metric labels.
    pub fn reason(self) -> &'static str {
        match self {
            Self::NoPort { .. } => "no_port",
            Self::NoSubset => "no_subset",
            Self::NoHealthy => "no_healthy_endpoint",
        }
    }
}

/// Why an endpoint comes later than a fresh one. Later variants come later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// None.
    None,
    /// Its cluster asks for no new requests.
    Draining,
    /// Its cluster's lease has run out, or its tunnel is silent.
    Suspect,
    /// No link to its cluster is up.
    NoPath,
    /// It failed this caller just now.
    Down,
    /// This request has tried it.
    Tried,
}

/// How good an endpoint is for a caller: smaller is better. Endpoints of equal rank share the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank<'a> {
    /// What speaks against it.
    pub doubt: Doubt,
    /// Whether it is in another cluster.
    pub remote: bool,
    /// [`Locality::distance`].
    pub distance: u8,
    /// Round trip of the link in microseconds; 0 in the own cluster.
    pub rtt_us: u32,
    /// Decides between clusters that are equally far.
    pub cluster: &'a ClusterName,
}

/// An endpoint that may be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate<'a> {
    rank: Rank<'a>,
    backends: &'a Backends,
    endpoint: &'a Endpoint,
}

/// Chooses an endpoint.
///
/// # Errors
/// [`NoEndpoint`] if every endpoint is out of the question. Doubtful ones are not.
pub fn choose<'a, R: Rng + ?Sized>(
    service: &'a ServiceView,
    ask: &Ask<'a>,
    observed: &dyn Observed,
    rng: &mut R,
) -> Result<Choice<'a>, NoEndpoint> {
    let mut candidates = Vec::new();
    for backends in &service.backends {
        for endpoint in &backends.endpoints {
            if let Ok(rank) = judge(service, backends, endpoint, ask, observed) {
                candidates.push(Candidate { rank, backends, endpoint });
            }
        }
    }
    let Some(best) = candidates.iter().map(|one| one.rank).min() else { return Err(why_none(service, ask)) };
    // One tier takes everything today. Shares between tiers by capacity (spill-over) go here: all that
    // is needed, the ranked candidates, is at hand.
    candidates.retain(|one| one.rank == best);
    let chosen = balance(&candidates, ask, observed, rng);
    let own_has_it = || service.backends.iter().any(|one| one.cluster == *ask.cluster && one.ports.contains(&ask.port));
    Ok(Choice {
        backends: chosen.backends,
        endpoint: chosen.endpoint,
        failover: best.remote && own_has_it(),
        repeated: best.doubt == Doubt::Tried,
    })
}

/// Why an endpoint is out of the question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Out {
    Cluster,
    Port,
    Subset,
    Unhealthy,
}

fn judge<'a>(
    service: &ServiceView,
    backends: &'a Backends,
    endpoint: &'a Endpoint,
    ask: &Ask<'_>,
    observed: &dyn Observed,
) -> Result<Rank<'a>, Out> {
    let remote = backends.cluster != *ask.cluster;
    if remote && service.host.is_cluster() {
        return Err(Out::Cluster);
    }
    if !backends.ports.contains(&ask.port) {
        return Err(Out::Port);
    }
    if !selects_all(ask.subset, &endpoint.labels) {
        return Err(Out::Subset);
    }
    if !endpoint.healthy {
        return Err(Out::Unhealthy);
    }
    let freshness = match backends.freshness {
        Freshness::Fresh => Doubt::None,
        Freshness::Draining => Doubt::Draining,
        Freshness::Suspect => Doubt::Suspect,
    };
    // The own cluster, and hosts outside the mesh, are reached without a link.
    let linked = remote && matches!(endpoint.target, Target::Tunnel { .. });
    let path = if linked && backends.rtt_us.is_none() { Doubt::NoPath } else { Doubt::None };
    let own = match observed.condition(backends.cluster_id, &endpoint.target) {
        Condition::Good => Doubt::None,
        Condition::Suspect => Doubt::Suspect,
        Condition::Down => Doubt::Down,
    };
    let tried = ask.tried.iter().any(|(cluster, target)| *cluster == backends.cluster_id && *target == endpoint.target);
    Ok(Rank {
        doubt: freshness.max(path).max(own).max(if tried { Doubt::Tried } else { Doubt::None }),
        remote,
        distance: ask.locality.distance(endpoint.locality.as_ref().unwrap_or(&backends.locality)),
        rtt_us: if remote { backends.rtt_us.unwrap_or(u32::MAX) } else { 0 },
        cluster: &backends.cluster,
    })
}

fn why_none(service: &ServiceView, ask: &Ask<'_>) -> NoEndpoint {
    let outs = service.backends.iter().flat_map(|backends| {
        backends.endpoints.iter().filter_map(|one| judge(service, backends, one, ask, &Unobserved).err())
    });
    // The endpoint that came furthest names the reason.
    let furthest = outs.max_by_key(|out| *out as u8);
    let serves = service
        .backends
        .iter()
        .any(|one| one.ports.contains(&ask.port) && (one.cluster == *ask.cluster || !service.host.is_cluster()));
    match furthest {
        Some(Out::Subset) => NoEndpoint::NoSubset,
        Some(Out::Unhealthy) => NoEndpoint::NoHealthy,
        _ if serves => NoEndpoint::NoHealthy,
        _ => NoEndpoint::NoPort { port: ask.port },
    }
}

/// One of equally good candidates; there is at least one.
fn balance<'a, R: Rng + ?Sized>(
    candidates: &[Candidate<'a>],
    ask: &Ask<'_>,
    observed: &dyn Observed,
    rng: &mut R,
) -> Candidate<'a> {
    if let [only] = candidates {
        return *only;
    }
    let total = candidates.iter().map(weight).sum::<u64>();
    match ask.balancing {
        Balancing::RoundRobin => at(candidates, turn(ask.turn, total)),
        Balancing::Random => at(candidates, rng.random_range(0..total)),
        Balancing::LeastRequest => less_busy(candidates, total, observed, rng),
        Balancing::Passthrough => {
            let dialled =
                |one: &&Candidate<'_>| ask.dialled.is_some_and(|address| is_at(&one.endpoint.target, address));
            let hit = candidates.iter().find(dialled).copied();
            hit.unwrap_or_else(|| at(candidates, rng.random_range(0..total)))
        }
    }
}

fn weight(candidate: &Candidate<'_>) -> u64 {
    u64::from(candidate.endpoint.weight.max(1))
}

/// The candidate at `point` of all weights laid end to end; `point` is below their sum.
fn at<'a>(candidates: &[Candidate<'a>], mut point: u64) -> Candidate<'a> {
    for candidate in candidates {
        match point.checked_sub(weight(candidate)) {
            Some(rest) => point = rest,
            None => return *candidate,
        }
    }
    candidates[candidates.len() - 1]
}

/// The point of turn `n`: every point once in `total` turns, in steps near the golden section, so that a
/// heavy endpoint's turns are spread out instead of following one another.
fn turn(n: u64, total: u64) -> u64 {
    let golden = u128::from(total) * 618 / 1_000;
    let mut step = u64::try_from(golden).unwrap_or(1).max(1);
    while gcd(step, total) != 1 {
        step += 1;
    }
    let point = u128::from(n % total) * u128::from(step) % u128::from(total);
    u64::try_from(point).unwrap_or(0)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Two different candidates by weight, of these the one with fewer waiting requests per weight.
fn less_busy<'a, R: Rng + ?Sized>(
    candidates: &[Candidate<'a>],
    total: u64,
    observed: &dyn Observed,
    rng: &mut R,
) -> Candidate<'a> {
    let first = at(candidates, rng.random_range(0..total));
    let same = |one: &Candidate<'_>| std::ptr::eq(one.endpoint, first.endpoint);
    let mut point = rng.random_range(0..total - weight(&first));
    let second = candidates.iter().filter(|one| !same(one)).find(|one| match point.checked_sub(weight(one)) {
        Some(rest) => {
            point = rest;
            false
        }
        None => true,
    });
    let Some(second) = second else { return first };
    let busy = |one: &Candidate<'_>| u64::from(observed.in_flight(one.backends.cluster_id, &one.endpoint.target));
    if busy(second).saturating_mul(weight(&first)) < busy(&first).saturating_mul(weight(second)) {
        *second
    } else {
        first
    }
}

fn is_at(target: &Target, address: IpAddr) -> bool {
    match target {
        Target::Direct(socket) => socket.ip() == address,
        Target::Plain(text) => text.parse() == Ok(address),
        Target::Tunnel { .. } => false,
    }
}

/// What was thought of one endpoint, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Considered {
    /// Its cluster.
    pub cluster: ClusterName,
    /// Where it is reached.
    pub target: Target,
    /// 1 for endpoints that may be chosen now, 2 for those that follow, ...; `None` if never.
    pub place: Option<usize>,
    /// Why, in words.
    pub reason: String,
}

/// Says of every endpoint of `service` where it stands and why; the best first, those that are out last.
pub fn explain(service: &ServiceView, ask: &Ask<'_>, observed: &dyn Observed) -> Vec<Considered> {
    let all = service.backends.iter().flat_map(|backends| backends.endpoints.iter().map(move |one| (backends, one)));
    let mut judged: Vec<_> =
        all.map(|(backends, one)| (judge(service, backends, one, ask, observed), backends, one)).collect();
    judged.sort_by_key(|(verdict, ..)| (verdict.is_err(), verdict.ok()));
    let mut ranks: Vec<Rank<'_>> = judged.iter().filter_map(|(verdict, ..)| verdict.ok()).collect();
    ranks.dedup();
    let considered = judged.into_iter().map(|(verdict, backends, endpoint)| Considered {
        cluster: backends.cluster.clone(),
        target: endpoint.target.clone(),
        place: verdict.ok().and_then(|rank| ranks.iter().position(|one| *one == rank)).map(|place| place + 1),
        reason: match verdict {
            Ok(rank) => rank.to_string(),
            Err(out) => out.words(ask),
        },
    });
    considered.collect()
}

impl Out {
    fn words(self, ask: &Ask<'_>) -> String {
        match self {
            Self::Cluster => "in another cluster, and the host is local to its own".to_owned(),
            Self::Port => format!("its cluster does not serve port {}", ask.port),
            Self::Subset => "lacks the subset's labels".to_owned(),
            Self::Unhealthy => "unhealthy".to_owned(),
        }
    }
}

impl fmt::Display for Rank<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.remote { "another cluster" } else { "own cluster" };
        let distance = ["same sub-zone", "same zone", "same region", "other or unknown region"];
        write!(f, "{place}, {}", distance[usize::from(self.distance.min(3))])?;
        if self.remote && self.rtt_us != u32::MAX {
            write!(f, ", {:.1} ms", f64::from(self.rtt_us) / 1_000.0)?;
        }
        match self.doubt {
            Doubt::None => Ok(()),
            Doubt::Draining => f.write_str("; its cluster is draining"),
            Doubt::Suspect => f.write_str("; suspect: no word from it within its lease, or its tunnel is silent"),
            Doubt::NoPath => f.write_str("; no link to its cluster is up"),
            Doubt::Down => f.write_str("; it failed a moment ago"),
            Doubt::Tried => f.write_str("; this request has tried it"),
        }
    }
}

#[cfg(test)]
mod tests;
