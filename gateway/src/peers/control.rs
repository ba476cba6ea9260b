//! One control connection: who the peer is, the control stream, and the streams of others.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use isthmus_identity::Tls;
use isthmus_model::{ClusterId, ClusterName};
use isthmus_tunnel::frame::{FrameError, read_frame, write_frame};
use isthmus_tunnel::probe::ProbeKey;
use isthmus_tunnel::ticket::TicketKeys;
use isthmus_wire::federation::link_control::Message;
use isthmus_wire::federation::{
    ClockSample, LinkControl, LinkHello, LinkProbeKeys, StreamOpen, TicketKey, TicketKeys as WireTicketKeys,
    stream_open,
};
use rustls::pki_types::CertificateDer;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Destination, PeerEvent, PeersShared, WantedPeer};

pub use stream_open::Class;

/// The first frames of a link, and of a stream, must come within this.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the peer is told our clock, by which its tickets expire.
const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// Control messages that wait to be written; they are told again or are out of date when this is full.
const OUTGOING_MAX: usize = 256;
const STREAM_VERSION: u32 = 1;

/// What [`super::Peers::run`] hears of control connections.
pub(super) enum LinkNews {
    /// An address is used from now on.
    Dialling { cluster: ClusterId, address: SocketAddr },
    /// It is used no more.
    Undialled { cluster: ClusterId, address: SocketAddr },
    /// The key of probes to a cluster.
    ProbeKey { cluster: ClusterId, key: Box<ProbeKey> },
    /// A control connection stands.
    Up { link: LinkHandle, dialled: Option<SocketAddr> },
}

/// A control connection that stands or stood. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LinkHandle(Arc<LinkState>);

#[derive(Debug)]
struct LinkState {
    number: u64,
    cluster: ClusterName,
    id: ClusterId,
    hello: LinkHello,
    replica: u8,
    connection: quinn::Connection,
    outgoing: mpsc::Sender<LinkControl>,
}

/// A stream of a link, after its opening frame.
#[derive(Debug)]
pub struct LinkStream {
    /// What travels on it.
    pub class: Class,
    /// Towards the peer.
    pub send: quinn::SendStream,
    /// From the peer.
    pub recv: quinn::RecvStream,
}

impl LinkHandle {
    /// Its number, never used again by this process.
    pub fn number(&self) -> u64 {
        self.0.number
    }

    /// The peer's cluster, as its certificate proves it.
    pub fn cluster(&self) -> &ClusterName {
        &self.0.cluster
    }

    /// The cluster's number.
    pub fn id(&self) -> ClusterId {
        self.0.id
    }

    /// The peer's replica.
    pub fn replica(&self) -> u8 {
        self.0.replica
    }

    /// Whether the peer is its cluster's member: Raft, follow and calls go there.
    pub fn is_member(&self) -> bool {
        self.0.hello.member
    }

    /// How the peer introduced itself.
    pub fn hello(&self) -> &LinkHello {
        &self.0.hello
    }

    /// Opens a stream of `class`.
    ///
    /// # Errors
    /// [`FrameError`] if the link is gone.
    pub async fn open_stream(&self, class: Class) -> Result<LinkStream, FrameError> {
        let (mut send, recv) = self.0.connection.open_bi().await.map_err(std::io::Error::from)?;
        write_frame(&mut send, &StreamOpen { version: STREAM_VERSION, class: class.into() }).await?;
        Ok(LinkStream { class, send, recv })
    }

    /// Queues a control message; false if the queue is full or the link gone.
    pub fn tell(&self, message: LinkControl) -> bool {
        self.0.outgoing.try_send(message).is_ok()
    }

    /// Round trip of the control connection.
    pub fn rtt(&self) -> Duration {
        self.0.connection.rtt()
    }

    /// Largest UDP payload that passed.
    pub fn mtu(&self) -> u16 {
        self.0.connection.stats().path.current_mtu
    }

