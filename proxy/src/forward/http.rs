//! Requests: the loop over endpoints, and the answer on its way back.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use http::{HeaderValue, Request, Response, StatusCode, header, request};
use http_body::Body as _;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use isthmus_model::Host;
use isthmus_model::route::HttpRoute;
use isthmus_model::route::matching::RequestFacts;
use isthmus_model::view::ServiceView;
use isthmus_tunnel::carrier::{Answer, Body, ByteIo};

use super::{Failed, REPEAT_PAUSE, REPEATS_MAX, Resolved, answer, attempt, resolve};
use crate::balance::InFlight;
use crate::copy::{Copied, copy_both};
use crate::destination::route_http;
use crate::metrics::Flags;
use crate::path::{AskFor, DataPath};
use crate::replay::Replay;
use crate::report::{Reached, Reported, RequestReport, counted, empty};
use crate::retry::{Failure, Retries};

/// A request that cannot be sent again waits this long for a silent tunnel to recover.
const SILENCE_MAX: Duration = Duration::from_secs(2);

/// A request, taken apart and in canonical form.
pub struct Inquiry {
    /// Its head: hop-by-hop and forged headers taken away, an upgrade put back as `Upgrade`.
    pub head: request::Parts,
    /// Its body.
    pub body: Body,
    /// The workload's side of an upgrade.
    pub upgrade: Option<OnUpgrade>,
    /// When it came.
    pub started: Instant,
}

/// Sends a request for `port` of `service`, which the caller named `asked` or dialled by address.
pub async fn to_service(
    path: &Arc<DataPath>,
    inquiry: Inquiry,
    service: Arc<ServiceView>,
    asked: Option<&Host>,
    dialled: Option<SocketAddr>,
    port: u16,
) -> Response<Body> {
    path.budget.lock().deposit(inquiry.started);
    let known = path.mesh.snapshot();
    let routed = {
        let head = &inquiry.head;
        let values = |name: &str| joined(&head.headers, name);
        let authority = head.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let facts = RequestFacts {
            method: head.method.as_str(),
            path: head.uri.path_and_query().map_or("/", |path| path.as_str()),
            authority,
            scheme: "http",
            headers: &values,
            port,
            source: path.own.source(),
        };
        route_http(&known, &service, asked, &facts, &mut rand::rng())
    };
    let mut exchange = Exchange::new(path, inquiry);
    let (routed, index) = match routed {
        Ok(found) => found,
        Err(_) => return exchange.fail(&Failed::NoRoute(service.host.clone()), Some(&service.host)),
    };
    let routes = known.routes.get(&service.host);
    let route = index.and_then(|index| routes?.source().http.get(index));
    let to = match resolve(path, &known, &service, routed, dialled.map(|address| address.ip())).await {
        Ok(to) => to,
        Err(failed) => return exchange.fail(&failed, Some(&service.host)),
    };
    exchange.run(&to, route).await
}

/// Sends a request out of the mesh, to where the workload meant to send it.
pub async fn to_outside(path: &Arc<DataPath>, inquiry: Inquiry, host: &str, address: SocketAddr) -> Response<Body> {
    let http2 = inquiry.head.version == http::Version::HTTP_2;
    let asked: Option<Host> = host.parse().ok();
    let mut exchange = Exchange::new(path, inquiry);
    let reached = path.reports.to_nobody(asked.as_ref());
    let request = exchange.request();
    match attempt::plain(path, address, http2, request, isthmus_model::destination::CONNECT_TIMEOUT).await {
        Ok(answered) => exchange.respond(answered, reached, None, None, Flags::UC),
        Err(error) => exchange.fail(&error.into(), asked.as_ref()),
    }
}

fn joined<'a>(headers: &'a http::HeaderMap, name: &str) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    let first = values.next()?;
    match values.next() {
        None => Some(Cow::Borrowed(first)),
        Some(second) => Some(Cow::Owned(values.fold(format!("{first},{second}"), |all, next| all + "," + next))),
    }
}

/// One request from its arrival to its answer.
struct Exchange<'a> {
    path: &'a Arc<DataPath>,
    head: request::Parts,
    /// `None` for a request without a body.
    replay: Option<Replay>,
    upgrade: Option<OnUpgrade>,
    request_bytes: Arc<AtomicU64>,
    started: Instant,
    /// The name of the route taken, for the access log.
    route: Option<String>,
}

