//! Taking tunnels from callers, and streams from tunnels.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Shared;
use super::dial::identify;
use super::tunnel::{self, CloseReason, StreamGuard, TunnelState, TunnelStats};
use crate::stream::{ByteStream, HEADER_LEN_MAX, ResetCode, StreamHeader};

/// How long a caller may take to prove itself.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a stream's first bytes may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// A tunnel that a caller opened and proved itself on. Closed when dropped.
pub struct IncomingTunnel<P> {
    pub(super) state: Arc<TunnelState<P>>,
}

/// Lets callers in until the endpoint is closed. Each handshake is a task of its own, so that a slow one holds up
/// nobody; their number is bounded by the timeout and by the tickets that are remembered.
pub(super) async fn admit_all<P: Clone + Send + Sync + 'static>(shared: Arc<Shared<P>>) {
    while let Some(incoming) = shared.quinn.accept().await {
        if !shared.admits(&incoming.orig_dst_cid()) {
            incoming.ignore();
            continue;
        }
        let Ok(connecting) = incoming.accept() else { continue };
        let handshake = prove(shared.clone(), connecting);
        shared.tasks.spawn(handshake);
    }
}

async fn prove<P: Clone + Send + Sync + 'static>(shared: Arc<Shared<P>>, connecting: quinn::Connecting) {
    let connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return tracing::debug!(%error, "a caller did not prove itself"),
        Err(_) => return tracing::debug!("a caller's handshake took too long"),
    };
    match identify(&shared, &connection) {
        Some(peer) => {
            shared.counters.accepted.fetch_add(1, Ordering::Relaxed);
            let state = tunnel::accepted(&shared, connection, peer);
            // If nobody accepts, this waits; if nobody ever will, the tunnel is dropped, which closes it.
            let _ = shared.proved.send(IncomingTunnel { state }).await;
        }
        None => connection.close(CloseReason::Denied.code(), b""),
    }
}

impl<P: Clone + Send + Sync + 'static> IncomingTunnel<P> {
    /// Who calls, as proved by the handshake.
    pub fn peer(&self) -> &P {
        &self.state.peer
    }

    /// The next stream that the caller opens; `None` once the tunnel is closed. Cancel-safe.
    pub async fn accept_stream(&self) -> Option<PendingStream> {
        let (send, recv) = self.state.connection.accept_bi().await.ok()?;
        let guard = StreamGuard::new(&self.state.usage);
        self.state.allow_more_streams();
        Some(PendingStream { send, recv, guard })
    }

    /// Closes the tunnel and all its streams.
    pub fn close(&self, reason: CloseReason) {
        self.state.close(reason);
    }

    /// Figures for the log and the dashboard.
    pub fn stats(&self) -> TunnelStats {
        self.state.stats()
    }
}

/// A stream whose header was not read yet. Dropped, it is reset.
pub struct PendingStream {
    send: quinn::SendStream,
    recv: quinn::RecvStream,
    guard: StreamGuard,
}

impl PendingStream {
    /// Reads the header; on an error the stream has been reset.
    ///
    /// # Errors
    /// `TimedOut`, `InvalidData`, or as quinn says.
    pub async fn header(mut self) -> io::Result<(StreamHeader, ByteStream)> {
        let read = tokio::time::timeout(HEADER_TIMEOUT, read_header(&mut self.recv)).await;
        match read.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(header) => Ok((header, ByteStream::counted(self.send, self.recv, &self.guard))),
            Err(error) => {
                ByteStream::new(self.send, self.recv).reset(ResetCode::Refused);
                Err(error)
            }
        }
    }
}

async fn read_header(recv: &mut quinn::RecvStream) -> io::Result<StreamHeader> {
    let mut buf = [0; HEADER_LEN_MAX];
    let mut have = 0;
    // The length of the host is the fifth byte: two reads take exactly the header and nothing of what follows.
    for until in [FIXED_LEN, HEADER_LEN_MAX] {
        let until = if until == FIXED_LEN { FIXED_LEN } else { FIXED_LEN + usize::from(buf[FIXED_LEN - 1]) };
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        if until > HEADER_LEN_MAX {
            break;
        }
        recv.read_exact(&mut buf[have..until]).await.map_err(io::Error::other)?;
        have = until;
        if let Some((header, _)) = StreamHeader::decode(&buf[..have]).map_err(invalid)? {
            return Ok(header);
        }
    }
    Err(io::ErrorKind::InvalidData.into())
}

/// All of a header but the host.
const FIXED_LEN: usize = 5;
