//! What other clusters say of their endpoints: leased words of their owners, kept until the owner takes
//! them back. Sans-IO: frames and `now` come in, what changed goes out.
//!
//! Fresh within the lease, then *suspect*: used last, still used. A cluster that has not spoken since this
//! process started is *unheard*, and nothing is said about it. Absence is never deletion.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use isthmus_model::ClusterName;
use isthmus_model::view::Freshness;
use isthmus_wire::federation::{EndpointHealth, HealthDelta, ServiceHealth};

use crate::locals::ServiceKey;
use crate::view::{Imported, Imports};

/// The lease an owner grants with every frame, if it does not say another.
pub const LEASE: Duration = Duration::from_secs(10);
/// Without a word from the owner for this long, its endpoints are forgotten.
pub const RETENTION: Duration = Duration::from_secs(24 * 3600);
/// Longest lease believed: an owner cannot make its word last longer than its own retention of us.
const LEASE_MAX: Duration = Duration::from_secs(60);
/// Services and endpoints of one cluster; more is refused, so that one member cannot fill the memory of all.
const SERVICES_MAX: usize = 10_000;
const ENDPOINTS_MAX: usize = 10_000;

/// Why a frame was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// From an epoch that has ended: an old process of the owner.
    #[error("epoch {got} is older than {have}: a process of {cluster} from before its restart")]
    OldEpoch {
        /// The owner.
        cluster: ClusterName,
        /// The frame's.
        got: u64,
        /// The newest heard.
        have: u64,
    },
    /// Names that are none.
    #[error("service {namespace}/{name} of {cluster} is not a name")]
    BadName {
        /// The owner.
        cluster: ClusterName,
        /// The frame's namespace.
        namespace: String,
        /// The frame's name.
        name: String,
    },
    /// Too much.
    #[error("{cluster} names more than {SERVICES_MAX} services or {ENDPOINTS_MAX} endpoints of one")]
    TooMuch {
        /// The owner.
        cluster: ClusterName,
    },
}

/// What came of a frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Whether anything that sidecars are told has changed.
    pub changed: bool,
    /// Processes that are no more: tunnels to them are closed at once.
    pub gone: Vec<(u32, u16)>,
}

#[derive(Debug, Clone)]
struct Word {
    epoch: u64,
    heard: Instant,
    lease_until: Instant,
    freshness: Freshness,
    services: BTreeMap<ServiceKey, ServiceHealth>,
    /// Named so far by a snapshot that has not ended.
    snapshot: Option<BTreeSet<ServiceKey>>,
    /// Whether a snapshot of this epoch has ended: only then does what it did not name not exist.
    complete: bool,
}

/// All other clusters' words: one of each gateway replica, since each speaks of the sidecars it sees.
#[derive(Debug, Clone, Default)]
pub struct ImportTable {
    clusters: BTreeMap<(ClusterName, u8), Word>,
}

/// A cluster's word, for tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Age {
    /// Since its last frame.
    pub since: Duration,
    /// What it is worth.
    pub freshness: Freshness,
}

impl ImportTable {
    /// A frame of `cluster` arrived over a link with its replica `replica`.
    ///
    /// # Errors
    /// [`ImportError`]; nothing of the frame is taken then.
    pub fn take(
        &mut self,
        cluster: &ClusterName,
        replica: u8,
        frame: HealthDelta,
        now: Instant,
    ) -> Result<Taken, ImportError> {
        let mut services = Vec::with_capacity(frame.services.len());
        for service in frame.services {
            services.push((key_of(cluster, &service)?, service));
        }
        let too_much = services.iter().any(|(_, one)| one.endpoints.len() > ENDPOINTS_MAX);
        if too_much || services.len() > SERVICES_MAX {
            return Err(ImportError::TooMuch { cluster: cluster.clone() });
        }
        let word = self.clusters.entry((cluster.clone(), replica)).or_insert_with(|| Word {
            epoch: frame.epoch,
            heard: now,
            lease_until: now,
            freshness: Freshness::Suspect,
            services: BTreeMap::new(),
            snapshot: None,
            complete: false,
        });
        if frame.epoch < word.epoch {
            let (got, have) = (frame.epoch, word.epoch);
            return Err(ImportError::OldEpoch { cluster: cluster.clone(), got, have });
        }
        if frame.epoch > word.epoch {
            // A new process of the owner: what the old one said stays until the new one's snapshot has ended.
            word.epoch = frame.epoch;
            word.snapshot = None;
        }
        let lease = if frame.lease_ms == 0 { LEASE } else { Duration::from_millis(frame.lease_ms.into()) };
        word.heard = now;
        word.lease_until = now + lease.min(LEASE_MAX);
        let mut taken = Taken::default();
        if word.freshness != Freshness::Fresh {
            word.freshness = Freshness::Fresh;
            taken.changed = true;
        }
        if frame.snapshot && word.snapshot.is_none() {
            word.snapshot = Some(BTreeSet::new());
        }
        for (key, service) in services {
            if let Some(named) = &mut word.snapshot {
                named.insert(key.clone());
            }
            taken.changed |= word.put(key, service);
        }
        if frame.last
            && let Some(named) = word.snapshot.take()
        {
            let before = word.services.len();
            word.services.retain(|key, _| named.contains(key));
            taken.changed |= word.services.len() != before || !word.complete;
            word.complete = true;
        }
        for gone in frame.gone {
            let process = (gone.handle, u16::try_from(gone.incarnation).unwrap_or_default());
            taken.gone.push(process);
            for service in word.services.values_mut() {
                service.endpoints.retain(|one| (one.handle, one.incarnation) != (gone.handle, gone.incarnation));
            }
            taken.changed = true;
        }
        if word.services.len() > SERVICES_MAX {
            word.services.clear();
            return Err(ImportError::TooMuch { cluster: cluster.clone() });
        }
        Ok(taken)
    }

