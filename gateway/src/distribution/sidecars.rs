//! The cluster's sidecars as this replica serves them: registrations, open sessions, tickets.
//!
//! The member assigns handles and signs them; a registration once signed is believed by every replica,
//! so that a fresh one rebuilds its table from the sidecars themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use isthmus_identity::{ClusterAuthority, verify_signature};
use isthmus_model::{ClusterId, ServiceAccount};
use isthmus_tunnel::cid::{Cid, CidKeys, EndpointName};
use isthmus_tunnel::ticket::{TICKET_VALIDITY, TicketTime};
use isthmus_wire::discovery::{
    self, DialRefused, EndpointKey, EndpointKeys, LinkStates, Register, Replicas, SignedRegistration, TicketRequest,
    Tickets,
};
use isthmus_wire::federation::DialNotice;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::watch;
use tonic::Status;

use super::session::Session;
use crate::handles::HandleTable;
use crate::hub::Hub;
use crate::join::{now_unix_s, refused};
use crate::locals::WorkloadKey;
use crate::peers::PeersHandle;

/// Tickets in one answer: a burst of dials to one endpoint is one dial and waiters.
const TICKETS_MAX: u32 = 16;
/// What a signed registration begins with, so that the signature means nothing elsewhere.
const SIGNED_PREFIX: &[u8] = b"isthmus registration\0";

/// A registration that the member has signed.
pub struct Registration {
    /// The number other clusters know it by.
    pub handle: u32,
    /// The process behind it.
    pub incarnation: u16,
    /// What the sidecar shows to other replicas.
    pub signed: SignedRegistration,
}

/// How far one session is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// Last version sent.
    pub sent: u64,
    /// Last version acknowledged.
    pub acked: u64,
    /// Why the last one was refused.
    pub refused: Option<String>,
    /// Names subscribed to.
    pub subscriptions: usize,
}

/// One connected sidecar.
#[derive(Debug, Clone)]
pub struct Connected {
    /// Who.
    pub key: WorkloadKey,
    /// Handle and incarnation.
    pub process: (u32, u16),
    /// Since when.
    pub since: Instant,
    /// The version it runs.
    pub version: String,
    /// How far its config is.
    pub progress: Progress,
}

/// The sidecars of one replica.
pub struct Sidecars {
    authority: Arc<ClusterAuthority>,
    own_id: ClusterId,
    /// Handles and where they are kept; only the member has them.
    handles: Option<Mutex<(HandleTable, PathBuf)>>,
    cid_keys: ArcSwap<CidKeys>,
    keys: watch::Sender<EndpointKeys>,
    replicas: watch::Sender<Replicas>,
    sessions: Mutex<BTreeMap<u64, Connected>>,
    /// Where keys of destination clusters come from, once the links run.
    peers: OnceLock<PeersHandle>,
    links: watch::Sender<LinkStates>,
}

impl Sidecars {
    /// The sidecars of a replica; `handles` is the member's table and its file.
    pub fn new(
        authority: Arc<ClusterAuthority>,
        cid_keys: CidKeys,
        handles: Option<(HandleTable, PathBuf)>,
        replicas: Replicas,
    ) -> Arc<Self> {
        Arc::new(Self {
            authority,
            own_id: cid_keys.cluster(),
            handles: handles.map(Mutex::new),
            keys: watch::Sender::new(wire_keys(&cid_keys)),
            cid_keys: ArcSwap::from_pointee(cid_keys),
            replicas: watch::Sender::new(replicas),
            sessions: Mutex::default(),
            peers: OnceLock::new(),
            links: watch::Sender::new(LinkStates::default()),
        })
    }

    /// The registration of a workload's process: as signed before, or a new one by the member.
    ///
    /// # Errors
    /// `bad_registration` if what it shows is not ours; `not_member` if only the member could sign one.
    pub async fn registration(
        &self,
        account: &ServiceAccount,
        key: &WorkloadKey,
        register: &Register,
    ) -> Result<Registration, Status> {
        if let Some(signed) = register.signed.as_ref().filter(|signed| !signed.registration.is_empty())
            && let Some(known) = self.believe(account, key, &register.process_id, signed)
        {
            self.remember(key, &register.process_id)?;
            return Ok(known);
        }
        let Some((handle, incarnation)) = self.remember(key, &register.process_id)? else {
            let text = "this replica cannot assign handles; register with replica 0 first".to_owned();
            return Err(refused("not_member", text));
        };
        let registration = discovery::Registration {
            cluster_id: self.own_id.0.into(),
            handle,
            incarnation: incarnation.into(),
            namespace: key.0.to_string(),
            workload: key.1.to_string(),
            spiffe_id: account.in_domain(self.authority.trust_domain()).to_string(),
            process_id: register.process_id.clone(),
            issued_unix_s: now_unix_s(),
        };
        let registration = registration.encode_to_vec();
        let signature_der = self
            .authority
            .sign(&[SIGNED_PREFIX, &registration].concat())
            .map_err(|error| Status::internal(error.to_string()))?;
        Ok(Registration { handle, incarnation, signed: SignedRegistration { registration, signature_der } })
    }

