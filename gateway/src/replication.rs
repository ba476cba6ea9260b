//! From the cluster's member to its other gateway replicas: registry, objects, virtual addresses, tunnel keys.
//!
//! The member (replica 0) serves [`ReplicationService`]; every other replica follows it with [`follow`] and keeps
//! what it hears on disk, so that it starts and serves without the member. Sidecars' registrations do not travel
//! here: each sidecar shows its own, signed by the member, to every replica.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use isthmus_federation::member::{MemberHandle, Mirror, Status as MemberStatus};
use isthmus_federation::registry::Registry;
use isthmus_identity::state::{StateError, read_private, write_private};
use isthmus_identity::tls::{client_config, server_name};
use isthmus_identity::{Expect, SharedIdentity, SharedTrust};
use isthmus_model::ClusterName;
use isthmus_model::vip::Addresses;
use isthmus_objects::ObjectSet;
use isthmus_wire::discovery::{
    CertificateResponse, EnrolRequest, Replica, Replicas, discovery_client::DiscoveryClient,
};
use isthmus_wire::replica::replication_client::ReplicationClient;
use isthmus_wire::replica::replication_server::Replication;
use isthmus_wire::replica::{FollowRequest, State};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsConnector;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::hub::Hub;
use crate::issue::Issuer;
use crate::join::{now_unix_s, refused};
use crate::keys::TunnelKeys;
use crate::object_store::ObjectStore;
use crate::tls_incoming::PeerInfo;

/// Changes are gathered for this long: ten objects applied at once travel at once.
const GATHER: Duration = Duration::from_millis(5);
/// Parts that wait for a slow replica.
const OUTGOING_MAX: usize = 16;
/// Largest state told at once; a registry of 10,000 exports is some 5 MB.
const STATE_LEN_MAX: usize = 64 * 1024 * 1024;
/// Pause before the member is dialled again.
const RETRY: Duration = Duration::from_millis(500);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A silent connection is asked for a sign of life this often; silence for as long again ends it.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A replica whose stream ended stays known for this long: a restart is not worth telling every sidecar.
const REPLICA_GRACE: Duration = Duration::from_secs(60);
/// Replicas of one cluster's gateway: their numbers are a byte, and each costs every sidecar a session.
const REPLICAS_MAX: usize = 16;

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

/// The member's knowledge of the other replicas, on disk, so that its own restart makes none of them vanish.
pub struct Registrar {
    own: ReplicaAddresses,
    path: PathBuf,
    others: Mutex<BTreeMap<u8, Known>>,
    list: watch::Sender<ReplicaList>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Known {
    addresses: ReplicaAddresses,
    /// Since when its stream is gone, Unix seconds.
    gone_unix_s: Option<u64>,
}

impl Registrar {
    /// The member's registrar; `list` is told every change.
    ///
    /// # Errors
    /// [`StateError`] if the file cannot be read back.
    pub fn open(
        own: ReplicaAddresses,
        path: PathBuf,
        list: watch::Sender<ReplicaList>,
    ) -> Result<Arc<Self>, StateError> {
        let mut others: BTreeMap<u8, Known> = read_state(&path)?.unwrap_or_default();
        // As long as the member itself was away nobody could be heard.
        let now = now_unix_s();
        others.values_mut().for_each(|known| known.gone_unix_s = Some(now));
        let registrar = Self { own, path, others: Mutex::new(others), list };
        registrar.publish(&registrar.others.lock());
        Ok(Arc::new(registrar))
    }

    fn here(&self, addresses: ReplicaAddresses) -> Result<(), Status> {
        let mut others = self.others.lock();
        if !others.contains_key(&addresses.number) && others.len() + 1 >= REPLICAS_MAX {
            return Err(refused("limited", format!("this cluster has {REPLICAS_MAX} gateway replicas already")));
        }
        others.insert(addresses.number, Known { addresses, gone_unix_s: None });
        self.publish(&others);
        Ok(())
    }

    fn gone(&self, addresses: &ReplicaAddresses) {
        let mut others = self.others.lock();
        if let Some(known) = others.get_mut(&addresses.number).filter(|known| known.addresses == *addresses) {
            known.gone_unix_s = Some(now_unix_s());
        }
    }

