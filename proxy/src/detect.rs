//! Tells HTTP/1, HTTP/2 and TLS from other bytes by what a client says first. Pure, but for [`peek`].
//!
//! A protocol where the server speaks first shows nothing: [`peek`] gives up after [`PEEK_TIMEOUT`]
//! and the connection is bytes. Ports typed `TCP` are never looked at.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use isthmus_model::Host;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// How long a client may stay silent before it counts as one that waits for the server.
pub const PEEK_TIMEOUT: Duration = Duration::from_millis(100);

/// Most bytes looked at: a ClientHello with a hybrid key share is about 2 KiB, one that fills this
/// is none we route by.
pub const PEEK_BYTES_MAX: usize = 16 * 1024;

/// A request line longer than this is passed on as bytes.
const REQUEST_LINE_MAX: usize = 8 * 1024;

/// The HTTP/2 client preface (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Methods that tell HTTP/1 without waiting for the whole request line.
const METHODS: [&[u8]; 9] =
    [b"GET ", b"POST ", b"PUT ", b"HEAD ", b"DELETE ", b"OPTIONS ", b"PATCH ", b"CONNECT ", b"TRACE "];

/// What a client speaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detected {
    /// HTTP/1.0 or 1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
    /// TLS, with the server name it asks for, if that is a host.
    Tls(Option<Host>),
    /// Anything else.
    Bytes,
}

/// Judges the first bytes of a connection; `None` means that more are needed.
pub fn detect(bytes: &[u8]) -> Option<Detected> {
    match *bytes.first()? {
        0x16 => detect_tls(bytes),
        b'A'..=b'Z' => detect_http(bytes),
        _ => Some(Detected::Bytes),
    }
}

fn detect_http(bytes: &[u8]) -> Option<Detected> {
    if bytes.starts_with(PREFACE) {
        return Some(Detected::Http2);
    }
    if PREFACE.starts_with(bytes) {
        return None;
    }
    if METHODS.iter().any(|method| bytes.starts_with(method)) {
        return Some(Detected::Http1);
    }
    // An extension method: only a whole request line tells it from, say, SMTP.
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => {
            let line = bytes[..end].trim_ascii_end();
            let http = line.len() > 9 && line[..line.len() - 1].ends_with(b" HTTP/1.");
            Some(if http { Detected::Http1 } else { Detected::Bytes })
        }
        None if bytes.len() > REQUEST_LINE_MAX => Some(Detected::Bytes),
        None => None,
    }
}

fn detect_tls(bytes: &[u8]) -> Option<Detected> {
    let mut hello = Vec::new();
    let mut rest = bytes;
    // A ClientHello may be spread over several records (RFC 8446 §5.1).
    loop {
        if rest.len() < 5 {
            return None;
        }
        if rest[0] != 0x16 || rest[1] != 3 {
            return Some(Detected::Bytes);
        }
        let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        if length == 0 || length > PEEK_BYTES_MAX {
            return Some(Detected::Bytes);
        }
        let fragment = &rest[5..];
        hello.extend_from_slice(&fragment[..length.min(fragment.len())]);
        if hello.first().is_some_and(|kind| *kind != 1) {
            return Some(Detected::Bytes);
        }
        if let Some(size) = hello.get(1..4) {
            let size = usize::from(size[0]) << 16 | usize::from(size[1]) << 8 | usize::from(size[2]);
            if size > PEEK_BYTES_MAX {
                return Some(Detected::Bytes);
            }
            if let Some(body) = hello.get(4..4 + size) {
                return Some(Detected::Tls(server_name(body)));
            }
        }
        if fragment.len() < length {
            return None;
        }
        rest = &fragment[length..];
    }
}

/// The `server_name` of a ClientHello's body (RFC 6066 §3); `None` where there is none or it is no host name.
fn server_name(body: &[u8]) -> Option<Host> {
    let mut reader = Reader(body);
    reader.take(34)?; // version, random
    reader.vector(1)?; // session id
    reader.vector(2)?; // cipher suites
    reader.vector(1)?; // compression methods
    let mut extensions = Reader(reader.vector(2)?);
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let data = extensions.vector(2)?;
        if kind == 0 {
            let mut list = Reader(Reader(data).vector(2)?);
            let name_kind = list.number(1)?;
            let name = list.vector(2)?;
            let text = std::str::from_utf8(name).ok().filter(|_| name_kind == 0)?;
            // An address is not a server name (RFC 6066 §3), and a trailing dot is not allowed in one.
            let named = text.parse::<std::net::IpAddr>().is_err() && !text.ends_with('.');
            return text.parse::<Host>().ok().filter(|host| named && !host.is_wildcard());
        }
    }
    None
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(self.take(bytes)?.iter().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    }

    fn vector(&mut self, length_bytes: usize) -> Option<&'a [u8]> {
        let length = self.number(length_bytes)?;
        self.take(length)
    }
}