    /// The member's word for this workload's process, if that is what `signed` is.
    fn believe(
        &self,
        account: &ServiceAccount,
        key: &WorkloadKey,
        process: &[u8],
        signed: &SignedRegistration,
    ) -> Option<Registration> {
        let by = self.authority.chain().first()?;
        if !verify_signature(by, &[SIGNED_PREFIX, &signed.registration].concat(), &signed.signature_der) {
            return None;
        }
        let said = discovery::Registration::decode(signed.registration.as_slice()).ok()?;
        let same = said.cluster_id == u32::from(self.own_id.0)
            && said.namespace == key.0.as_str()
            && said.workload == key.1.as_str()
            && said.process_id == process
            && said.spiffe_id == account.in_domain(self.authority.trust_domain()).to_string();
        let incarnation = u16::try_from(said.incarnation).ok()?;
        same.then(|| Registration { handle: said.handle, incarnation, signed: signed.clone() })
    }

    fn remember(&self, key: &WorkloadKey, process: &[u8]) -> Result<Option<(u32, u16)>, Status> {
        let Some(handles) = &self.handles else { return Ok(None) };
        let mut handles = handles.lock();
        let (table, path) = &mut *handles;
        let before = table.clone();
        let name = format!("{}/{}", key.0, key.1);
        let assigned =
            table.assign(&name, process, now_unix_s()).map_err(|error| refused("handles_full", error.to_string()))?;
        // A handle is told to nobody before it is on disk: after a crash it could be given twice.
        let known = before.says(&name, assigned, process);
        if !known {
            let json = serde_json::to_vec(&*table).map_err(|error| Status::internal(error.to_string()))?;
            isthmus_identity::state::write_private(path, &json).map_err(|error| {
                *table = before;
                Status::unavailable(error.to_string())
            })?;
        }
        Ok(Some(assigned))
    }

    /// A session opened.
    pub fn opened(&self, key: &WorkloadKey, process: (u32, u16), session: u64, version: String) {
        let since = Instant::now();
        let connected = Connected { key: key.clone(), process, since, version, progress: Progress::default() };
        self.sessions.lock().insert(session, connected);
    }

    /// A session ended; says whether it was the last one of its process here.
    pub fn closed(&self, key: &WorkloadKey, process: (u32, u16), session: u64) -> bool {
        let mut sessions = self.sessions.lock();
        sessions.remove(&session);
        !sessions.values().any(|one| one.key == *key && one.process == process)
    }

    /// How far a session is.
    pub fn progress(&self, session: u64, state: &Session) {
        if let Some(connected) = self.sessions.lock().get_mut(&session) {
            connected.progress = Progress {
                sent: state.sent_version(),
                acked: state.acked_version(),
                refused: state.refused().map(str::to_owned),
                subscriptions: state.subscriptions(),
            };
        }
    }

    /// All connected sidecars.
    pub fn connected(&self) -> Vec<Connected> {
        self.sessions.lock().values().cloned().collect()
    }

    /// Processes with a session here.
    pub fn processes(&self) -> BTreeSet<(u32, u16)> {
        self.sessions.lock().values().map(|one| one.process).collect()
    }

    /// Keys for own connection IDs.
    pub fn keys(&self) -> watch::Receiver<EndpointKeys> {
        self.keys.subscribe()
    }

    /// The keys were rotated.
    pub fn set_keys(&self, keys: CidKeys) {
        self.keys.send_replace(wire_keys(&keys));
        self.cid_keys.store(Arc::new(keys));
    }

