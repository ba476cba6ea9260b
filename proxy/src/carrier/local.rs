//! Requests and byte streams to sidecars of the own cluster: HTTP/2 over mTLS, one connection per sidecar.
//!
//! A request names its service in [`headers::SERVICE`]; a byte stream is a request whose two bodies are the
//! two directions. A receiver that did not pass a request on says so in [`headers::REFUSED`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use isthmus_identity::tls::server_name;
use isthmus_identity::{Expect, PeerIdentity, Tls};
use isthmus_model::{ClusterName, ServiceAccount};
use isthmus_tunnel::ResetCode;
use isthmus_tunnel::carrier::{
    Answer, Body, BoxFuture, ByteIo, Carrier, CarrierError, CarrierErrorKind, ServiceTarget,
};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::body_bytes::{BodyBytes, writer};
use super::spawn::Spawn;
use crate::headers;

/// ALPN of connections between sidecars of one cluster.
pub const ALPN_LOCAL: &[u8] = b"isthmus-h2/1";
/// A connection that does not answer a PING for this long is dead.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a connection with open requests is asked.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Bytes of one stream that may wait at the receiver: 100 Mbit/s at 80 ms inside one region.
pub const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// Bytes of all streams of a connection that may wait.
pub const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Largest DATA frame: fewer headers and TLS records than the 16 KiB default.
pub const FRAME_BYTES_MAX: u32 = 64 * 1024;
/// Limit of a head after decoding, against HPACK bombs.
pub const HEAD_BYTES_MAX: u32 = 64 * 1024;
/// Streams one peer may have open.
pub const STREAMS_MAX: u32 = 4096;
/// Connections kept; the oldest unused go first.
const PEERS_MAX: usize = 1024;

