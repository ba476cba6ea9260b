//! One request or stream of a proven caller: admitted by the exports, then to the workload.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use isthmus_identity::PeerIdentity;
use isthmus_model::Host;
use isthmus_model::service::Protocol;
use isthmus_tunnel::ResetCode;
use isthmus_tunnel::carrier::{Answer, Body, ByteIo};

use crate::carrier::app::connect;
use crate::copy::{Copied, copy_both};
use crate::exports::{Served, app_address};
use crate::headers;
use crate::metrics::{Direction, Flags};
use crate::path::DataPath;
use crate::report::{Reported, counted};

/// How long the workload may take to accept a connection: it is on this host.
const APP_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What `peer` reaches as `port` of `host`.
///
/// # Errors
/// The code that the stream is reset with.
pub(super) fn admit(path: &DataPath, peer: &PeerIdentity, host: &Host, port: u16) -> Result<Served, ResetCode> {
    let cluster = peer.cluster.as_ref().ok_or(ResetCode::Denied)?;
    if path.draining.is_cancelled() {
        return Err(ResetCode::Refused);
    }
    let admitted = path.exports.load().admit(host, port, cluster).cloned();
    admitted.inspect_err(|code| {
        path.reports.metrics().refused(Direction::Inbound, code.as_str());
        tracing::info!(%host, port, peer = %peer.spiffe, %cluster, "refused: not exported to the caller's cluster");
    })
}

/// Carries a request to the workload.
///
/// # Errors
/// [`ResetCode::ConnectFailed`]: the workload never saw it.
pub(super) async fn request(
    path: &Arc<DataPath>,
    peer: &PeerIdentity,
    host: &Host,
    served: &Served,
    request: Request<Body>,
    informed: impl Fn(Response<()>) + Send + Sync + 'static,
) -> Result<Answer, ResetCode> {
    let started = Instant::now();
    let (mut head, body) = request.into_parts();
    let speaks_http2 = head.headers.contains_key(headers::PROTOCOL);
    let http2 = match served.protocol {
        Protocol::Http2 | Protocol::Grpc => true,
        Protocol::Auto => speaks_http2,
        _ => false,
    };
    if headers::canonical(&mut head).is_err() {
        // The caller's sidecar sends canonical heads only.
        return Err(ResetCode::Denied);
    }
    headers::strip_forged(&mut head.headers);
    let upgrade = head.headers.remove(header::UPGRADE);
    headers::strip_hop_by_hop(&mut head.headers);
    if let Some(protocol) = upgrade {
        head.headers.insert(header::UPGRADE, protocol);
    }
    head.headers.insert(headers::CLIENT_CERT, client_cert(path, peer));
    let bytes = Arc::default();
    let mut report = path.reports.request(path.reports.from_peer(Some(peer), host), &head, Arc::clone(&bytes), started);
    let body = if body.is_end_stream() { body } else { counted(body, &bytes) };
    let address = app_address(path.own.address, served);
    let sent = path.app.send(address, http2, Request::from_parts(head, body), APP_CONNECT_TIMEOUT, informed).await;
    match sent {
        Ok(Answer::Response(mut response)) => {
            headers::strip_hop_by_hop(response.headers_mut());
            headers::strip_forged(response.headers_mut());
            report.answered(response.status(), response.headers());
            Ok(Answer::Response(response.map(|body| Body::new(Reported::new(body, report, Flags::UC)))))
        }
        Ok(Answer::Upgraded(mut head, io)) => {
            let protocol = headers::strip_hop_by_hop(head.headers_mut());
            headers::strip_forged(head.headers_mut());
            if let Some(protocol) = protocol {
                head.headers_mut().insert(header::UPGRADE, protocol);
            }
            report.answered(head.status(), head.headers());
            Ok(Answer::Upgraded(head, io))
        }
        Err(error) if error.not_processed() => {
            report.failed(&error, Flags::UF);
            tracing::info!(%address, %error, "the workload does not take connections");
            Err(ResetCode::ConnectFailed)
        }
        Err(error) => {
            report.failed(&error, Flags::UC);
            let response = lost(&error.to_string());
            report.answered(response.status(), response.headers());
            Ok(Answer::Response(response))
        }
    }
}

/// The workload ended the connection before it answered: whether it processed the request, nobody knows.
fn lost(reason: &str) -> Response<Body> {
    let text = format!("isthmus: {reason} (UC)\n");
    let mut response = Response::new(Body::new(Full::from(text).map_err(|never| match never {})));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(headers::RESPONSE_FLAGS, HeaderValue::from_static("UC"));
    response
}

/// Envoy's `x-forwarded-client-cert`: who received, who called.
fn client_cert(path: &DataPath, peer: &PeerIdentity) -> HeaderValue {
    let cluster = peer.cluster.as_ref().map_or("", |cluster| cluster.as_str());
    let text = format!("By={};URI={};Cluster={cluster}", path.own.spiffe, peer.spiffe);
    HeaderValue::try_from(text).expect("SPIFFE ids and cluster names are visible ASCII")
}

/// Connects a byte stream to the workload.
///
/// # Errors
/// [`ResetCode::ConnectFailed`].
pub(super) async fn dial(path: &DataPath, served: &Served) -> Result<tokio::net::TcpStream, ResetCode> {
    let address = app_address(path.own.address, served);
    connect(address, APP_CONNECT_TIMEOUT).await.map_err(|error| {
        tracing::info!(%error, "the workload does not take connections");
        ResetCode::ConnectFailed
    })
}

/// Copies between a caller's stream and the workload until both directions have ended, or one broke.
pub(super) async fn copy(
    path: &DataPath,
    peer: Option<&PeerIdentity>,
    host: &Host,
    mut caller: Box<dyn ByteIo>,
    mut workload: tokio::net::TcpStream,
) {
    let mut report = path.reports.stream(path.reports.from_peer(peer, host));
    let mut copied = Copied::default();
    let result = copy_both(&mut caller, &mut workload, &mut copied).await;
    report.bytes(copied.forth, copied.back);
    if result.is_err() {
        report.flags = Flags::UC;
        reset(&workload);
    }
}

/// Makes the close of a connection a reset.
pub(super) fn reset(stream: &tokio::net::TcpStream) {
    // An error means that it is gone already.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// For the log.
pub(super) fn shown(address: std::io::Result<SocketAddr>) -> String {
    address.map_or_else(|error| error.to_string(), |address| address.to_string())
}
