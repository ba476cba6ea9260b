//! All gateways of a sidecar's cluster behind one address.
//!
//! QUIC must see one peer address: a client drops what comes from another, and a server would migrate (and reset
//! its congestion control) with every change. So sending picks a live gateway by the packet's connection ID, and
//! receiving rewrites the source. Only packets of these gateways are passed on.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use isthmus_model::ClusterId;
use parking_lot::Mutex;
use quinn::{AsyncUdpSocket, UdpPoller};
use quinn_udp::{RecvMeta, Transmit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::UdpPort;
use super::recent::Recent;
use crate::cid::{Cid, CidKind};
use crate::endpoint::CidMint;
use crate::link::{INTERVAL_BUSY, INTERVAL_IDLE, PathHealth, PathState, choose};
use crate::packet::Packet;
use crate::probe::{PROBE_LEN, Probe};

/// Gateways that are probed and used; more replicas than a cluster has.
const GATEWAYS_MAX: usize = 32;
/// Probing stays busy for this long after the last packet: when a path has died little is sent, a few packets
/// further and further apart, and that is when its death must be noticed.
const BUSY_FOR: Duration = Duration::from_secs(2);

/// What a sidecar's QUIC endpoint sends to and receives from: "the gateway".
pub struct VirtualGatewaySocket {
    io: AsyncFd<PortFd>,
    mint: Arc<CidMint>,
    virtual_address: SocketAddr,
    paths: Mutex<Vec<GatewayPath>>,
    /// What `paths` come to, for every packet.
    choice: ArcSwap<Choice>,
    recent: Mutex<Recent>,
    active: AtomicBool,
    woken: Notify,
    foreign: AtomicU64,
}

#[derive(Debug)]
struct GatewayPath {
    address: SocketAddr,
    health: PathHealth,
}

#[derive(Debug, Default)]
struct Choice {
    all: Vec<SocketAddr>,
    /// Never empty unless `all` is: with every gateway silent, each is as good as another.
    usable: Vec<(u64, SocketAddr)>,
}

impl Choice {
    /// The gateway that packets to `id` take.
    fn of(&self, id: &Cid) -> Option<SocketAddr> {
        choose(id.spread(), self.usable.iter().map(|&(id, _)| id)).map(|index| self.usable[index].1)
    }
}

/// One gateway as the sidecar sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GatewayStatus {
    /// Its UDP address.
    pub address: SocketAddr,
    /// Whether it answers.
    pub state: PathState,
    /// Round trip to it.
    pub rtt: Option<Duration>,
    /// Share of probes it left unanswered.
    pub loss: f32,
}

#[derive(Debug)]
struct PortFd(UdpPort);

impl std::os::fd::AsRawFd for PortFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.socket().as_raw_fd()
    }
}

impl VirtualGatewaySocket {
    /// Takes over `port`. Nothing passes until [`VirtualGatewaySocket::set_gateways`].
    ///
    /// # Errors
    /// As the system says. Must be called within a tokio runtime.
    pub fn new(port: UdpPort, mint: Arc<CidMint>) -> io::Result<Arc<Self>> {
        // TEST-NET-1 and the documentation prefix: no gateway is there.
        let virtual_address = match port.local_addr()? {
            SocketAddr::V4(_) => (Ipv4Addr::new(192, 0, 2, 1), 15443).into(),
            SocketAddr::V6(_) => (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 15443).into(),
        };
        // SAFETY: `PortFd` owns the socket, always names the same one, and is dropped after it is deregistered.
        let io = unsafe { AsyncFd::register(PortFd(port)) }?;
        Ok(Arc::new(Self {
            io,
            mint,
            virtual_address,
            paths: Mutex::new(Vec::new()),
            choice: ArcSwap::default(),
            recent: Mutex::default(),
            active: AtomicBool::new(false),
            woken: Notify::new(),
            foreign: AtomicU64::new(0),
        }))
    }

    /// The address under which QUIC knows all of them.
    pub fn virtual_address(&self) -> SocketAddr {
        self.virtual_address
    }

