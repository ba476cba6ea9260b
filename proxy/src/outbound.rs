//! Port 15001: takes the workload's connections, finds out what they speak and where they go, and carries them.
//!
//! Two ways in: redirected by the packet filter (the kernel knows where the workload dialled), or as an HTTP
//! proxy that the workload names. Top to bottom: accept, find the destination, detect, route, carry.

mod proxy;
mod requests;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use isthmus_model::Host;
use isthmus_model::service::Protocol;
use isthmus_model::view::{ResourceName, ServiceView};
use tokio::net::TcpStream;

use crate::capture::original_dst;
use crate::carrier::app::connect;
use crate::copy::{Copied, copy_both};
use crate::destination::{Verdict, judge_address, judge_host, protocol};
use crate::detect::{Detected, PEEK_TIMEOUT, Prefixed, peek};
use crate::discovery::Answer;
use crate::forward::{self, Failed};
use crate::metrics::{Direction, Flags};
use crate::path::DataPath;
use crate::server::{serve_http1, serve_http2};
use requests::Origin;

/// A connection of the workload, whose first bytes may have been read.
pub(crate) type Io = Prefixed<TcpStream>;

/// Serves one connection of the workload to its end.
pub async fn serve(path: Arc<DataPath>, stream: TcpStream) {
    let _open = path.reports.metrics().connection_opened(Direction::Outbound);
    let dialled =
        stream.set_nodelay(true).and_then(|()| stream.local_addr()).and_then(|local| original_dst(&stream, local));
    let result = match dialled {
        Ok(Some(dialled)) => captured(&path, Prefixed::new(bytes::Bytes::new(), stream), dialled).await,
        Ok(None) => proxy::serve(&path, stream).await,
        Err(error) => Err(error),
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection of the workload ended");
    }
}

/// A connection that the workload made to `dialled`.
async fn captured(path: &Arc<DataPath>, io: Io, dialled: SocketAddr) -> io::Result<()> {
    if path.is_own(dialled) {
        path.reports.metrics().refused(Direction::Outbound, "own_port");
        return reset(&io);
    }
    match judge(path, dialled).await {
        Verdict::Service(service) => to_service(path, io, service, Some(dialled), dialled.port()).await,
        Verdict::Outside => to_outside(path, io, dialled).await,
        Verdict::Unknown => {
            path.reports.metrics().refused(Direction::Outbound, "unknown_address");
            tracing::info!(%dialled, error = %Failed::UnknownAddress, "refused");
            reset(&io)
        }
        Verdict::Blocked => by_name_only(path, io, dialled).await,
    }
}

/// What the mesh says of an address; asked for if it could be the mesh's.
pub(crate) async fn judge(path: &DataPath, address: SocketAddr) -> Verdict {
    let ip = address.ip();
    let name = ResourceName::Address(ip);
    let answer = match path.mesh.known(&name) {
        Some(answer) => answer,
        None if crate::destination::is_in_mesh(&path.mesh.view(), ip) => path.mesh.resolve(&name).await,
        None => Answer::Absent,
    };
    judge_address(&path.mesh.view(), ip, answer, path.policy)
}

/// A connection for `port` of `service`.
pub(crate) async fn to_service(
    path: &Arc<DataPath>,
    io: Io,
    service: Arc<ServiceView>,
    dialled: Option<SocketAddr>,
    port: u16,
) -> io::Result<()> {
    let declared = protocol(&service, port);
    if matches!(declared, Protocol::Tcp | Protocol::Udp) {
        return stream(path, io, &service, None, dialled, port).await;
    }
    let (detected, io) = peek(io, PEEK_TIMEOUT).await?;
    // One layer for all: what was read comes first again.
    let io = io.flatten();
    match detected {
        Detected::Http1 if declared != Protocol::Tls => {
            let origin = Arc::new(Origin { service: Some(service), dialled, port });
            let handle = |request| requests::handle(Arc::clone(path), Arc::clone(&origin), request);
            serve_http1(io, handle, &path.draining).await.map_err(io::Error::other)
        }
        Detected::Http2 if declared != Protocol::Tls => {
            let origin = Arc::new(Origin { service: Some(service), dialled, port });
            let handle = |request| requests::handle(Arc::clone(path), Arc::clone(&origin), request);
            serve_http2(io, handle, path.spawn.clone(), &path.draining).await.map_err(io::Error::other)
        }
        Detected::Tls(sni) => stream(path, io, &service, sni.as_ref(), dialled, port).await,
        _ => stream(path, io, &service, None, dialled, port).await,
    }
}