    fn forget_gone(&self, now_unix_s: u64) {
        let mut others = self.others.lock();
        let before = others.len();
        let stays = |gone: u64| now_unix_s.saturating_sub(gone) < REPLICA_GRACE.as_secs();
        others.retain(|_, known| known.gone_unix_s.is_none_or(stays));
        if others.len() != before {
            self.publish(&others);
        }
    }

    fn publish(&self, others: &BTreeMap<u8, Known>) {
        let list: ReplicaList =
            std::iter::once(&self.own).chain(others.values().map(|known| &known.addresses)).cloned().collect();
        self.list.send_if_modified(|current| {
            let differs = *current != list;
            *current = list;
            differs
        });
        if let Err(error) = write_state(&self.path, others) {
            tracing::warn!(%error, "the other replicas are not kept; they are told anew after a restart");
        }
    }

    /// Forgets replicas that do not come back, until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(REPLICA_GRACE / 4) => self.forget_gone(now_unix_s()),
            }
        }
    }
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
            list: self.registrar.list.subscribe(),
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

/// The way to the member, from another replica. Cheap to clone.
#[derive(Clone)]
pub struct MemberClient {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
}

impl MemberClient {
    /// Dials `address`, and believes only a gateway of `own` there.
    pub fn new(address: SocketAddr, own: &ClusterName, identity: &SharedIdentity, trust: &SharedTrust) -> Self {
        let tls = client_config(identity, trust, Expect::Gateway(Some(own.clone())), &[b"h2"]);
        Self { address, tls: Arc::new(tls) }
    }

