//! What callers see of the choice: order of clusters, shares of endpoints, and never an endpoint that is out.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::*;
use crate::service::{Location, Resolution};

const OWN: u16 = 1;

fn cluster(n: u16) -> ClusterName {
    format!("c{n}").parse().expect("valid")
}

fn endpoint(handle: u32, weight: u32) -> Endpoint {
    let target = Target::Tunnel { handle, incarnation: 1 };
    Endpoint { target, weight, locality: None, labels: Labels::new(), healthy: true }
}

fn backends(n: u16, region: &str, rtt_ms: Option<u32>, endpoints: Vec<Endpoint>) -> Backends {
    let mut endpoints = endpoints;
    if n == OWN {
        for (one, host) in endpoints.iter_mut().zip(1_u8..) {
            one.target = Target::Direct(([10, 0, 0, host], 15008).into());
        }
    }
    Backends {
        cluster: cluster(n),
        cluster_id: ClusterId(n),
        locality: Locality::parse(region),
        freshness: Freshness::Fresh,
        rtt_us: rtt_ms.map(|ms| ms * 1_000),
        ports: vec![80],
        accounts: Vec::new(),
        endpoints,
    }
}

fn service(backends: Vec<Backends>) -> ServiceView {
    ServiceView {
        host: "cart.shop.svc.clusterset.local".parse().expect("valid"),
        addresses: Vec::new(),
        ports: Vec::new(),
        location: Location::MeshInternal,
        resolution: Resolution::Static,
        backends,
    }
}

/// The own cluster in eu/a, one in its region, one far away and nearer by the clock than by the map.
fn three() -> ServiceView {
    service(vec![
        backends(3, "us/x", Some(5), vec![endpoint(31, 1)]),
        backends(2, "eu/b", Some(40), vec![endpoint(21, 1)]),
        backends(OWN, "eu/a", None, vec![endpoint(11, 1), endpoint(12, 1)]),
    ])
}

struct Caller {
    cluster: ClusterName,
    locality: Locality,
    subset: Labels,
    balancing: Balancing,
    tried: Vec<(ClusterId, Target)>,
}

fn caller() -> Caller {
    Caller {
        cluster: cluster(OWN),
        locality: Locality::parse("eu/a"),
        subset: Labels::new(),
        balancing: Balancing::Random,
        tried: Vec::new(),
    }
}

impl Caller {
    fn ask(&self, turn: u64) -> Ask<'_> {
        Ask {
            port: 80,
            subset: &self.subset,
            balancing: self.balancing,
            cluster: &self.cluster,
            locality: &self.locality,
            tried: &self.tried,
            turn,
            dialled: None,
        }
    }

    fn chosen<'a>(&'a self, service: &'a ServiceView, observed: &dyn Observed) -> Result<Choice<'a>, NoEndpoint> {
        choose(service, &self.ask(0), observed, &mut StdRng::seed_from_u64(7))
    }
}

/// What a test's caller has seen, by cluster and handle (0 for direct endpoints).
#[derive(Default)]
struct Seen(BTreeMap<(u16, u32), (u32, Condition)>);

impl Seen {
    fn of(&self, cluster: ClusterId, target: &Target) -> (u32, Condition) {
        let handle = if let Target::Tunnel { handle, .. } = target { *handle } else { 0 };
        self.0.get(&(cluster.0, handle)).copied().unwrap_or_default()
    }
}

impl Observed for Seen {
    fn in_flight(&self, cluster: ClusterId, target: &Target) -> u32 {
        self.of(cluster, target).0
    }
    fn condition(&self, cluster: ClusterId, target: &Target) -> Condition {
        self.of(cluster, target).1
    }
}

#[test]
fn the_own_cluster_serves_first_then_the_nearest() {
    let mut view = three();
    let order = |view: &ServiceView| {
        let caller = caller();
        caller.chosen(view, &Unobserved).map(|one| (one.backends.cluster_id.0, one.failover))
    };
    assert_eq!(order(&view), Ok((1, false)));
    view.backends[2].endpoints.iter_mut().for_each(|one| one.healthy = false);
    assert_eq!(order(&view), Ok((2, true)), "the same region before the shorter round trip");
    view.backends[1].endpoints.clear();
    assert_eq!(order(&view), Ok((3, true)));
    view.backends.truncate(1);
    assert_eq!(order(&view), Ok((3, false)), "no failover where the own cluster never had it");
}