/// Why no connection to a sidecar came about. The request was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalDialError {
    /// TCP did not connect.
    #[error("{address} does not take the connection")]
    Connect {
        /// The sidecar's address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Nothing within the connect timeout.
    #[error("{address} did not answer within {after:?}")]
    TimedOut {
        /// The sidecar's address.
        address: SocketAddr,
        /// The limit.
        after: Duration,
    },
    /// TLS or HTTP/2 failed.
    #[error("the handshake with {address} failed: {reason}")]
    Handshake {
        /// The sidecar's address.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// The peer is none of the accounts that serve this service.
    #[error("{address} is {found}, which does not serve this service")]
    Unexpected {
        /// The sidecar's address.
        address: SocketAddr,
        /// Whom it proved to be.
        found: String,
    },
}

/// Connections to the sidecars of the own cluster.
pub struct LocalPool {
    tls: Tls,
    cluster: ClusterName,
    spawn: Spawn,
    peers: Mutex<FxHashMap<SocketAddr, Arc<Slot>>>,
}

#[derive(Default)]
struct Slot {
    /// Held while dialling, so that a burst dials once.
    dialling: tokio::sync::Mutex<()>,
    connection: Mutex<Option<Arc<LocalConnection>>>,
}

impl Slot {
    fn live(&self) -> Option<Arc<LocalConnection>> {
        self.connection.lock().clone().filter(|connection| !connection.sender.is_closed())
    }
}

impl LocalPool {
    /// A pool that shows `tls`'s identity and believes workloads of `cluster`.
    pub fn new(tls: Tls, cluster: ClusterName, spawn: Spawn) -> Self {
        Self { tls, cluster, spawn, peers: Mutex::default() }
    }

    /// The connection to the sidecar at `address`, dialled if there is none; its peer is one of `accounts`.
    ///
    /// # Errors
    /// [`LocalDialError`]. Nothing was sent.
    pub async fn get(
        &self,
        address: SocketAddr,
        accounts: &[ServiceAccount],
        connect_timeout: Duration,
    ) -> Result<Arc<LocalConnection>, LocalDialError> {
        let slot = self.slot(address);
        if let Some(live) = slot.live() {
            return live.serving(address, accounts);
        }
        let _dialling = slot.dialling.lock().await;
        if let Some(live) = slot.live() {
            return live.serving(address, accounts);
        }
        let dialled = tokio::time::timeout(connect_timeout, self.dial(address)).await;
        let connection = dialled.map_err(|_| LocalDialError::TimedOut { address, after: connect_timeout })??;
        let connection = Arc::new(connection);
        *slot.connection.lock() = Some(Arc::clone(&connection));
        connection.serving(address, accounts)
    }

    /// Connections that stand, with the number of streams that may still be opened on each.
    pub fn connections(&self) -> Vec<(SocketAddr, PeerIdentity)> {
        let peers = self.peers.lock();
        peers.iter().filter_map(|(address, slot)| Some((*address, slot.live()?.peer.clone()))).collect()
    }

    /// Forgets the connections whose peers are trusted no more.
    pub fn judge_again(&self, trusted: impl Fn(&PeerIdentity) -> bool) {
        for slot in self.peers.lock().values() {
            slot.connection.lock().take_if(|connection| !trusted(&connection.peer));
        }
    }

    /// Closes all connections.
    pub fn clear(&self) {
        self.peers.lock().clear();
    }

    fn slot(&self, address: SocketAddr) -> Arc<Slot> {
        let mut peers = self.peers.lock();
        if peers.len() >= PEERS_MAX && !peers.contains_key(&address) {
            peers.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.live().is_some());
        }
        Arc::clone(peers.entry(address).or_default())
    }

    async fn dial(&self, address: SocketAddr) -> Result<LocalConnection, LocalDialError> {
        let connect = |source| LocalDialError::Connect { address, source };
        let handshake = |reason: String| LocalDialError::Handshake { address, reason };
        let tcp = TcpStream::connect(address).await.map_err(connect)?;
        tcp.set_nodelay(true).map_err(connect)?;
        let config = self.tls.client_config(&[ALPN_LOCAL], Expect::Workload(Some(self.cluster.clone())));
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(server_name(), tcp).await.map_err(|error| handshake(error.to_string()))?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let peer = self.tls.peer_identity(chain).map_err(|error| handshake(error.to_string()))?;
        let (sender, connection) = http2::Builder::new(self.spawn.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .max_header_list_size(HEAD_BYTES_MAX)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .handshake::<_, Body>(TokioIo::new(stream))
            .await
            .map_err(|error| handshake(error.to_string()))?;
        // Ends with the last sender, or with the peer.
        self.spawn.0.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%address, %error, "local connection ended");
            }
        });
        Ok(LocalConnection { sender, peer })
    }
}

/// One mTLS connection to a sidecar.
pub struct LocalConnection {
    sender: SendRequest<Body>,
    /// Whom the handshake proved at the other end.
    pub peer: PeerIdentity,
}

impl LocalConnection {
    fn serving(self: Arc<Self>, address: SocketAddr, accounts: &[ServiceAccount]) -> Result<Arc<Self>, LocalDialError> {
        if accounts.contains(&self.peer.spiffe.account) {
            return Ok(self);
        }
        Err(LocalDialError::Unexpected { address, found: self.peer.spiffe.to_string() })
    }

    async fn exchange(&self, request: Request<Body>) -> Result<Response<Body>, CarrierError> {
        let mut sender = self.sender.clone();
        let response = sender.try_send_request(request).await.map_err(|mut failed| {
            let unsent = failed.take_message().is_some();
            broken(&failed.into_error(), unsent)
        })?;
        match response.headers().get(headers::REFUSED) {
            Some(code) => Err(refused(code)),
            None => Ok(response.map(|body| Body::new(body.map_err(Into::into)))),
        }
    }
}

