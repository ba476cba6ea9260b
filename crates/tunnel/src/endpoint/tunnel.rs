//! One tunnel: opening streams, noticing that it got silent, closing it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use isthmus_model::ClusterId;
use parking_lot::Mutex;
use quinn::VarInt;
use tokio::sync::Notify;

use super::config::{STREAMS_FIRST, STREAMS_MAX};
use super::{EndpointName, Shared};
use crate::carrier::{Answer, Body, BoxFuture, ByteIo, Carrier, CarrierError, CarrierErrorKind, ServiceTarget};
use crate::http::{self, HttpError, SendError};
use crate::stream::{ByteStream, ResetCode, StreamHeader, StreamKind};

/// A tunnel whose data goes unacknowledged for at least this long is suspect.
const SUSPECT_AFTER_MIN: Duration = Duration::from_secs(1);
/// How long a tunnel has to show that it survived a change of path.
const RECOVERY_AFTER_CHANGE: Duration = Duration::from_secs(1);
/// How long a stream waits for the peer to permit more of them.
const PERMISSION_PATIENCE: Duration = Duration::from_secs(10);
/// How often an open tunnel with streams is looked at.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// Why a tunnel is closed (the application error code of CONNECTION_CLOSE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseReason {
    /// Not needed any more.
    Done,
    /// This process ends.
    Shutdown,
    /// The peer's process is known to be gone.
    Gone,
    /// The peer may not talk to us: unknown, evicted, or its grants ended.
    Denied,
    /// A newer tunnel took its place.
    Replaced,
}

impl CloseReason {
    pub(super) fn code(self) -> VarInt {
        VarInt::from_u32(self as u32)
    }
}

/// Why no stream was opened. Nothing was processed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The peer permits no more streams now: a second tunnel is due.
    #[error("the tunnel has as many streams as its peer permits")]
    Full,
    /// The tunnel is closed.
    #[error("the tunnel is closed")]
    Closed(#[source] quinn::ConnectionError),
}

/// Figures of one tunnel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TunnelStats {
    /// Smoothed round trip, end to end.
    pub rtt: Duration,
    /// UDP payload bytes sent.
    pub bytes_sent: u64,
    /// UDP payload bytes received.
    pub bytes_received: u64,
    /// Packets sent.
    pub packets_sent: u64,
    /// Packets declared lost.
    pub packets_lost: u64,
    /// Congestion window in bytes.
    pub congestion_window: u64,
    /// Largest UDP payload in use.
    pub mtu: u16,
    /// Streams open now.
    pub streams: u32,
}

pub(crate) struct TunnelState<P> {
    pub(super) connection: quinn::Connection,
    pub(super) peer: P,
    pub(super) usage: Arc<Usage>,
    closed_as: Mutex<Option<CloseReason>>,
    streams_allowed: AtomicU32,
    silence: Mutex<Silence>,
    suspect: AtomicBool,
}

/// How many streams are open, and a bell for the attendant.
#[derive(Debug, Default)]
pub(super) struct Usage {
    open: AtomicU32,
    busy: Notify,
}

