//! TCP across the loopback WAN: delayed, rated and partitioned, never damaged.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, mpsc},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Gateways, relay_address};
use crate::{LabError, Wan, shaper::Fate, wan::ClusterNumber};

/// The thread that relays TCP connections.
#[derive(Debug)]
pub(super) struct TcpRelay {
    open: mpsc::UnboundedSender<(std::net::TcpListener, Ipv4Addr, u16)>,
    shutdown: CancellationToken,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl TcpRelay {
    pub(super) fn start(wan: Wan, gateways: Gateways) -> Result<Self, LabError> {
        let (open, opened) = mpsc::unbounded_channel();
        let shutdown = CancellationToken::new();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(LabError::io("start the TCP relay's runtime"))?;
        let carrier = Arc::new(Carrier { wan, gateways, connections: Semaphore::new(CONNECTIONS_MAX) });
        let stop = shutdown.clone();
        let thread = thread::Builder::new()
            .name("lab-relay-tcp".into())
            .spawn(move || runtime.block_on(carrier.run(opened, stop)))
            .map_err(LabError::io("start the TCP relay's thread"))?;
        Ok(Self { open, shutdown, thread: Mutex::new(Some(thread)) })
    }

    pub(super) fn open(&self, local: Ipv4Addr, port: u16) -> Result<(), LabError> {
        let relay = SocketAddrV4::new(relay_address(local), port);
        let what = || format!("bind the relay {relay}/tcp");
        let listener = std::net::TcpListener::bind(relay).map_err(LabError::io(what()))?;
        listener.set_nonblocking(true).map_err(LabError::io(what()))?;
        let _ = self.open.send((listener, local, port));
        Ok(())
    }
}

impl Drop for TcpRelay {
    fn drop(&mut self) {
        self.shutdown.cancel();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

struct Carrier {
    wan: Wan,
    gateways: Gateways,
    connections: Semaphore,
}

impl Carrier {
    async fn run(
        self: Arc<Self>,
        mut opened: mpsc::UnboundedReceiver<(std::net::TcpListener, Ipv4Addr, u16)>,
        shutdown: CancellationToken,
    ) {
        let tasks = TaskTracker::new();
        loop {
            let next = tokio::select! {
                () = shutdown.cancelled() => break,
                next = opened.recv() => next,
            };
            let Some((listener, local, port)) = next else { break };
            let (carrier, stop) = (self.clone(), shutdown.clone());
            let accepted = tasks.clone();
            tasks.spawn(async move { carrier.accept(listener, local, port, &accepted, stop).await });
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn accept(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        local: Ipv4Addr,
        port: u16,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) {
        let Ok(listener) = TcpListener::from_std(listener) else { return };
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, source)) = accepted else {
                // Out of descriptors, most likely: a pause lets open connections give some back.
                sleep(ACCEPT_PAUSE).await;
                continue;
            };
            let (carrier, stop) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    // An error of either side closes both, which is all that a relay can say.
                    _ = carrier.relay(stream, source, SocketAddrV4::new(local, port)) => {}
                }
            });
        }
    }

    async fn relay(&self, near: TcpStream, source: SocketAddr, to: SocketAddrV4) -> io::Result<()> {
        let Ok(_permit) = self.connections.try_acquire() else { return Ok(()) };
        let SocketAddr::V4(source) = source else { return Ok(()) };
        let Some(to_cluster) = self.gateways.cluster_of(*to.ip()) else { return Ok(()) };
        // A command (`isthmus join`) dials from no cluster's address: it stands beside its target.
        let from_cluster = cluster_by_octet(source).unwrap_or(to_cluster);
        // The handshake's own round trip.
        self.cross(from_cluster, to_cluster, HANDSHAKE_BYTES).await;
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(relay_address(*source.ip()).into(), 0))?;
        let far = socket.connect(to.into()).await?;
        self.cross(to_cluster, from_cluster, HANDSHAKE_BYTES).await;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
        let there = self.copy(near_read, far_write, from_cluster, to_cluster);
        let back = self.copy(far_read, near_write, to_cluster, from_cluster);
        futures_util::future::try_join(there, back).await.map(drop)
    }

    /// One direction: reading goes on while earlier chunks are under way.
    async fn copy(
        &self,
        mut from: impl AsyncReadExt + Unpin,
        mut to: impl AsyncWriteExt + Unpin,
        from_cluster: ClusterNumber,
        to_cluster: ClusterNumber,
    ) -> io::Result<()> {
        let (sender, mut chunks) = mpsc::channel::<(Duration, Bytes)>(CHUNKS_MAX);
        let read = async move {
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(CHUNK_BYTES);
                let len = from.read_buf(&mut buffer).await?;
                let due = self.arrival(from_cluster, to_cluster, len + HANDSHAKE_BYTES).await;
                // An empty chunk is the end of the stream, and travels as long as the others.
                if sender.send((due, buffer.split().freeze())).await.is_err() || len == 0 {
                    return io::Result::Ok(());
                }
            }
        };
        let write = async move {
            while let Some((due, chunk)) = chunks.recv().await {
                sleep(due.saturating_sub(self.wan.now())).await;
                if chunk.is_empty() {
                    break;
                }
                to.write_all(&chunk).await?;
            }
            to.shutdown().await
        };
        futures_util::future::try_join(read, write).await.map(drop)
    }

    async fn cross(&self, from: ClusterNumber, to: ClusterNumber, len: usize) {
        let due = self.arrival(from, to, len).await;
        sleep(due.saturating_sub(self.wan.now())).await;
    }

    /// When a chunk arrives. A dropped one is offered again, as TCP would; so a partition holds.
    async fn arrival(&self, from: ClusterNumber, to: ClusterNumber, len: usize) -> Duration {
        loop {
            match self.wan.offer(from, to, self.wan.now(), len, false) {
                Fate::Deliver(at) | Fate::Twice(at, _) => return at,
                Fate::Drop(_) => sleep(RETRANSMIT).await,
            }
        }
    }
}

/// The cluster whose range an address is in.
fn cluster_by_octet(address: SocketAddrV4) -> Option<ClusterNumber> {
    match address.ip().octets() {
        [127, cluster @ 1..=99, ..] => Some(cluster),
        _ => None,
    }
}

/// Joins and fallback links: a handful; the bound keeps a loop in a peer from eating descriptors.
const CONNECTIONS_MAX: usize = 512;
/// In flight per direction: 256 chunks of 16 KiB are 4 MiB, a window for 300 Mbit/s at 100 ms.
const CHUNKS_MAX: usize = 256;
const CHUNK_BYTES: usize = 16 * 1024;
/// The least that Linux waits before it sends again.
const RETRANSMIT: Duration = Duration::from_millis(200);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Headers of a segment.
const HANDSHAKE_BYTES: usize = 40;
