//! One conversation with one gateway replica, without its connection: messages in, messages and events out.
//!
//! Performs no I/O and reads no clock. The first session to stand is the *primary*: it subscribes, asks for
//! tickets and tells telemetry. The others register, so that every replica knows this sidecar, and hear
//! what ends tunnels. The driver is `super::client`.

use isthmus_model::view::ResourceName;
use isthmus_wire::discovery as wire;
use rustc_hash::FxHashSet;
use wire::to_gateway::Message as Up;
use wire::to_proxy::Message as Down;

use super::delta::Known;

/// Names in one Subscribe message.
const SUBSCRIBE_MAX: usize = 512;

/// What a gateway told, for whoever it concerns.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// This sidecar's handle, signed by the member.
    Registered(wire::Registered),
    /// Keys of own connection IDs.
    EndpointKeys(wire::EndpointKeys),
    /// A process of another cluster is no more.
    Gone(wire::Gone),
    /// A dial was refused.
    DialRefused(wire::DialRefused),
    /// What the workload serves, to whom.
    Exports(wire::Exports),
    /// Whom to trust.
    Trust(wire::Trust),
    /// The gateway's replicas.
    Replicas(wire::Replicas),
    /// Paths to other clusters.
    Links(wire::LinkStates),
    /// Tickets, or why there are none.
    Tickets(wire::Tickets),
    /// The replica asks to be left.
    Draining,
}

/// What to do with a message.
#[derive(Debug)]
pub enum Reaction {
    /// Replace what is known, then acknowledge.
    Learn {
        /// All that is known now.
        known: Box<Known>,
        /// Names that do not exist.
        absent: Vec<ResourceName>,
        /// The acknowledgement.
        ack: Up,
    },
    /// Answer.
    Send(Up),
    /// Pass on.
    Tell(Event),
    /// Nothing.
    Ignore,
}

/// The state of one conversation.
#[derive(Debug, Default)]
pub struct Session {
    subscribed: FxHashSet<ResourceName>,
    refused_deltas: u64,
}

impl Session {
    /// Takes in one message of the gateway; `known` is what stands.
    pub fn handle(&mut self, message: wire::ToProxy, known: &Known) -> Reaction {
        let Some(message) = message.message else { return Reaction::Ignore };
        Reaction::Tell(match message {
            Down::Delta(delta) => return self.handle_delta(&delta, known),
            Down::Registered(registered) => Event::Registered(registered),
            Down::Tickets(tickets) => Event::Tickets(tickets),
            Down::EndpointKeys(keys) => Event::EndpointKeys(keys),
            Down::Gone(gone) => Event::Gone(gone),
            Down::DialRefused(refused) => Event::DialRefused(refused),
            Down::Exports(exports) => Event::Exports(exports),
            Down::Trust(trust) => Event::Trust(trust),
            Down::Replicas(replicas) => Event::Replicas(replicas),
            Down::Draining(_) => Event::Draining,
            Down::Links(links) => Event::Links(links),
        })
    }

    fn handle_delta(&mut self, delta: &wire::Delta, known: &Known) -> Reaction {
        match known.after(delta) {
            Ok((known, absent)) => {
                let ack = Up::Ack(wire::Ack { version: delta.version, error: String::new() });
                Reaction::Learn { known: Box::new(known), absent, ack }
            }
            Err(refused) => {
                self.refused_deltas += 1;
                tracing::warn!(version = delta.version, error = %refused, "delta refused; the last good view stays");
                Reaction::Send(Up::Ack(wire::Ack { version: delta.version, error: refused.to_string() }))
            }
        }
    }

    /// Becomes the primary: what is held already, so that only differences follow.
    pub fn take_over(&mut self, known: &Known) -> Up {
        let one = |(name, version): (&String, &u64)| wire::HeldResource { name: name.clone(), version: *version };
        let held = Some(wire::Held { resources: known.held.iter().map(one).collect() });
        Up::Subscribe(wire::Subscribe { add: vec![], remove: vec![], held })
    }

    /// What to subscribe to and what to give up, so that the gateway knows of `wanted`.
    pub fn subscribe(&mut self, wanted: &[ResourceName]) -> Vec<Up> {
        let json = |name: &ResourceName| serde_json::to_string(name).ok();
        let now: FxHashSet<&ResourceName> = wanted.iter().collect();
        let gone: Vec<ResourceName> = self.subscribed.iter().filter(|name| !now.contains(name)).cloned().collect();
        let new: Vec<&ResourceName> = wanted.iter().filter(|name| !self.subscribed.contains(name)).collect();
        let mut messages = Vec::new();
        for names in gone.chunks(SUBSCRIBE_MAX) {
            let remove = names.iter().filter_map(json).collect();
            messages.push(Up::Subscribe(wire::Subscribe { add: vec![], remove, held: None }));
        }
        for names in new.chunks(SUBSCRIBE_MAX) {
            let add = names.iter().copied().filter_map(json).collect();
            messages.push(Up::Subscribe(wire::Subscribe { add, remove: vec![], held: None }));
        }
        self.subscribed.extend(new.into_iter().cloned());
        for name in &gone {
            self.subscribed.remove(name);
        }
        messages
    }

    /// Deltas refused so far.
    pub fn refused_deltas(&self) -> u64 {
        self.refused_deltas
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(hosts: &[&str]) -> Vec<ResourceName> {
        hosts.iter().map(|host| ResourceName::Host(host.parse().expect("valid"))).collect()
    }

    #[test]
    fn only_the_difference_is_subscribed() {
        let mut session = Session::default();
        let messages = session.subscribe(&names(&["a.example", "b.example"]));
        assert!(matches!(&messages[..], [Up::Subscribe(one)] if one.add.len() == 2 && one.remove.is_empty()));
        let messages = session.subscribe(&names(&["b.example", "c.example"]));
        let expected = |up: &Up, add: &[&str], remove: &[&str]| match up {
            Up::Subscribe(one) => one.add == add && one.remove == remove,
            _ => false,
        };
        assert!(expected(&messages[0], &[], &[r#"{"host":"a.example"}"#]));
        assert!(expected(&messages[1], &[r#"{"host":"c.example"}"#], &[]));
        assert!(session.subscribe(&names(&["b.example", "c.example"])).is_empty());
    }

    #[test]
    fn a_bad_delta_is_refused_with_the_reason_and_a_good_one_acknowledged() {
        let mut session = Session::default();
        let resource = wire::Resource { name: "mesh-ranges".into(), version: 1, body: b"{}".to_vec() };
        let bad = wire::Delta { version: 7, upserts: vec![resource], ..Default::default() };
        let message = |delta| wire::ToProxy { message: Some(Down::Delta(delta)) };
        match session.handle(message(bad), &Known::default()) {
            Reaction::Send(Up::Ack(ack)) => assert!(ack.version == 7 && ack.error.starts_with("mesh-ranges: ")),
            other => panic!("{other:?}"),
        }
        let resource = wire::Resource {
            name: "mesh-ranges".into(),
            version: 1,
            body: br#"{"mesh_ranges":["240.240.0.0/12"]}"#.to_vec(),
        };
        let good = wire::Delta { version: 8, upserts: vec![resource], ..Default::default() };
        match session.handle(message(good), &Known::default()) {
            Reaction::Learn { known, ack: Up::Ack(ack), .. } => {
                assert_eq!((known.view.mesh_ranges.len(), ack.version, ack.error.as_str()), (1, 8, ""));
            }
            other => panic!("{other:?}"),
        }
    }
}