    /// Replaces the gateways' addresses; those that stay keep their state.
    pub fn set_gateways(&self, mut addresses: Vec<SocketAddr>) {
        addresses.truncate(GATEWAYS_MAX);
        let now = Instant::now();
        let mut paths = self.paths.lock();
        paths.retain(|path| addresses.contains(&path.address));
        for address in addresses {
            if !paths.iter().any(|path| path.address == address) {
                paths.push(GatewayPath { address, health: PathHealth::new(now, INTERVAL_BUSY, unix_ms()) });
            }
        }
        self.publish(&paths);
        drop(paths);
        self.woken.notify_one();
    }

    /// All gateways as they are seen.
    pub fn gateways(&self) -> Vec<GatewayStatus> {
        let status = |path: &GatewayPath| GatewayStatus {
            address: path.address,
            state: path.health.state(),
            rtt: path.health.rtt(),
            loss: path.health.loss(),
        };
        self.paths.lock().iter().map(status).collect()
    }

    /// Datagrams dropped because no gateway of ours sent them.
    pub fn foreign_datagrams(&self) -> u64 {
        self.foreign.load(Ordering::Relaxed)
    }

    /// The socket underneath: buffers and offload, for metrics.
    pub fn port(&self) -> &UdpPort {
        &self.io.get_ref().0
    }

    /// Probes the gateways until `shutdown`: every 50 ms while packets are sent and for a while after, else once a
    /// second.
    pub async fn run_probes(self: Arc<Self>, shutdown: CancellationToken) {
        let mut busy_until = Instant::now();
        loop {
            let wake_at = self.probe_round(&mut busy_until);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep_until(wake_at.into()) => {}
                () = self.woken.notified() => {}
            }
        }
    }

    /// Sends what is due; when to come back.
    fn probe_round(&self, busy_until: &mut Instant) -> Instant {
        let now = Instant::now();
        if self.active.swap(false, Ordering::Relaxed) {
            *busy_until = now + BUSY_FOR;
        }
        let interval = if now < *busy_until { INTERVAL_BUSY } else { INTERVAL_IDLE };
        let identity = self.mint.current();
        let mut paths = self.paths.lock();
        for path in paths.iter_mut() {
            // A path in doubt is asked often, whatever the traffic.
            let doubtful = !matches!(path.health.state(), PathState::Live);
            path.health.set_interval(now, if doubtful { INTERVAL_BUSY } else { interval });
            if let Some(sequence) = path.health.poll_probe(now) {
                let probe = Probe::request(identity.name.handle, sequence).to_local(&identity.keys);
                self.port().send_small(path.address, &probe);
            }
        }
        self.publish(&paths);
        paths.iter().map(|path| path.health.next_timeout()).min().unwrap_or(now + INTERVAL_IDLE)
    }

    fn publish(&self, paths: &[GatewayPath]) {
        let entry = |path: &GatewayPath| (address_id(path.address), path.address);
        let mut usable: Vec<_> = paths.iter().filter(|path| path.health.usable()).map(entry).collect();
        if usable.is_empty() {
            // Draining gateways still forward; dead ones may only have lost our probes.
            usable = paths.iter().filter(|path| path.health.state() == PathState::Draining).map(entry).collect();
        }
        if usable.is_empty() {
            usable = paths.iter().map(entry).collect();
        }
        let current = self.choice.load();
        let all: Vec<_> = paths.iter().map(|path| path.address).collect();
        if current.usable != usable || current.all != all {
            tracing::debug!(usable = usable.len(), of = all.len(), "gateways in use changed");
            let before = self.choice.swap(Arc::new(Choice { all, usable }));
            let now = self.choice.load();
            self.send_again(|id| before.of(id) != now.of(id));
        }
    }

    /// The path to `cluster` is another one from now on.
    pub fn path_changed(&self, cluster: ClusterId) {
        self.send_again(|id| id.cluster() == cluster);
    }

    /// Sends the last packets of the tunnels that `affected` picks once more: those before may have been lost.
    fn send_again(&self, affected: impl Fn(&Cid) -> bool) {
        let copies = self.recent.lock().copies(Instant::now(), affected);
        let choice = self.choice.load();
        for (id, packet) in copies {
            if let Some(gateway) = choice.of(&id) {
                self.port().send_small(gateway, &packet);
            }
        }
    }

    /// Takes probe answers out of a received batch.
    fn take_answers(&self, batch: &[u8], meta: &RecvMeta) {
        if meta.stride != PROBE_LEN && meta.len % meta.stride.max(1) != PROBE_LEN {
            return;
        }
        for datagram in batch.chunks(meta.stride.max(1)).filter(|datagram| datagram.len() == PROBE_LEN) {
            let Some(packet) = Packet::parse(datagram).filter(|packet| packet.dcid.kind() == CidKind::Probe) else {
                continue;
            };
            let probe = Probe::from_local(&packet.dcid, &self.mint.current().keys);
            let Some(probe) = probe.filter(|probe| probe.reply) else { continue };
            let mut paths = self.paths.lock();
            if let Some(path) = paths.iter_mut().find(|path| path.address == meta.addr) {
                path.health.on_reply(Instant::now(), probe.sequence, probe.draining);
            }
            self.publish(&paths);
        }
    }
}

