//! Links to other clusters' gateways: control connections, flows and their probes, what the router is told.
//!
//! [`Peers::run`] owns all of it. Forwarding does not hang on a control connection: it goes on over the flows that
//! are known, and a restarted gateway learns the flows that were dialled to it from their next probes. What streams
//! of a link carry is not known here but for the control stream.

mod control;
mod dial;
mod flows;
mod socket;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_identity::{Expect, Tls};
use isthmus_model::{ClusterId, ClusterName};
use isthmus_tunnel::link::INTERVAL_LINK;
use isthmus_tunnel::probe::{Probe, ProbeKey};
use isthmus_tunnel::route::{DropReason, LinkTable, Refusal};
use isthmus_tunnel::ticket::{TicketKeys, TicketMasters};
use isthmus_wire::federation::{DialNotice, LinkControl, link_control};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use control::{Class, LinkHandle, LinkStream};
pub use flows::FlowStatus;
pub use isthmus_tunnel::frame::{FRAME_LEN_MAX, FrameError, read_frame, write_frame};

use crate::router::{ControlDatagram, LinkTraffic, Links, RouterEvent, RouterShared};
use control::LinkNews;
use flows::{Flows, LinkKey};

/// ALPN of control connections between gateways.
pub const ALPN_LINK: &[u8] = b"isthmus-link/1";
/// Events that wait for the gateway to look at them.
const EVENTS_MAX: usize = 1024;
/// How often the links are looked at for others: sidecars turn away from a cluster whose last path is gone.
const STATUS_INTERVAL: Duration = Duration::from_millis(200);

/// Who this gateway is to its peers.
#[derive(Debug, Clone)]
pub struct PeersConfig {
    /// This cluster.
    pub cluster: ClusterName,
    /// Its number.
    pub cluster_id: ClusterId,
    /// This replica.
    pub replica: u8,
    /// Whether others can dial it.
    pub dialable: bool,
    /// Whether this replica is the cluster's member of the federation.
    pub member: bool,
    /// The version it runs.
    pub version: String,
    /// Highest form of log entries, deltas and streams it speaks.
    pub form_max: u32,
}

/// A cluster to have links with. All members of the mesh belong here, also those that only dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedPeer {
    /// Its name, as its gateways' certificates prove it.
    pub cluster: ClusterName,
    /// Its number.
    pub id: ClusterId,
    /// Where its gateway replicas are dialled, `host:port`; names are resolved again at every dial.
    pub addresses: Vec<String>,
}

/// What a gateway hears of its links.
#[derive(Debug)]
pub enum PeerEvent {
    /// A control connection stands.
    Up(LinkHandle),
    /// It is gone. Forwarding may go on; a new one is dialled.
    Down(LinkHandle),
    /// The peer opened a stream.
    Stream(LinkHandle, LinkStream),
    /// A control message that is not this module's own: dial notices, draining, traffic.
    Control(LinkHandle, LinkControl),
}

/// Keys of a destination cluster, as its gateways handed them over.
#[derive(Debug, Clone)]
pub struct Destination {
    /// Mint tickets.
    pub keys: TicketKeys,
    /// The destination's clock minus ours.
    pub clock_offset_ms: i64,
}

/// One link as it stands.
#[derive(Debug, Clone)]
pub struct LinkStatus {
    /// The peer's cluster.
    pub cluster: ClusterName,
    /// Its number.
    pub id: ClusterId,
    /// The peer's replica, once it is known.
    pub replica: Option<u8>,
    /// Whether the control connection stands.
    pub control: bool,
    /// Whether we dialled it.
    pub dialled: bool,
    /// The peer's address as we see it.
    pub address: Option<SocketAddr>,
    /// Round trip: the median of the live flows.
    pub rtt: Option<Duration>,
    /// Share of probes lost, mean of the flows.
    pub loss: f32,
    /// Its flows.
    pub flows: Vec<FlowStatus>,
    /// Largest UDP payload of the control connection's path.
    pub mtu: Option<u16>,
}

