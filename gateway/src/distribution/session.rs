//! What one sidecar was told, what it has acknowledged, and what it should hear next. Sans-IO.
//!
//! One delta is in flight at a time: whatever changes meanwhile is coalesced into the next one, so a
//! slow sidecar costs no queue. A refused version is not sent again until it changes.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use isthmus_model::view::ResourceName;
use isthmus_wire::discovery::{Delta, Resource};

/// Hosts and addresses one sidecar may ask for; more than any workload calls, and it bounds the session.
pub const SUBSCRIPTIONS_MAX: usize = 20_000;

/// A resource as all sessions share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Its name, as in `Resource.name`.
    pub name: String,
    /// Hash of the body: equal in all replicas and after a restart, as long as the content is.
    pub version: u64,
    /// JSON of `isthmus_model::view::Resource`.
    pub body: Bytes,
}

/// What is known of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// These resources make it up.
    Found(Vec<Encoded>),
    /// It does not exist.
    Absent,
    /// Nothing can be said, since its owner has not been heard: absence is never deletion.
    Unknown,
}

/// Where a session looks names up.
pub trait Source {
    /// What is known of `name`.
    fn lookup(&self, name: &ResourceName) -> Lookup;
    /// What every sidecar gets without asking.
    fn common(&self) -> Vec<Encoded>;
}

/// One sidecar's subscription state.
#[derive(Debug, Default)]
pub struct Session {
    subscribed: BTreeSet<ResourceName>,
    /// Resource name -> version the sidecar has or is being sent.
    held: BTreeMap<String, u64>,
    /// Which resources a name stood for when it was last sent.
    parts: BTreeMap<ResourceName, Vec<String>>,
    absent_told: BTreeSet<ResourceName>,
    in_flight: Option<u64>,
    last_version: u64,
    acked_version: u64,
    refused: Option<String>,
}

impl Session {
    /// The sidecar says what it holds: from another replica, or from before this process started.
    pub fn hold(&mut self, held: impl IntoIterator<Item = (String, u64)>) {
        self.held = held.into_iter().take(3 * SUBSCRIPTIONS_MAX).collect();
    }

    /// Adds and removes names. Names over [`SUBSCRIPTIONS_MAX`] are dropped and counted in the result.
    pub fn subscribe(&mut self, add: Vec<ResourceName>, remove: &[ResourceName]) -> usize {
        for name in remove {
            self.subscribed.remove(name);
            self.absent_told.remove(name);
            for part in self.parts.remove(name).unwrap_or_default() {
                self.held.remove(&part);
            }
        }
        let mut dropped = 0;
        for name in add {
            if self.subscribed.len() >= SUBSCRIPTIONS_MAX {
                dropped += 1;
            } else {
                // Asked again: answer again, even if the answer is the same "absent".
                self.absent_told.remove(&name);
                self.subscribed.insert(name);
            }
        }
        dropped
    }

    /// The sidecar applied (`error` empty) or refused a version.
    pub fn acknowledge(&mut self, version: u64, error: String) {
        if self.in_flight == Some(version) {
            self.in_flight = None;
            if error.is_empty() {
                self.acked_version = version;
                self.refused = None;
            } else {
                self.refused = Some(error);
            }
        }
    }

    /// The next delta, if something changed and none is in flight.
    pub fn poll_delta(&mut self, source: &impl Source) -> Option<Delta> {
        if self.in_flight.is_some() {
            return None;
        }
        let mut delta = Delta::default();
        for encoded in source.common() {
            self.offer(encoded, &mut delta);
        }
        for name in self.subscribed.clone() {
            match source.lookup(&name) {
                Lookup::Found(resources) => {
                    self.absent_told.remove(&name);
                    let parts: Vec<String> = resources.iter().map(|encoded| encoded.name.clone()).collect();
                    let before = self.parts.insert(name.clone(), parts.clone()).unwrap_or_default();
                    for gone in before.into_iter().chain(of_host(&name)).filter(|gone| !parts.contains(gone)) {
                        self.drop_held(gone, &mut delta);
                    }
                    for encoded in resources {
                        self.offer(encoded, &mut delta);
                    }
                }
                Lookup::Absent => {
                    for gone in self.parts.remove(&name).unwrap_or_default().into_iter().chain(of_host(&name)) {
                        self.drop_held(gone, &mut delta);
                    }
                    if self.absent_told.insert(name.clone()) {
                        delta.absent.extend(serde_json::to_string(&name));
                    }
                }
                Lookup::Unknown => {}
            }
        }
        if delta.upserts.is_empty() && delta.removed.is_empty() && delta.absent.is_empty() {
            return None;
        }
        self.last_version += 1;
        delta.version = self.last_version;
        self.in_flight = Some(self.last_version);
        Some(delta)
    }

    /// The last version sent.
    pub fn sent_version(&self) -> u64 {
        self.last_version
    }

    /// The last version applied by the sidecar.
    pub fn acked_version(&self) -> u64 {
        self.acked_version
    }

    /// Why the last version was refused, if it was.
    pub fn refused(&self) -> Option<&str> {
        self.refused.as_deref()
    }

