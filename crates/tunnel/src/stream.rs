//! What opens a stream of a tunnel, how it is reset, and the byte stream it becomes.
//!
//! A stream names a service and one of its ports, never an address; the receiving sidecar maps that to its own
//! workload by its own exports. The codec is pure and is a fuzz target.
//!
//! ```text
//! version 1 | kind 1 | port 2 (big-endian) | host length 1 | host
//! ```

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use isthmus_model::Host;
use quinn::VarInt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::endpoint::StreamGuard;

/// The only form of the header so far.
pub const HEADER_VERSION: u8 = 1;
/// Longest header: 5 bytes and a host of 253.
pub const HEADER_LEN_MAX: usize = 5 + 253;

/// What the rest of a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StreamKind {
    /// HTTP in the frames of [`crate::http`].
    Http,
    /// The bytes of one TCP connection.
    Tcp,
}

impl StreamKind {
    /// On the wire. 3 (UDP) and above are reserved.
    fn number(self) -> u8 {
        match self {
            Self::Http => 1,
            Self::Tcp => 2,
        }
    }
}

/// The first bytes of every stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StreamHeader {
    /// What follows.
    pub kind: StreamKind,
    /// The service's host.
    pub host: Host,
    /// The service's port.
    pub port: u16,
}

/// Why a stream's first bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// A version this build does not speak.
    #[error("stream header version {0} is not known here; the caller runs a newer isthmus")]
    UnknownVersion(u8),
    /// A kind this build does not speak.
    #[error("stream kind {0} is not known here; the caller runs a newer isthmus")]
    UnknownKind(u8),
    /// Not a host, or a wildcard.
    #[error("the host in the stream header is not a DNS name")]
    Host,
    /// Port 0.
    #[error("port 0 in the stream header")]
    Port,
}

impl StreamHeader {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let host = self.host.as_str().as_bytes();
        let mut bytes = Vec::with_capacity(5 + host.len());
        bytes.extend([HEADER_VERSION, self.kind.number()]);
        bytes.extend(self.port.to_be_bytes());
        bytes.push(u8::try_from(host.len()).expect("a host has at most 253 bytes"));
        bytes.extend(host);
        bytes
    }

    /// Decodes a header from the front of `buf`: the header and the bytes it took, or `None` if `buf` ends first.
    ///
    /// # Errors
    /// [`HeaderError`] as soon as the bytes at hand cannot become a header.
    pub fn decode(buf: &[u8]) -> Result<Option<(Self, usize)>, HeaderError> {
        match buf.first() {
            Some(&HEADER_VERSION) => {}
            Some(&other) => return Err(HeaderError::UnknownVersion(other)),
            None => return Ok(None),
        }
        let kind = match buf.get(1) {
            Some(1) => StreamKind::Http,
            Some(2) => StreamKind::Tcp,
            Some(&other) => return Err(HeaderError::UnknownKind(other)),
            None => return Ok(None),
        };
        let (Some(port), Some(&length)) = (buf.get(2..4), buf.get(4)) else { return Ok(None) };
        let port = u16::from_be_bytes([port[0], port[1]]);
        if port == 0 {
            return Err(HeaderError::Port);
        }
        let end = 5 + usize::from(length);
        if end > HEADER_LEN_MAX {
            return Err(HeaderError::Host);
        }
        let Some(host) = buf.get(5..end) else { return Ok(None) };
        let host: Host = std::str::from_utf8(host).ok().and_then(|text| text.parse().ok()).ok_or(HeaderError::Host)?;
        if host.is_wildcard() {
            return Err(HeaderError::Host);
        }
        Ok(Some((Self { kind, host, port }, end)))
    }
}

/// Why one side ended a stream before its time (the application error code of RESET_STREAM and STOP_SENDING).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResetCode {
    /// Nothing went wrong: the rest is not wanted.
    NoError,
    /// The service or port is not exported to the caller's cluster.
    NotExported,
    /// Not taken up: overload, draining, no such stream kind. Not processed.
    Refused,
    /// The workload did not take the connection. Not processed.
    ConnectFailed,
    /// A policy of the receiver denies this caller. Not processed.
    Denied,
    /// Whoever asked has gone away.
    Cancelled,
    /// The application reset its connection.
    AppReset,
    /// A fault of the sidecar, or a peer that broke the protocol.
    Internal,
}

impl ResetCode {
    const ALL: [Self; 8] = [
        Self::NoError,
        Self::NotExported,
        Self::Refused,
        Self::ConnectFailed,
        Self::Denied,
        Self::Cancelled,
        Self::AppReset,
        Self::Internal,
    ];

