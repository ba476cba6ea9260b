//! The packet path: one thread per core that forwards datagrams by their connection ID.
//!
//! What a datagram's next hop is, [`isthmus_tunnel::route`] decides; here are sockets, batches and threads. No
//! worker ever waits for anything but its sockets: tables are swapped underneath, and what others must hear goes
//! into bounded channels that drop when full. It can forward before any link is up: tables are all it needs.
//! Links and their probes are in [`crate::peers`].

mod batch;
mod counters;
mod worker;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use arc_swap::ArcSwap;
use bytes::Bytes;
use isthmus_model::ClusterId;
use isthmus_tunnel::route::{DropReason, FlowSocket, LinkTable, LocalTable, PeerProbe, Refusal};
use isthmus_tunnel::socket::UdpPort;
use quinn_udp::EcnCodepoint;
use rustc_hash::FxHashMap;
use tokio::sync::mpsc;

pub use counters::{RouterStats, WorkerCounters};

/// Datagrams for control connections that wait to be read. Control traffic is sparse; a flood of first packets
/// fills this and nothing else.
const CONTROL_QUEUE: usize = 1024;
/// Events that wait to be looked at.
const EVENT_QUEUE: usize = 4096;

/// Sockets and workers of one gateway replica, bound and not yet running.
pub struct Router {
    shared: Arc<RouterShared>,
    /// Datagrams for this replica's control connections.
    pub control: mpsc::Receiver<ControlDatagram>,
    /// What the workers saw.
    pub events: mpsc::Receiver<RouterEvent>,
}

/// What all workers share.
pub struct RouterShared {
    local: ArcSwap<LocalTable>,
    links: ArcSwap<Links>,
    /// One per worker, all on the public address.
    public: Vec<UdpPort>,
    /// One per worker, each with a port of its own: the flows of the links that this replica dials.
    dial: Vec<UdpPort>,
    control: mpsc::Sender<ControlDatagram>,
    events: mpsc::Sender<RouterEvent>,
    counters: Vec<WorkerCounters>,
    stop: AtomicBool,
}

/// The links as workers see them.
#[derive(Debug, Default)]
pub struct Links {
    /// Where packets go.
    pub table: LinkTable,
    /// What went there.
    pub traffic: FxHashMap<ClusterId, Arc<LinkTraffic>>,
}

/// Bytes and datagrams forwarded to and from one cluster.
#[derive(Debug, Default)]
pub struct LinkTraffic {
    /// Payload bytes forwarded to it.
    pub bytes_out: AtomicU64,
    /// Payload bytes that came from it.
    pub bytes_in: AtomicU64,
    /// Datagrams forwarded to it.
    pub datagrams_out: AtomicU64,
    /// Datagrams that came from it.
    pub datagrams_in: AtomicU64,
}

impl LinkTraffic {
    /// Datagrams in both directions.
    pub fn datagrams(&self) -> u64 {
        self.datagrams_out.load(Ordering::Relaxed) + self.datagrams_in.load(Ordering::Relaxed)
    }
}

/// A datagram of a control connection.
#[derive(Debug)]
pub struct ControlDatagram {
    /// Where it came from.
    pub from: SocketAddr,
    /// Its ECN bits.
    pub ecn: Option<EcnCodepoint>,
    /// The datagram.
    pub payload: Bytes,
}

/// Something a worker saw that others must know.
#[derive(Debug)]
pub enum RouterEvent {
    /// An authentic probe of a peer's flow, answered already.
    Probed {
        /// Where it came from, and so where the flow's packets go.
        from: SocketAddr,
        /// The socket it came to.
        socket: FlowSocket,
        /// Whose it was.
        probe: PeerProbe,
    },
    /// The answer to a probe of ours.
    Answered {
        /// When.
        at: Instant,
        /// The peer's address.
        from: SocketAddr,
        /// Whose it was.
        probe: PeerProbe,
    },
    /// A dial that was refused; its source is to be told.
    Refused(DropReason, Refusal),
}

impl Router {
    /// Binds the sockets of `workers` workers on `listen` (UDP 15443). The tables may be those of the last run.
    ///
    /// # Errors
    /// As the system says: the port is taken, or may not be bound.
    pub fn bind(listen: SocketAddr, workers: usize, local: LocalTable) -> io::Result<Self> {
        let (control, control_next) = mpsc::channel(CONTROL_QUEUE);
        let (events, events_next) = mpsc::channel(EVENT_QUEUE);
        // A second process on the port would silently take a share of the packets: the first bind is exclusive.
        drop(UdpPort::bind(listen, false)?);
        let public = (0..workers).map(|_| UdpPort::bind(listen, true)).collect::<io::Result<_>>()?;
        let any_port = SocketAddr::new(listen.ip(), 0);
        let dial = (0..workers).map(|_| UdpPort::bind(any_port, false)).collect::<io::Result<_>>()?;
        let shared = RouterShared {
            local: ArcSwap::from_pointee(local),
            links: ArcSwap::default(),
            public,
            dial,
            control,
            events,
            counters: (0..workers).map(|_| WorkerCounters::default()).collect(),
            stop: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), control: control_next, events: events_next })
    }

    /// The tables, counters and sockets; lives as long as whoever needs it.
    pub fn shared(&self) -> Arc<RouterShared> {
        self.shared.clone()
    }

    /// Starts the workers, each a thread of its own. Dropping the result stops and joins them.
    ///
    /// # Errors
    /// If the system gives no more threads.
    pub fn start(shared: &Arc<RouterShared>) -> io::Result<RunningRouter> {
        let mut running = RunningRouter { shared: shared.clone(), threads: Vec::new() };
        for index in 0..shared.public.len() {
            let shared = shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("router-{index}"))
                .spawn(move || worker::Worker::new(shared, index).run())?;
            running.threads.push(thread);
        }
        Ok(running)
    }
}

/// Workers that forward. Stopped and joined when dropped.
pub struct RunningRouter {
    shared: Arc<RouterShared>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Drop for RunningRouter {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a router thread had panicked");
            }
        }
    }
}

impl RouterShared {
    /// What the router knows of its own cluster.
    pub fn local(&self) -> Arc<LocalTable> {
        self.local.load_full()
    }

    /// Replaces it; takes effect with the next batch.
    pub fn set_local(&self, local: LocalTable) {
        self.local.store(Arc::new(local));
    }

    /// The links as the workers see them.
    pub fn links(&self) -> Arc<Links> {
        self.links.load_full()
    }

    pub(crate) fn set_links(&self, links: Links) {
        self.links.store(Arc::new(links));
    }

    /// Threads, and so flows of every link that this replica dials.
    pub fn workers(&self) -> usize {
        self.public.len()
    }

    /// The public address.
    ///
    /// # Errors
    /// As the system says.
    pub fn public_address(&self) -> io::Result<SocketAddr> {
        self.public[0].local_addr()
    }

    /// The socket of a flow; worker `index` sends what is public from its own.
    pub(crate) fn socket(&self, socket: FlowSocket, index: usize) -> &UdpPort {
        match socket {
            FlowSocket::Public => &self.public[index],
            FlowSocket::Dial(flow) => &self.dial[usize::from(flow) % self.dial.len()],
        }
    }

    /// Counters of all workers together.
    pub fn stats(&self) -> RouterStats {
        counters::sum(&self.counters, &self.public)
    }
}
