//! From the cluster's member to its other gateway replicas: registry, objects, virtual addresses, tunnel keys.
//!
//! The member (replica 0) serves [`ReplicationService`]; every other replica follows it with [`follow()`] and keeps
//! what it hears on disk, so that it starts and serves without the member. Sidecars' registrations do not travel
//! here: each sidecar shows its own, signed by the member, to every replica.

mod follow;
mod registrar;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use isthmus_federation::member::{MemberHandle, Status as MemberStatus};
use isthmus_identity::state::{StateError, read_private, write_private};
use isthmus_model::vip::Addresses;
use isthmus_objects::ObjectSet;
use isthmus_wire::discovery::{Replica, Replicas};
use isthmus_wire::replica::replication_server::Replication;
use isthmus_wire::replica::{FollowRequest, State};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::hub::Hub;
use crate::issue::Issuer;
use crate::keys::TunnelKeys;
use crate::object_store::ObjectStore;
use crate::tls_incoming::PeerInfo;

pub use follow::{Followed, MemberClient, follow};
pub use registrar::Registrar;

/// Changes are gathered for this long: ten objects applied at once travel at once.
const GATHER: Duration = Duration::from_millis(5);
/// Parts that wait for a slow replica.
const OUTGOING_MAX: usize = 16;
/// Largest state told at once; a registry of 10,000 exports is some 5 MB.
const STATE_LEN_MAX: usize = 64 * 1024 * 1024;

/// Where one replica is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaAddresses {
    /// Its number.
    pub number: u8,
    /// Its UDP socket, for sidecars and the other replicas.
    pub udp: SocketAddr,
    /// Its session socket.
    pub sessions: SocketAddr,
    /// Where other clusters reach it, `host:port`.
    pub advertise: Vec<String>,
}

/// All replicas of the own cluster as far as this one knows, itself included, by number.
pub type ReplicaList = Vec<ReplicaAddresses>;

/// The list as sidecars are told it.
pub fn to_wire(list: &[ReplicaAddresses]) -> Replicas {
    let one = |replica: &ReplicaAddresses| Replica {
        number: replica.number.into(),
        udp_address: replica.udp.to_string(),
        session_address: replica.sessions.to_string(),
    };
    Replicas { replicas: list.iter().map(one).collect() }
}

/// The addresses under which other clusters dial any replica: at most 16, as a cluster's record holds.
pub fn advertised(list: &[ReplicaAddresses]) -> Vec<String> {
    let mut all = Vec::new();
    for address in list.iter().flat_map(|replica| &replica.advertise) {
        if !all.contains(address) && all.len() < 16 {
            all.push(address.clone());
        }
    }
    all
}

/// What the member serves to its other replicas.
pub struct ReplicationService {
    /// Addresses.
    pub hub: Arc<Hub>,
    /// Objects.
    pub objects: Arc<ObjectStore>,
    /// Registry and status.
    pub member: MemberHandle,
    /// Tunnel keys.
    pub keys: watch::Receiver<TunnelKeys>,
    /// Who is a gateway of ours.
    pub issuer: Arc<Issuer>,
    /// The other replicas.
    pub registrar: Arc<Registrar>,
    /// Ends the streams.
    pub stop: CancellationToken,
}

type States = Pin<Box<dyn Stream<Item = Result<State, Status>> + Send>>;

#[tonic::async_trait]
impl Replication for ReplicationService {
    type FollowStream = States;