    /// On the wire.
    pub fn code(self) -> VarInt {
        VarInt::from_u32(Self::ALL.iter().position(|&code| code == self).map_or(7, |at| at as u32))
    }

    /// From the wire; codes that are not known count as [`ResetCode::Internal`].
    pub fn from_code(code: VarInt) -> Self {
        usize::try_from(code.into_inner()).ok().and_then(|at| Self::ALL.get(at)).copied().unwrap_or(Self::Internal)
    }

    /// Whether the receiver says that the workload never saw the request, so that another may be asked.
    pub fn not_processed(self) -> bool {
        matches!(self, Self::NotExported | Self::Refused | Self::ConnectFailed | Self::Denied)
    }

    /// A fixed word for metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoError => "no_error",
            Self::NotExported => "not_exported",
            Self::Refused => "refused",
            Self::ConnectFailed => "connect_failed",
            Self::Denied => "denied",
            Self::Cancelled => "cancelled",
            Self::AppReset => "app_reset",
            Self::Internal => "internal",
        }
    }
}

impl std::fmt::Display for ResetCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The code carried by an I/O error of a [`ByteStream`], if the peer reset it.
pub fn reset_code(error: &io::Error) -> Option<ResetCode> {
    let inner = error.get_ref()?;
    if let Some(quinn::ReadError::Reset(code)) = inner.downcast_ref() {
        return Some(ResetCode::from_code(*code));
    }
    match inner.downcast_ref() {
        Some(quinn::WriteError::Stopped(code)) => Some(ResetCode::from_code(*code)),
        _ => None,
    }
}

/// The sending direction of a stream. Dropped before [`ByteSender::finish`], it is reset with
/// [`ResetCode::Cancelled`]: a broken connection must not look like a finished one at the far end.
#[derive(Debug)]
pub struct ByteSender {
    stream: quinn::SendStream,
    ended: bool,
    /// Counts the stream as open.
    _open: Option<StreamGuard>,
}

impl ByteSender {
    pub(crate) fn new(stream: quinn::SendStream) -> Self {
        Self { stream, ended: false, _open: None }
    }

    /// Queues `bytes` without copying them; waits for room.
    ///
    /// # Errors
    /// As quinn says; [`reset_code`] names the peer's reason.
    pub async fn write_chunk(&mut self, bytes: Bytes) -> io::Result<()> {
        Ok(self.stream.write_chunk(bytes).await?)
    }

    /// Queues several pieces as one.
    ///
    /// # Errors
    /// As [`ByteSender::write_chunk`].
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> io::Result<()> {
        Ok(self.stream.write_all_chunks(chunks).await?)
    }

    /// FIN.
    pub fn finish(&mut self) {
        self.ended = true;
        // An error says that the direction has ended already.
        let _ = self.stream.finish();
    }

    /// Resets this direction.
    pub fn reset(&mut self, code: ResetCode) {
        self.ended = true;
        let _ = self.stream.reset(code.code());
    }

    /// Waits until the receiver wants no more, and says why; `None` when all has arrived, or the tunnel is gone.
    pub fn stopped(&self) -> impl Future<Output = Option<ResetCode>> + Send + 'static {
        let stopped = self.stream.stopped();
        async move { stopped.await.ok().flatten().map(ResetCode::from_code) }
    }
}

impl Drop for ByteSender {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.stream.reset(ResetCode::Cancelled.code());
        }
    }
}

impl AsyncWrite for ByteSender {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finish();
        Poll::Ready(Ok(()))
    }
}

/// The receiving direction of a stream. Dropped before its end, the sender is told to stop
/// ([`ResetCode::Cancelled`]).
#[derive(Debug)]
pub struct ByteReceiver {
    stream: quinn::RecvStream,
    /// Read from the stream already, and given out first.
    pending: Bytes,
    ended: bool,
    /// Counts the stream as open.
    _open: Option<StreamGuard>,
}

impl ByteReceiver {
    pub(crate) fn new(stream: quinn::RecvStream) -> Self {
        Self { stream, pending: Bytes::new(), ended: false, _open: None }
    }

    /// Puts bytes back, to be read first.
    pub(crate) fn unread(&mut self, bytes: Bytes) {
        debug_assert!(self.pending.is_empty());
        self.pending = bytes;
    }

    /// Waits for more bytes without copying them; `None` after FIN.
    ///
    /// # Errors
    /// As quinn says; [`reset_code`] names the peer's reason.
    pub async fn read_chunk(&mut self, max: usize) -> io::Result<Option<Bytes>> {
        std::future::poll_fn(|cx| self.poll_read_chunk(cx, max)).await
    }