    /// How many names it asked for.
    pub fn subscriptions(&self) -> usize {
        self.subscribed.len()
    }

    fn drop_held(&mut self, gone: String, delta: &mut Delta) {
        if self.held.remove(&gone).is_some() {
            delta.removed.push(gone);
        }
    }

    fn offer(&mut self, encoded: Encoded, delta: &mut Delta) {
        if self.held.get(&encoded.name) != Some(&encoded.version) {
            self.held.insert(encoded.name.clone(), encoded.version);
            delta.upserts.push(Resource { name: encoded.name, version: encoded.version, body: encoded.body.to_vec() });
        }
    }
}

/// All resources that a host may have: what a sidecar may hold of it from elsewhere.
fn of_host(name: &ResourceName) -> Vec<String> {
    match name {
        ResourceName::Host(host) => {
            ["service", "virtual-service", "destination-rule"].map(|kind| format!("{kind}/{host}")).into()
        }
        ResourceName::Address(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Known(BTreeMap<ResourceName, Lookup>);

    impl Source for Known {
        fn lookup(&self, name: &ResourceName) -> Lookup {
            self.0.get(name).cloned().unwrap_or(Lookup::Absent)
        }
        fn common(&self) -> Vec<Encoded> {
            Vec::new()
        }
    }

    fn host(text: &str) -> ResourceName {
        ResourceName::Host(text.parse().expect("valid"))
    }

    fn found(name: &str, version: u64) -> Lookup {
        Lookup::Found(vec![Encoded { name: name.into(), version, body: Bytes::from_static(b"{}") }])
    }

    #[test]
    fn only_what_was_asked_for_and_changed_is_sent() {
        let cart = host("cart.shop.svc.clusterset.local");
        let mut known = Known(BTreeMap::from([
            (cart.clone(), found("service/cart", 1)),
            (host("other.shop.svc.clusterset.local"), found("service/other", 1)),
        ]));
        let mut session = Session::default();
        session.subscribe(vec![cart.clone()], &[]);
        let delta = session.poll_delta(&known).expect("the first answer");
        assert_eq!(delta.upserts.len(), 1);
        assert_eq!(session.poll_delta(&known), None, "one delta is in flight");
        session.acknowledge(delta.version, String::new());
        assert_eq!(session.poll_delta(&known), None, "nothing changed");
        known.0.insert(cart, found("service/cart", 2));
        assert_eq!(session.poll_delta(&known).expect("the change").upserts[0].version, 2);
    }

    #[test]
    fn a_refused_version_is_not_repeated_until_it_changes() {
        let cart = host("cart.shop.svc.clusterset.local");
        let mut known = Known(BTreeMap::from([(cart.clone(), found("service/cart", 1))]));
        let mut session = Session::default();
        session.subscribe(vec![cart.clone()], &[]);
        let version = session.poll_delta(&known).expect("the first").version;
        session.acknowledge(version, "field `x` is unknown".into());
        assert_eq!(session.poll_delta(&known), None);
        assert_eq!(session.refused(), Some("field `x` is unknown"));
        known.0.insert(cart, found("service/cart", 2));
        assert!(session.poll_delta(&known).is_some());
    }

    #[test]
    fn an_owner_not_yet_heard_removes_nothing() {
        let cart = host("cart.shop.svc.clusterset.local");
        let mut known = Known(BTreeMap::from([(cart.clone(), found("service/cart", 1))]));
        let mut session = Session::default();
        session.subscribe(vec![cart.clone()], &[]);
        let version = session.poll_delta(&known).expect("the first").version;
        session.acknowledge(version, String::new());
        known.0.insert(cart.clone(), Lookup::Unknown);
        assert_eq!(session.poll_delta(&known), None);
        known.0.insert(cart, Lookup::Absent);
        let delta = session.poll_delta(&known).expect("the tombstone");
        assert_eq!((delta.removed.len(), delta.absent.len()), (1, 1));
    }

    #[test]
    fn what_a_sidecar_holds_from_before_is_not_sent_again() {
        let cart = host("cart.shop.svc.clusterset.local");
        let known = Known(BTreeMap::from([(cart.clone(), found("service/cart", 7))]));
        let mut session = Session::default();
        session.hold([("service/cart".to_owned(), 7)]);
        session.subscribe(vec![cart], &[]);
        assert_eq!(session.poll_delta(&known), None);
    }

    #[test]
    fn what_was_deleted_while_a_sidecar_was_away_is_taken_from_it() {
        let cart = host("cart.shop.svc.clusterset.local");
        let known = Known(BTreeMap::from([(cart.clone(), found("service/cart.shop.svc.clusterset.local", 7))]));
        let mut session = Session::default();
        let held = ["service", "virtual-service"].map(|kind| (format!("{kind}/cart.shop.svc.clusterset.local"), 7));
        session.hold(held);
        session.subscribe(vec![cart], &[]);
        let delta = session.poll_delta(&known).expect("one is gone");
        assert_eq!(delta.removed, ["virtual-service/cart.shop.svc.clusterset.local"]);
        assert!(delta.upserts.is_empty());
    }
}
