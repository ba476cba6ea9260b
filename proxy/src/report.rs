//! Counts every request and byte stream when it ends, however it ends.
//!
//! A report is made when the work begins and counts itself when dropped, so no path through the proxy is
//! uncounted. Labels are looked up once per endpoint and kept.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header, request};
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

use crate::access_log::{AccessLog, Entry, Tunnel};
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
    access: Option<AccessLog>,
    /// Requests and streams that have not ended; a draining sidecar waits for them.
    open: Arc<AtomicUsize>,
    own: Arc<Party>,
    nobody: Arc<Party>,
    outbound: Mutex<FxHashMap<OutboundKey, Arc<Edge>>>,
    inbound: Mutex<FxHashMap<InboundKey, Arc<Edge>>>,
}

impl Reports {
    /// Reports of the workload `own`.
    pub fn new(metrics: Metrics, access: Option<AccessLog>, own: Party) -> Self {
        let nobody = Arc::new(Party::default());
        let (outbound, inbound) = (Mutex::default(), Mutex::default());
        Self { metrics, access, open: Arc::default(), own: Arc::new(own), nobody, outbound, inbound }
    }

    /// Requests and streams that have not ended.
    pub fn open(&self) -> usize {
        self.open.load(Relaxed)
    }

    /// The endpoint of `host` that a request or stream for `port` goes to.
    pub fn reached(&self, host: &Host, choice: &Choice<'_>, port: u16) -> Reached {
        let via = self.access.as_ref().map(|_| Via::endpoint(choice, port));
        Reached { edge: self.to_endpoint(host, choice), via: via.unwrap_or_default() }
    }

    /// A request with this head that began at `started`.
    pub fn request(
        &self,
        Reached { edge, via }: Reached,
        head: &request::Parts,
        request_bytes: Arc<AtomicU64>,
        started: Instant,
    ) -> RequestReport {
        let kind = head.headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
        let grpc = kind.starts_with(b"application/grpc");
        RequestReport {
            edge,
            started,
            protocol: if grpc { RequestProtocol::Grpc } else { RequestProtocol::Http },
            request_bytes,
            response_bytes: 0,
            code: 0,
            grpc_status: None,
            flags: Flags::NONE,
            head_only: head.method == Method::HEAD,
            length: None,
            line: self.access.as_ref().map(|log| Box::new(Line::new(log.clone(), head, via, started))),
            _open: Open::new(&self.open),
        }
    }

    /// A stream that was just opened.
    pub fn stream(&self, Reached { edge, via }: Reached) -> StreamReport {
        edge.tcp_opened();
        let (started, log) = (Instant::now(), self.access.clone());
        let (flags, sent, received) = (Flags::NONE, 0, 0);
        StreamReport { edge, flags, sent, received, started, log, via, _open: Open::new(&self.open) }
    }