    /// The peer's address.
    pub fn address(&self) -> SocketAddr {
        self.0.connection.remote_address()
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.0.connection.close_reason().is_some()
    }

    /// Waits until it is closed.
    pub async fn closed(&self) {
        self.0.connection.closed().await;
    }

    /// Closes it.
    pub fn close(&self, reason: &str) {
        self.0.connection.close(0u32.into(), reason.as_bytes());
    }
}

/// Serves one control connection to its end; says why it ended. `dialled` is the address and whom we expect there.
pub(super) async fn serve(
    shared: &Arc<PeersShared>,
    connection: quinn::Connection,
    dialled: Option<(SocketAddr, &WantedPeer)>,
) -> String {
    let greeted = match timeout(OPEN_TIMEOUT, greet(shared, &connection, dialled.is_some())).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(why)) => {
            connection.close(1u32.into(), why.as_bytes());
            return why;
        }
        Err(_) => {
            connection.close(1u32.into(), b"no hello");
            return "the peer did not introduce itself".into();
        }
    };
    let (link, mut control) = greeted;
    tracing::info!(cluster = %link.cluster(), replica = link.replica(), address = %link.address(), "link is up");
    let _standing = Standing::new(shared, &link);
    let up = LinkNews::Up { link: link.clone(), dialled: dialled.map(|(address, _)| address) };
    let _ = shared.news.send(up).await;
    let _ = shared.events.send(PeerEvent::Up(link.clone())).await;
    tokio::select! {
        error = connection.closed() => error.to_string(),
        why = control.run(shared, &link) => why,
        why = accept_streams(shared, &link) => why,
    }
}

/// A control connection that stands. Its end is told however it came about, also when its task was stopped.
struct Standing<'a> {
    shared: &'a PeersShared,
    link: LinkHandle,
}

impl<'a> Standing<'a> {
    fn new(shared: &'a PeersShared, link: &LinkHandle) -> Self {
        shared.links.lock().insert(link.number(), link.clone());
        Self { shared, link: link.clone() }
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        self.link.close("");
        self.shared.links.lock().remove(&self.link.number());
        // Who missed it in a full queue sees the handle closed at its next use.
        let _ = self.shared.events.try_send(PeerEvent::Down(self.link.clone()));
    }
}

/// Both ends of the control stream.
struct Control {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    outgoing: mpsc::Receiver<LinkControl>,
    /// The peer's last clock sample and when it came.
    sample: Option<(u64, Instant)>,
}

