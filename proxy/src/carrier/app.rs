//! Plain connections: to the workload beside us, and to hosts outside the mesh.
//!
//! HTTP/1 connections are pooled and used by one request at a time; HTTP/2 ones (prior knowledge) carry many.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::client::conn::{http1, http2};
use hyper::ext::on_informational;
use hyper_util::rt::{TokioIo, TokioTimer};
use isthmus_tunnel::carrier::{Answer, Body, BoxError};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::net::TcpStream;

use super::local::{CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, HEAD_BYTES_MAX, STREAM_WINDOW_BYTES};
use super::spawn::Spawn;
use crate::headers;

/// Idle HTTP/1 connections kept per address: as many as a burst of a busy workload leaves behind.
const IDLE_MAX: usize = 256;
/// Addresses with kept connections; beyond it connections are not kept.
const ADDRESSES_MAX: usize = 1024;
/// Longest head of an answer.
const HEAD_BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Headers of an answer.
const HEADERS_MAX: usize = 100;

/// Why a request to a plain address got no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AppError {
    /// TCP did not connect: nothing was sent.
    #[error("{address} does not take the connection")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection ended before an answer.
    #[error("{address} ended the connection before it answered")]
    Lost {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: hyper::Error,
    },
}

impl AppError {
    /// Whether the request provably did not reach the application.
    pub fn not_processed(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }
}

/// Connects to `address`, with `TCP_NODELAY`.
///
/// # Errors
/// [`AppError::Connect`], also when `connect_timeout` runs out.
pub async fn connect(address: SocketAddr, connect_timeout: Duration) -> Result<TcpStream, AppError> {
    let connecting = tokio::time::timeout(connect_timeout, TcpStream::connect(address)).await;
    let connected = connecting.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let stream = connected.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
    stream.map_err(|source| AppError::Connect { address, source })
}

type Http1Sender = http1::SendRequest<Body>;
type Http2Sender = http2::SendRequest<Body>;

/// Connections to plain addresses, shared.
#[derive(Clone)]
pub struct AppPool {
    idle: Arc<Mutex<FxHashMap<SocketAddr, Vec<Http1Sender>>>>,
    multiplexed: Arc<Mutex<FxHashMap<SocketAddr, Http2Sender>>>,
    spawn: Spawn,
}

impl AppPool {
    /// An empty pool.
    pub fn new(spawn: Spawn) -> Self {
        Self { idle: Arc::default(), multiplexed: Arc::default(), spawn }
    }