fn address_id(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        std::net::IpAddr::V4(ip) => u64::from(ip.to_bits()),
        std::net::IpAddr::V6(ip) => ip.to_bits() as u64 ^ (ip.to_bits() >> 64) as u64,
    };
    ip << 16 ^ u64::from(address.port())
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl fmt::Debug for VirtualGatewaySocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtualGatewaySocket").field("gateways", &self.choice.load().all).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for VirtualGatewaySocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Poller { socket: self, waiting: Mutex::new(None) })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if !self.active.load(Ordering::Relaxed) && !self.active.swap(true, Ordering::Relaxed) {
            self.woken.notify_one();
        }
        // QUIC sends nothing else; whatever it may be is as lost as on a cut wire.
        let Some(packet) = Packet::parse(transmit.contents) else { return Ok(()) };
        let choice = self.choice.load();
        // No gateway known: QUIC sends again.
        let Some(destination) = choice.of(&packet.dcid) else { return Ok(()) };
        self.recent.lock().sent(Instant::now(), &packet, transmit.contents, transmit.segment_size);
        let transmit = Transmit {
            destination,
            ecn: transmit.ecn,
            contents: transmit.contents,
            segment_size: transmit.segment_size,
            src_ip: None,
        };
        self.io.try_io(Interest::WRITABLE, |port| port.0.send(&transmit))
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.io.poll_read_ready(cx))?;
            let Ok(received) = guard.try_io(|port| port.get_ref().0.recv(bufs, meta)) else { continue };
            let count = received?;
            let choice = self.choice.load();
            for (buf, meta) in bufs.iter().zip(meta.iter_mut()).take(count) {
                if !choice.all.contains(&meta.addr) {
                    self.foreign.fetch_add(1, Ordering::Relaxed);
                    // An empty entry is passed over.
                    meta.len = 0;
                    continue;
                }
                self.take_answers(&buf[..meta.len], meta);
                meta.addr = self.virtual_address;
                meta.dst_ip = None;
            }
            return Poll::Ready(Ok(count));
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.port().local_addr()
    }

    // The three capabilities: with the trait's defaults offload and MTU discovery are silently lost.
    fn max_transmit_segments(&self) -> usize {
        self.port().gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.port().gro_segments()
    }

    fn may_fragment(&self) -> bool {
        self.port().may_fragment()
    }
}

type Waiting = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// Waits for room; one per connection, for a shared one would keep a single waker.
struct Poller {
    socket: Arc<VirtualGatewaySocket>,
    waiting: Mutex<Option<Waiting>>,
}

impl fmt::Debug for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Poller")
    }
}

impl UdpPoller for Poller {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.waiting.lock();
        let future = waiting.get_or_insert_with(|| {
            let socket = self.socket.clone();
            Box::pin(async move { socket.io.writable().await.map(|mut guard| guard.retain_ready()) })
        });
        let ready = ready!(future.as_mut().poll(cx));
        *waiting = None;
        Poll::Ready(ready)
    }
}
