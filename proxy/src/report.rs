//! Counts every request and byte stream when it ends, however it ends.
//!
//! A report is made when the work begins and counts itself when dropped, so no path through the proxy is
//! uncounted. Labels are looked up once per endpoint and kept.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, Empty};
use isthmus_identity::PeerIdentity;
use isthmus_model::select::Choice;
use isthmus_model::service::Labels;
use isthmus_model::view::Target;
use isthmus_model::{ClusterId, ClusterName, Host};
use isthmus_tunnel::carrier::{Body, BoxError};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::time::Sleep;

use crate::balance::InFlight;
use crate::metrics::{Edge, EdgeLabels, Flags, Metrics, Party, Reporter, RequestEnd, RequestProtocol, Security};

/// Edges kept at hand; beyond it they are looked up anew.
const EDGES_MAX: usize = 4096;

type OutboundKey = (Host, ClusterId, Target);
type InboundKey = (Host, String, Option<ClusterName>);

/// Where reports go. Shared.
#[derive(Debug)]
pub struct Reports {
    metrics: Metrics,
    /// Requests and streams that have not ended; a draining sidecar waits for them.
    open: Arc<AtomicUsize>,
    own: Arc<Party>,
    nobody: Arc<Party>,
    outbound: Mutex<FxHashMap<OutboundKey, Arc<Edge>>>,
    inbound: Mutex<FxHashMap<InboundKey, Arc<Edge>>>,
}

impl Reports {
    /// Reports of the workload `own`.
    pub fn new(metrics: Metrics, own: Party) -> Self {
        let nobody = Arc::new(Party::default());
        let (outbound, inbound) = (Mutex::default(), Mutex::default());
        Self { metrics, open: Arc::default(), own: Arc::new(own), nobody, outbound, inbound }
    }

    /// Requests and streams that have not ended.
    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }

    /// A request with these headers that began at `started`.
    pub fn request(
        &self,
        edge: Arc<Edge>,
        headers: &HeaderMap,
        request_bytes: Arc<AtomicU64>,
        started: Instant,
    ) -> RequestReport {
        let kind = headers.get(header::CONTENT_TYPE).map(http::HeaderValue::as_bytes).unwrap_or_default();
        let grpc = kind.starts_with(b"application/grpc");
        let protocol = if grpc { RequestProtocol::Grpc } else { RequestProtocol::Http };
        let (code, grpc_status, flags, open) = (0, None, Flags::NONE, Open::new(&self.open));
        RequestReport {
            edge,
            started,
            protocol,
            request_bytes,
            response_bytes: 0,
            code,
            grpc_status,
            flags,
            _open: open,
        }
    }

    /// A stream that was just opened.
    pub fn stream(&self, edge: Arc<Edge>) -> StreamReport {
        edge.tcp_opened();
        StreamReport { edge, flags: Flags::NONE, _open: Open::new(&self.open) }
    }

    /// The counters behind.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The edge to the endpoint that serves `host`.
    pub fn to_endpoint(&self, host: &Host, choice: &Choice<'_>) -> Arc<Edge> {
        let target = &choice.endpoint.target;
        let mut edges = self.outbound.lock();
        // The lookup wants an owned key: one allocation a request, as many as the response has headers.
        let key = (host.clone(), choice.backends.cluster_id, target.clone());
        if let Some(edge) = edges.get(&key) {
            return Arc::clone(edge);
        }
        let account = match choice.backends.accounts.as_slice() {
            [one] => Some(one),
            _ => None,
        };
        let namespace = host.service().map(|(_, namespace)| namespace);
        let mut party =
            Party::new("", namespace.as_ref(), &choice.endpoint.labels, None, Some(&choice.backends.cluster));
        if let (Some(account), Some(domain)) = (account, self.own.principal.strip_prefix("spiffe://")) {
            let domain = domain.split('/').next().unwrap_or_default();
            party.principal = format!("spiffe://{domain}/{account}").into();
        }
        let security = if matches!(target, Target::Plain(_)) { Security::None } else { Security::MutualTls };
        let edge = self.edge(Reporter::Source, Arc::clone(&self.own), Arc::new(party), Some(host.clone()), security);
        if edges.len() < EDGES_MAX {
            edges.insert(key, Arc::clone(&edge));
        }
        edge
    }

    /// The edge of a request that reached no endpoint.
    pub fn to_nobody(&self, host: Option<&Host>) -> Arc<Edge> {
        self.edge(Reporter::Source, Arc::clone(&self.own), Arc::clone(&self.nobody), host.cloned(), Security::Unknown)
    }

    /// The edge from a caller to the own workload.
    pub fn from_peer(&self, peer: Option<&PeerIdentity>, host: &Host) -> Arc<Edge> {
        let principal = peer.map(|peer| peer.spiffe.to_string()).unwrap_or_default();
        let key = (host.clone(), principal, peer.and_then(|peer| peer.cluster.clone()));
        let mut edges = self.inbound.lock();
        if let Some(edge) = edges.get(&key) {
            return Arc::clone(edge);
        }
        let caller = peer.map(|peer| {
            let account = &peer.spiffe.account;
            Party::new(
                account.name.as_str(),
                Some(&account.namespace),
                &Labels::new(),
                Some(&peer.spiffe),
                peer.cluster.as_ref(),
            )
        });
        let caller = caller.map_or_else(|| Arc::clone(&self.nobody), Arc::new);
        let security = if peer.is_some() { Security::MutualTls } else { Security::None };
        let edge = self.edge(Reporter::Destination, caller, Arc::clone(&self.own), Some(host.clone()), security);
        if edges.len() < EDGES_MAX {
            edges.insert(key, Arc::clone(&edge));
        }
        edge
    }

    fn edge(
        &self,
        reporter: Reporter,
        source: Arc<Party>,
        destination: Arc<Party>,
        service: Option<Host>,
        security: Security,
    ) -> Arc<Edge> {
        self.metrics.edge(&EdgeLabels { reporter, source, destination, service, security })
    }
}

