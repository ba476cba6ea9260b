//! Two clusters on loopback: real gateways' packet path and links, real sidecars' endpoints, certificates of one root.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use isthmus_gateway::peers::{PeerEvent, Peers, PeersConfig, PeersHandle, PeersParts, WantedPeer};
use isthmus_gateway::router::{Router, RouterShared, RunningRouter};
use isthmus_identity::{
    ClusterAuthority, Expect, Identity, IssuerRecord, KeyPair, PeerIdentity, RootAuthority, SharedIdentity,
    SharedTrust, Tls, Trust,
};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, TrustDomain};
use isthmus_tunnel::carrier::{Answer, Body, Carrier, CarrierError, ServiceTarget};
use isthmus_tunnel::cid::{Cid, CidKeys, EndpointName};
use isthmus_tunnel::endpoint::{ALPN_TUNNEL, CidMint, EndpointParts, TunnelConfig};
use isthmus_tunnel::http::read_request;
use isthmus_tunnel::probe::ProbeKey;
use isthmus_tunnel::route::{LocalTable, Source, Visibility};
use isthmus_tunnel::socket::UdpPort;
use isthmus_tunnel::stream::{ResetCode, StreamKind};
use isthmus_tunnel::ticket::{TICKET_VALIDITY, TicketMasters, TicketTime};
use isthmus_tunnel::{DialError, Tunnel, TunnelEndpoint};
use isthmus_wire::federation::link_control::Message;
use rustc_hash::FxHashMap;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub const HOST: &str = "cart.shop.svc.clusterset.local";
pub const PATIENCE: Duration = Duration::from_secs(10);

pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as u64
}

pub fn free_address() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port")
}

/// Waits for `condition` with a deadline.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come true within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// One cluster: its authority and keys, what its gateways know.
pub struct Cluster {
    pub name: ClusterName,
    pub id: ClusterId,
    authority: ClusterAuthority,
    trust: SharedTrust,
    pub keys: Arc<CidKeys>,
    pub masters: Arc<TicketMasters>,
    /// The other cluster.
    peer: (ClusterName, ClusterId),
}

/// Both clusters of a fresh mesh: alpha (1) and beta (2).
pub fn clusters() -> (Cluster, Cluster) {
    let domain: TrustDomain = "corp.example".parse().expect("valid");
    let now = unix_ms() / 1000;
    let root = RootAuthority::create("test", &domain, now).expect("a root");
    let names: Vec<ClusterName> = ["alpha", "beta"].map(|name| name.parse().expect("valid")).into();
    let record = |id| IssuerRecord { cluster_id: ClusterId(id), may_issue: Patterns::all() };
    let trust = Trust {
        trust_domain: domain.clone(),
        roots: vec![root.certificate().clone()],
        issuers: names.iter().cloned().zip([record(1), record(2)]).collect(),
    };
    let cluster = |index: usize| {
        let key = KeyPair::generate().expect("a key");
        let csr = key.request().expect("a request");
        let intermediate = root.issue_intermediate(&csr, &names[index], &domain, now).expect("issued");
        let id = ClusterId(index as u16 + 1);
        Cluster {
            name: names[index].clone(),
            id,
            authority: ClusterAuthority::load(vec![intermediate], key, domain.clone()),
            trust: Arc::new(ArcSwap::from_pointee(trust.clone())),
            keys: Arc::new(CidKeys::new(id, 0, [index as u8; 16])),
            masters: Arc::new(TicketMasters::new(id, [index as u8; 32])),
            peer: (names[1 - index].clone(), ClusterId(2 - index as u16)),
        }
    };
    (cluster(0), cluster(1))
}

impl Cluster {
    fn tls(&self, identity: &Identity) -> Tls {
        Tls { identity: SharedIdentity::new(identity).expect("usable"), trust: self.trust.clone() }
    }

    fn workload_tls(&self, account: &str) -> Tls {
        let key = KeyPair::generate().expect("a key");
        let account = account.parse().expect("valid");
        let life = Duration::from_secs(3600);
        let csr = key.request().expect("a request");
        let chain = self.authority.issue_workload(&csr, &account, life, unix_ms() / 1000).expect("issued");
        self.tls(&Identity::new(chain, key).expect("whole"))
    }

    /// What a gateway of this cluster knows before any sidecar registers.
    pub fn table(&self, replica: u8) -> LocalTable {
        let source = self.peer.1;
        let probe = ProbeKey::new(0, self.masters.probe_key_for(source, 0).expect("lives"));
        LocalTable {
            cluster: self.id,
            replica,
            keys: self.keys.clone(),
            endpoints: FxHashMap::default(),
            registered: Default::default(),
            exports: FxHashMap::default(),
            sources: vec![Source { tickets: self.masters.keys_for(source), probes: vec![probe] }],
            siblings: FxHashMap::default(),
            draining: false,
        }
    }