    async fn follow(&self, request: Request<FollowRequest>) -> Result<Response<States>, Status> {
        let info = request.extensions().get::<Arc<PeerInfo>>().cloned();
        let info = info.ok_or_else(|| Status::unauthenticated("no connection"))?;
        self.issuer.own_gateway(&info.chain)?;
        let addresses = follower(request.get_ref(), info.remote.ip())?;
        self.registrar.here(addresses.clone())?;
        tracing::info!(replica = addresses.number, address = %addresses.udp, "a gateway replica follows");
        let (states, stream) = mpsc::channel(OUTGOING_MAX);
        let feed = Feed {
            hub: self.hub.clone(),
            objects: self.objects.clone(),
            member: self.member.clone(),
            keys: self.keys.clone(),
            list: self.registrar.list(),
            local: info.local.ip(),
            told: Told::default(),
        };
        let (registrar, stop) = (self.registrar.clone(), self.stop.clone());
        // Ends with the stream or with `stop`, which the server's own shutdown waits for.
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = feed.run(&states) => {}
            }
            registrar.gone(&addresses);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

fn follower(request: &FollowRequest, from: IpAddr) -> Result<ReplicaAddresses, Status> {
    let address = |what: &str, text: &str| {
        let parsed: SocketAddr =
            text.parse().map_err(|error| Status::invalid_argument(format!("{what} {text:?}: {error}")))?;
        Ok::<_, Status>(at(parsed, from))
    };
    match u8::try_from(request.number) {
        Ok(number @ 1..) => Ok(ReplicaAddresses {
            number,
            udp: address("udp_address", &request.udp_address)?,
            sessions: address("session_address", &request.session_address)?,
            advertise: request.advertise.clone(),
        }),
        _ => Err(Status::invalid_argument(format!("replica {} is none that follows (1-255)", request.number))),
    }
}

/// `address`, with `ip` if it is bound to all of its host's.
fn at(address: SocketAddr, ip: IpAddr) -> SocketAddr {
    if address.ip().is_unspecified() { SocketAddr::new(ip, address.port()) } else { address }
}

/// One replica's stream.
struct Feed {
    hub: Arc<Hub>,
    objects: Arc<ObjectStore>,
    member: MemberHandle,
    keys: watch::Receiver<TunnelKeys>,
    list: watch::Receiver<ReplicaList>,
    /// Where the replica dialled us.
    local: IpAddr,
    told: Told,
}

/// What a replica was told, so that only what changed is put into words again: the hub changes several times a
/// second, and a registry of 10,000 exports is 5 MB.
#[derive(Default)]
struct Told {
    /// Its position in the log.
    registry: Option<u64>,
    status: Option<MemberStatus>,
    objects: Option<Arc<ObjectSet>>,
    addresses: Option<Arc<Addresses>>,
    /// When their generation began.
    keys: Option<u64>,
    list: Option<ReplicaList>,
}

impl Feed {
    /// Tells what changed until the replica is gone.
    async fn run(mut self, states: &mpsc::Sender<Result<State, Status>>) {
        let (mut registry, mut status) = (self.member.registry(), self.member.status_changes());
        let mut generation = self.hub.generation();
        loop {
            registry.mark_unchanged();
            status.mark_unchanged();
            generation.mark_unchanged();
            self.keys.mark_unchanged();
            self.list.mark_unchanged();
            let news = self.news();
            if news != State::default() && states.send(Ok(news)).await.is_err() {
                return;
            }
            tokio::select! {
                () = states.closed() => return,
                Ok(()) = registry.changed() => {}
                Ok(()) = status.changed() => {}
                Ok(()) = generation.changed() => {}
                Ok(()) = self.keys.changed() => {}
                Ok(()) = self.list.changed() => {}
                // Everything that could change has ended.
                else => return,
            }
            tokio::time::sleep(GATHER).await;
        }
    }

    fn news(&mut self) -> State {
        let (registry, status) = (self.member.registry().borrow().clone(), self.member.status());
        let (objects, addresses) = (self.hub.objects(), self.hub.addresses());
        let keys = self.keys.borrow().clone();
        let mut list = self.list.borrow().clone();
        for replica in &mut list {
            (replica.udp, replica.sessions) = (at(replica.udp, self.local), at(replica.sessions, self.local));
        }
        let told = &mut self.told;
        State {
            registry: part(&mut told.registry, registry.index, || json(&*registry)),
            objects: match &told.objects {
                Some(known) if Arc::ptr_eq(known, &objects) => Vec::new(),
                _ => {
                    told.objects = Some(objects);
                    self.objects.to_json()
                }
            },
            addresses: part(&mut told.addresses, addresses.clone(), || json(&*addresses)),
            tunnel_keys: part(&mut told.keys, keys.since_unix_s, || keys.to_json()),
            status: part(&mut told.status, status.clone(), || json(&status)),
            replicas: part(&mut told.list, list.clone(), || json(&list)),
        }
    }
}

/// The words for a part that is not as it was told; else none.
fn part<T: PartialEq>(told: &mut Option<T>, now: T, words: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    if told.as_ref() == Some(&now) {
        return Vec::new();
    }
    *told = Some(now);
    words()
}

/// Plain values into memory: an empty part, which tells nothing, if that could ever fail.
fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

/// Reads JSON that [`write_state`] wrote; `None` if there is no such file.
///
/// # Errors
/// [`StateError`]: unreadable, exposed or broken.
pub fn read_state<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let Some(bytes) = read_private(path)? else { return Ok(None) };
    let broken = |error: serde_json::Error| StateError::Content {
        path: path.to_owned(),
        what: format!("{error}; restore it from a backup"),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(broken)
}

/// Writes JSON for the owner's eyes only.
///
/// # Errors
/// [`StateError::Io`].
pub fn write_state(path: &Path, value: &impl Serialize) -> Result<(), StateError> {
    let json = serde_json::to_vec(value)
        .map_err(|error| StateError::Content { path: path.to_owned(), what: error.to_string() })?;
    write_private(path, &json)
}

#[cfg(test)]
mod tests {
    use isthmus_federation::member::Mirror;
    use isthmus_federation::registry::Registry;
    use isthmus_model::ClusterName;

