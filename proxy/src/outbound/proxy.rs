//! The workload names the sidecar as its HTTP proxy: requests in absolute form, and CONNECT for everything else.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use isthmus_model::service::Protocol;
use isthmus_model::view::ServiceView;
use isthmus_tunnel::carrier::Body;
use tokio::net::TcpStream;

use super::requests::{self, Origin, named};
use super::{Io, judge, stream, to_outside, to_service};
use crate::destination::{Verdict, judge_host, protocol};
use crate::detect::Prefixed;
use crate::forward::{self, Failed};
use crate::headers::{self, Authority};
use crate::path::DataPath;
use crate::server::serve_http1;

/// Serves a connection that was made to the sidecar itself.
pub(super) async fn serve(path: &Arc<DataPath>, stream: TcpStream) -> io::Result<()> {
    let origin = Arc::new(Origin { service: None, dialled: None, port: 80 });
    let io = Prefixed::new(bytes::Bytes::new(), stream);
    let handle = |request| handle(Arc::clone(path), Arc::clone(&origin), request);
    serve_http1(io, handle, &path.draining).await.map_err(io::Error::other)
}

async fn handle(path: Arc<DataPath>, origin: Arc<Origin>, request: Request<Incoming>) -> Response<Body> {
    if request.method() != Method::CONNECT {
        return requests::handle(path, origin, request).await;
    }
    connect(&path, request).await.unwrap_or_else(|failed| forward::answer(&failed, failed.flags()))
}

/// Where a CONNECT leads.
enum Leads {
    Service(Arc<ServiceView>),
    Outside(SocketAddr),
}

async fn connect(path: &Arc<DataPath>, mut request: Request<Incoming>) -> Result<Response<Body>, Failed> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (head, _) = request.into_parts();
    let Authority { host, port } = headers::authority(&head).map_err(Failed::BadRequest)?;
    let port = port.ok_or(Failed::BadRequest(headers::BadRequest::Authority))?;
    let leads = find(path, &host, port).await?;
    let task_path = Arc::clone(path);
    // Nothing is read before the 200 has gone out: early data stays unread until then. The sidecar's
    // shutdown waits for the task.
    path.spawn.0.spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let Ok(parts) = upgraded.downcast::<TokioIo<Io>>() else { return };
        let io = Prefixed::new(parts.read_buf, parts.io.into_inner()).flatten();
        let result = match leads {
            Leads::Service(service) if protocol(&service, port) == Protocol::Tcp => {
                stream(&task_path, io, &service, None, None, port).await
            }
            Leads::Service(service) => to_service(&task_path, io, service, None, port).await,
            Leads::Outside(address) => to_outside(&task_path, io, address).await,
        };
        if let Err(error) = result {
            tracing::debug!(%error, "a CONNECT of the workload ended");
        }
    });
    let mut response = Response::new(Body::new(Empty::new().map_err(|never| match never {})));
    *response.status_mut() = StatusCode::OK;
    Ok(response)
}

async fn find(path: &DataPath, host: &str, port: u16) -> Result<Leads, Failed> {
    if let Some(name) = named(path, host) {
        let answer = path.mesh.resolve_host(&name).await;
        match judge_host(&name, answer, path.policy) {
            Verdict::Service(service) => return Ok(Leads::Service(service)),
            Verdict::Unknown => return Err(Failed::NoService(name)),
            Verdict::Blocked => return Err(Failed::Blocked),
            Verdict::Outside => {}
        }
    }
    let address = path.outside(host, port).await?;
    match judge(path, address).await {
        Verdict::Service(service) => Ok(Leads::Service(service)),
        Verdict::Unknown => Err(Failed::UnknownAddress),
        Verdict::Blocked => Err(Failed::Blocked),
        Verdict::Outside => Ok(Leads::Outside(address)),
    }
}