    /// A ticket as a gateway of the other cluster would mint it.
    pub fn ticket_to(&self, destination: &Cluster, name: EndpointName) -> Cid {
        let keys = destination.masters.keys_for(self.id);
        keys.mint(name, TicketTime::from_unix_ms(unix_ms()).after(TICKET_VALIDITY), rand::random())
    }
}

/// A running gateway replica.
pub struct Gateway {
    pub address: SocketAddr,
    pub router: Arc<RouterShared>,
    pub peers: PeersHandle,
    running: Option<RunningRouter>,
    /// The links' own runtime, so that they can be ended without a word.
    runtime: Option<tokio::runtime::Runtime>,
    pub refused: tokio::sync::mpsc::UnboundedReceiver<Cid>,
}

impl Gateway {
    /// Starts one on `address`, which dials `peer` if that is given.
    pub fn start(cluster: &Cluster, table: LocalTable, address: SocketAddr, peers: Vec<SocketAddr>) -> Self {
        let dialable = peers.is_empty();
        let replica = table.replica;
        let router = Router::bind(address, 2, table).expect("the port is free");
        let shared = router.shared();
        let running = Router::start(&shared).expect("threads");
        let wanted = WantedPeer {
            cluster: cluster.peer.0.clone(),
            id: cluster.peer.1,
            addresses: peers.iter().map(ToString::to_string).collect(),
        };
        let identity = cluster.authority.issue_gateway(unix_ms() / 1000).expect("issued");
        let parts = PeersParts {
            config: PeersConfig {
                cluster: cluster.name.clone(),
                cluster_id: cluster.id,
                replica,
                dialable,
                member: true,
                version: "test".into(),
                form_max: 1,
            },
            tls: cluster.tls(&identity),
            router: shared.clone(),
            control: router.control,
            router_events: router.events,
            wanted: watch::channel(vec![wanted]).1,
            masters: watch::channel(cluster.masters.clone()).1,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let entered = runtime.enter();
        let (peers, handle, mut events) = Peers::new(parts).expect("links");
        let (notices, refused) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(event) = events.recv().await {
                if let PeerEvent::Control(_, control) = event
                    && let Some(Message::DialNotice(notice)) = control.message
                {
                    let _ = notices.send(Cid::from_slice(&notice.ticket).expect("20 bytes"));
                }
            }
        });
        tokio::spawn(peers.run(CancellationToken::new()));
        drop(entered);
        Self { address, router: shared, peers: handle, running: Some(running), runtime: Some(runtime), refused }
    }

    /// Makes a sidecar known, as its registration would.
    pub fn register(&self, sidecar: &Sidecar, exported: bool) {
        let mut table = (*self.router.local()).clone();
        table.endpoints.insert(sidecar.name, sidecar.address);
        table.registered.insert(sidecar.address);
        if exported {
            table.exports.insert(sidecar.name.handle, Visibility::All);
        }
        self.router.set_local(table);
    }

    /// Ends it at once, without a word to anybody: as SIGKILL would.
    pub async fn kill(self) {
        let router = self.router.clone();
        drop(self);
        until("the router's sockets are closed", || Arc::strong_count(&router) == 1).await;
    }

    pub async fn linked(&self) {
        until("a link with live flows", || {
            let alive = |link: &isthmus_gateway::peers::LinkStatus| {
                link.flows.iter().any(|flow| flow.state == isthmus_tunnel::link::PathState::Live)
            };
            !self.peers.links().is_empty() && self.peers.status().borrow().links.iter().any(alive)
        })
        .await;
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.runtime.take().expect("dropped once").shutdown_background();
        drop(self.running.take());
    }
}

/// A running sidecar's endpoint, which serves one service if told to.
pub struct Sidecar {
    pub name: EndpointName,
    pub address: SocketAddr,
    pub endpoint: TunnelEndpoint<PeerIdentity>,
    tls: Tls,
    stop: CancellationToken,
}

impl Sidecar {
    pub fn start(cluster: &Cluster, account: &str, handle: u32, gateways: Vec<SocketAddr>) -> Self {
        let name = EndpointName { handle, incarnation: 1 };
        let tls = cluster.workload_tls(account);
        let port = UdpPort::bind("127.0.0.1:0".parse().expect("valid"), false).expect("a port");
        let address = port.local_addr().expect("bound");
        let identify = tls.clone();
        let parts = EndpointParts {
            port,
            mint: CidMint::new(cluster.keys.clone(), name),
            server_tls: Arc::new(tls.server_config(&[ALPN_TUNNEL], Expect::Workload(None))),
            identify: Arc::new(move |chain| identify.peer_identity(chain).ok()),
            config: TunnelConfig { dial_timeout: Duration::from_secs(3), ..TunnelConfig::default() },
        };
        let endpoint = TunnelEndpoint::new(parts).expect("an endpoint");
        endpoint.set_gateways(gateways);
        let stop = CancellationToken::new();
        let (running, token) = (endpoint.clone(), stop.clone());
        tokio::spawn(async move { running.run(token).await });
        Self { name, address, endpoint, tls, stop }
    }