/// Counts one stream as open until its last clone is dropped.
#[derive(Debug, Clone)]
pub(crate) struct StreamGuard(#[expect(dead_code, reason = "held for its drop")] Arc<OpenStream>);

#[derive(Debug)]
struct OpenStream(Arc<Usage>);

impl StreamGuard {
    pub(super) fn new(usage: &Arc<Usage>) -> Self {
        if usage.open.fetch_add(1, Ordering::Relaxed) == 0 {
            usage.busy.notify_one();
        }
        Self(Arc::new(OpenStream(usage.clone())))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Since when sent data waits for an acknowledgement.
#[derive(Debug, Default)]
struct Silence {
    acks: u64,
    sent: u64,
    since: Option<Instant>,
    /// The path changed: acknowledgements must come by then.
    must_recover_by: Option<Instant>,
}

impl Silence {
    /// Takes in the frame counters; whether the tunnel is suspect.
    fn look(&mut self, now: Instant, acks: u64, sent: u64, patience: Duration) -> bool {
        if acks != self.acks {
            *self = Self { acks, sent, since: None, must_recover_by: None };
        } else if sent != self.sent {
            self.since.get_or_insert(now);
        }
        let silent = self.since.is_some_and(|since| now.saturating_duration_since(since) >= patience);
        silent || (self.since.is_some() && self.must_recover_by.is_some_and(|by| now >= by))
    }
}

impl<P> TunnelState<P> {
    fn new(connection: quinn::Connection, peer: P) -> Arc<Self> {
        Arc::new(Self {
            connection,
            peer,
            usage: Arc::default(),
            closed_as: Mutex::new(None),
            streams_allowed: AtomicU32::new(STREAMS_FIRST),
            silence: Mutex::default(),
            suspect: AtomicBool::new(false),
        })
    }

    pub(super) fn close(&self, reason: CloseReason) {
        self.closed_as.lock().get_or_insert(reason);
        self.connection.close(reason.code(), b"");
    }

    pub(super) fn path_changed(&self, now: Instant) {
        self.silence.lock().must_recover_by = Some(now + RECOVERY_AFTER_CHANGE);
    }

    /// Doubles what the peer may open when it uses four fifths of it.
    pub(super) fn allow_more_streams(&self) {
        let allowed = self.streams_allowed.load(Ordering::Relaxed);
        let open = self.usage.open.load(Ordering::Relaxed);
        if open * 5 >= allowed * 4 && allowed < STREAMS_MAX {
            let allowed = (allowed * 2).min(STREAMS_MAX);
            self.streams_allowed.store(allowed, Ordering::Relaxed);
            self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(allowed));
        }
    }

    fn watch(&self, now: Instant) -> bool {
        let stats = self.connection.stats();
        let tx = &stats.frame_tx;
        // A probe timeout sends again whatever is outstanding and asks for an immediate ACK. So do probes of a larger
        // MTU, which may well be lost and do not count.
        let probes = (tx.ping + tx.immediate_ack).saturating_sub(2 * stats.path.sent_plpmtud_probes);
        let sent = tx.stream + tx.datagram + tx.crypto + tx.new_connection_id + tx.retire_connection_id + probes;
        // PTO = rtt + 4 rttvar + max_ack_delay (RFC 9002 §6.2); without rttvar at hand, its start value rtt / 2.
        let pto = stats.path.rtt * 3 + Duration::from_millis(25);
        let patience = (pto * 3).max(SUSPECT_AFTER_MIN);
        let suspect = self.silence.lock().look(now, stats.frame_rx.acks, sent, patience);
        if suspect != self.suspect.swap(suspect, Ordering::Relaxed) {
            tracing::debug!(suspect, rtt = ?stats.path.rtt, "tunnel changed");
        }
        suspect
    }

    pub(super) fn stats(&self) -> TunnelStats {
        let stats = self.connection.stats();
        TunnelStats {
            rtt: stats.path.rtt,
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
            packets_sent: stats.path.sent_packets,
            packets_lost: stats.path.lost_packets,
            congestion_window: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            streams: self.usage.open.load(Ordering::Relaxed),
        }
    }
}

impl<P> Drop for TunnelState<P> {
    fn drop(&mut self) {
        self.connection.close(CloseReason::Done.code(), b"");
    }
}

/// Looks after a tunnel while streams are open: keeps it heard, and notices silence. Ends with the tunnel.
async fn attend<P: Send + Sync + 'static>(
    state: Weak<TunnelState<P>>,
    usage: Arc<Usage>,
    connection: quinn::Connection,
    keep_alive: Duration,
) {
    let mut heard = (0, Instant::now());
    loop {
        let idle = usage.open.load(Ordering::Relaxed) == 0;
        tokio::select! {
            _ = connection.closed() => return,
            // UDP flows are for later; until then whatever comes is the peer's keep-alive.
            datagram = connection.read_datagram() => if datagram.is_err() { return },
            () = usage.busy.notified(), if idle => {}
            () = tokio::time::sleep(WATCH_INTERVAL), if !idle => {
                let Some(state) = state.upgrade() else { return };
                let now = Instant::now();
                // quinn doubles its probe timeout without end: after an outage of 10 s it would look again 10 s later.
                let patience = if state.watch(now) { SUSPECT_AFTER_MIN } else { keep_alive };
                let received = connection.stats().udp_rx.datagrams;
                if received != heard.0 {
                    heard = (received, now);
                } else if now.duration_since(heard.1) >= patience {
                    heard.1 = now;
                    // The smallest thing that must be acknowledged and that can be asked of quinn.
                    let _ = connection.send_datagram(bytes::Bytes::from_static(&[0]));
                }
            }
        }
    }
}

fn start<P: Send + Sync + 'static>(shared: &Shared<P>, connection: quinn::Connection, peer: P) -> Arc<TunnelState<P>> {
    let state = TunnelState::new(connection.clone(), peer);
    let attendant = attend(Arc::downgrade(&state), state.usage.clone(), connection, shared.config.keep_alive);
    shared.tasks.spawn(attendant);
    state
}