    use super::*;

    pub(super) fn replica(number: u8, ip: &str) -> ReplicaAddresses {
        ReplicaAddresses {
            number,
            udp: format!("{ip}:15443").parse().expect("valid"),
            sessions: format!("{ip}:15012").parse().expect("valid"),
            advertise: vec![format!("{ip}:15443")],
        }
    }

    struct NoLinks;

    impl isthmus_federation::member::Transport for NoLinks {
        fn send(&self, _: isthmus_model::ClusterId, _: isthmus_wire::federation::RaftFrame) {}
        fn call(
            &self,
            to: isthmus_model::ClusterId,
            _: isthmus_wire::federation::Call,
        ) -> isthmus_federation::member::CallFuture {
            Box::pin(async move { Err(isthmus_federation::member::TransportError { to, reason: String::new() }) })
        }
    }

    #[test]
    fn every_part_is_told_once_and_again_when_it_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let own: ClusterName = "aws-eu".parse().expect("valid");
        let id = isthmus_model::ClusterId(1);
        let hub = Hub::new(own.clone(), Default::default(), Arc::default(), Arc::default(), Addresses::new("demo"));
        let config = isthmus_federation::member::MemberConfig::new("demo", own, id, dir.path().into());
        let (mirror, member) = Mirror::new(config, Arc::default(), Arc::new(NoLinks));
        let (keys, list) = (watch::Sender::new(TunnelKeys::generate(id, 7)), watch::Sender::new(Vec::new()));
        let mut feed = Feed {
            objects: ObjectStore::open(dir.path(), None, hub.clone()).expect("a store"),
            hub: hub.clone(),
            member,
            keys: keys.subscribe(),
            list: list.subscribe(),
            local: "10.0.0.1".parse().expect("valid"),
            told: Told::default(),
        };
        let first = feed.news();
        let parts = [&first.registry, &first.status, &first.objects, &first.addresses, &first.tunnel_keys];
        assert!(parts.iter().all(|part| !part.is_empty()));
        assert_eq!(feed.news(), State::default(), "nothing changed");
        mirror.set_registry(Arc::new(Registry { index: 5, ..Registry::default() }));
        keys.send_replace(TunnelKeys::generate(id, 8));
        list.send_replace(vec![replica(0, "0.0.0.0")]);
        let next = feed.news();
        assert!(!next.registry.is_empty() && !next.tunnel_keys.is_empty() && next.objects.is_empty());
        let replicas = String::from_utf8(next.replicas).expect("JSON");
        assert!(replicas.contains("10.0.0.1:15443"), "at the address that was dialled: {replicas}");
    }

    #[test]
    fn a_follower_on_all_addresses_is_known_at_the_one_it_dialled_from() {
        let request = FollowRequest {
            number: 1,
            udp_address: "0.0.0.0:15443".into(),
            session_address: "10.0.0.9:15012".into(),
            advertise: Vec::new(),
        };
        let from = "10.0.0.2".parse().expect("valid");
        let known = follower(&request, from).expect("valid");
        assert_eq!(
            (known.udp.to_string(), known.sessions.to_string()),
            ("10.0.0.2:15443".into(), "10.0.0.9:15012".into())
        );
        assert!(follower(&FollowRequest { number: 0, ..request }, from).is_err(), "replica 0 is the member");
    }
}