    /// Sends `request`, whose `Host` and path are as the server shall see them. `http2` speaks HTTP/2 with prior
    /// knowledge. A request with an `Upgrade` header may turn into bytes.
    ///
    /// # Errors
    /// [`AppError`].
    pub async fn send(
        &self,
        address: SocketAddr,
        http2: bool,
        request: Request<Body>,
        connect_timeout: Duration,
        informed: impl Fn(Response<()>) + Send + Sync + 'static,
    ) -> Result<Answer, AppError> {
        if http2 {
            let response = self.send_http2(address, request, connect_timeout).await?;
            return Ok(Answer::Response(response.map(|body| Body::new(body.map_err(Into::into)))));
        }
        let (mut head, body) = request.into_parts();
        head.version = http::Version::HTTP_11;
        let upgrade = head.headers.contains_key(header::UPGRADE);
        if upgrade {
            head.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        }
        let mut request = Request::from_parts(head, body);
        on_informational(&mut request, move |response| {
            let (status, headers) = (response.status(), response.headers().clone());
            let mut response = Response::new(());
            (*response.status_mut(), *response.headers_mut()) = (status, headers);
            informed(response);
        });
        let (sender, mut response) = self.send_http1(address, request, connect_timeout).await?;
        if upgrade && response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let upgraded =
                hyper::upgrade::on(&mut response).await.map_err(|source| AppError::Lost { address, source })?;
            let (head, _) = response.into_parts();
            return Ok(Answer::Upgraded(Response::from_parts(head, ()), Box::new(TokioIo::new(upgraded))));
        }
        Ok(Answer::Response(response.map(|body| {
            let returned = Returned { pool: self.clone(), address, sender };
            Body::new(Pooled { body: Some(body), returned: Some(returned) })
        })))
    }

    async fn send_http1(
        &self,
        address: SocketAddr,
        mut request: Request<Body>,
        connect_timeout: Duration,
    ) -> Result<(Http1Sender, Response<hyper::body::Incoming>), AppError> {
        let lost = |source| AppError::Lost { address, source };
        // A kept connection may have been closed by the server at this moment; hyper gives the request back
        // if not a byte of it was written.
        while let Some(mut sender) = self.take(address) {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok((sender, response)),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(lost(failed.into_error())),
                },
            }
        }
        let stream = connect(address, connect_timeout).await?;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(HEAD_BUFFER_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(lost)?;
        // Ends with its sender, or with the server.
        self.spawn.0.spawn(connection.with_upgrades());
        let response = sender.send_request(request).await.map_err(lost)?;
        Ok((sender, response))
    }

    async fn send_http2(
        &self,
        address: SocketAddr,
        mut request: Request<Body>,
        connect_timeout: Duration,
    ) -> Result<Response<hyper::body::Incoming>, AppError> {
        let lost = |source| AppError::Lost { address, source };
        *request.version_mut() = http::Version::HTTP_2;
        if let Some(host) = request.headers_mut().remove(header::HOST)
            && let Some(uri) = headers::absolute(request.uri(), &host)
        {
            *request.uri_mut() = uri;
        }
        let kept = self.multiplexed.lock().get(&address).filter(|sender| !sender.is_closed()).cloned();
        if let Some(mut sender) = kept {
            match sender.try_send_request(request).await {
                Ok(response) => return Ok(response),
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(lost(failed.into_error())),
                },
            }
        }
        let stream = connect(address, connect_timeout).await?;
        let (mut sender, connection) = http2::Builder::new(self.spawn.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(lost)?;
        // Ends with the last sender, or with the server.
        self.spawn.0.spawn(connection);
        {
            let mut kept = self.multiplexed.lock();
            kept.retain(|_, sender| !sender.is_closed());
            if kept.len() < ADDRESSES_MAX {
                kept.insert(address, sender.clone());
            }
        }
        sender.send_request(request).await.map_err(lost)
    }

    /// Closes all kept connections.
    pub fn clear(&self) {
        self.idle.lock().clear();
        self.multiplexed.lock().clear();
    }

    fn take(&self, address: SocketAddr) -> Option<Http1Sender> {
        let mut idle = self.idle.lock();
        let kept = idle.get_mut(&address)?;
        kept.retain(|sender| !sender.is_closed());
        // The last one was used last; one whose answer was not read to its end never becomes ready.
        let ready = kept.iter().rposition(Http1Sender::is_ready)?;
        Some(kept.swap_remove(ready))
    }

    fn give_back(&self, address: SocketAddr, sender: Http1Sender) {
        let mut idle = self.idle.lock();
        if sender.is_closed() || (idle.len() >= ADDRESSES_MAX && !idle.contains_key(&address)) {
            return;
        }
        let kept = idle.entry(address).or_default();
        if kept.len() >= IDLE_MAX {
            kept.remove(0);
        }
        kept.push(sender);
    }
}

struct Returned {
    pool: AppPool,
    address: SocketAddr,
    sender: Http1Sender,
}

/// A response's body that gives its connection back when it was read to its end; dropped earlier, the
/// connection is closed.
struct Pooled {
    body: Option<hyper::body::Incoming>,
    returned: Option<Returned>,
}

impl Pooled {
    fn ended(&mut self) {
        self.body = None;
        if let Some(Returned { pool, address, sender }) = self.returned.take() {
            pool.give_back(address, sender);
        }
    }
}

impl HttpBody for Pooled {
    type Data = bytes::Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<bytes::Bytes>, BoxError>>> {
        use std::task::Poll;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = std::task::ready!(std::pin::Pin::new(body).poll_frame(cx));
        match &frame {
            None => self.ended(),
            Some(Ok(_)) if self.body.as_ref().is_some_and(HttpBody::is_end_stream) => self.ended(),
            Some(Ok(_)) => {}
            Some(Err(_)) => self.returned = None,
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if self.is_end_stream() {
            self.ended();
        }
    }
}
