//! Serves HTTP/1 or HTTP/2 on one connection, within limits, and ends gracefully.
//!
//! Limits: a head comes within 10 s and fits 64 KiB and 100 headers (decoded); HTTP/2 floods end their
//! own connection only.

use std::convert::Infallible;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use isthmus_tunnel::carrier::Body;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use crate::carrier::local::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, HEAD_BYTES_MAX, STREAM_WINDOW_BYTES, STREAMS_MAX,
};
use crate::carrier::spawn::Spawn;

/// How long a request's head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest head of a request.
const HEAD_BUFFER_BYTES_MAX: usize = 64 * 1024;
/// Headers of a request, leaving room for those that the sidecar adds (a tunnel carries 100).
const HEADERS_MAX: usize = 96;
/// A peer that resets streams faster than they are taken up is cut off (rapid reset).
const PENDING_RESETS_MAX: usize = 64;
/// A peer that makes us reset streams is cut off (made-you-reset).
const LOCAL_RESETS_MAX: usize = 512;
/// An HTTP/2 connection that does not answer a PING for this long is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves HTTP/1 on `io` until it ends, or, after `draining`, until its current request ends.
///
/// # Errors
/// As hyper says; the connection is gone by then.
pub async fn serve_http1<S, F, R>(io: S, handle: F, draining: &CancellationToken) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Request<Incoming>) -> R,
    R: Future<Output = Response<Body>>,
{
    let service = service_fn(|request| {
        let response = handle(request);
        async { Ok::<_, Infallible>(response.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BUFFER_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .half_close(true)
        .pipeline_flush(true)
        .serve_connection(TokioIo::new(io), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = draining.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

/// Serves HTTP/2 (prior knowledge, or after ALPN) on `io` until it ends, or, after `draining`, until its
/// requests have ended.
///
/// # Errors
/// As hyper says; the connection is gone by then.
pub async fn serve_http2<S, F, R>(io: S, handle: F, spawn: Spawn, draining: &CancellationToken) -> hyper::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    F: Fn(Request<Incoming>) -> R,
    R: Future<Output = Response<Body>> + Send + 'static,
{
    let service = service_fn(|request| {
        let response = handle(request);
        async { Ok::<_, Infallible>(response.await) }
    });
    let connection = http2::Builder::new(spawn)
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_header_list_size(HEAD_BYTES_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
        .max_local_error_reset_streams(LOCAL_RESETS_MAX)
        .keep_alive_interval(PING_TIMEOUT)
        .keep_alive_timeout(PING_TIMEOUT)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = draining.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}