    /// Time passed: leases run out, and after [`RETENTION`] words are forgotten. Says whether anything changed.
    pub fn handle_timeout(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for word in self.clusters.values_mut() {
            if word.freshness == Freshness::Fresh && now >= word.lease_until {
                word.freshness = Freshness::Suspect;
                changed = true;
            }
        }
        let before = self.clusters.len();
        self.clusters.retain(|_, word| now.saturating_duration_since(word.heard) < RETENTION);
        changed || self.clusters.len() != before
    }

    /// When to call [`Self::handle_timeout`] next.
    pub fn next_timeout(&self) -> Option<Instant> {
        let leases =
            self.clusters.values().filter(|word| word.freshness == Freshness::Fresh).map(|word| word.lease_until);
        let ends = self.clusters.values().map(|word| word.heard + RETENTION);
        leases.chain(ends).min()
    }

    /// Forgets clusters that the log no longer lists: they left or were evicted.
    pub fn retain_clusters(&mut self, member: impl Fn(&ClusterName) -> bool) {
        self.clusters.retain(|(cluster, _), _| member(cluster));
    }

    /// Whether `handle` of `cluster` serves any service for which `visible` holds.
    pub fn serves(&self, cluster: &ClusterName, handle: u32, visible: impl Fn(&ServiceKey) -> bool) -> bool {
        self.words(cluster).any(|word| {
            word.services
                .iter()
                .any(|(key, one)| one.endpoints.iter().any(|endpoint| endpoint.handle == handle) && visible(key))
        })
    }

    fn words(&self, cluster: &ClusterName) -> impl Iterator<Item = &Word> {
        self.clusters.range((cluster.clone(), 0)..=(cluster.clone(), u8::MAX)).map(|(_, word)| word)
    }

    /// How old a cluster's word is; `None` if it was never heard.
    pub fn age(&self, cluster: &ClusterName, now: Instant) -> Option<Age> {
        let word = self.words(cluster).max_by_key(|word| word.heard)?;
        Some(Age { since: now.saturating_duration_since(word.heard), freshness: word.freshness })
    }
}

impl Imports for ImportTable {
    /// The words of all replicas together: fresh ones if there are any, else all; an endpoint that two
    /// replicas see counts once.
    fn of(&self, cluster: &ClusterName, service: &ServiceKey) -> Imported {
        let fresh = self.words(cluster).any(|word| word.freshness == Freshness::Fresh);
        let worth = if fresh { Freshness::Fresh } else { Freshness::Suspect };
        let mut endpoints: BTreeMap<(u32, u32), EndpointHealth> = BTreeMap::new();
        let (mut named, mut complete, mut heard) = (false, true, false);
        for word in self.words(cluster).filter(|word| word.freshness == worth) {
            heard = true;
            complete &= word.complete;
            if let Some(health) = word.services.get(service) {
                named = true;
                for one in &health.endpoints {
                    endpoints.entry((one.handle, one.incarnation)).or_insert_with(|| one.clone());
                }
            }
        }
        match (named, heard && complete) {
            (true, _) => Imported::Heard(worth, endpoints.into_values().collect()),
            (false, true) => Imported::Gone,
            (false, false) => Imported::Unheard,
        }
    }
}

