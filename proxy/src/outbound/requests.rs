//! One HTTP request of the workload: which service it is for, and on its way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, Request, Response, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use isthmus_model::Host;
use isthmus_model::view::{ResourceName, ServiceView};
use isthmus_tunnel::carrier::Body;

use crate::destination::{Verdict, is_in_mesh, judge_host};
use crate::discovery::Answer;
use crate::forward::{self, Failed, Inquiry};
use crate::headers::{self, Authority};
use crate::metrics::Flags;
use crate::path::{DataPath, NoWay};

/// Where the connection of a request was going.
#[derive(Debug)]
pub(super) struct Origin {
    /// The service of the dialled address.
    pub service: Option<Arc<ServiceView>>,
    /// The dialled address; `None` where the workload speaks to a proxy.
    pub dialled: Option<SocketAddr>,
    /// The dialled port; for a proxy the one without a port in the authority.
    pub port: u16,
}

/// Answers one request.
pub(super) async fn handle(path: Arc<DataPath>, origin: Arc<Origin>, mut request: Request<Incoming>) -> Response<Body> {
    let started = Instant::now();
    let upgrade = request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
    let (mut head, body) = request.into_parts();
    let authority = match headers::canonical(&mut head) {
        Ok(authority) => authority,
        Err(error) => return refuse(&path, &head, &Failed::BadRequest(error), None, started),
    };
    headers::strip_forged(&mut head.headers);
    let protocol = headers::strip_hop_by_hop(&mut head.headers);
    if head.version == http::Version::HTTP_2 {
        head.headers.insert(headers::PROTOCOL, HeaderValue::from_static("h2"));
    }
    if let Some(protocol) = protocol {
        head.headers.insert(header::UPGRADE, protocol);
    }
    let body = Body::new(body.map_err(Into::into));
    let inquiry = Inquiry { head, body, upgrade, started };
    let port = if origin.dialled.is_some() { origin.port } else { authority.port.unwrap_or(origin.port) };
    match find(&path, &origin, &authority, port).await {
        Found::Service(service, asked) => {
            forward::to_service(&path, inquiry, service, asked.as_ref(), origin.dialled, port).await
        }
        Found::Outside(address) => forward::to_outside(&path, inquiry, &authority.host, address).await,
        Found::Nowhere(failed) => {
            let host = authority.host.parse::<Host>().ok();
            refuse(&path, &inquiry.head, &failed, host.as_ref(), started)
        }
    }
}

enum Found {
    Service(Arc<ServiceView>, Option<Host>),
    Outside(SocketAddr),
    Nowhere(Failed),
}

/// The service that a request is for. Its authority decides, where the mesh knows it; else the dialled address.
async fn find(path: &DataPath, origin: &Origin, authority: &Authority, port: u16) -> Found {
    if let Some(host) = named(path, &authority.host) {
        let name = ResourceName::Host(host.clone());
        let of_mesh = host.is_mesh() || host.is_cluster();
        // Beside a known address, only names of the mesh are worth a question.
        let ask = of_mesh || origin.service.is_none();
        let answer = match path.mesh.known(&name) {
            Some(answer) => answer,
            None if ask => path.mesh.resolve(&name).await,
            None => Answer::Unanswered,
        };
        match judge_host(&host, answer, path.policy) {
            Verdict::Service(service) => return Found::Service(service, Some(host)),
            Verdict::Unknown if origin.service.is_none() => return Found::Nowhere(Failed::NoService(host)),
            Verdict::Blocked if origin.service.is_none() => return Found::Nowhere(Failed::Blocked),
            _ => {}
        }
    }
    if let Some(service) = &origin.service {
        return Found::Service(Arc::clone(service), None);
    }
    match origin.dialled {
        Some(dialled) => by_address(path, dialled).await,
        None => match path.outside(&authority.host, port).await {
            Ok(address) => by_address(path, address).await,
            Err(error) => Found::Nowhere(error.into()),
        },
    }
}

/// A name that resolves into the mesh is the mesh's: it must not leave in plaintext.
async fn by_address(path: &DataPath, address: SocketAddr) -> Found {
    match super::judge(path, address).await {
        Verdict::Service(service) => Found::Service(service, None),
        Verdict::Unknown => Found::Nowhere(Failed::UnknownAddress),
        Verdict::Blocked => Found::Nowhere(Failed::Blocked),
        Verdict::Outside if is_in_mesh(&path.mesh.view(), address.ip()) => {
            Found::Nowhere(NoWay::Forbidden(address).into())
        }
        Verdict::Outside => Found::Outside(address),
    }
}

/// The host as the mesh spells it: a single label is a service of the own namespace, as in Kubernetes.
pub(super) fn named(path: &DataPath, text: &str) -> Option<Host> {
    if text.parse::<std::net::IpAddr>().is_ok() || text.starts_with('[') {
        return None;
    }
    if !text.contains('.') && text != "localhost" {
        return format!("{text}.{}.svc.cluster.local", path.own.namespace).parse().ok();
    }
    text.parse().ok().filter(|host: &Host| !host.is_wildcard())
}

fn refuse(
    path: &DataPath,
    head: &http::request::Parts,
    failed: &Failed,
    host: Option<&Host>,
    started: Instant,
) -> Response<Body> {
    let flags: Flags = failed.flags();
    let mut response = forward::answer(failed, flags);
    let mut report = path.reports.request(path.reports.to_nobody(host), head, Arc::default(), started);
    report.answered(response.status(), response.headers());
    report.failed(failed, flags);
    if matches!(failed, Failed::BadRequest(_)) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