impl<'a> Exchange<'a> {
    fn new(path: &'a Arc<DataPath>, inquiry: Inquiry) -> Self {
        let Inquiry { mut head, body, upgrade, started } = inquiry;
        head.extensions.clear();
        let request_bytes = Arc::default();
        let replay = (!body.is_end_stream()).then(|| Replay::new(counted(body, &request_bytes)));
        Self { path, head, replay, upgrade, request_bytes, started, route: None }
    }

    fn request(&self) -> Request<Body> {
        let body = self.replay.as_ref().map_or_else(empty, Replay::body);
        Request::from_parts(self.head.clone(), body)
    }

    async fn run(&mut self, to: &Resolved, route: Option<&HttpRoute>) -> Response<Body> {
        self.route = route.and_then(|route| route.name.clone());
        let deadline = route.and_then(|route| route.timeout).map(|timeout| self.started + timeout);
        let tries = self.tries(to, route);
        let result = match deadline {
            None => tries.await,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), tries).await {
                Ok(result) => result,
                Err(_) => Err(Box::new((Failed::Timeout, None))),
            },
        };
        match result {
            Ok(served) => {
                let Served { answer, reached, in_flight, lost } = *served;
                let deadline = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline.into())));
                self.respond(answer, reached, Some(in_flight), deadline, lost)
            }
            Err(failed) => match *failed {
                (failed, Some(reached)) => self.fail_at(&failed, reached),
                (failed, None) => self.fail(&failed, Some(&to.host)),
            },
        }
    }

    /// Tries endpoints until one answers, or another try would not be safe or useful.
    async fn tries(
        &self,
        to: &Resolved,
        route: Option<&HttpRoute>,
    ) -> Result<Box<Served>, Box<(Failed, Option<Reached>)>> {
        let path = self.path;
        let mut retries = Retries::new(route.and_then(|route| route.retries.as_ref()), &self.head.method);
        let mut tried = Vec::new();
        let mut repeats = 0;
        let mut last: Option<Box<(Failed, Option<Reached>)>> = None;
        loop {
            let ask = AskFor {
                port: to.port,
                subset: &to.subset,
                balancing: to.policy.balancing,
                tried: &tried,
                dialled: to.dialled,
            };
            let (choice, in_flight) = match path.choose(&to.service, ask) {
                Ok(chosen) => chosen,
                Err(reason) => {
                    let none = Failed::NoEndpoint { host: to.host.clone(), reason };
                    return Err(last.unwrap_or_else(|| Box::new((none, None))));
                }
            };
            if choice.repeated {
                repeats += 1;
                if let Some(last) = last.take_if(|_| repeats > REPEATS_MAX) {
                    return Err(last);
                }
                tokio::time::sleep(REPEAT_PAUSE).await;
            }
            let reached = path.reports.reached(&to.host, &choice, to.port);
            if choice.failover {
                reached.edge.failed_over();
                path.reports.metrics().failed_over(last.as_ref().map_or("no_local_endpoint", |last| last.0.reason()));
            }
            let key = (choice.backends.cluster_id, choice.endpoint.target.clone());
            let movable = self.head.method.is_idempotent() && self.can_replay();
            let leaves = |silent| (movable && self.has_other(to, &tried, &key)) || silent >= SILENCE_MAX;
            let trying = attempt::send(path, to, &choice, self.request(), leaves);
            let outcome = match retries.per_try_timeout() {
                None => trying.await,
                Some(limit) => tokio::time::timeout(limit, trying).await.unwrap_or(Err(Failed::TryTimeout)),
            };
            let failed = match outcome {
                Ok(answer) => {
                    in_flight.answered();
                    if !self.tries_answer_again(&answer, &mut retries) {
                        let lost = lost_flag(&choice.endpoint.target);
                        return Ok(Box::new(Served { answer, reached, in_flight, lost }));
                    }
                    tokio::time::sleep(REPEAT_PAUSE).await;
                    tried.push(key);
                    continue;
                }
                Err(failed) => failed,
            };
            if failed.blames_endpoint() {
                in_flight.failed(Instant::now());
            }
            tracing::debug!(host = %to.host, cluster = %choice.backends.cluster, target = ?key.1, error = %failed, "a try failed");
            let again = failed.failure().is_some_and(|failure| {
                self.can_replay() && retries.again(failure, &mut path.budget.lock(), Instant::now())
            });
            let failed = Box::new((failed, Some(reached)));
            if !again {
                return Err(failed);
            }
            tried.push(key);
            last = Some(failed);
        }
    }

    fn can_replay(&self) -> bool {
        self.replay.as_ref().is_none_or(Replay::can_replay)
    }

    /// Whether an explicit policy asks for another try after this answer.
    fn tries_answer_again(&self, answer: &Answer, retries: &mut Retries<'_>) -> bool {
        let Answer::Response(response) = answer else { return false };
        retries.judges_responses()
            && self.can_replay()
            && retries.again(
                Failure::Status(response.status(), response.headers()),
                &mut self.path.budget.lock(),
                Instant::now(),
            )
    }

    /// Whether an endpoint without doubt is left, so that leaving a silent one makes sense.
    fn has_other(
        &self,
        to: &Resolved,
        tried: &[(isthmus_model::ClusterId, isthmus_model::view::Target)],
        current: &(isthmus_model::ClusterId, isthmus_model::view::Target),
    ) -> bool {
        let mut tried = tried.to_vec();
        tried.push(current.clone());
        let ask = AskFor {
            port: to.port,
            subset: &to.subset,
            balancing: to.policy.balancing,
            tried: &tried,
            dialled: to.dialled,
        };
        self.path.choose(&to.service, ask).is_ok_and(|(choice, _)| !choice.repeated)
    }

    fn respond(
        &mut self,
        answered: Answer,
        reached: Reached,
        in_flight: Option<InFlight>,
        deadline: Option<std::pin::Pin<Box<tokio::time::Sleep>>>,
        broken: Flags,
    ) -> Response<Body> {
        let mut report = self.path.reports.request(reached, &self.head, Arc::clone(&self.request_bytes), self.started);
        report.route(self.route.as_deref());
        match answered {
            Answer::Response(response) => {
                report.answered(response.status(), response.headers());
                response.map(|body| {
                    let mut reported = Reported::new(body, report, broken);
                    (reported.in_flight, reported.deadline) = (in_flight, deadline);
                    Body::new(reported)
                })
            }
            Answer::Upgraded(head, io) => {
                report.answered(head.status(), head.headers());
                self.upgraded(head, io, report, in_flight)
            }
        }
    }

    /// The answer to an upgrade; from then on bytes are copied until both sides have ended.
    fn upgraded(
        &mut self,
        head: Response<()>,
        mut io: Box<dyn ByteIo>,
        report: RequestReport,
        in_flight: Option<InFlight>,
    ) -> Response<Body> {
        let (mut parts, ()) = head.into_parts();
        parts.status = StatusCode::SWITCHING_PROTOCOLS;
        parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(upgrade) = self.upgrade.take() {
            // The sidecar's shutdown waits for it.
            self.path.spawn.0.spawn(async move {
                let _held = (report, in_flight);
                let Ok(workload) = upgrade.await else { return };
                let mut copied = Copied::default();
                // An error resets both by dropping them.
                let _ = copy_both(&mut TokioIo::new(workload), &mut io, &mut copied).await;
            });
        }
        Response::from_parts(parts, empty())
    }

    fn fail(&self, failed: &Failed, host: Option<&Host>) -> Response<Body> {
        self.fail_at(failed, self.path.reports.to_nobody(host))
    }

    fn fail_at(&self, failed: &Failed, reached: Reached) -> Response<Body> {
        let flags = failed.flags();
        let response = answer(failed, flags);
        let mut report = self.path.reports.request(reached, &self.head, Arc::clone(&self.request_bytes), self.started);
        report.answered(response.status(), response.headers());
        report.failed(failed, flags);
        response
    }
}

struct Served {
    answer: Answer,
    reached: Reached,
    in_flight: InFlight,
    lost: Flags,
}

fn lost_flag(target: &isthmus_model::view::Target) -> Flags {
    match target {
        isthmus_model::view::Target::Tunnel { .. } => Flags::XT,
        _ => Flags::UC,
    }
}