/// All links, for the dashboard, the sidecars' link states and `status`.
#[derive(Debug, Clone, Default)]
pub struct PeersStatus {
    /// Each link.
    pub links: Vec<LinkStatus>,
    /// Per cluster: grows when the set of flows in use changes.
    pub path_generations: BTreeMap<ClusterId, u32>,
    /// Per cluster: payload forwarded.
    pub traffic: BTreeMap<ClusterId, TrafficTotals>,
}

/// Payload forwarded to and from a cluster since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrafficTotals {
    /// Bytes to it.
    pub bytes_out: u64,
    /// Bytes from it.
    pub bytes_in: u64,
}

/// What others hold of a running [`Peers`].
#[derive(Clone)]
pub struct PeersHandle {
    shared: Arc<PeersShared>,
    status: watch::Receiver<PeersStatus>,
}

impl PeersHandle {
    /// All links as of a moment ago.
    pub fn status(&self) -> watch::Receiver<PeersStatus> {
        self.status.clone()
    }

    /// What mints tickets for `cluster`; `None` before a link to it has stood.
    pub fn destination(&self, cluster: ClusterId) -> Option<Destination> {
        self.shared.destinations.lock().get(&cluster).cloned()
    }

    /// The control connections that stand.
    pub fn links(&self) -> Vec<LinkHandle> {
        self.shared.links.lock().values().cloned().collect()
    }

    /// A link to `cluster`, to its member if one stands to that.
    pub fn link_to(&self, cluster: ClusterId) -> Option<LinkHandle> {
        let links = self.shared.links.lock();
        let of = || links.values().filter(|link| link.id() == cluster);
        of().find(|link| link.is_member()).or_else(|| of().next()).cloned()
    }
}

pub(crate) struct PeersShared {
    config: PeersConfig,
    tls: Tls,
    router: Arc<RouterShared>,
    wanted: watch::Receiver<Vec<WantedPeer>>,
    masters: watch::Receiver<Arc<TicketMasters>>,
    destinations: Mutex<FxHashMap<ClusterId, Destination>>,
    links: Mutex<BTreeMap<u64, LinkHandle>>,
    news: mpsc::Sender<LinkNews>,
    events: mpsc::Sender<PeerEvent>,
}

/// The links of one gateway replica, not yet running.
pub struct Peers {
    shared: Arc<PeersShared>,
    quinn: quinn::Endpoint,
    socket: Arc<socket::LinkSocket>,
    router_events: mpsc::Receiver<RouterEvent>,
    news: mpsc::Receiver<LinkNews>,
    status: watch::Sender<PeersStatus>,
}

/// What [`Peers`] is built from.
pub struct PeersParts {
    /// Who we are.
    pub config: PeersConfig,
    /// Gateway identity and trust.
    pub tls: Tls,
    /// The running router.
    pub router: Arc<RouterShared>,
    /// Its control datagrams.
    pub control: mpsc::Receiver<ControlDatagram>,
    /// Its events.
    pub router_events: mpsc::Receiver<RouterEvent>,
    /// Clusters to have links with; replaced whole.
    pub wanted: watch::Receiver<Vec<WantedPeer>>,
    /// Own ticket masters; a rotation is told to every peer.
    pub masters: watch::Receiver<Arc<TicketMasters>>,
}

impl Peers {
    /// Prepares the links. Events must be read: a full queue holds the links up.
    ///
    /// # Errors
    /// As the system says. Needs a tokio runtime.
    pub fn new(parts: PeersParts) -> io::Result<(Self, PeersHandle, mpsc::Receiver<PeerEvent>)> {
        let PeersParts { config, tls, router, control, router_events, wanted, masters } = parts;
        let socket = socket::LinkSocket::new(router.clone(), control);
        let server_tls = tls.server_config(&[ALPN_LINK], Expect::Gateway(None));
        let quinn = quinn::Endpoint::new_with_abstract_socket(
            dial::endpoint_config(&router),
            Some(dial::server_config(server_tls)?),
            socket.clone(),
            Arc::new(quinn::TokioRuntime),
        )?;
        let (events, events_next) = mpsc::channel(EVENTS_MAX);
        let (news, news_next) = mpsc::channel(EVENTS_MAX);
        let (status, status_next) = watch::channel(PeersStatus::default());
        let shared = Arc::new(PeersShared {
            config,
            tls,
            router,
            wanted,
            masters,
            destinations: Mutex::default(),
            links: Mutex::default(),
            news,
            events,
        });
        let handle = PeersHandle { shared: shared.clone(), status: status_next };
        Ok((Self { shared, quinn, socket, router_events, news: news_next, status }, handle, events_next))
    }