/// Opens or accepts the control stream and exchanges hellos.
async fn greet(
    shared: &Arc<PeersShared>,
    connection: &quinn::Connection,
    dialled: bool,
) -> Result<(LinkHandle, Control), String> {
    let peer = proved_peer(&shared.tls, connection)?;
    let wanted = shared.wanted(&peer).ok_or_else(|| format!("cluster {peer} is no member of the mesh that we know"))?;
    let (mut send, mut recv) = if dialled {
        let (mut send, recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
        let open = StreamOpen { version: STREAM_VERSION, class: Class::Control.into() };
        write_frame(&mut send, &open).await.map_err(|error| error.to_string())?;
        (send, recv)
    } else {
        let (send, mut recv) = connection.accept_bi().await.map_err(|error| error.to_string())?;
        match read_frame::<StreamOpen>(&mut recv).await {
            Ok(Some(open)) if open.class() == Class::Control => (send, recv),
            _ => return Err("a link begins with its control stream".into()),
        }
    };
    let config = &shared.config;
    let hello = LinkHello {
        cluster: config.cluster.to_string(),
        cluster_id: config.cluster_id.0.into(),
        replica: config.replica.into(),
        version: config.version.clone(),
        member: config.member,
        flows: shared.router.workers() as u32,
        form_max: config.form_max,
    };
    write_frame(&mut send, &control(Message::Hello(hello))).await.map_err(|error| error.to_string())?;
    let first = read_frame::<LinkControl>(&mut recv).await.map_err(|error| error.to_string())?;
    let Some(Message::Hello(hello)) = first.and_then(|first| first.message) else {
        return Err("no hello".into());
    };
    if hello.cluster != peer.as_str() || hello.cluster_id != u32::from(wanted.id.0) {
        return Err(format!("the peer says {} ({}), its certificate {peer}", hello.cluster, hello.cluster_id));
    }
    let replica = u8::try_from(hello.replica).map_err(|_| "an impossible replica number".to_owned())?;
    let (outgoing, outgoing_next) = mpsc::channel(OUTGOING_MAX);
    static NUMBERS: AtomicU64 = AtomicU64::new(1);
    let link = LinkHandle(Arc::new(LinkState {
        number: NUMBERS.fetch_add(1, Ordering::Relaxed),
        cluster: peer,
        id: wanted.id,
        hello,
        replica,
        connection: connection.clone(),
        outgoing,
    }));
    Ok((link, Control { send, recv, outgoing: outgoing_next, sample: None }))
}

/// The cluster whose gateway this is, read from the verified path.
fn proved_peer(tls: &Tls, connection: &quinn::Connection) -> Result<ClusterName, String> {
    let identity = connection.peer_identity().ok_or("the peer showed no certificate")?;
    let chain = identity.downcast_ref::<Vec<CertificateDer<'static>>>().ok_or("the peer showed no certificate")?;
    let peer = tls.peer_identity(chain).map_err(|error| error.to_string())?;
    match peer.cluster.clone() {
        Some(cluster) if peer.is_gateway() => Ok(cluster),
        _ => Err(format!("{} is no gateway", peer.spiffe)),
    }
}

impl Control {
    /// Writes and reads control messages until the stream or the link ends.
    async fn run(&mut self, shared: &Arc<PeersShared>, link: &LinkHandle) -> String {
        let mut masters = shared.masters.clone();
        let mut clock = tokio::time::interval(CLOCK_INTERVAL);
        let (frames, mut frames_next) = mpsc::channel(1);
        let recv = &mut self.recv;
        // Reading a frame must not be cut off in its middle: it has a future of its own.
        let read = async move {
            loop {
                let frame = read_frame::<LinkControl>(recv).await;
                let end = !matches!(frame, Ok(Some(_)));
                if frames.send(frame).await.is_err() || end {
                    return;
                }
            }
        };
        let mut read = std::pin::pin!(read);
        let mut reading = true;
        if let Err(error) = send_keys(&mut self.send, shared, link.id()).await {
            return error.to_string();
        }
        loop {
            let written = tokio::select! {
                () = &mut read, if reading => { reading = false; Ok(()) }
                frame = frames_next.recv() => match frame {
                    Some(Ok(Some(LinkControl { message: Some(message) }))) => {
                        take(shared, link, &mut self.sample, message).await;
                        Ok(())
                    }
                    Some(Ok(Some(LinkControl { message: None }))) => Ok(()),
                    Some(Ok(None)) | None => return "the peer ended the control stream".into(),
                    Some(Err(error)) => return error.to_string(),
                },
                Some(message) = self.outgoing.recv() => write_frame(&mut self.send, &message).await,
                Ok(()) = masters.changed() => send_keys(&mut self.send, shared, link.id()).await,
                _ = clock.tick() => {
                    let (echo_unix_ms, held_ms) =
                        self.sample.map_or((0, 0), |(sample, came)| (sample, came.elapsed().as_millis() as u32));
                    let sample = ClockSample { unix_ms: unix_ms(), echo_unix_ms, held_ms };
                    write_frame(&mut self.send, &control(Message::Clock(sample))).await
                }
            };
            if let Err(error) = written {
                return error.to_string();
            }
        }
    }
}

/// Our probe key and ticket keys for this peer, and our clock with them.
async fn send_keys(send: &mut quinn::SendStream, shared: &PeersShared, peer: ClusterId) -> Result<(), FrameError> {
    if let Some(key) = shared.probe_key_in(peer) {
        let (generation, key) = key.parts();
        let message = LinkProbeKeys { key: key.to_vec(), generation: generation.into() };
        write_frame(send, &control(Message::ProbeKeys(message))).await?;
    }
    let tickets = shared.masters.borrow().keys_for(peer);
    let message = WireTicketKeys {
        keys: tickets
            .parts()
            .map(|(generation, key)| TicketKey { generation: generation.into(), key: key.to_vec() })
            .collect(),
        current_generation: tickets.current().into(),
    };
    write_frame(send, &control(Message::TicketKeys(message))).await?;
    let sample = ClockSample { unix_ms: unix_ms(), echo_unix_ms: 0, held_ms: 0 };
    write_frame(send, &control(Message::Clock(sample))).await
}

/// Acts on one control message of the peer.
async fn take(shared: &PeersShared, link: &LinkHandle, sample: &mut Option<(u64, Instant)>, message: Message) {
    match message {
        Message::Hello(_) => {}
        Message::ProbeKeys(keys) => {
            let key = keys.key.as_slice().try_into().ok().zip(u8::try_from(keys.generation).ok());
            if let Some((key, generation)) = key {
                let key = Box::new(ProbeKey::new(generation, key));
                let _ = shared.news.send(LinkNews::ProbeKey { cluster: link.id(), key }).await;
            }
        }
        Message::TicketKeys(keys) => match parsed_keys(shared.config.cluster_id, link.id(), &keys) {
            Some(keys) => {
                let mut destinations = shared.destinations.lock();
                let offset = destinations.get(&link.id()).map_or(0, |known| known.clock_offset_ms);
                destinations.insert(link.id(), Destination { keys, clock_offset_ms: offset });
            }
            None => tracing::warn!(cluster = %link.cluster(), "ticket keys that cannot be; ignored"),
        },
        Message::Clock(clock) => {
            *sample = Some((clock.unix_ms, Instant::now()));
            // The sample is half a round trip old; tickets' 4 s units forgive the rest.
            let there = clock.unix_ms as i64 + (link.rtt().as_millis() / 2) as i64;
            if let Some(destination) = shared.destinations.lock().get_mut(&link.id()) {
                destination.clock_offset_ms = there - unix_ms() as i64;
            }
        }
        other @ (Message::DialNotice(_) | Message::Draining(_) | Message::Traffic(_)) => {
            let message = control(other);
            let _ = shared.events.send(PeerEvent::Control(link.clone(), message)).await;
        }
    }
}

fn parsed_keys(source: ClusterId, destination: ClusterId, wire: &WireTicketKeys) -> Option<TicketKeys> {
    let mut keys = Vec::new();
    for key in &wire.keys {
        keys.push((u8::try_from(key.generation).ok()?, key.key.as_slice().try_into().ok()?));
    }
    TicketKeys::from_parts(source, destination, u8::try_from(wire.current_generation).ok()?, keys)
}

/// Takes the peer's streams until the link ends.
async fn accept_streams(shared: &Arc<PeersShared>, link: &LinkHandle) -> String {
    loop {
        let (mut send, mut recv) = match link.0.connection.accept_bi().await {
            Ok(stream) => stream,
            Err(error) => return error.to_string(),
        };
        // Streams open rarely, and the opening frame comes with the stream: one after the other is soon enough.
        let class = match timeout(OPEN_TIMEOUT, read_frame::<StreamOpen>(&mut recv)).await {
            Ok(Ok(Some(open))) if open.version == STREAM_VERSION => open.class(),
            _ => Class::Unspecified,
        };
        if matches!(class, Class::Unspecified | Class::Control) {
            let _ = send.reset(1u32.into());
            let _ = recv.stop(1u32.into());
            continue;
        }
        let stream = LinkStream { class, send, recv };
        if shared.events.send(PeerEvent::Stream(link.clone(), stream)).await.is_err() {
            return "this gateway is going down".into();
        }
    }
}

fn control(message: Message) -> LinkControl {
    LinkControl { message: Some(message) }
}

pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