    /// The counters behind.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The edge to the endpoint that serves `host`.
    fn to_endpoint(&self, host: &Host, choice: &Choice<'_>) -> Arc<Edge> {
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
    pub fn to_nobody(&self, host: Option<&Host>) -> Reached {
        let (own, nobody) = (Arc::clone(&self.own), Arc::clone(&self.nobody));
        self.edge(Reporter::Source, own, nobody, host.cloned(), Security::Unknown).into()
    }

    /// The edge from a caller to the own workload.
    pub fn from_peer(&self, peer: Option<&PeerIdentity>, host: &Host) -> Reached {
        let principal = peer.map(|peer| peer.spiffe.to_string()).unwrap_or_default();
        let key = (host.clone(), principal, peer.and_then(|peer| peer.cluster.clone()));
        let mut edges = self.inbound.lock();
        if let Some(edge) = edges.get(&key) {
            return Arc::clone(edge).into();
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
        edge.into()
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
    /// The request was HEAD.
    head_only: bool,
    /// Length of the response's body, where it is known.
    length: Option<u64>,
    line: Option<Box<Line>>,
    _open: Open,
}

/// What only the access log wants to know; made only if there is one.
#[derive(Debug)]
struct Line {
    log: AccessLog,
    start_time: SystemTime,
    method: Method,
    path: String,
    protocol: &'static str,
    x_forwarded_for: Option<HeaderValue>,
    user_agent: Option<HeaderValue>,
    request_id: Option<HeaderValue>,
    authority: Option<HeaderValue>,
    service_time: Option<Duration>,
    via: Via,
    route: String,
    failure: String,
}

/// What a request or stream is counted at.
#[derive(Debug, Clone)]
pub struct Reached {
    /// The counters.
    pub edge: Arc<Edge>,
    via: Via,
}

impl From<Arc<Edge>> for Reached {
    fn from(edge: Arc<Edge>) -> Self {
        Self { edge, via: Via::default() }
    }
}

/// Where a request or stream went, for the access log.
#[derive(Debug, Clone, Default)]
struct Via {
    /// Address, or `cluster/handle` of an endpoint behind a tunnel.
    endpoint: String,
    /// The service's port.
    port: u16,
    /// How it was carried.
    tunnel: Tunnel,
}

impl Via {
    /// To the chosen endpoint.
    fn endpoint(choice: &Choice<'_>, port: u16) -> Self {
        let (endpoint, tunnel) = match &choice.endpoint.target {
            Target::Direct(address) => (address.to_string(), Tunnel::Local),
            Target::Tunnel { handle, .. } => (format!("{}/{handle}", choice.backends.cluster), Tunnel::Quic),
            Target::Plain(host) => (host.clone(), Tunnel::None),
        };
        Self { endpoint, port, tunnel }
    }
}

fn text(value: Option<&HeaderValue>) -> &str {
    value.and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Envoy's name of the other side: `outbound|80||host`.
fn upstream_cluster(labels: &EdgeLabels, port: u16) -> String {
    let host = labels.service.as_ref().map_or("", Host::as_str);
    match labels.reporter {
        Reporter::Source if host.is_empty() => "PassthroughCluster".to_owned(),
        Reporter::Source => format!("outbound|{port}||{host}"),
        Reporter::Destination => format!("inbound|{port}||"),
    }
}

/// What an entry says of both sides.
fn entry_of<'a>(labels: &'a EdgeLabels, via: &'a Via, upstream_cluster: &'a str) -> Entry<'a> {
    let peer = match labels.reporter {
        Reporter::Source => &labels.destination,
        Reporter::Destination => &labels.source,
    };
    Entry {
        upstream_host: &via.endpoint,
        upstream_cluster,
        source_cluster: &labels.source.cluster,
        destination_cluster: &labels.destination.cluster,
        tunnel: via.tunnel,
        peer_spiffe: &peer.principal,
        ..Entry::default()
    }
}

impl Line {
    fn new(log: AccessLog, head: &request::Parts, via: Via, started: Instant) -> Self {
        let get = |name: &str| head.headers.get(name).cloned();
        let now = SystemTime::now();
        Self {
            log,
            start_time: now.checked_sub(started.elapsed()).unwrap_or(now),
            method: head.method.clone(),
            path: head.uri.path_and_query().map_or_else(String::new, ToString::to_string),
            protocol: if head.version == http::Version::HTTP_2 { "HTTP/2" } else { "HTTP/1.1" },
            x_forwarded_for: get("x-forwarded-for"),
            user_agent: get("user-agent"),
            request_id: get("x-request-id"),
            authority: get("host"),
            service_time: None,
            via,
            route: String::new(),
            failure: String::new(),
        }
    }

    fn write(&self, report: &RequestReport, duration: Duration) {
        let labels = report.edge.labels();
        let upstream = upstream_cluster(labels, self.via.port);
        self.log.log(&Entry {
            start_time: Some(self.start_time),
            method: self.method.as_str(),
            path: &self.path,
            protocol: self.protocol,
            response_code: report.code,
            response_flags: report.flags,
            response_code_details: if self.failure.is_empty() { "via_upstream" } else { "local_reply" },
            upstream_transport_failure_reason: &self.failure,
            bytes_received: report.request_bytes.load(Relaxed),
            bytes_sent: report.response_bytes,
            duration,
            upstream_service_time: self.service_time.filter(|_| self.failure.is_empty()),
            x_forwarded_for: text(self.x_forwarded_for.as_ref()),
            user_agent: text(self.user_agent.as_ref()),
            request_id: text(self.request_id.as_ref()),
            authority: text(self.authority.as_ref()),
            route_name: &self.route,
            ..entry_of(labels, &self.via, &upstream)
        });
    }
}

impl RequestReport {
    /// The route that it takes.
    pub fn route(&mut self, name: Option<&str>) {
        if let Some(line) = &mut self.line {
            line.route = name.unwrap_or("default").to_owned();
        }
    }

    /// Why the sidecar answers itself.
    pub fn failed(&mut self, failure: &dyn std::fmt::Display, flags: Flags) {
        self.flag(flags);
        if let Some(line) = &mut self.line {
            line.failure = failure.to_string();
        }
    }

    /// It was answered with this head.
    pub fn answered(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.code = status.as_u16();
        let told = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        // RFC 9110 §6.4.1: no body, whatever the length says.
        let bodiless = self.head_only || matches!(self.code, 204 | 304);
        self.length = if bodiless { Some(0) } else { told };
        if let Some(line) = &mut self.line {
            line.service_time = Some(self.started.elapsed());
        }
        self.grpc_status = grpc_status(headers).or(self.grpc_status);
    }

    /// Whether all bytes of a body of known length have passed.
    fn is_complete(&self) -> bool {
        self.length.is_some_and(|length| self.response_bytes >= length)
    }

    /// Something went wrong.
    pub fn flag(&mut self, flags: Flags) {
        self.flags |= flags;
    }
}

impl Drop for RequestReport {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        if let Some(line) = self.line.take() {
            line.write(self, duration);
        }
        self.edge.request_ended(&RequestEnd {
            protocol: self.protocol,
            code: self.code,
            grpc_status: self.grpc_status,
            flags: self.flags,
            duration,
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
    ended: bool,
    /// Polled ahead, behind the last byte of a body of known length.
    ahead: Option<Option<Result<Frame<Bytes>, BoxError>>>,
}

impl Reported {
    /// `body`, with what ends when it does. `broken` is the flag of a body that breaks off.
    pub fn new(body: Body, report: RequestReport, broken: Flags) -> Self {
        Self { body, report, in_flight: None, deadline: None, broken, ended: false, ahead: None }
    }

    fn note(&mut self, frame: &Option<Result<Frame<Bytes>, BoxError>>) {
        match frame {
            None => self.ended = true,
            Some(Err(_)) => {
                self.ended = true;
                self.report.flag(self.broken);
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.report.response_bytes += data.len() as u64;
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.report.grpc_status = grpc_status(trailers).or(self.report.grpc_status);
                    self.ended = true;
                }
            }
        }
    }
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
        if let Some(frame) = this.ahead.take() {
            return Poll::Ready(frame);
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        this.note(&frame);
        // Whoever writes a body of known length does not ask for its end. Asked here, the stream underneath is
        // seen to finish; else it would be told to stop, with a packet of its own.
        if !this.ended
            && this.report.is_complete()
            && let Poll::Ready(next) = Pin::new(&mut this.body).poll_frame(cx)
        {
            this.note(&next);
            this.ahead = Some(next);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.ahead {
            Some(next) => next.is_none(),
            None => self.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Reported {
    fn drop(&mut self) {
        if !self.ended && !self.report.is_complete() && !self.body.is_end_stream() {
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
    sent: u64,
    received: u64,
    started: Instant,
    log: Option<AccessLog>,
    via: Via,
    _open: Open,
}

impl StreamReport {
    /// Bytes that passed.
    pub fn bytes(&mut self, to_server: u64, to_caller: u64) {
        self.edge.tcp_bytes(to_server, to_caller);
        self.received += to_server;
        self.sent += to_caller;
    }
}

impl Drop for StreamReport {
    fn drop(&mut self) {
        self.edge.tcp_closed(self.flags);
        if let Some(log) = &self.log {
            let (now, duration) = (SystemTime::now(), self.started.elapsed());
            let upstream = upstream_cluster(self.edge.labels(), self.via.port);
            log.log(&Entry {
                start_time: now.checked_sub(duration),
                response_flags: self.flags,
                bytes_received: self.received,
                bytes_sent: self.sent,
                duration,
                ..entry_of(self.edge.labels(), &self.via, &upstream)
            });
        }
    }
}