#[test]
fn of_equally_far_clusters_the_shorter_round_trip_serves() {
    let view = service(vec![
        backends(2, "us/x", Some(90), vec![endpoint(21, 1)]),
        backends(3, "us/y", Some(70), vec![endpoint(31, 1)]),
    ]);
    assert_eq!(caller().chosen(&view, &Unobserved).map(|one| one.backends.cluster_id.0), Ok(3));
}

#[test]
fn doubtful_endpoints_come_last_and_are_still_used() {
    let doubts = [
        ("draining", Freshness::Draining, Some(1_000)),
        ("suspect", Freshness::Suspect, Some(1_000)),
        ("without a link", Freshness::Fresh, None),
    ];
    for (what, freshness, rtt_us) in doubts {
        let mut view = service(vec![
            backends(2, "eu/a", Some(1), vec![endpoint(21, 1)]),
            backends(3, "us/x", Some(200), vec![endpoint(31, 1)]),
        ]);
        (view.backends[0].freshness, view.backends[0].rtt_us) = (freshness, rtt_us);
        assert_eq!(caller().chosen(&view, &Unobserved).map(|one| one.backends.cluster_id.0), Ok(3), "{what}");
        view.backends.truncate(1);
        assert_eq!(caller().chosen(&view, &Unobserved).map(|one| one.backends.cluster_id.0), Ok(2), "{what}, alone");
    }
}

#[test]
fn what_the_caller_saw_sends_it_elsewhere() {
    let view = service(vec![
        backends(2, "eu/a", Some(1), vec![endpoint(21, 1), endpoint(22, 1)]),
        backends(3, "us/x", Some(200), vec![endpoint(31, 1)]),
    ]);
    let handle = |seen: &Seen| match caller().chosen(&view, seen).expect("one").endpoint.target {
        Target::Tunnel { handle, .. } => handle,
        _ => 0,
    };
    let mut seen = Seen::default();
    seen.0.insert((2, 21), (0, Condition::Suspect));
    assert_eq!(handle(&seen), 22, "within the cluster first");
    seen.0.insert((2, 22), (0, Condition::Down));
    assert_eq!(handle(&seen), 31, "then to the next cluster");
    seen.0.insert((3, 31), (0, Condition::Down));
    assert_eq!(handle(&seen), 21, "a silent tunnel is better than one that failed");
}

#[test]
fn a_retry_goes_elsewhere_while_there_is_an_elsewhere() {
    let view = three();
    let mut caller = caller();
    let mut clusters = Vec::new();
    for _ in 0..4 {
        let choice = caller.chosen(&view, &Unobserved).expect("one");
        assert!(!choice.repeated);
        let (cluster, target) = (choice.backends.cluster_id, choice.endpoint.target.clone());
        clusters.push(cluster.0);
        caller.tried.push((cluster, target));
    }
    assert_eq!(clusters, [1, 1, 2, 3], "every endpoint once, the best first");
    assert!(caller.chosen(&view, &Unobserved).expect("again the first").repeated);
}

#[test]
fn a_name_of_the_own_cluster_never_leaves_it() {
    let mut view = three();
    view.host = "cart.shop.svc.cluster.local".parse().expect("valid");
    assert_eq!(caller().chosen(&view, &Unobserved).map(|one| one.backends.cluster_id.0), Ok(1));
    view.backends.pop();
    assert_eq!(caller().chosen(&view, &Unobserved), Err(NoEndpoint::NoPort { port: 80 }));
}

