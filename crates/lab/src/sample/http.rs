//! The HTTP side of the sample service.
//!
//! | request | answer |
//! |---|---|
//! | any path | 200 and an [`Answer`] |
//! | `/status/N` | status N and an `Answer` |
//! | `/delay/MS` | an `Answer` after so many milliseconds |
//! | `/bytes/N` | N bytes of `x` (at most [`BYTES_MAX`]) |
//! | `/echo` | the request's body, as it comes |
//! | `Upgrade: echo` or `websocket` | 101, then every byte back |
//! | `content-type: application/grpc` | the request's messages, trailers `grpc-status: 0` |

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tokio::{net::TcpListener, task::JoinSet};

use super::{Answer, Service};

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// Accepts for ever; dropped with its connections.
pub(super) async fn serve(listener: TcpListener, service: Arc<Service>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let _ = stream.set_nodelay(true);
                let service = service.clone();
                connections.spawn(async move {
                    let answer = service_fn(move |request| answer(service.clone(), request));
                    let builder = auto::Builder::new(TokioExecutor::new());
                    // A client that goes away is its own business.
                    let _ = builder.serve_connection_with_upgrades(TokioIo::new(stream), answer).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(service: Arc<Service>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let id = text(request.headers(), "x-request-id");
    service.note(&id, request.method().as_str());
    if request.headers().contains_key(header::UPGRADE) {
        return Ok(upgrade(request));
    }
    if text(request.headers(), "content-type").starts_with("application/grpc") {
        return Ok(grpc(&service, request));
    }
    let path = request.uri().path().to_owned();
    let mut parts = path.trim_start_matches('/').splitn(2, '/');
    let response = match (parts.next(), parts.next().and_then(|number| number.parse::<u64>().ok())) {
        (Some("echo"), _) => Response::new(request.into_body().boxed_unsync()),
        (Some("bytes"), Some(len)) => bytes(len),
        (Some("delay"), Some(millis)) => {
            tokio::time::sleep(Duration::from_millis(millis).min(DELAY_MAX)).await;
            describe(&service, request, id, StatusCode::OK).await
        }
        (Some("status"), Some(code)) => {
            let code = u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
            describe(&service, request, id, code.unwrap_or(StatusCode::BAD_REQUEST)).await
        }
        _ => describe(&service, request, id, StatusCode::OK).await,
    };
    Ok(response)
}

async fn describe(service: &Service, request: Request<Incoming>, id: String, status: StatusCode) -> Response<Body> {
    let (head, body) = request.into_parts();
    let as_text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let headers = head.headers.iter().map(|(name, value)| (name.to_string(), as_text(value))).collect();
    let host = head.uri.authority().map_or_else(|| text(&head.headers, "host"), ToString::to_string);
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let body_bytes = Limited::new(body, BYTES_MAX).collect().await.map_or(0, |body| body.to_bytes().len());
    let answer = Answer {
        request_id: id,
        method: head.method.to_string(),
        path,
        host,
        service: service.config.service.clone(),
        version: service.config.version.clone(),
        instance: service.config.instance.clone(),
        cluster: service.config.cluster.clone(),
        protocol: format!("{:?}", head.version),
        headers,
        body_bytes,
    };
    let json = serde_json::to_vec(&answer).unwrap_or_default();
    let mut response = Response::new(full(json.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn bytes(len: u64) -> Response<Body> {
    let len = usize::try_from(len).unwrap_or(BYTES_MAX).min(BYTES_MAX);
    Response::new(full(vec![b'x'; len].into()))
}

/// Messages back as they came, then a status where gRPC has it: in the trailers.
fn grpc(service: &Service, request: Request<Incoming>) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    if let Ok(instance) = HeaderValue::from_str(&service.config.instance) {
        trailers.insert("x-instance", instance);
    }
    let messages = futures_util::stream::unfold((request.into_body(), Some(trailers)), |(mut body, last)| async {
        loop {
            match body.frame().await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => return Some((Ok(Frame::data(data)), (body, last))),
                    Err(_trailers_of_the_request) => {}
                },
                Some(Err(error)) => return Some((Err(error), (body, None))),
                None => return last.map(|trailers| (Ok(Frame::trailers(trailers)), (body, None))),
            }
        }
    });
    let mut response = Response::new(StreamBody::new(messages).boxed_unsync());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn upgrade(mut request: Request<Incoming>) -> Response<Body> {
    let protocol = request.headers().get(header::UPGRADE).cloned().unwrap_or(HeaderValue::from_static("echo"));
    let upgrading = hyper::upgrade::on(&mut request);
    // Ends with its connection; the service's owner ends those.
    tokio::spawn(async move {
        let Ok(upgraded) = upgrading.await else { return };
        let (mut from, mut to) = tokio::io::split(TokioIo::new(upgraded));
        let _ = tokio::io::copy(&mut from, &mut to).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(&mut to).await;
    });
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::UPGRADE, protocol);
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    response
}

fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

fn text(headers: &HeaderMap, name: &str) -> String {
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).unwrap_or_default()
}

/// 64 MiB: what a bulk test asks for at most.
const BYTES_MAX: usize = 64 << 20;
const DELAY_MAX: Duration = Duration::from_secs(60);
