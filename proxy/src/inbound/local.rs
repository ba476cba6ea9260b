//! Port 15008 over TCP: sidecars of the own cluster, HTTP/2 over mTLS (see `carrier::local` for the asking side).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use isthmus_identity::{Expect, PeerIdentity, Tls};
use isthmus_model::Host;
use isthmus_tunnel::ResetCode;
use isthmus_tunnel::carrier::{Answer, Body};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{distrusted, serve};
use crate::carrier::body_bytes::{BodyBytes, writer};
use crate::carrier::local::{ALPN_LOCAL, refusal};
use crate::copy::{Copied, copy_both};
use crate::exports::Served;
use crate::headers;
use crate::path::DataPath;
use crate::server::serve_http2;

/// How long a caller may take to prove itself.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at once: one per calling sidecar of the cluster.
const CONNECTIONS_MAX: usize = 4096;
/// Out of descriptors, most likely: a pause lets open connections give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Takes connections until `shutdown`; on return all have ended.
pub async fn run(
    path: Arc<DataPath>,
    listener: TcpListener,
    tls: Tls,
    trust_changed: watch::Receiver<u64>,
    shutdown: CancellationToken,
) {
    let config = tls.server_config(&[ALPN_LOCAL], Expect::Workload(Some(path.own.cluster.clone())));
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            () = path.draining.cancelled() => break,
            accepted = listener.accept(), if tasks.len() < CONNECTIONS_MAX => accepted,
            () = tokio::time::sleep(ACCEPT_PAUSE), if tasks.len() >= CONNECTIONS_MAX => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (path, acceptor, tls) = (Arc::clone(&path), acceptor.clone(), tls.clone());
        let (changed, shutdown) = (trust_changed.clone(), shutdown.clone());
        tasks.spawn(async move {
            let peer_address = serve::shown(stream.peer_addr());
            let ended = tokio::select! {
                ended = connection(path, stream, acceptor, tls, changed) => ended,
                () = shutdown.cancelled() => return,
            };
            if let Err(error) = ended {
                tracing::debug!(peer = %peer_address, %error, "local connection ended");
            }
        });
    }
    // The port is closed before draining: callers must see new connections refused.
    drop(listener);
    tasks.close();
    tasks.wait().await;
}

async fn connection(
    path: Arc<DataPath>,
    stream: TcpStream,
    acceptor: TlsAcceptor,
    tls: Tls,
    trust_changed: watch::Receiver<u64>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await??;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = Arc::new(tls.peer_identity(chain).map_err(io::Error::other)?);
    let handle = |request| handle(Arc::clone(&path), Arc::clone(&peer), request);
    tokio::select! {
        ended = serve_http2(stream, handle, path.spawn.clone(), &path.draining) => ended.map_err(io::Error::other),
        () = distrusted(tls.trust.clone(), trust_changed, &peer) => Err(io::Error::other("the peer is trusted no more")),
    }
}

async fn handle(path: Arc<DataPath>, peer: Arc<PeerIdentity>, request: Request<Incoming>) -> Response<Body> {
    match answer(&path, &peer, request).await {
        Ok(response) => response,
        Err(code) => refusal(code),
    }
}

async fn answer(
    path: &Arc<DataPath>,
    peer: &Arc<PeerIdentity>,
    request: Request<Incoming>,
) -> Result<Response<Body>, ResetCode> {
    let mut request = request.map(|body| Body::new(body.map_err(Into::into)));
    let target = request.headers_mut().remove(headers::SERVICE).ok_or(ResetCode::Denied)?;
    let (host, port) = service(&target).ok_or(ResetCode::Denied)?;
    let served = serve::admit(path, peer, &host, port)?;
    if request.headers().contains_key(headers::STREAM) {
        return stream(path, peer, host, &served, request.into_body()).await;
    }
    let Some(protocol) = request.headers_mut().remove(headers::UPGRADE) else {
        let answer = serve::request(path, peer, &host, &served, request, |_| {}).await?;
        return Ok(match answer {
            Answer::Response(response) => response,
            // Not asked for: the workload broke the protocol.
            Answer::Upgraded(..) => return Err(ResetCode::Internal),
        });
    };
    let (mut head, body) = request.into_parts();
    head.headers.insert(header::UPGRADE, protocol);
    let request = Request::from_parts(head, crate::report::empty());
    match serve::request(path, peer, &host, &served, request, |_| {}).await? {
        Answer::Response(response) => Ok(response),
        Answer::Upgraded(head, mut workload) => {
            let (near, far) = writer();
            let mut caller = BodyBytes::new(body, near);
            // The sidecar's shutdown waits for it; an error resets both by dropping them.
            path.spawn.0.spawn(async move {
                let _ = copy_both(&mut caller, &mut workload, &mut Copied::default()).await;
            });
            let (mut parts, ()) = head.into_parts();
            parts.status = http::StatusCode::OK;
            let protocol = parts.headers.remove(header::UPGRADE).unwrap_or_else(|| HeaderValue::from_static("unknown"));
            parts.headers.insert(headers::UPGRADE, protocol);
            Ok(Response::from_parts(parts, far))
        }
    }
}

async fn stream(
    path: &Arc<DataPath>,
    peer: &Arc<PeerIdentity>,
    host: Host,
    served: &Served,
    body: Body,
) -> Result<Response<Body>, ResetCode> {
    let workload = serve::dial(path, served).await?;
    let (near, far) = writer();
    let caller = Box::new(BodyBytes::new(body, near));
    let (path_of_task, peer) = (Arc::clone(path), Arc::clone(peer));
    // The sidecar's shutdown waits for it.
    path.spawn.0.spawn(async move { serve::copy(&path_of_task, Some(&peer), &host, caller, workload).await });
    Ok(Response::new(far))
}

fn service(value: &HeaderValue) -> Option<(Host, u16)> {
    let (host, port) = value.to_str().ok()?.rsplit_once(':')?;
    let host: Host = host.parse().ok()?;
    Some((host, port.parse().ok().filter(|port| *port > 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_a_host_and_a_port_and_nothing_else() {
        let read = |text: &'static str| service(&HeaderValue::from_static(text));
        let (host, port) = read("cart.shop.svc.clusterset.local:80").expect("valid");
        assert_eq!((host.as_str(), port), ("cart.shop.svc.clusterset.local", 80));
        for bad in ["", "cart", "cart:", "cart:0", "cart:65536", ":80", "cart:80:80", "[::1]:80"] {
            assert!(read(bad).is_none(), "{bad:?}");
        }
    }
}