#[test]
fn why_there_is_none_is_told() {
    let mut other = caller();
    other.subset = Labels::from([("version".into(), "v2".into())]);
    let mut view = three();
    assert_eq!(other.chosen(&view, &Unobserved), Err(NoEndpoint::NoSubset));
    view.backends.iter_mut().flat_map(|one| &mut one.endpoints).for_each(|one| one.healthy = false);
    assert_eq!(caller().chosen(&view, &Unobserved), Err(NoEndpoint::NoHealthy));
    view.backends.iter_mut().for_each(|one| one.endpoints.clear());
    assert_eq!(caller().chosen(&view, &Unobserved), Err(NoEndpoint::NoHealthy), "served, by nobody just now");
    view.backends.iter_mut().for_each(|one| one.ports = vec![81]);
    assert_eq!(caller().chosen(&view, &Unobserved), Err(NoEndpoint::NoPort { port: 80 }));
    assert_eq!(caller().chosen(&service(vec![]), &Unobserved), Err(NoEndpoint::NoPort { port: 80 }));
}

#[test]
fn passthrough_goes_where_the_caller_dialled() {
    let view = three();
    let caller = Caller { balancing: Balancing::Passthrough, ..caller() };
    for host in [1, 2] {
        let ask = Ask { dialled: Some([10, 0, 0, host].into()), ..caller.ask(0) };
        let choice = choose(&view, &ask, &Unobserved, &mut StdRng::seed_from_u64(1)).expect("one");
        assert_eq!(choice.endpoint.target, Target::Direct(([10, 0, 0, host], 15008).into()));
    }
}

#[test]
fn the_less_busy_of_two_is_taken_by_its_weight() {
    let view = service(vec![backends(2, "eu/a", Some(1), vec![endpoint(1, 1), endpoint(2, 4)])]);
    let caller = Caller { balancing: Balancing::LeastRequest, ..caller() };
    let chosen = |busy: [u32; 2]| {
        let seen = Seen(BTreeMap::from([((2, 1), (busy[0], Condition::Good)), ((2, 2), (busy[1], Condition::Good))]));
        caller.chosen(&view, &seen).expect("one").endpoint.weight
    };
    assert_eq!(chosen([3, 8]), 4, "8 waiting at four times the weight are less than 3");
    assert_eq!(chosen([1, 8]), 1);
}

#[test]
fn the_explanation_agrees_with_the_choice() {
    let mut view = three();
    view.backends[2].endpoints[1].healthy = false;
    let caller = caller();
    let all = explain(&view, &caller.ask(0), &Unobserved);
    let chosen = caller.chosen(&view, &Unobserved).expect("one");
    assert_eq!((&all[0].target, all[0].place), (&chosen.endpoint.target, Some(1)));
    let told: Vec<_> = all.iter().map(|one| (one.cluster.as_str(), one.place, one.reason.as_str())).collect();
    assert_eq!(
        told,
        [
            ("c1", Some(1), "own cluster, same sub-zone"),
            ("c2", Some(2), "another cluster, same region, 40.0 ms"),
            ("c3", Some(3), "another cluster, other or unknown region, 5.0 ms"),
            ("c1", None, "unhealthy"),
        ]
    );
}

/// How often each of `weights` is chosen in `draws` requests that are answered at once.
fn counts(weights: &[u32], balancing: Balancing, draws: u64, seed: u64) -> Vec<u64> {
    let endpoints = weights.iter().zip(0..).map(|(weight, handle)| endpoint(handle, *weight)).collect();
    let view = service(vec![backends(2, "eu/a", Some(1), endpoints)]);
    let caller = Caller { balancing, ..caller() };
    let mut rng = StdRng::seed_from_u64(seed);
    let mut counts = vec![0; weights.len()];
    for turn in 0..draws {
        let choice = choose(&view, &caller.ask(turn), &Unobserved, &mut rng).expect("one");
        if let Target::Tunnel { handle, .. } = choice.endpoint.target {
            counts[handle as usize] += 1;
        }
    }
    counts
}

#[test]
fn four_endpoints_get_a_quarter_each_within_five_percent() {
    for balancing in [Balancing::RoundRobin, Balancing::Random, Balancing::LeastRequest] {
        for count in counts(&[1, 1, 1, 1], balancing, 10_000, 3) {
            assert!((2_375..=2_625).contains(&count), "{balancing:?}: {count}");
        }
    }
}

