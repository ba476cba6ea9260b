//! Takes what gateways tell to those whom it concerns: keys and handles to the tunnel endpoint, exports to the
//! inbound side, trust to all handshakes, replicas to sockets and sessions.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use isthmus_identity::PeerIdentity;
use isthmus_model::ClusterId;
use isthmus_tunnel::cid::EndpointName;
use isthmus_tunnel::{Cid, CidKeys, TunnelEndpoint};
use isthmus_wire::discovery as wire;
use prost::Message;
use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::discovery::Tickets;
use crate::discovery::client::Reported;
use crate::discovery::session::Event;
use crate::exports::Exports;
use crate::identity::Enrolled;
use crate::inbound::is_trusted;
use crate::path::DataPath;

/// Everybody whom gateways tell something.
pub struct Told {
    /// Tunnels' endpoint.
    pub endpoint: TunnelEndpoint<PeerIdentity>,
    /// The data path.
    pub path: Arc<DataPath>,
    /// Identity and trust.
    pub enrolled: Arc<Enrolled>,
    /// Tickets, of which some become useless.
    pub tickets: Tickets,
    /// What sessions register.
    pub reported: Arc<Reported>,
    /// Sessions' addresses.
    pub replicas: watch::Sender<BTreeSet<SocketAddr>>,
    /// Counts changes of trust.
    pub trust_changed: watch::Sender<u64>,
    /// Set once this sidecar has a handle and knows its exports.
    pub registered: watch::Sender<bool>,
}

/// What connection IDs are minted from: complete once keys and a handle are there.
#[derive(Default)]
struct Naming {
    cluster: Option<ClusterId>,
    name: Option<EndpointName>,
    keys: Option<wire::EndpointKeys>,
}

impl Told {
    /// Takes events until `shutdown` or until their senders are gone.
    pub async fn run(self, mut events: mpsc::Receiver<Event>, shutdown: CancellationToken) {
        let mut naming = Naming::default();
        let mut generations = FxHashMap::default();
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = events.recv() => match event {
                    Some(event) => event,
                    None => return,
                },
            };
            self.path.reports.metrics().config_confirmed(SystemTime::now());
            match event {
                Event::Registered(registered) => self.registered(&registered, &mut naming),
                Event::EndpointKeys(keys) => {
                    naming.keys = Some(keys);
                    self.rename(&naming);
                }
                Event::Gone(gone) => self.gone(&gone),
                Event::DialRefused(refused) => {
                    if let Some(ticket) = Cid::from_slice(&refused.ticket) {
                        self.endpoint.refused(&ticket, &refused.reason);
                    }
                }
                Event::Exports(exports) => self.exports(&exports),
                Event::Trust(trust) => self.trust(&trust),
                Event::Replicas(replicas) => self.replicas(&replicas),
                Event::Links(links) => self.links(&links, &mut generations),
                // Sessions end by themselves; sockets move when probes say so.
                Event::Draining | Event::Tickets(_) => {}
            }
        }
    }

    fn registered(&self, registered: &wire::Registered, naming: &mut Naming) {
        let Some(signed) = &registered.signed else { return };
        // Signed by the member for gateways to check; to us it is our own name.
        let Ok(registration) = wire::Registration::decode(&signed.registration[..]) else {
            return tracing::warn!("the gateway's registration cannot be read");
        };
        let (Ok(cluster), Ok(incarnation)) = (registered.cluster_id.try_into(), registration.incarnation.try_into())
        else {
            return tracing::warn!("the gateway's registration is out of range");
        };
        self.reported.register.send_if_modified(|register| {
            let changed = register.signed.as_ref() != Some(signed);
            register.signed = Some(signed.clone());
            changed
        });
        naming.cluster = Some(ClusterId(cluster));
        naming.name = Some(EndpointName { handle: registration.handle, incarnation });
        self.rename(naming);
    }

    fn rename(&self, naming: &Naming) {
        let (Some(cluster), Some(name), Some(told)) = (naming.cluster, naming.name, &naming.keys) else { return };
        let keys = told
            .keys
            .iter()
            .filter_map(|key| Some((u8::try_from(key.generation).ok()?, <[u8; 16]>::try_from(&key.key[..]).ok()?)));
        let current = u8::try_from(told.current_generation).unwrap_or(u8::MAX);
        match CidKeys::from_parts(cluster, current, keys) {
            Some(keys) => {
                self.endpoint.mint().replace(Arc::new(keys), name);
                tracing::info!(handle = name.handle, incarnation = name.incarnation, "registered");
                self.registered.send_replace(true);
            }
            None => tracing::warn!("the gateway's endpoint keys cannot be used; the last ones stay"),
        }
    }

    fn gone(&self, gone: &wire::Gone) {
        let (Ok(cluster), Ok(incarnation)) = (gone.cluster_id.try_into(), gone.incarnation.try_into()) else { return };
        let name = EndpointName { handle: gone.handle, incarnation };
        self.tickets.forget(ClusterId(cluster), name);
        self.endpoint.gone(ClusterId(cluster), name);
    }

    fn exports(&self, told: &wire::Exports) {
        match Exports::read(told, &self.path.own_ports) {
            Ok(exports) => self.path.exports.store(Arc::new(exports)),
            Err(error) => tracing::warn!(%error, "exports refused; the last good ones stay"),
        }
    }

    fn trust(&self, told: &wire::Trust) {
        if let Err(error) = self.enrolled.trust(told) {
            return tracing::warn!(%error, "trust not taken over; the last good one stays");
        }
        let trust = self.enrolled.tls.trust.load_full();
        if let Some(tunnels) = &self.path.tunnels {
            tunnels.judge_again(|peer| is_trusted(&trust, peer));
        }
        self.path.local.judge_again(|peer| is_trusted(&trust, peer));
        self.trust_changed.send_modify(|count| *count += 1);
    }

    fn replicas(&self, told: &wire::Replicas) {
        let udp: Vec<SocketAddr> =
            told.replicas.iter().filter_map(|replica| replica.udp_address.parse().ok()).collect();
        let sessions = told.replicas.iter().filter_map(|replica| replica.session_address.parse().ok()).collect();
        if !udp.is_empty() {
            self.endpoint.set_gateways(udp);
        }
        isthmus_runtime::watched::replace(&self.replicas, sessions);
    }

    /// A new generation of a path: it changed underneath the tunnels.
    fn links(&self, told: &wire::LinkStates, generations: &mut FxHashMap<ClusterId, u32>) {
        for link in &told.links {
            let Ok(cluster) = link.cluster_id.try_into().map(ClusterId) else { continue };
            let before = generations.insert(cluster, link.path_generation);
            if before.is_some_and(|before| before != link.path_generation) {
                self.endpoint.path_changed(cluster);
            }
        }
    }
}
