//! Byte streams over HTTP/2 bodies: one body each way, each with its own end (half-close) and its own reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame};
use isthmus_tunnel::carrier::{Body, BoxError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

/// Pieces in flight between writer and connection: with [`PIECE_BYTES_MAX`] half a MiB a stream.
const PIECES_MAX: usize = 8;
/// Largest piece copied at once.
const PIECE_BYTES_MAX: usize = 64 * 1024;

/// A writer, and the body that gives out what is written. A writer dropped before its shutdown makes the
/// body fail: the peer sees a reset, never a clean end.
pub fn writer() -> (BodyWriter, Body) {
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let finished = Arc::new(AtomicBool::new(false));
    let body = WrittenBody { pieces, finished: Arc::clone(&finished) };
    (BodyWriter { sender: PollSender::new(sender), finished }, Body::new(body))
}

/// The writing end.
#[derive(Debug)]
pub struct BodyWriter {
    sender: PollSender<Bytes>,
    finished: Arc<AtomicBool>,
}

impl AsyncWrite for BodyWriter {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.sender.poll_reserve(cx)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        let count = buf.len().min(PIECE_BYTES_MAX);
        let sent = self.sender.send_item(Bytes::copy_from_slice(&buf[..count]));
        Poll::Ready(sent.map(|()| count).map_err(|_| io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.finished.store(true, Ordering::Release);
        self.sender.close();
        Poll::Ready(Ok(()))
    }
}

struct WrittenBody {
    pieces: mpsc::Receiver<Bytes>,
    finished: Arc<AtomicBool>,
}

impl HttpBody for WrittenBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match ready!(self.pieces.poll_recv(cx)) {
            Some(piece) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            None if self.finished.load(Ordering::Acquire) => Poll::Ready(None),
            // hyper turns the reason of an h2 error into the RST_STREAM's.
            None => Poll::Ready(Some(Err(Box::new(h2::Error::from(h2::Reason::CANCEL))))),
        }
    }
}

/// A body read as bytes, and the writer of the other direction.
pub struct BodyBytes {
    body: Option<Body>,
    current: Bytes,
    writer: BodyWriter,
}

impl BodyBytes {
    /// Reads `body`, writes to `writer`.
    pub fn new(body: Body, writer: BodyWriter) -> Self {
        Self { body: Some(body), current: Bytes::new(), writer }
    }
}

impl AsyncRead for BodyBytes {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.current.is_empty() {
                let count = self.current.len().min(buf.remaining());
                buf.put_slice(&self.current[..count]);
                self.current.advance(count);
                return Poll::Ready(Ok(()));
            }
            let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
            match ready!(Pin::new(body).poll_frame(cx)) {
                None => self.body = None,
                Some(Ok(frame)) => self.current = frame.into_data().unwrap_or_default(),
                Some(Err(error)) => {
                    self.body = None;
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, error)));
                }
            }
        }
    }
}

impl AsyncWrite for BodyBytes {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn bytes_end_cleanly_only_if_the_writer_said_so() {
        let (mut near, body) = writer();
        near.write_all(b"all").await.expect("room");
        near.shutdown().await.expect("no error");
        drop(near);
        assert_eq!(body.collect().await.expect("a clean end").to_bytes(), "all");

        let (mut near, body) = writer();
        near.write_all(b"some").await.expect("room");
        drop(near);
        let (writer, _) = writer();
        let mut reader = BodyBytes::new(body, writer);
        let mut read = Vec::new();
        let error = reader.read_to_end(&mut read).await.expect_err("a reset");
        assert_eq!((error.kind(), &read[..]), (io::ErrorKind::ConnectionReset, &b"some"[..]));
    }
}