pub(super) fn accepted<P: Send + Sync + 'static>(
    shared: &Shared<P>,
    connection: quinn::Connection,
    peer: P,
) -> Arc<TunnelState<P>> {
    start(shared, connection, peer)
}

pub(super) fn dialled<P: Send + Sync + 'static>(
    shared: &Shared<P>,
    connection: quinn::Connection,
    peer: P,
    cluster: ClusterId,
    name: EndpointName,
) -> Tunnel<P> {
    let state = start(shared, connection, peer);
    let mut dialled = shared.dialled.lock();
    // What has ended meanwhile makes room, so that the table is bounded by the tunnels that live.
    dialled.retain(|_, tunnels| {
        tunnels.retain(|tunnel| tunnel.strong_count() > 0);
        !tunnels.is_empty()
    });
    dialled.entry((cluster, name)).or_default().push(Arc::downgrade(&state));
    Tunnel { state }
}

/// A tunnel that we dialled. Cheap to clone; closed when the last clone is dropped.
pub struct Tunnel<P> {
    state: Arc<TunnelState<P>>,
}

impl<P> Clone for Tunnel<P> {
    fn clone(&self) -> Self {
        Self { state: self.state.clone() }
    }
}

impl<P: Clone + Send + Sync + 'static> Tunnel<P> {
    /// Who is at the other end, as proved by the handshake.
    pub fn peer(&self) -> &P {
        &self.state.peer
    }

    /// Opens a byte stream; the header is sent with the first bytes or at once. Costs no round trip.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self, header: &StreamHeader) -> Result<ByteStream, OpenError> {
        let mut stream = self.bare_stream().await?;
        // An error shows at the first read or write, with its reason.
        let _ = stream.send.write_chunk(header.encode().into()).await;
        Ok(stream)
    }

    async fn bare_stream(&self) -> Result<ByteStream, OpenError> {
        let guard = StreamGuard::new(&self.state.usage);
        let opening = self.state.connection.open_bi();
        // quinn waits for the peer's permission. While a gateway restarts that takes as long as the restart; who
        // wants to wait less has a second tunnel, or drops this future.
        match tokio::time::timeout(PERMISSION_PATIENCE, opening).await {
            Ok(Ok((send, recv))) => Ok(ByteStream::counted(send, recv, &guard)),
            Ok(Err(error)) => Err(OpenError::Closed(error)),
            Err(_) => Err(OpenError::Full),
        }
    }

    /// Smoothed round trip, end to end.
    pub fn rtt(&self) -> Duration {
        self.state.connection.rtt()
    }

    /// Streams open now.
    pub fn streams(&self) -> u32 {
        self.state.usage.open.load(Ordering::Relaxed)
    }

    /// Figures for the log and the dashboard.
    pub fn stats(&self) -> TunnelStats {
        self.state.stats()
    }

    /// Whether sent data went unacknowledged for max(3 PTO, 1 s): new requests go elsewhere, open streams stay.
    pub fn is_suspect(&self) -> bool {
        self.state.suspect.load(Ordering::Relaxed) || self.is_closed()
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        self.state.connection.close_reason().is_some()
    }

    /// Closes it and all its streams.
    pub fn close(&self, reason: CloseReason) {
        self.state.close(reason);
    }

    /// Waits until it is closed; our own reason, if it was us.
    pub async fn closed(&self) -> (quinn::ConnectionError, Option<CloseReason>) {
        let error = self.state.connection.closed().await;
        (error, *self.state.closed_as.lock())
    }

    fn header(target: &ServiceTarget, kind: StreamKind) -> StreamHeader {
        StreamHeader { kind, host: target.host.clone(), port: target.port }
    }
}