    async fn channel(&self) -> Result<Channel, Status> {
        let (tls, address) = (self.tls.clone(), self.address);
        let connector = tower::service_fn(move |_: http::Uri| {
            let tls = tls.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let stream = TlsConnector::from(tls).connect(server_name(), tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://gateway.isthmus.invalid")
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let connecting = endpoint.connect_with_connector(connector);
        let unreachable = |error: String| Status::unavailable(format!("replica 0 at {address}: {error}"));
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(unreachable(innermost(&error))),
            Err(_) => Err(unreachable(format!("no answer within {CONNECT_TIMEOUT:?}"))),
        }
    }

    /// Passes an enrolment on: only the member can spend a token.
    ///
    /// # Errors
    /// The member's, or `UNAVAILABLE` if it cannot be reached.
    pub async fn enrol(&self, token: &str, csr: &[u8]) -> Result<CertificateResponse, Status> {
        let mut client = DiscoveryClient::new(self.channel().await?);
        let request = EnrolRequest { token: token.to_owned(), csr_der: csr.to_vec() };
        client.enrol(request).await.map(Response::into_inner)
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// What a replica fills with what it hears, and where it keeps that.
pub struct Followed {
    /// Registry and status.
    pub mirror: Mirror,
    /// Addresses.
    pub hub: Arc<Hub>,
    /// Objects.
    pub objects: Arc<ObjectStore>,
    /// Tunnel keys, and their file.
    pub keys: (watch::Sender<TunnelKeys>, PathBuf),
    /// All replicas.
    pub list: watch::Sender<ReplicaList>,
    /// Where the registry lies, and the virtual addresses.
    pub registry_path: PathBuf,
    /// See `registry_path`.
    pub addresses_path: PathBuf,
}

/// Follows the member until `stop`. What was heard stays when it is gone.
pub async fn follow(followed: Followed, client: MemberClient, own: ReplicaAddresses, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            status = followed.once(&client, &own) => {
                tracing::warn!(member = %client.address, %status, "the member is not followed; serving its last word");
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

impl Followed {
    async fn once(&self, client: &MemberClient, own: &ReplicaAddresses) -> Status {
        match self.listen(client, own).await {
            Ok(()) => Status::unavailable("it ended the stream"),
            Err(status) => status,
        }
    }

    async fn listen(&self, client: &MemberClient, own: &ReplicaAddresses) -> Result<(), Status> {
        let mut replication = ReplicationClient::new(client.channel().await?).max_decoding_message_size(STATE_LEN_MAX);
        let request = FollowRequest {
            number: own.number.into(),
            udp_address: own.udp.to_string(),
            session_address: own.sessions.to_string(),
            advertise: own.advertise.clone(),
        };
        let mut states = replication.follow(request).await?.into_inner();
        tracing::info!(member = %client.address, "following the member");
        while let Some(state) = states.message().await? {
            self.take(&state);
        }
        Ok(())
    }

    /// Takes what changed. A part that cannot be read is left out, and said.
    fn take(&self, state: &State) {
        // Trust and registry first: what follows may need them.
        self.part("registry", &state.registry, |registry: Registry| {
            self.keep(&self.registry_path, &registry);
            self.mirror.set_registry(Arc::new(registry));
        });
        self.part("status", &state.status, |status| self.mirror.set_status(status));
        if !state.tunnel_keys.is_empty() {
            match TunnelKeys::from_json(&state.tunnel_keys) {
                Ok(keys) => {
                    if let Err(error) = keys.store(&self.keys.1) {
                        tracing::error!(%error, "tunnel keys are not kept");
                    }
                    self.keys.0.send_replace(keys);
                }
                Err(what) => tracing::error!(%what, "tunnel keys of the member are not usable"),
            }
        }
        if !state.objects.is_empty()
            && let Err(error) = self.objects.adopt(&state.objects)
        {
            tracing::error!(%error, "the member's objects are not usable; the last ones stay");
        }
        self.part("addresses", &state.addresses, |addresses: Addresses| {
            self.keep(&self.addresses_path, &addresses);
            self.hub.set_addresses(addresses);
        });
        self.part("replicas", &state.replicas, |list: ReplicaList| {
            self.list.send_if_modified(|current| {
                let differs = *current != list;
                *current = list;
                differs
            });
        });
    }

    fn part<T: DeserializeOwned>(&self, what: &str, json: &[u8], take: impl FnOnce(T)) {
        if json.is_empty() {
            return;
        }
        match serde_json::from_slice(json) {
            Ok(value) => take(value),
            // A newer member, most likely.
            Err(error) => tracing::error!(%error, part = what, "not understood; upgrade this replica"),
        }
    }

    fn keep(&self, path: &std::path::Path, value: &impl Serialize) {
        if let Err(error) = write_state(path, value) {
            tracing::error!(%error, "not kept: this replica could not start without its member");
        }
    }
}

/// Reads JSON that [`write_state`] wrote; `None` if there is no such file.
///
/// # Errors
/// [`StateError`]: unreadable, exposed or broken.
pub fn read_state<T: DeserializeOwned>(path: &std::path::Path) -> Result<Option<T>, StateError> {
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
pub fn write_state(path: &std::path::Path, value: &impl Serialize) -> Result<(), StateError> {
    let json = serde_json::to_vec(value)
        .map_err(|error| StateError::Content { path: path.to_owned(), what: error.to_string() })?;
    write_private(path, &json)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(number: u8, ip: &str) -> ReplicaAddresses {
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
    fn a_replica_that_restarts_is_not_forgotten_and_one_that_stays_away_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("replicas.json");
        let open = || {
            let list = watch::Sender::new(Vec::new());
            let known = list.subscribe();
            (Registrar::open(replica(0, "10.0.0.1"), path.clone(), list).expect("readable"), known)
        };
        let (registrar, known) = open();
        registrar.here(replica(1, "10.0.0.2")).expect("room");
        assert_eq!(known.borrow().len(), 2);
        assert_eq!(advertised(&known.borrow()), ["10.0.0.1:15443", "10.0.0.2:15443"]);

        let (registrar, known) = open();
        assert_eq!(known.borrow().len(), 2, "known after the member's restart");
        registrar.forget_gone(now_unix_s() + REPLICA_GRACE.as_secs() - 2);
        assert_eq!(known.borrow().len(), 2);
        registrar.forget_gone(now_unix_s() + REPLICA_GRACE.as_secs() + 1);
        assert_eq!(known.borrow().len(), 1);
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