    /// As [`ByteReceiver::read_chunk`].
    pub fn poll_read_chunk(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<io::Result<Option<Bytes>>> {
        if !self.pending.is_empty() {
            let length = max.min(self.pending.len());
            return Poll::Ready(Ok(Some(self.pending.split_to(length))));
        }
        // The future holds nothing between polls: the waker lies in the connection.
        let chunk = ready!(std::pin::pin!(self.stream.read_chunk(max, true)).poll(cx));
        self.ended |= !matches!(chunk, Ok(Some(_)));
        Poll::Ready(Ok(chunk?.map(|chunk| chunk.bytes)))
    }

    /// Tells the sender to stop.
    pub fn stop(&mut self, code: ResetCode) {
        self.ended = true;
        let _ = self.stream.stop(code.code());
    }
}

impl Drop for ByteReceiver {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.stream.stop(ResetCode::Cancelled.code());
        }
    }
}

impl AsyncRead for ByteReceiver {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.pending.is_empty() {
            let length = buf.remaining().min(self.pending.len());
            buf.put_slice(&self.pending.split_to(length));
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let read = ready!(AsyncRead::poll_read(Pin::new(&mut self.stream), cx, buf));
        self.ended |= read.is_err() || (buf.filled().len() == before && buf.remaining() > 0);
        Poll::Ready(read)
    }
}

/// Both directions of a stream, as bytes. `shutdown` sends FIN and leaves reading open (half-close).
#[derive(Debug)]
pub struct ByteStream {
    /// Towards the peer.
    pub send: ByteSender,
    /// From the peer.
    pub recv: ByteReceiver,
}

impl ByteStream {
    /// Joins the two directions of a QUIC stream.
    pub fn new(send: quinn::SendStream, recv: quinn::RecvStream) -> Self {
        Self { send: ByteSender::new(send), recv: ByteReceiver::new(recv) }
    }

    /// The same, counted as open as long as either direction lives.
    pub(crate) fn counted(send: quinn::SendStream, recv: quinn::RecvStream, guard: &StreamGuard) -> Self {
        let mut stream = Self::new(send, recv);
        stream.send._open = Some(guard.clone());
        stream.recv._open = Some(guard.clone());
        stream
    }

    /// Resets both directions.
    pub fn reset(mut self, code: ResetCode) {
        self.send.reset(code);
        self.recv.stop(code);
    }
}

impl AsyncRead for ByteStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.recv).poll_read(cx, buf)
    }
}

impl AsyncWrite for ByteStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.send).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.send).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.send).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> StreamHeader {
        let host = "cart.shop.svc.clusterset.local".parse().expect("a host");
        StreamHeader { kind: StreamKind::Http, host, port: 80 }
    }

    #[test]
    fn a_header_is_read_back_and_every_prefix_asks_for_more() {
        let mut bytes = header().encode();
        for end in 0..bytes.len() {
            assert_eq!(StreamHeader::decode(&bytes[..end]), Ok(None), "{end} bytes");
        }
        let length = bytes.len();
        bytes.extend(b"GET / HTTP/1.1");
        assert_eq!(StreamHeader::decode(&bytes), Ok(Some((header(), length))));
    }

    #[test]
    fn what_cannot_become_a_header_is_refused_at_once() {
        let with = |at: usize, byte: u8| {
            let mut bytes = header().encode();
            bytes[at] = byte;
            StreamHeader::decode(&bytes)
        };
        assert_eq!(with(0, 2), Err(HeaderError::UnknownVersion(2)));
        assert_eq!(with(1, 3), Err(HeaderError::UnknownKind(3)));
        assert_eq!(with(3, 0), Err(HeaderError::Port));
        assert_eq!(with(4, 254), Err(HeaderError::Host), "longer than any host");
        assert_eq!(with(5, b'*'), Err(HeaderError::Host));
        assert_eq!(with(5, 0xff), Err(HeaderError::Host), "not UTF-8");
    }

    #[test]
    fn reset_codes_survive_the_wire_and_unknown_ones_are_internal() {
        for code in ResetCode::ALL {
            assert_eq!(ResetCode::from_code(code.code()), code);
        }
        assert_eq!(ResetCode::from_code(VarInt::from_u32(99)), ResetCode::Internal);
        assert_eq!(ResetCode::from_code(VarInt::MAX), ResetCode::Internal);
    }
}
