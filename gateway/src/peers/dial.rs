//! Who dials whom, and how: one task per wanted address that keeps a control connection up.
//!
//! Of two clusters the side that has an address of the other dials; if both have one, the lower number does. A
//! cluster that nobody can dial dials out, and both directions work.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use isthmus_identity::Expect;
use isthmus_tunnel::cid::{CID_LEN, Cid, CidKind};
use isthmus_tunnel::route::LocalTable;
use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionId, EndpointConfig, IdleTimeout, TransportConfig, VarInt};
use quinn_proto::{ConnectionIdGenerator, InvalidCid};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::control::{LinkNews, serve};
use super::socket::LinkSocket;
use super::{ALPN_LINK, PeersShared, WantedPeer};
use crate::router::RouterShared;

/// First and longest pause between two dials.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A handshake that takes longer is given up and begun anew, perhaps by another address of the name.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// A control connection that hears nothing for this long is dialled anew; forwarding does not depend on it.
const IDLE_TIMEOUT_MS: u32 = 1_500;
const KEEP_ALIVE: Duration = Duration::from_millis(400);
/// Streams that a peer may have open: raft, follow, health, and calls that are forwarded.
const STREAMS_MAX: u32 = 256;
/// Handshakes of peers at a time. Whoever is no gateway of the mesh is gone after one.
const HANDSHAKES_MAX: usize = 64;
/// IDs of control connections change this often, well within the overlap of two key generations.
const CID_LIFETIME: Duration = Duration::from_secs(3600);

/// The dial tasks that run, by peer and address.
pub(super) struct Dials {
    shared: Arc<PeersShared>,
    quinn: quinn::Endpoint,
    socket: Arc<LinkSocket>,
    running: BTreeMap<(u16, String), CancellationToken>,
    /// Addresses being dialled, kept by the tasks.
    dialled: Arc<parking_lot::Mutex<BTreeMap<(u16, String), SocketAddr>>>,
}

impl Dials {
    pub(super) fn new(shared: Arc<PeersShared>, quinn: quinn::Endpoint, socket: Arc<LinkSocket>) -> Self {
        Self { shared, quinn, socket, running: BTreeMap::new(), dialled: Arc::default() }
    }

    /// Starts and stops tasks so that exactly the wanted addresses are dialled.
    pub(super) fn adjust(&mut self, tasks: &mut JoinSet<()>, shutdown: &CancellationToken) {
        let config = &self.shared.config;
        let mut wanted = BTreeMap::new();
        for peer in self.shared.wanted.borrow().iter() {
            if peer.id != config.cluster_id && (!config.dialable || config.cluster_id < peer.id) {
                wanted.extend(peer.addresses.iter().map(|address| ((peer.id.0, address.clone()), peer.clone())));
            }
        }
        self.running.retain(|key, stop| {
            let keep = wanted.contains_key(key);
            if !keep {
                stop.cancel();
            }
            keep
        });
        for (key, peer) in wanted {
            self.running.entry(key.clone()).or_insert_with(|| {
                let stop = shutdown.child_token();
                let dial = Dial {
                    shared: self.shared.clone(),
                    quinn: self.quinn.clone(),
                    socket: self.socket.clone(),
                    dialled: self.dialled.clone(),
                    key,
                    peer,
                };
                let token = stop.clone();
                tasks.spawn(async move { dial.run(token).await });
                stop
            });
        }
    }
}

/// Keeps one address dialled.
struct Dial {
    shared: Arc<PeersShared>,
    quinn: quinn::Endpoint,
    socket: Arc<LinkSocket>,
    dialled: Arc<parking_lot::Mutex<BTreeMap<(u16, String), SocketAddr>>>,
    key: (u16, String),
    peer: WantedPeer,
}

impl Dial {
    async fn run(self, stop: CancellationToken) {
        let mut pause = BACKOFF_MIN;
        let mut last = None;
        let mut complained = false;
        loop {
            let turn = async {
                let address = resolve(&self.key.1).await?;
                if last != Some(address) {
                    self.announce(last.replace(address), address).await;
                }
                let connection = self.connect(address).await?;
                pause = BACKOFF_MIN;
                Ok::<_, io::Error>(serve(&self.shared, connection, Some((address, &self.peer))).await)
            };
            let ended = tokio::select! { () = stop.cancelled() => break, ended = turn => ended };
            match ended {
                Ok(why) => {
                    complained = false;
                    tracing::info!(cluster = %self.peer.cluster, address = %self.key.1, %why, "link's control connection ended; dialling anew");
                }
                Err(error) if !complained => {
                    complained = true;
                    tracing::warn!(cluster = %self.peer.cluster, address = %self.key.1, %error, "cannot reach a gateway; trying on. Check that its UDP port is open to us");
                }
                Err(error) => tracing::debug!(cluster = %self.peer.cluster, %error, "dial failed"),
            }
            // Jitter keeps the replicas of a returning cluster from being dialled by all at once.
            let jittered = pause.mul_f64(rand::random_range(0.7..1.3));
            tokio::select! { () = stop.cancelled() => break, () = tokio::time::sleep(jittered) => {} }
            pause = (pause * 2).min(BACKOFF_MAX);
        }
        self.dialled.lock().remove(&self.key);
        self.publish();
        if let Some(address) = last {
            let _ = self.shared.news.send(LinkNews::Undialled { cluster: self.peer.id, address }).await;
        }
    }