#[test]
fn round_robin_spreads_a_heavy_endpoint_over_the_round() {
    let endpoints = vec![endpoint(0, 6), endpoint(1, 3), endpoint(2, 1)];
    let view = service(vec![backends(2, "eu/a", Some(1), endpoints)]);
    let caller = Caller { balancing: Balancing::RoundRobin, ..caller() };
    let weights: Vec<u32> = (0..10)
        .map(|turn| {
            let choice = choose(&view, &caller.ask(turn), &Unobserved, &mut StdRng::seed_from_u64(0)).expect("one");
            choice.endpoint.weight
        })
        .collect();
    let runs = weights.chunk_by(|a, b| a == b).map(<[u32]>::len).max();
    assert!(runs <= Some(2), "{weights:?}");
}

fn any_backends(n: u16) -> impl Strategy<Value = Backends> {
    let endpoint = (1_u32..5, any::<bool>()).prop_map(|(weight, healthy)| Endpoint { healthy, ..endpoint(0, weight) });
    let freshness = prop::sample::select(vec![Freshness::Fresh, Freshness::Draining, Freshness::Suspect]);
    let region = prop::sample::select(vec!["eu/a", "eu/b", "us/x", ""]);
    let rtt = prop::option::of(1_u32..300);
    (prop::collection::vec(endpoint, 0..5), freshness, region, rtt).prop_map(
        move |(mut all, freshness, region, rtt)| {
            for (one, handle) in all.iter_mut().zip(0..) {
                one.target = Target::Tunnel { handle, incarnation: 1 };
            }
            let rtt = rtt.filter(|_| n != OWN);
            Backends { freshness, ..backends(n, region, rtt, all) }
        },
    )
}

proptest! {
    #[test]
    fn weights_are_kept(weights in prop::collection::vec(1_u32..20, 2..8), seed: u64) {
        let total: u32 = weights.iter().sum();
        let rounds = 20;
        let exact = counts(&weights, Balancing::RoundRobin, u64::from(total) * rounds, seed);
        for (count, weight) in exact.iter().zip(&weights) {
            prop_assert_eq!(*count, u64::from(*weight) * rounds, "round robin is exact over whole rounds");
        }
        let draws = 4_000_u64;
        for (count, weight) in counts(&weights, Balancing::Random, draws, seed).iter().zip(&weights) {
            let share = f64::from(*weight) / f64::from(total);
            let mean = share * draws as f64;
            // Five standard deviations: one failure in a million draws of a case.
            let tolerance = 5.0 * (mean * (1.0 - share)).sqrt();
            prop_assert!((*count as f64 - mean).abs() <= tolerance, "{} of {}, expected {}", count, draws, mean);
        }
    }

    #[test]
    fn the_choice_is_the_best_there_is(
        own in any_backends(OWN), two in any_backends(2), three in any_backends(3), seed: u64, turn: u64,
        balancing in prop::sample::select(vec![Balancing::RoundRobin, Balancing::Random, Balancing::LeastRequest]),
    ) {
        let view = service(vec![own, two, three]);
        let caller = Caller { balancing, ..caller() };
        let chosen = choose(&view, &caller.ask(turn), &Unobserved, &mut StdRng::seed_from_u64(seed));
        let places = explain(&view, &caller.ask(turn), &Unobserved);
        let any_healthy = view.backends.iter().flat_map(|one| &one.endpoints).any(|one| one.healthy);
        prop_assert_eq!(chosen.is_ok(), any_healthy, "never refused while a healthy endpoint is known");
        if let Ok(choice) = chosen {
            prop_assert!(choice.endpoint.healthy);
            let at = |one: &&Considered| {
                one.cluster == choice.backends.cluster && one.target == choice.endpoint.target
            };
            prop_assert_eq!(places.iter().find(at).and_then(|one| one.place), Some(1));
            let fresh_own = view.backends[0].freshness == Freshness::Fresh;
            if fresh_own && choice.backends.cluster_id.0 != OWN {
                let none = view.backends[0].endpoints.iter().all(|one| !one.healthy);
                prop_assert!(none, "the own cluster is left only when it cannot serve");
            }
        }
    }
}
