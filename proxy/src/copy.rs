//! Carries bytes both ways between two streams, each direction ending on its own (half-close).
//!
//! Buffers are small while little flows and grow with it: 8 KiB buffers cost a factor of two at full
//! rate, 256 KiB ones a sidecar's whole memory with a thousand idle connections.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A quiet direction holds this much.
const BUFFER_BYTES_MIN: usize = 8 * 1024;
/// A busy one at most this: beyond it nothing was gained.
const BUFFER_BYTES_MAX: usize = 256 * 1024;
/// Reads of less than an eighth of the buffer, in a row, before it shrinks.
const SPARSE_READS: u8 = 16;

/// Bytes carried so far, whatever the end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copied {
    /// From the first stream to the second.
    pub forth: u64,
    /// From the second to the first.
    pub back: u64,
}

/// Copies until both directions have ended, or one broke: then both streams should be reset by
/// dropping them, so that no end takes a broken connection for a finished one.
///
/// `copied` counts along, and holds when the future is dropped.
///
/// # Errors
/// The first error of either stream.
pub async fn copy_both<A, B>(a: &mut A, b: &mut B, copied: &mut Copied) -> io::Result<()>
where
    A: AsyncRead + AsyncWrite + Unpin + ?Sized,
    B: AsyncRead + AsyncWrite + Unpin + ?Sized,
{
    let (mut forth, mut back) = (Direction::default(), Direction::default());
    std::future::poll_fn(|cx| {
        let forth = forth.poll(cx, a, b, &mut copied.forth)?;
        let back = back.poll(cx, b, a, &mut copied.back)?;
        if forth.is_ready() && back.is_ready() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}

#[derive(Debug, Default)]
struct Direction {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    sparse_reads: u8,
    unflushed: bool,
    state: State,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Copying,
    Closing,
    Done,
}

impl Direction {
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W, count: &mut u64) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin + ?Sized,
        W: AsyncWrite + Unpin + ?Sized,
    {
        loop {
            match self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx))?;
                    self.state = State::Done;
                }
                State::Copying => {
                    while self.start < self.end {
                        let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.start..self.end]))?;
                        if written == 0 {
                            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                        }
                        self.start += written;
                        *count += written as u64;
                        self.unflushed = true;
                    }
                    if ready!(self.poll_fill(cx, from, to))? == 0 {
                        self.buffer = Box::default();
                        self.state = State::Closing;
                    }
                }
            }
        }
    }

    fn poll_fill<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<io::Result<usize>>
    where
        R: AsyncRead + Unpin + ?Sized,
        W: AsyncWrite + Unpin + ?Sized,
    {
        self.resize();
        let mut read = ReadBuf::new(&mut self.buffer);
        if Pin::new(from).poll_read(cx, &mut read)?.is_pending() {
            if self.unflushed {
                ready!(Pin::new(to).poll_flush(cx))?;
                self.unflushed = false;
            }
            return Poll::Pending;
        }
        let filled = read.filled().len();
        (self.start, self.end) = (0, filled);
        self.sparse_reads = if filled * 8 < self.buffer.len() { self.sparse_reads.saturating_add(1) } else { 0 };
        Poll::Ready(Ok(filled))
    }

    /// The last read filled the buffer: double it. Many reads were tiny: back to the smallest.
    fn resize(&mut self) {
        let size = self.buffer.len();
        if size == 0 {
            self.buffer = vec![0; BUFFER_BYTES_MIN].into();
        } else if self.end == size && size < BUFFER_BYTES_MAX {
            self.buffer = vec![0; size * 2].into();
        } else if self.sparse_reads >= SPARSE_READS && size > BUFFER_BYTES_MIN {
            self.buffer = vec![0; BUFFER_BYTES_MIN].into();
            self.sparse_reads = 0;
        }
        (self.start, self.end) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn one_direction_ends_and_the_other_goes_on() {
        let (mut client, mut near) = duplex(1024);
        let (mut far, mut server) = duplex(1024);
        let copy = async {
            let mut copied = Copied::default();
            copy_both(&mut near, &mut far, &mut copied).await.expect("no error");
            copied
        };
        let talk = async {
            client.write_all(b"question").await.expect("written");
            client.shutdown().await.expect("half-closed");
            let mut question = Vec::new();
            server.read_to_end(&mut question).await.expect("question and its end");
            assert_eq!(question, b"question");
            server.write_all(b"late answer").await.expect("the other half is open");
            server.shutdown().await.expect("closed");
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.expect("answer");
            assert_eq!(answer, b"late answer");
        };
        let (copied, ()) = tokio::join!(copy, talk);
        assert_eq!(copied, Copied { forth: 8, back: 11 });
    }

    #[tokio::test]
    async fn much_data_arrives_whole_and_grows_the_buffer() {
        let (mut client, mut near) = duplex(1 << 20);
        let (mut far, mut server) = duplex(1 << 20);
        let sent: Vec<u8> = (0..3_000_000u32).map(|n| ((n * 31) >> 3) as u8).collect();
        let mut copied = Copied::default();
        let copy = copy_both(&mut near, &mut far, &mut copied);
        let send = async {
            client.write_all(&sent).await.expect("written");
            client.shutdown().await.expect("closed");
        };
        let receive = async {
            let mut received = Vec::new();
            server.read_to_end(&mut received).await.expect("read");
            drop(server);
            received
        };
        let (done, (), received) = tokio::join!(copy, send, receive);
        done.expect("both directions ended");
        assert!(received == sent);
    }

    #[test]
    fn buffers_grow_when_full_and_shrink_when_mostly_empty() {
        let mut direction = Direction::default();
        direction.resize();
        for _ in 0..10 {
            direction.end = direction.buffer.len();
            direction.resize();
        }
        assert_eq!(direction.buffer.len(), BUFFER_BYTES_MAX);
        direction.sparse_reads = SPARSE_READS;
        direction.resize();
        assert_eq!(direction.buffer.len(), BUFFER_BYTES_MIN);
    }
}