impl Carrier for LocalConnection {
    fn send<'a>(
        &'a self,
        target: &'a ServiceTarget,
        request: Request<Body>,
        _on_informational: &'a mut (dyn FnMut(Response<()>) + Send),
    ) -> BoxFuture<'a, Result<Answer, CarrierError>> {
        Box::pin(async move {
            let (mut head, mut body) = request.into_parts();
            head.version = http::Version::HTTP_2;
            let authority = head.uri.authority().cloned();
            // One authority: `:authority` carries what the application said in Host.
            if let Some(host) = head.headers.remove(header::HOST)
                && authority.is_none()
            {
                head.uri = headers::absolute(&head.uri, &host).ok_or_else(|| unsendable("its Host is no authority"))?;
            }
            head.headers.insert(headers::SERVICE, service_value(target));
            let upgrade = head.headers.remove(header::UPGRADE);
            let mut up = None;
            if let Some(protocol) = upgrade {
                head.headers.insert(headers::UPGRADE, protocol);
                let (near, far) = writer();
                (up, body) = (Some(near), far);
            }
            let mut response = self.exchange(Request::from_parts(head, body)).await?;
            match (up, response.headers_mut().remove(headers::UPGRADE)) {
                (Some(near), Some(protocol)) => {
                    let (mut head, body) = response.into_parts();
                    head.status = StatusCode::SWITCHING_PROTOCOLS;
                    head.headers.insert(header::UPGRADE, protocol);
                    Ok(Answer::Upgraded(Response::from_parts(head, ()), Box::new(BodyBytes::new(body, near))))
                }
                _ => Ok(Answer::Response(response)),
            }
        })
    }

    fn open<'a>(&'a self, target: &'a ServiceTarget) -> BoxFuture<'a, Result<Box<dyn ByteIo>, CarrierError>> {
        Box::pin(async move {
            let (near, far) = writer();
            let request = Request::builder()
                .method(Method::POST)
                .uri(format!("http://{}:{}/", target.host, target.port))
                .header(headers::SERVICE, service_value(target))
                .header(headers::STREAM, HeaderValue::from_static("tcp"))
                .body(far)
                .map_err(|_| unsendable("its service is no authority"))?;
            let response = self.exchange(request).await?;
            Ok(Box::new(BodyBytes::new(response.into_body(), near)) as Box<dyn ByteIo>)
        })
    }

    fn is_suspect(&self) -> bool {
        self.sender.is_closed()
    }
}

fn service_value(target: &ServiceTarget) -> HeaderValue {
    let text = Bytes::from(format!("{}:{}", target.host, target.port));
    HeaderValue::from_maybe_shared(text).expect("a host is visible ASCII")
}

/// The word of the receiving sidecar that it did not pass a request on.
fn refused(code: &HeaderValue) -> CarrierError {
    let number = code.to_str().ok().and_then(|text| text.parse::<u32>().ok());
    let code = ResetCode::from_code(number.map_or(quinn::VarInt::MAX, quinn::VarInt::from_u32));
    CarrierError { kind: CarrierErrorKind::Reset(code), not_processed: code.not_processed() }
}

/// [`headers::REFUSED`]'s value for `code`, with an empty body.
pub fn refusal(code: ResetCode) -> Response<Body> {
    let mut response = Response::new(Body::new(Empty::new().map_err(|never| match never {})));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(headers::REFUSED, HeaderValue::from(code.code().into_inner()));
    response
}

fn unsendable(reason: &'static str) -> CarrierError {
    CarrierError { kind: CarrierErrorKind::Unsendable(reason), not_processed: true }
}

fn broken(error: &hyper::Error, unsent: bool) -> CarrierError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let mut h2_error = None;
    while let Some(current) = cause {
        h2_error = h2_error.or_else(|| current.downcast_ref::<h2::Error>());
        cause = current.source();
    }
    // A GOAWAY ends only the streams that the peer did not take up (RFC 9113 §6.8).
    let not_taken = h2_error.is_some_and(|error| {
        error.is_remote() && (error.is_go_away() || error.reason() == Some(h2::Reason::REFUSED_STREAM))
    });
    CarrierError { kind: CarrierErrorKind::Lost(error.to_string()), not_processed: unsent || not_taken }
}