fn not_opened(error: OpenError) -> CarrierError {
    let kind = match error {
        OpenError::Full => CarrierErrorKind::Reset(ResetCode::Refused),
        OpenError::Closed(error) => CarrierErrorKind::Lost(error.to_string()),
    };
    CarrierError { kind, not_processed: true }
}

fn failed(error: SendError) -> CarrierError {
    let error = match error {
        SendError::Body(source) => {
            return CarrierError { kind: CarrierErrorKind::Body(source), not_processed: false };
        }
        SendError::Http(error) => error,
    };
    let not_processed = error.not_processed();
    let kind = match error {
        HttpError::Reset(code) => CarrierErrorKind::Reset(code),
        HttpError::Lost(error) => CarrierErrorKind::Lost(error.to_string()),
        HttpError::Protocol(text) => CarrierErrorKind::Protocol(text),
        HttpError::Head(_) => CarrierErrorKind::Unsendable("its head is over 64 KiB or 100 headers"),
    };
    CarrierError { kind, not_processed }
}

impl<P: Clone + Send + Sync + 'static> Carrier for Tunnel<P> {
    fn send<'a>(
        &'a self,
        target: &'a ServiceTarget,
        request: ::http::Request<Body>,
        on_informational: &'a mut (dyn FnMut(::http::Response<()>) + Send),
    ) -> BoxFuture<'a, Result<Answer, CarrierError>> {
        Box::pin(async move {
            let stream = self.bare_stream().await.map_err(not_opened)?;
            let header = Self::header(target, StreamKind::Http).encode();
            let answer = http::send(stream, &header, request, on_informational).await.map_err(failed)?;
            Ok(match answer {
                http::Answer::Response(response) => {
                    Answer::Response(response.map(|body| body.map_err(Into::into).boxed_unsync()))
                }
                http::Answer::Upgraded(head, stream) => Answer::Upgraded(head, Box::new(stream)),
            })
        })
    }

    fn open<'a>(&'a self, target: &'a ServiceTarget) -> BoxFuture<'a, Result<Box<dyn ByteIo>, CarrierError>> {
        Box::pin(async move {
            let stream = Tunnel::open(self, &Self::header(target, StreamKind::Tcp)).await.map_err(not_opened)?;
            Ok(Box::new(stream) as Box<dyn ByteIo>)
        })
    }

    fn is_suspect(&self) -> bool {
        Tunnel::is_suspect(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(1);

    #[test]
    fn data_without_an_acknowledgement_makes_a_tunnel_suspect_and_one_clears_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut silence = Silence::default();
        assert!(!silence.look(at(0), 5, 5, PATIENCE));
        assert!(!silence.look(at(5000), 5, 5, PATIENCE), "an idle tunnel is not silent");
        assert!(!silence.look(at(5100), 5, 6, PATIENCE), "sent just now");
        assert!(!silence.look(at(6000), 5, 9, PATIENCE));
        assert!(silence.look(at(6100), 5, 9, PATIENCE));
        assert!(!silence.look(at(6200), 6, 9, PATIENCE));
    }

    #[test]
    fn after_a_change_of_path_a_second_without_acknowledgement_is_enough() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let long = Duration::from_secs(5);
        let mut silence = Silence::default();
        silence.look(at(0), 1, 1, long);
        silence.look(at(100), 1, 2, long);
        silence.must_recover_by = Some(at(1000));
        assert!(!silence.look(at(900), 1, 2, long));
        assert!(silence.look(at(1000), 1, 2, long));
    }
}