    /// Tells that `address` is used from now on, before the handshake: forwarding needs no more than that.
    async fn announce(&self, before: Option<SocketAddr>, address: SocketAddr) {
        self.dialled.lock().insert(self.key.clone(), address);
        self.publish();
        let cluster = self.peer.id;
        if let Some(address) = before {
            let _ = self.shared.news.send(LinkNews::Undialled { cluster, address }).await;
        }
        let _ = self.shared.news.send(LinkNews::Dialling { cluster, address }).await;
    }

    fn publish(&self) {
        self.socket.set_dialled(self.dialled.lock().values().copied().collect());
    }

    async fn connect(&self, address: SocketAddr) -> io::Result<quinn::Connection> {
        let tls = self.shared.tls.client_config(&[ALPN_LINK], Expect::Gateway(Some(self.peer.cluster.clone())));
        let crypto = QuicClientConfig::try_from(tls).map_err(unfit)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        let first = Cid::first_link(self.peer.id, rand::random());
        config.transport_config(transport());
        config.initial_dst_cid_provider(Arc::new(move || ConnectionId::new(first.as_bytes())));
        let connecting = self.quinn.connect_with(config, address, "link.invalid").map_err(io::Error::other)?;
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(connected) => Ok(connected?),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// One of the addresses of `host:port`, another one each time where there are several.
async fn resolve(address: &str) -> io::Result<SocketAddr> {
    let addresses: Vec<_> = tokio::net::lookup_host(address).await?.collect();
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    Ok(addresses[rand::random_range(0..addresses.len())])
}

/// Lets peers in until `shutdown`.
pub(super) async fn accept_all(shared: Arc<PeersShared>, quinn: quinn::Endpoint, shutdown: CancellationToken) {
    let mut links = JoinSet::new();
    let handshakes = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
    loop {
        let incoming = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = links.join_next() => continue,
            incoming = quinn.accept() => incoming,
        };
        let Some(incoming) = incoming else { break };
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.ignore();
            continue;
        };
        let Ok(connecting) = incoming.accept() else { continue };
        let shared = shared.clone();
        links.spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
                Ok(Ok(connection)) => {
                    drop(permit);
                    let why = serve(&shared, connection, None).await;
                    tracing::info!(%why, "a peer's control connection ended");
                }
                Ok(Err(error)) => tracing::debug!(%error, "a peer's handshake failed"),
                Err(_) => tracing::debug!("a peer's handshake took too long"),
            }
        });
    }
    links.shutdown().await;
}

pub(super) fn endpoint_config(router: &Arc<RouterShared>) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    let router = router.clone();
    config.cid_generator(move || Box::new(LinkIds(router.clone())));
    config
}

pub(super) fn server_config(tls: rustls::ServerConfig) -> io::Result<quinn::ServerConfig> {
    let crypto = QuicServerConfig::try_from(tls).map_err(unfit)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(transport()).max_incoming(HANDSHAKES_MAX);
    Ok(config)
}

fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        // More gaps than 2.5 MB can hold would close the connection.
        .stream_receive_window(VarInt::from_u32(2_500_000))
        .congestion_controller_factory(Arc::new(BbrConfig::default()));
    Arc::new(transport)
}

fn unfit(error: quinn::crypto::rustls::NoInitialCipherSuite) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// IDs that lead to this replica, under keys that change while it runs.
struct LinkIds(Arc<RouterShared>);

impl LinkIds {
    fn table(&self) -> Arc<LocalTable> {
        self.0.local()
    }
}

impl ConnectionIdGenerator for LinkIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let local = self.table();
        ConnectionId::new(local.keys.mint_link(local.replica, rand::random()).as_bytes())
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        match Cid::from_slice(cid) {
            Some(cid) if cid.kind() == CidKind::Link => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        CID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        Some(CID_LIFETIME)
    }
}