/// Counts as open until dropped.
#[derive(Debug)]
struct Open(Arc<AtomicUsize>);

impl Open {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// One request; counted when dropped.
#[derive(Debug)]
pub struct RequestReport {
    edge: Arc<Edge>,
    started: Instant,
    protocol: RequestProtocol,
    request_bytes: Arc<AtomicU64>,
    response_bytes: u64,
    code: u16,
    grpc_status: Option<u16>,
    flags: Flags,
    _open: Open,
}

impl RequestReport {
    /// It was answered with this head.
    pub fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.code = status.as_u16();
        self.grpc_status = grpc_status(headers).or(self.grpc_status);
    }

    /// Something went wrong.
    pub fn flag(&mut self, flags: Flags) {
        self.flags |= flags;
    }
}

impl Drop for RequestReport {
    fn drop(&mut self) {
        self.edge.request_ended(&RequestEnd {
            protocol: self.protocol,
            code: self.code,
            grpc_status: self.grpc_status,
            flags: self.flags,
            duration: self.started.elapsed(),
            request_bytes: self.request_bytes.load(Relaxed),
            response_bytes: self.response_bytes,
        });
    }
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// A body without anything.
pub fn empty() -> Body {
    Body::new(Empty::new().map_err(|never| match never {}))
}

/// Counts the bytes of a request's body.
pub fn counted(body: Body, bytes: &Arc<AtomicU64>) -> Body {
    Body::new(Counted { body, bytes: Arc::clone(bytes) })
}

struct Counted {
    body: Body,
    bytes: Arc<AtomicU64>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.bytes.fetch_add(data.len() as u64, Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body on its way to the caller: ends the report, the endpoint's load and the route's timeout.
pub struct Reported {
    /// The body.
    pub body: Body,
    /// Counted when the body ends.
    pub report: RequestReport,
    /// The endpoint's load, for outbound requests.
    pub in_flight: Option<InFlight>,
    /// The route's timeout.
    pub deadline: Option<Pin<Box<Sleep>>>,
    /// The flag of a body that breaks off.
    pub broken: Flags,
    /// Whether the body came to its end, or broke.
    pub ended: bool,
}

impl HttpBody for Reported {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            (this.ended, this.deadline) = (true, None);
            this.report.flag(Flags::UT);
            return Poll::Ready(Some(Err("the route's timeout ran out".into())));
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        match &frame {
            None => this.ended = true,
            Some(Err(_)) => {
                this.ended = true;
                this.report.flag(this.broken);
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.report.response_bytes += data.len() as u64;
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.report.grpc_status = grpc_status(trailers).or(this.report.grpc_status);
                    this.ended = true;
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Reported {
    fn drop(&mut self) {
        if !self.ended && !self.body.is_end_stream() {
            self.report.flag(Flags::DC);
        }
    }
}

/// One byte stream; counted when dropped.
#[derive(Debug)]
pub struct StreamReport {
    edge: Arc<Edge>,
    /// What went wrong.
    pub flags: Flags,
    _open: Open,
}

impl StreamReport {
    /// Bytes that passed.
    pub fn bytes(&self, to_server: u64, to_caller: u64) {
        self.edge.tcp_bytes(to_server, to_caller);
    }
}

impl Drop for StreamReport {
    fn drop(&mut self) {
        self.edge.tcp_closed(self.flags);
    }
}