/// Bytes to an endpoint of `service`.
async fn stream(
    path: &DataPath,
    mut io: Io,
    service: &Arc<ServiceView>,
    sni: Option<&Host>,
    dialled: Option<SocketAddr>,
    port: u16,
) -> io::Result<()> {
    let mut opened = match forward::open(path, service, sni, dialled, port).await {
        Ok(opened) => opened,
        Err(failed) => {
            tracing::info!(host = %service.host, port, error = %failed, "connection refused");
            let mut report = path.reports.stream(path.reports.to_nobody(Some(&service.host)));
            report.flags = failed.flags();
            return reset(&io);
        }
    };
    let mut copied = Copied::default();
    let result = copy_both(&mut io, &mut opened.io, &mut copied).await;
    opened.report.bytes(copied.forth, copied.back);
    if result.is_err() {
        opened.report.flags |= Flags::UC;
        // Dropping `opened.io` resets the other side.
        reset(&io)?;
    }
    Ok(())
}

/// Bytes to an address outside the mesh.
async fn to_outside(path: &DataPath, mut io: Io, address: SocketAddr) -> io::Result<()> {
    let mut report = path.reports.stream(path.reports.to_nobody(None));
    let mut far = match connect(address, isthmus_model::destination::CONNECT_TIMEOUT).await {
        Ok(far) => far,
        Err(error) => {
            tracing::debug!(%address, %error, "not connected");
            report.flags = Flags::UF;
            return reset(&io);
        }
    };
    let mut copied = Copied::default();
    let result = copy_both(&mut io, &mut far, &mut copied).await;
    report.bytes(copied.forth, copied.back);
    if result.is_err() {
        abort(&far);
        reset(&io)?;
    }
    Ok(())
}

/// REGISTRY_ONLY, and an address that is no service's: only a name of the registry may let it through.
async fn by_name_only(path: &Arc<DataPath>, io: Io, dialled: SocketAddr) -> io::Result<()> {
    let (detected, io) = peek(io, PEEK_TIMEOUT).await?;
    let io = io.flatten();
    match detected {
        Detected::Http1 => {
            let origin = Arc::new(Origin { service: None, dialled: Some(dialled), port: dialled.port() });
            let handle = |request| requests::handle(Arc::clone(path), Arc::clone(&origin), request);
            return serve_http1(io, handle, &path.draining).await.map_err(io::Error::other);
        }
        Detected::Tls(Some(sni)) => {
            let answer = path.mesh.resolve_host(&sni).await;
            if let Verdict::Service(service) = judge_host(&sni, answer, path.policy) {
                return stream(path, io, &service, Some(&sni), Some(dialled), dialled.port()).await;
            }
        }
        _ => {}
    }
    path.reports.metrics().refused(Direction::Outbound, "registry_only");
    tracing::info!(%dialled, error = %Failed::Blocked, "refused");
    reset(&io)
}

/// Makes the close of `io` a reset: the workload must not take a broken connection for a finished one.
pub(crate) fn reset(io: &Io) -> io::Result<()> {
    socket2::SockRef::from(io.get_ref()).set_linger(Some(std::time::Duration::ZERO))
}

fn abort(stream: &TcpStream) {
    // An error means that the connection is gone already.
    let _ = socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO));
}