    /// Keeps the links until `shutdown`. On return no task of theirs is left.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut tasks = JoinSet::new();
        tasks.spawn(dial::accept_all(self.shared.clone(), self.quinn.clone(), shutdown.child_token()));
        let mut dials = dial::Dials::new(self.shared.clone(), self.quinn.clone(), self.socket.clone());
        let mut flows =
            Flows::new(self.shared.config.replica, self.shared.router.workers(), Instant::now(), control::unix_ms());
        let mut wanted = self.shared.wanted.clone();
        let mut report = tokio::time::interval(STATUS_INTERVAL);
        let mut traffic_look = tokio::time::interval(INTERVAL_LINK);
        let mut traffic_seen = FxHashMap::default();
        dials.adjust(&mut tasks, &shutdown);
        loop {
            self.probe(&mut flows);
            let next_probe = flows.next_timeout().unwrap_or_else(|| Instant::now() + STATUS_INTERVAL);
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(event) = self.router_events.recv() => {
                    self.router_event(event, &mut flows);
                    // More is often waiting: one look at the flows serves all.
                    while let Ok(event) = self.router_events.try_recv() {
                        self.router_event(event, &mut flows);
                    }
                }
                Some(news) = self.news.recv() => self.link_news(news, &mut flows),
                Ok(()) = wanted.changed() => {
                    dials.adjust(&mut tasks, &shutdown);
                    let ids: Vec<_> = wanted.borrow_and_update().iter().map(|peer| peer.id).collect();
                    flows.retain(|cluster| ids.contains(&cluster));
                    self.forget(&ids);
                }
                Some(_) = tasks.join_next() => {}
                _ = report.tick() => self.report(&flows),
                _ = traffic_look.tick() => self.look_at_traffic(&mut flows, &mut traffic_seen),
                () = tokio::time::sleep_until(next_probe.into()) => {}
            }
        }
        self.quinn.close(0u32.into(), b"shutdown");
        tasks.shutdown().await;
        // Says goodbye to the peers, so that they move at once; bounded by quinn's own 3 PTO.
        self.quinn.wait_idle().await;
    }

    /// Links that carry packets are probed more often.
    fn look_at_traffic(&self, flows: &mut Flows, seen: &mut FxHashMap<ClusterId, u64>) {
        for (cluster, traffic) in &self.shared.router.links().traffic {
            let count = traffic.datagrams();
            let before = seen.insert(*cluster, count).unwrap_or(0);
            flows.set_busy(Instant::now(), *cluster, count != before);
        }
    }

    /// Sends the probes that are due and tells the router what follows from those that were not answered.
    fn probe(&self, flows: &mut Flows) {
        let own = self.shared.config.cluster_id;
        for due in flows.poll(Instant::now()) {
            let probe = Probe::request(due.prober, due.sequence).to_link(&due.key, own, due.cluster);
            self.shared.router.socket(due.socket, 0).send_small(due.address, &probe);
        }
        if let Some(table) = flows.take_changed_table(Instant::now()) {
            tracing::debug!(peers = ?table.peers, "the paths to other clusters changed");
            self.publish(table);
            // Sidecars send again what was lost on the old path as soon as there is a new one.
            self.report(flows);
        }
    }

    fn publish(&self, table: LinkTable) {
        let before = self.shared.router.links();
        let traffic = |cluster: &ClusterId| before.traffic.get(cluster).cloned().unwrap_or_default();
        let traffic: FxHashMap<ClusterId, Arc<LinkTraffic>> =
            table.peers.keys().map(|cluster| (*cluster, traffic(cluster))).collect();
        self.shared.router.set_links(Links { table, traffic });
    }

    fn router_event(&self, event: RouterEvent, flows: &mut Flows) {
        match event {
            RouterEvent::Probed { from, socket, probe } => flows.on_probe(Instant::now(), from, socket, &probe),
            RouterEvent::Answered { at, from, probe } => flows.on_answer(at, from, &probe),
            RouterEvent::Refused(reason, refusal) => self.tell_refused(reason, &refusal),
        }
    }

    /// Tells the cluster that dialled: its gateways know which sidecar it was.
    fn tell_refused(&self, reason: DropReason, refusal: &Refusal) {
        let notice = DialNotice {
            ticket: refusal.ticket.as_bytes().to_vec(),
            source_cid: refusal.dialer.map_or_else(Vec::new, |cid| cid.as_bytes().to_vec()),
            reason: reason.as_str().to_owned(),
        };
        let links = self.shared.links.lock();
        // Every replica of the source: which one the dialler listens to is not known here.
        for link in links.values().filter(|link| link.id() == refusal.source) {
            link.tell(LinkControl { message: Some(link_control::Message::DialNotice(notice.clone())) });
        }
    }

    fn link_news(&self, news: LinkNews, flows: &mut Flows) {
        match news {
            LinkNews::Dialling { cluster, address } => flows.add_dialled(Instant::now(), cluster, address),
            LinkNews::ProbeKey { cluster, key } => flows.set_key(cluster, *key),
            LinkNews::Up { link, dialled } => {
                flows.reset_sequences(link.id(), link.replica());
                let key = match dialled {
                    Some(address) => LinkKey::Dialled(link.id(), address),
                    None => LinkKey::Accepted(link.id(), link.replica()),
                };
                flows.name_replica(key, link.replica());
            }
            LinkNews::Undialled { cluster, address } => flows.remove(LinkKey::Dialled(cluster, address)),
        }
    }

    fn forget(&self, wanted: &[ClusterId]) {
        self.shared.destinations.lock().retain(|cluster, _| wanted.contains(cluster));
        for link in self.shared.links.lock().values().filter(|link| !wanted.contains(&link.id())) {
            link.close("no longer a member");
        }
    }

    fn report(&self, flows: &Flows) {
        let names: FxHashMap<_, _> =
            self.shared.wanted.borrow().iter().map(|peer| (peer.id, peer.cluster.clone())).collect();
        let handles = self.links_by_key();
        let mut links = flows.status(&names);
        for link in &mut links {
            let handle = handles.get(&(link.id, link.replica.unwrap_or(0)));
            link.control = handle.is_some();
            link.mtu = handle.map(LinkHandle::mtu);
            link.rtt = link.rtt.or_else(|| handle.map(LinkHandle::rtt));
        }
        let totals = |traffic: &LinkTraffic| TrafficTotals {
            bytes_out: traffic.bytes_out.load(std::sync::atomic::Ordering::Relaxed),
            bytes_in: traffic.bytes_in.load(std::sync::atomic::Ordering::Relaxed),
        };
        let traffic =
            self.shared.router.links().traffic.iter().map(|(cluster, traffic)| (*cluster, totals(traffic))).collect();
        self.status.send_replace(PeersStatus { links, path_generations: flows.generations(), traffic });
    }

    fn links_by_key(&self) -> FxHashMap<(ClusterId, u8), LinkHandle> {
        self.shared.links.lock().values().map(|link| ((link.id(), link.replica()), link.clone())).collect()
    }
}

impl PeersShared {
    /// The cluster that a peer proved to be, if it is wanted.
    fn wanted(&self, cluster: &ClusterName) -> Option<WantedPeer> {
        self.wanted.borrow().iter().find(|peer| peer.cluster == *cluster).cloned()
    }

    /// The key for probes that `cluster` sends us.
    fn probe_key_in(&self, cluster: ClusterId) -> Option<ProbeKey> {
        let masters = self.masters.borrow();
        let generation = masters.current();
        masters.probe_key_for(cluster, generation).map(|key| ProbeKey::new(generation, key))
    }
}