impl Word {
    fn put(&mut self, key: ServiceKey, service: ServiceHealth) -> bool {
        if service.tombstone {
            return self.services.remove(&key).is_some();
        }
        let same = |old: &ServiceHealth| old.endpoints == service.endpoints;
        if self.services.get(&key).is_some_and(same) {
            return false;
        }
        self.services.insert(key, service);
        true
    }
}

fn key_of(cluster: &ClusterName, service: &ServiceHealth) -> Result<ServiceKey, ImportError> {
    match (service.namespace.parse(), service.name.parse()) {
        (Ok(namespace), Ok(name)) => Ok((namespace, name)),
        _ => Err(ImportError::BadName {
            cluster: cluster.clone(),
            namespace: service.namespace.chars().take(64).collect(),
            name: service.name.chars().take(64).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_wire::federation::GoneEndpoint;

    fn cluster() -> ClusterName {
        "gcp-us".parse().expect("valid")
    }

    fn key(name: &str) -> ServiceKey {
        ("shop".parse().expect("valid"), name.parse().expect("valid"))
    }

    fn service(name: &str, handle: u32) -> ServiceHealth {
        ServiceHealth {
            namespace: "shop".into(),
            name: name.into(),
            endpoints: vec![EndpointHealth { handle, incarnation: 1, healthy: true, ..EndpointHealth::default() }],
            ..ServiceHealth::default()
        }
    }

    fn snapshot(epoch: u64, services: Vec<ServiceHealth>) -> HealthDelta {
        HealthDelta { epoch, snapshot: true, last: true, services, lease_ms: 10_000, ..HealthDelta::default() }
    }

    #[test]
    fn a_word_is_fresh_then_suspect_then_forgotten_after_retention() {
        let start = Instant::now();
        let mut table = ImportTable::default();
        assert_eq!(table.of(&cluster(), &key("cart")), Imported::Unheard);
        table.take(&cluster(), 0, snapshot(1, vec![service("cart", 7)]), start).expect("taken");
        assert!(matches!(table.of(&cluster(), &key("cart")), Imported::Heard(Freshness::Fresh, _)));
        assert_eq!(table.of(&cluster(), &key("other")), Imported::Gone, "its owner did not name it");
        assert!(!table.handle_timeout(start + Duration::from_secs(9)));
        assert!(table.handle_timeout(start + Duration::from_secs(10)));
        assert!(
            matches!(table.of(&cluster(), &key("cart")), Imported::Heard(Freshness::Suspect, one) if one.len() == 1)
        );
        assert!(table.handle_timeout(start + RETENTION));
        assert_eq!(table.of(&cluster(), &key("cart")), Imported::Unheard);
    }

    #[test]
    fn a_restarted_owner_takes_nothing_back_before_its_snapshot_has_ended() {
        let start = Instant::now();
        let mut table = ImportTable::default();
        table.take(&cluster(), 0, snapshot(1, vec![service("cart", 7), service("web", 8)]), start).expect("taken");
        let mut first = snapshot(2, vec![service("cart", 7)]);
        first.last = false;
        table.take(&cluster(), 0, first, start).expect("taken");
        assert!(matches!(table.of(&cluster(), &key("web")), Imported::Heard(..)), "not named yet");
        let rest = HealthDelta { epoch: 2, last: true, ..HealthDelta::default() };
        table.take(&cluster(), 0, rest, start).expect("taken");
        assert_eq!(table.of(&cluster(), &key("web")), Imported::Gone);
    }

    #[test]
    fn an_old_process_of_the_owner_is_not_believed() {
        let start = Instant::now();
        let mut table = ImportTable::default();
        table.take(&cluster(), 0, snapshot(5, vec![]), start).expect("taken");
        let old = table.take(&cluster(), 0, snapshot(4, vec![service("cart", 7)]), start);
        assert!(matches!(old, Err(ImportError::OldEpoch { got: 4, have: 5, .. })));
    }

    #[test]
    fn a_process_that_is_gone_serves_no_more() {
        let start = Instant::now();
        let mut table = ImportTable::default();
        table.take(&cluster(), 0, snapshot(1, vec![service("cart", 7)]), start).expect("taken");
        assert!(table.serves(&cluster(), 7, |_| true));
        assert!(!table.serves(&cluster(), 7, |_| false), "not exported to us");
        let gone = vec![GoneEndpoint { handle: 7, incarnation: 1 }];
        let taken = table.take(&cluster(), 0, HealthDelta { epoch: 1, gone, ..HealthDelta::default() }, start);
        assert_eq!(taken.expect("taken").gone, [(7, 1)]);
        assert!(!table.serves(&cluster(), 7, |_| true));
    }
}
