//! What this sidecar knows of endpoints from its own use, for `isthmus_model::select`: requests in flight, and
//! who failed a moment ago. Reads no clock: `now` comes in.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use isthmus_model::ClusterId;
use isthmus_model::select::{Ask, Choice, Condition, NoEndpoint, Observed, choose};
use isthmus_model::view::{ServiceView, Target};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

/// First pause of an endpoint that could not be reached: others first.
const DOWN_MIN: Duration = Duration::from_secs(1);
/// Longest pause; the mesh's own health data should long have said so.
const DOWN_MAX: Duration = Duration::from_secs(30);
/// Endpoints remembered; those without requests make room.
const ENDPOINTS_MAX: usize = 16 * 1024;

/// Loads of all endpoints in use.
#[derive(Debug)]
pub struct Balancer {
    started: Instant,
    turn: AtomicU64,
    loads: Mutex<FxHashMap<(ClusterId, Target), Arc<Load>>>,
}

#[derive(Debug, Default)]
struct Load {
    in_flight: AtomicU32,
    failures: AtomicU32,
    /// Milliseconds since the balancer's start.
    down_until: AtomicU64,
}

/// One request at one endpoint: counted until dropped.
#[derive(Debug)]
pub struct InFlight {
    load: Arc<Load>,
    started: Instant,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.load.in_flight.fetch_sub(1, Relaxed);
    }
}

impl InFlight {
    /// The endpoint could not be reached or was lost at `now`: others go first for a while.
    pub fn failed(&self, now: Instant) {
        let failures = self.load.failures.fetch_add(1, Relaxed).min(5);
        let pause = (DOWN_MIN * 2u32.pow(failures)).min(DOWN_MAX);
        let until = now.saturating_duration_since(self.started) + pause;
        self.load.down_until.store(u64::try_from(until.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The endpoint answered.
    pub fn answered(&self) {
        if self.load.failures.load(Relaxed) != 0 {
            self.load.failures.store(0, Relaxed);
            self.load.down_until.store(0, Relaxed);
        }
    }
}

/// Looks at loads while they are locked.
struct Seen<'a, S> {
    loads: &'a FxHashMap<(ClusterId, Target), Arc<Load>>,
    now_ms: u64,
    suspect: S,
}

impl<S: Fn(ClusterId, &Target) -> bool> Seen<'_, S> {
    fn load(&self, cluster: ClusterId, target: &Target) -> Option<&Load> {
        self.loads.get(&(cluster, target.clone())).map(|load| &**load)
    }
}

impl<S: Fn(ClusterId, &Target) -> bool> Observed for Seen<'_, S> {
    fn in_flight(&self, cluster: ClusterId, target: &Target) -> u32 {
        self.load(cluster, target).map_or(0, |load| load.in_flight.load(Relaxed))
    }

    fn condition(&self, cluster: ClusterId, target: &Target) -> Condition {
        if self.load(cluster, target).is_some_and(|load| load.down_until.load(Relaxed) > self.now_ms) {
            Condition::Down
        } else if (self.suspect)(cluster, target) {
            Condition::Suspect
        } else {
            Condition::Good
        }
    }
}

impl Balancer {
    /// Nothing was used yet.
    pub fn new(now: Instant) -> Self {
        Self { started: now, turn: AtomicU64::new(0), loads: Mutex::default() }
    }

    /// Chooses an endpoint of `service` and counts a request at it. `suspect` says of tunnels whether they are silent.
    ///
    /// # Errors
    /// [`NoEndpoint`].
    pub fn choose<'a>(
        &self,
        service: &'a ServiceView,
        mut ask: Ask<'a>,
        suspect: impl Fn(ClusterId, &Target) -> bool,
        now: Instant,
    ) -> Result<(Choice<'a>, InFlight), NoEndpoint> {
        ask.turn = self.turn.fetch_add(1, Relaxed);
        let now_ms = now.saturating_duration_since(self.started).as_millis();
        let mut loads = self.loads.lock();
        let seen = Seen { loads: &loads, now_ms: u64::try_from(now_ms).unwrap_or(u64::MAX), suspect };
        let choice = choose(service, &ask, &seen, &mut rand::rng())?;
        if loads.len() >= ENDPOINTS_MAX {
            loads.retain(|_, load| load.in_flight.load(Relaxed) > 0);
        }
        let key = (choice.backends.cluster_id, choice.endpoint.target.clone());
        let load = Arc::clone(loads.entry(key).or_default());
        load.in_flight.fetch_add(1, Relaxed);
        Ok((choice, InFlight { load, started: self.started }))
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use isthmus_model::destination::Balancing;
    use isthmus_model::service::{Labels, Location, Resolution};
    use isthmus_model::view::{Backends, Endpoint, Freshness};
    use isthmus_model::{ClusterName, Locality};

    use super::*;

    fn service(ports: &[u16]) -> ServiceView {
        let endpoint = |port: &u16| Endpoint {
            target: Target::Direct(SocketAddr::from(([127, 0, 0, 1], *port))),
            weight: 1,
            locality: None,
            labels: Labels::new(),
            healthy: true,
        };
        ServiceView {
            host: "cart.shop.svc.clusterset.local".parse().expect("valid"),
            addresses: vec![],
            ports: vec![],
            location: Location::MeshInternal,
            resolution: Resolution::Static,
            backends: vec![Backends {
                cluster: "a".parse().expect("valid"),
                cluster_id: ClusterId(1),
                locality: Locality::default(),
                freshness: Freshness::Fresh,
                rtt_us: None,
                ports: vec![80],
                accounts: vec![],
                endpoints: ports.iter().map(endpoint).collect(),
            }],
        }
    }

    fn port_of(choice: &Choice<'_>) -> u16 {
        match choice.endpoint.target {
            Target::Direct(address) => address.port(),
            _ => 0,
        }
    }

    #[test]
    fn requests_go_where_fewer_wait_and_never_first_to_one_that_failed() {
        let start = Instant::now();
        let balancer = Balancer::new(start);
        let service = service(&[1, 2]);
        let (subset, cluster, locality): (_, ClusterName, _) =
            (Labels::new(), "a".parse().expect("valid"), Locality::default());
        let ask = Ask {
            port: 80,
            subset: &subset,
            balancing: Balancing::LeastRequest,
            cluster: &cluster,
            locality: &locality,
            tried: &[],
            turn: 0,
            dialled: None,
        };
        let choose = |now| balancer.choose(&service, ask, |_, _| false, now).expect("an endpoint");
        let (first, first_in_flight) = choose(start);
        let (second, second_in_flight) = choose(start);
        assert_ne!(port_of(&first), port_of(&second), "the idle one of two");

        first_in_flight.failed(start);
        drop((second_in_flight, first_in_flight));
        let soon = start + DOWN_MIN / 2;
        for _ in 0..20 {
            assert_eq!(port_of(&choose(soon).0), port_of(&second));
        }
        let later = start + DOWN_MIN * 2;
        let (mut held, mut seen) = (Vec::new(), Vec::new());
        for _ in 0..4 {
            let (choice, in_flight) = choose(later);
            seen.push(port_of(&choice));
            held.push(in_flight);
        }
        assert!(seen.contains(&port_of(&first)), "after the pause it is used again");
    }
}