/// Reads from `io` until it is clear what the client speaks, at most `patience` after the last byte.
///
/// Returns the verdict and the stream with all its bytes. A client that closes early spoke bytes.
///
/// # Errors
/// Whatever reading says.
pub async fn peek<S>(mut io: S, patience: Duration) -> io::Result<(Detected, Prefixed<S>)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut read = BytesMut::with_capacity(2048);
    let detected = loop {
        if let Some(detected) = detect(&read) {
            break detected;
        }
        if read.len() >= PEEK_BYTES_MAX {
            break Detected::Bytes;
        }
        match tokio::time::timeout(patience, io.read_buf(&mut read)).await {
            Ok(Ok(0)) | Err(_) => break Detected::Bytes,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
        }
    };
    Ok((detected, Prefixed::new(read.freeze(), io)))
}

/// A stream whose first bytes were read already.
#[derive(Debug)]
pub struct Prefixed<S> {
    prefix: Bytes,
    io: S,
}

impl<S> Prefixed<S> {
    /// `prefix`, then whatever `io` has to say.
    pub fn new(prefix: Bytes, io: S) -> Self {
        Self { prefix, io }
    }

    /// The stream underneath.
    pub fn get_ref(&self) -> &S {
        &self.io
    }
}

impl<S> Prefixed<Prefixed<S>> {
    /// One layer in place of two.
    pub fn flatten(self) -> Prefixed<S> {
        let Prefixed { prefix, io: inner } = self;
        let prefix = match (prefix.is_empty(), inner.prefix.is_empty()) {
            (_, true) => prefix,
            (true, false) => inner.prefix,
            (false, false) => [prefix, inner.prefix].concat().into(),
        };
        Prefixed { prefix, io: inner.io }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let count = self.prefix.len().min(buf.remaining());
        buf.put_slice(&self.prefix[..count]);
        self.prefix.advance(count);
        if self.prefix.is_empty() {
            self.prefix = Bytes::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(name: &str) -> Vec<u8> {
        let sized = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
        let entry = [&[0][..], &sized(name.as_bytes())].concat();
        let extension = [&[0, 0][..], &sized(&sized(&entry))].concat();
        let body = [&[3, 3][..], &[7; 32], &[0], &sized(&[0x13, 1]), &[1, 0], &sized(&extension)].concat();
        let message = [&[1, 0][..], &sized(&body)].concat();
        [&[0x16, 3, 1][..], &sized(&message)].concat()
    }

    #[test]
    fn clients_are_told_apart_by_their_first_bytes() {
        assert_eq!(detect(b"GET / HTTP/1.1\r\n"), Some(Detected::Http1));
        assert_eq!(detect(PREFACE), Some(Detected::Http2));
        assert_eq!(detect(b"PURGE /x HTTP/1.1\r\n"), Some(Detected::Http1));
        assert_eq!(detect(b"EHLO example.org\r\n"), Some(Detected::Bytes));
        assert_eq!(detect(b"\0\0\0\x01"), Some(Detected::Bytes));
        let host = "cart.example".parse().expect("valid");
        assert_eq!(detect(&hello("cart.example")), Some(Detected::Tls(Some(host))));
    }

    #[test]
    fn every_cut_of_a_recognised_start_asks_for_more() {
        for whole in [PREFACE.to_vec(), b"PURGE /x HTTP/1.1\n".to_vec(), hello("cart.example")] {
            for end in 0..whole.len() {
                assert_eq!(detect(&whole[..end]), None, "{end} of {:?}", String::from_utf8_lossy(&whole));
            }
            assert!(detect(&whole).is_some());
        }
    }

    #[test]
    fn a_server_name_that_is_no_host_is_none() {
        for name in ["", "10.0.0.1", "a\0b.example", "cart.example.", "*.example", &"x".repeat(256)] {
            assert_eq!(detect(&hello(name)), Some(Detected::Tls(None)), "{name:?}");
        }
    }

    #[test]
    fn a_hello_spread_over_two_records_is_read() {
        let whole = hello("cart.example");
        let (first, second) = whole[5..].split_at(20);
        let record = |part: &[u8]| [&[0x16, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat();
        let spread = [record(first), record(second)].concat();
        assert!(matches!(detect(&spread), Some(Detected::Tls(Some(_)))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_bytes_and_loses_none() {
        let (mut client, server) = tokio::io::duplex(64);
        let (detected, _server) = peek(server, PEEK_TIMEOUT).await.expect("no error");
        assert_eq!(detected, Detected::Bytes);

        let (mut other, server) = tokio::io::duplex(64);
        tokio::io::AsyncWriteExt::write_all(&mut other, b"SSH-2.0-x").await.expect("room");
        let (detected, mut server) = peek(server, PEEK_TIMEOUT).await.expect("no error");
        let mut read = [0; 9];
        server.read_exact(&mut read).await.expect("all bytes");
        assert_eq!((detected, &read), (Detected::Bytes, b"SSH-2.0-x"));
        drop((client.read(&mut read), other));
    }
}