    /// All replicas of this cluster, for a sidecar that dialled this one at `local`: a replica that listens
    /// on all its addresses is reached at that one.
    pub fn replicas(&self, local: Option<IpAddr>) -> Replicas {
        let mut replicas = self.replicas.borrow().clone();
        for replica in &mut replicas.replicas {
            for address in [&mut replica.udp_address, &mut replica.session_address] {
                match (address.parse::<SocketAddr>(), local) {
                    (Ok(bound), Some(local)) if bound.ip().is_unspecified() => {
                        *address = SocketAddr::new(local, bound.port()).to_string();
                    }
                    _ => {}
                }
            }
        }
        replicas
    }

    /// The replicas changed.
    pub fn set_replicas(&self, replicas: Replicas) {
        self.replicas.send_replace(replicas);
    }

    /// Changes of [`Sidecars::replicas`].
    pub fn replica_changes(&self) -> watch::Receiver<Replicas> {
        self.replicas.subscribe()
    }

    /// Paths to other clusters, as sidecars are told. A change is one of ways, not of figures.
    pub fn link_states(&self) -> watch::Receiver<LinkStates> {
        self.links.subscribe()
    }

    /// The paths as they are now.
    pub fn set_link_states(&self, states: LinkStates) {
        let ways = |states: &LinkStates| -> Vec<(u32, u32, bool)> {
            states.links.iter().map(|link| (link.cluster_id, link.path_generation, link.up)).collect()
        };
        self.links.send_if_modified(|current| {
            let changed = ways(current) != ways(&states);
            *current = states;
            changed
        });
    }

    /// Mints with the keys that come over the links of `peers`.
    pub fn attach(&self, peers: PeersHandle) {
        // Set once, at start; a second call would be the same handle.
        let _ = self.peers.set(peers);
    }

    /// Tickets for one endpoint of another cluster, if this cluster may call it: the first of three checks.
    pub fn mint(&self, hub: &Hub, request: &TicketRequest) -> Tickets {
        let mut answer = Tickets {
            cluster_id: request.cluster_id,
            handle: request.handle,
            incarnation: request.incarnation,
            valid_s: TICKET_VALIDITY.as_secs() as u32,
            ..Tickets::default()
        };
        match self.minted(hub, request) {
            Ok(tickets) => answer.tickets = tickets,
            Err(reason) => answer.refused = reason.into(),
        }
        answer
    }

    fn minted(&self, hub: &Hub, request: &TicketRequest) -> Result<Vec<Vec<u8>>, &'static str> {
        let cluster = u16::try_from(request.cluster_id).map(ClusterId).map_err(|_| "unknown_cluster")?;
        let registry = hub.registry();
        let record = registry.cluster_by_id(cluster).ok_or("unknown_cluster")?;
        let name = EndpointName {
            handle: request.handle,
            incarnation: u16::try_from(request.incarnation).map_err(|_| "not_exported")?,
        };
        let exported = hub.imports(|imports| {
            imports.serves(&record.name, name.handle, |key| {
                let exports = registry.exports.get(&record.name);
                let record = exports.and_then(|of| of.get(&format!("{}/{}", key.0, key.1)));
                record.is_some_and(|record| record.export.visible_to.cover(hub.own().as_str()))
            })
        });
        if !exported {
            return Err("not_exported");
        }
        let destination = self.peers.get().and_then(|peers| peers.destination(cluster)).ok_or("no_key")?;
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as i64);
        let theirs = u64::try_from(now_ms + destination.clock_offset_ms).unwrap_or_default();
        let expiry = TicketTime::from_unix_ms(theirs).after(TICKET_VALIDITY);
        let count = request.count.clamp(1, TICKETS_MAX);
        let mint = |_| destination.keys.mint(name, expiry, rand::random()).as_bytes().to_vec();
        Ok((0..count).map(mint).collect())
    }

    /// The notice as the sidecar behind `process` is told it, if it is that sidecar's dial.
    pub fn notice_for(&self, process: (u32, u16), notice: &DialNotice) -> Option<DialRefused> {
        let source = Cid::from_slice(&notice.source_cid)?;
        let name = self.cid_keys.load().open_endpoint(&source)?;
        ((name.handle, name.incarnation) == process)
            .then(|| DialRefused { ticket: notice.ticket.clone(), reason: notice.reason.clone() })
    }
}

fn wire_keys(keys: &CidKeys) -> EndpointKeys {
    let one = |(generation, key): (u8, [u8; 16])| EndpointKey { generation: generation.into(), key: key.to_vec() };
    EndpointKeys { keys: keys.parts().map(one).collect(), current_generation: keys.current().into() }
}