    /// Dials `to` with `ticket`; accepts only the account ns/shop/sa/cart of its cluster.
    pub async fn dial(&self, to: &Cluster, name: EndpointName, ticket: Cid) -> Result<Tunnel<PeerIdentity>, DialError> {
        let accounts = vec!["ns/shop/sa/cart".parse().expect("valid")];
        let expect = Expect::Accounts { cluster: to.name.clone(), accounts };
        let tls = Arc::new(self.tls.client_config(&[ALPN_TUNNEL], expect));
        self.endpoint.dialer().dial(to.id, name, ticket, tls).await
    }

    /// Serves port 80 by [`answer`] and port 5432 by echoing; anything else is not exported.
    pub fn serve(&self) {
        let endpoint = self.endpoint.clone();
        tokio::spawn(async move {
            while let Some(tunnel) = endpoint.accept().await {
                tokio::spawn(async move {
                    while let Some(pending) = tunnel.accept_stream().await {
                        let caller = tunnel.peer().clone();
                        tokio::spawn(async move {
                            let Ok((header, stream)) = pending.header().await else { return };
                            match (header.kind, header.port) {
                                (StreamKind::Http, 80) => answer(caller, stream).await,
                                (StreamKind::Tcp, 5432) => {
                                    let (mut read, mut write) = (stream.recv, stream.send);
                                    let _ = tokio::io::copy(&mut read, &mut write).await;
                                    write.finish();
                                }
                                _ => stream.reset(ResetCode::NotExported),
                            }
                        });
                    }
                });
            }
        });
    }

    pub fn stop(&self) {
        self.stop.cancel();
    }
}

/// Echoes the body; tells who called; trailers come back; `Upgrade: echo` turns into bytes.
async fn answer(caller: PeerIdentity, stream: isthmus_tunnel::stream::ByteStream) {
    let Ok(isthmus_tunnel::http::Request { request, mut responder }) = read_request(stream).await else { return };
    if request.headers().contains_key("upgrade") {
        let head = http::Response::builder().status(101).header("upgrade", "echo").body(()).expect("valid");
        let stream = responder.upgrade(head).await.expect("asked for");
        let (mut read, mut write) = (stream.recv, stream.send);
        let _ = tokio::io::copy(&mut read, &mut write).await;
        write.finish();
        return;
    }
    if request.headers().contains_key("expect") {
        let head = http::Response::builder().status(103).header("link", "</a.css>").body(()).expect("valid");
        responder.informational(head).await.expect("sent");
    }
    let caller = format!("{} of {}", caller.spiffe, caller.cluster.expect("a workload"));
    let response = http::Response::builder().header("caller", caller).body(request.into_body()).expect("valid");
    let _ = responder.respond(response).await;
}

pub fn target(port: u16) -> ServiceTarget {
    ServiceTarget { host: HOST.parse().expect("valid"), port }
}

pub fn body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// One request; its status, caller header and body.
pub async fn post(tunnel: &Tunnel<PeerIdentity>, bytes: Bytes) -> Result<(u16, String, Bytes), CarrierError> {
    let request = http::Request::post(format!("http://{HOST}/items")).body(body(bytes)).expect("valid");
    match tunnel.send(&target(80), request, &mut |_| {}).await? {
        Answer::Response(response) => {
            let (head, body) = response.into_parts();
            let caller = head.headers.get("caller").map_or("", |value| value.to_str().expect("text")).to_owned();
            let body = body.collect().await.expect("whole").to_bytes();
            Ok((head.status.as_u16(), caller, body))
        }
        Answer::Upgraded(..) => panic!("nobody asked for an upgrade"),
    }
}

/// alpha's sidecar calls beta's through a gateway of each; alpha dials.
pub struct Bed {
    pub alpha: Cluster,
    pub beta: Cluster,
    pub gateway_a: Gateway,
    pub gateway_b: Gateway,
    pub client: Sidecar,
    pub server: Sidecar,
}

impl Bed {
    pub async fn start() -> Self {
        let (alpha, beta) = clusters();
        let (at_a, at_b) = (free_address(), free_address());
        let gateway_b = Gateway::start(&beta, beta.table(0), at_b, vec![]);
        let gateway_a = Gateway::start(&alpha, alpha.table(0), at_a, vec![at_b]);
        let server = Sidecar::start(&beta, "ns/shop/sa/cart", 7, vec![at_b]);
        let client = Sidecar::start(&alpha, "ns/shop/sa/web", 9, vec![at_a]);
        gateway_a.register(&client, false);
        gateway_b.register(&server, true);
        server.serve();
        gateway_a.linked().await;
        gateway_b.linked().await;
        Self { alpha, beta, gateway_a, gateway_b, client, server }
    }

    pub fn ticket(&self) -> Cid {
        self.alpha.ticket_to(&self.beta, self.server.name)
    }

    pub async fn tunnel(&self) -> Tunnel<PeerIdentity> {
        self.client.dial(&self.beta, self.server.name, self.ticket()).await.expect("a tunnel")
    }
}
