//! HTTP between two sidecars of one cluster: plain requests, gRPC-like streams, upgrades, and what is refused.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test")]

mod common;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use common::{Cluster, HOST, Sidecar, app, introduce, served, soon};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use isthmus_model::service::Protocol;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Answers with what it saw: the headers as lines, and the body.
async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut text = format!("{} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        text += &format!("{name}: {}\n", value.to_str().unwrap());
    }
    let mut seen = text.into_bytes();
    seen.extend(request.into_body().collect().await.unwrap().to_bytes());
    let response = Response::builder().header("isthmus-refused", "1").header("x-app", "yes");
    Ok(response.body(Full::from(seen)).unwrap())
}

async fn http1_app() -> std::net::SocketAddr {
    app(|stream| async {
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(echo)).await;
    })
    .await
}

/// Sends a request to a sidecar's HTTP proxy.
async fn send(client: &Sidecar, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = TcpStream::connect(client.proxy).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    soon(sender.send_request(request)).await.unwrap()
}

fn get(url: &str) -> Request<Full<Bytes>> {
    let host = url.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
    Request::builder().uri(url).header("host", host).body(Full::default()).unwrap()
}

async fn text(response: Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

fn flags(response: &Response<Incoming>) -> &str {
    response.headers().get("x-isthmus-response-flags").map_or("", |flags| flags.to_str().unwrap())
}

#[tokio::test]
async fn a_request_reaches_the_workload_with_the_callers_proven_identity() {
    let cluster = Cluster::new();
    let server = cluster.sidecar("cart", served(&[(80, Protocol::Http, http1_app().await)], "aws-eu")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(80, Protocol::Http)]);

    let mut request = get(&format!("http://{HOST}/path?q=1"));
    for forged in ["x-forwarded-client-cert", "isthmus-service", "x-isthmus-source"] {
        request.headers_mut().insert(forged, HeaderValue::from_static("URI=spiffe://mesh.test/ns/bank/sa/vault"));
    }
    request.headers_mut().insert("connection", HeaderValue::from_static("x-private"));
    request.headers_mut().insert("x-private", HeaderValue::from_static("hop"));
    let response = send(&client, request).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["x-app"], "yes");
    assert!(!response.headers().contains_key("isthmus-refused"), "only sidecars may say so");
    let seen = text(response).await;
    assert!(seen.starts_with("GET /path?q=1\n"), "{seen}");
    assert!(seen.contains(&format!("host: {HOST}\n")), "{seen}");
    let identity =
        "x-forwarded-client-cert: By=spiffe://mesh.test/ns/shop/sa/cart;URI=spiffe://mesh.test/ns/shop/sa/web";
    assert!(seen.contains(identity), "{seen}");
    for gone in ["vault", "isthmus-", "x-private"] {
        assert!(!seen.contains(gone), "{gone} in {seen}");
    }
}

#[tokio::test]
async fn a_large_body_passes_both_ways() {
    let cluster = Cluster::new();
    let server = cluster.sidecar("cart", served(&[(80, Protocol::Http, http1_app().await)], "aws-eu")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(80, Protocol::Http)]);
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let mut request = get(&format!("http://{HOST}/"));
    *request.method_mut() = Method::POST;
    *request.body_mut() = Full::from(sent.clone());
    let response = send(&client, request).await;
    let seen = soon(response.into_body().collect()).await.unwrap().to_bytes();
    assert!(seen.ends_with(&sent));
}

#[tokio::test]
async fn trailers_of_a_grpc_like_stream_come_through_in_both_directions() {
    let grpc = app(|stream| async {
        let serve = |request: Request<Incoming>| async move {
            assert_eq!(request.version(), http::Version::HTTP_2);
            let asked = request.into_body().collect().await.unwrap();
            let client_trailer = asked.trailers().and_then(|trailers| trailers.get("x-client")).cloned();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("7"));
            trailers.insert("x-client", client_trailer.unwrap_or_else(|| HeaderValue::from_static("none")));
            let frames = [Ok::<_, Infallible>(Frame::data(asked.to_bytes())), Ok(Frame::trailers(trailers))];
            Ok::<_, Infallible>(Response::new(StreamBody::new(futures_util::stream::iter(frames))))
        };
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        let _ = builder.serve_connection(TokioIo::new(stream), service_fn(serve)).await;
    })
    .await;
    let cluster = Cluster::new();
    let server = cluster.sidecar("cart", served(&[(50051, Protocol::Grpc, grpc)], "aws-eu")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(50051, Protocol::Grpc)]);

    let tunnel = connect(&client, &format!("{HOST}:50051")).await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(tunnel)).await.unwrap();
    tokio::spawn(connection);
    let mut trailers = HeaderMap::new();
    trailers.insert("x-client", HeaderValue::from_static("here"));
    let frames = [Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"hello"))), Ok(Frame::trailers(trailers))];
    let request = Request::post(format!("http://{HOST}:50051/pkg.Service/Call"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(StreamBody::new(futures_util::stream::iter(frames)))
        .unwrap();
    let response = soon(sender.send_request(request)).await.unwrap();
    let answered = soon(response.into_body().collect()).await.unwrap();
    let trailers = answered.trailers().cloned().unwrap();
    assert_eq!(answered.to_bytes(), "hello");
    assert_eq!(
        (&trailers["grpc-status"], &trailers["x-client"]),
        (&HeaderValue::from_static("7"), &HeaderValue::from_static("here"))
    );
}

/// A CONNECT through a sidecar's HTTP proxy.
async fn connect(client: &Sidecar, authority: &str) -> TcpStream {
    let mut stream = TcpStream::connect(client.proxy).await.unwrap();
    stream.write_all(format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(stream.read_u8()).await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    stream
}

#[tokio::test]
async fn an_upgrade_turns_into_bytes_only_after_101() {
    let chat = app(|mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let Ok(byte) = stream.read_u8().await else { return };
            head.push(byte);
        }
        let head = String::from_utf8(head).unwrap().to_lowercase();
        assert!(head.contains("upgrade: chat") && head.contains("connection: upgrade"), "{head}");
        if head.starts_with("get /no") {
            let _ = stream.write_all(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
            return;
        }
        let switching = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\n\r\nhello ";
        let _ = stream.write_all(switching).await;
        let mut name = [0; 5];
        let _ = stream.read_exact(&mut name).await;
        let _ = stream.write_all(&name).await;
    })
    .await;
    let cluster = Cluster::new();
    let server = cluster.sidecar("cart", served(&[(80, Protocol::Http, chat)], "aws-eu")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(80, Protocol::Http)]);
    let ask = async |path: &str| {
        let mut stream = TcpStream::connect(client.proxy).await.unwrap();
        let head =
            format!("GET http://{HOST}{path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: Upgrade\r\nupgrade: chat\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon(stream.read_u8()).await.unwrap());
        }
        (String::from_utf8(head).unwrap().to_lowercase(), stream)
    };
    let (head, mut stream) = ask("/chat").await;
    assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: chat"), "{head}");
    stream.write_all(b"world").await.unwrap();
    let mut said = [0; 11];
    soon(stream.read_exact(&mut said)).await.unwrap();
    assert_eq!(&said, b"hello world");

    let (head, _) = ask("/no").await;
    assert!(head.starts_with("http/1.1 403"), "{head}");
}

#[tokio::test]
async fn what_is_not_exported_or_not_known_is_refused_with_the_reason() {
    let cluster = Cluster::new();
    let app = http1_app().await;
    let server = cluster.sidecar("cart", served(&[(80, Protocol::Http, app)], "gcp-us")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(80, Protocol::Http), (81, Protocol::Http)]);
    for port in [80, 81] {
        let response = send(&client, get(&format!("http://{HOST}:{port}/"))).await;
        assert_eq!((response.status(), flags(&response)), (StatusCode::FORBIDDEN, "UAEX"), "port {port}");
    }
    let response = send(&client, get("http://ghost.shop.svc.clusterset.local/")).await;
    assert_eq!((response.status(), flags(&response)), (StatusCode::SERVICE_UNAVAILABLE, "NC"));
    let response = send(&client, get("http://240.240.9.9/")).await;
    assert_eq!((response.status(), flags(&response)), (StatusCode::SERVICE_UNAVAILABLE, "UH"));
    let response = send(&client, get(&format!("http://127.0.0.1:{}/", client.proxy.port()))).await;
    assert_eq!((response.status(), flags(&response)), (StatusCode::SERVICE_UNAVAILABLE, "UF"), "its own port");
}

#[tokio::test]
async fn a_server_that_is_none_of_the_exports_accounts_gets_no_request() {
    let cluster = Cluster::new();
    let server = cluster.sidecar("cart", served(&[(80, Protocol::Http, http1_app().await)], "aws-eu")).await;
    let thief = cluster.sidecar("thief", served(&[(80, Protocol::Http, http1_app().await)], "aws-eu")).await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&server], &[(80, Protocol::Http)]);
    let mut view = client.path.mesh.snapshot().view.clone();
    let mut service = isthmus_model::view::ServiceView::clone(&view.services[&common::host()]);
    service.backends[0].endpoints[0].target = isthmus_model::view::Target::Direct(thief.address);
    view.services.insert(common::host(), Arc::new(service));
    client.path.mesh.replace(view, []);
    let response = send(&client, get(&format!("http://{HOST}/"))).await;
    assert_eq!((response.status(), flags(&response)), (StatusCode::SERVICE_UNAVAILABLE, "UF"));
    assert!(text(response).await.contains("sa/thief"));
}

#[tokio::test]
async fn a_dead_endpoint_costs_no_request_and_a_post_is_never_sent_twice() {
    let seen = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&seen);
    // Reads the request, and ends the connection without an answer.
    let rude = app(move |mut stream| {
        let seen = Arc::clone(&counting);
        async move {
            let mut head = [0; 1024];
            if stream.read(&mut head).await.is_ok_and(|read| read > 0) {
                seen.fetch_add(1, Ordering::SeqCst);
            }
        }
    })
    .await;
    let cluster = Cluster::new();
    let gone = cluster.sidecar("cart", vec![]).await;
    gone.ending.cancel();
    let alive = cluster
        .sidecar("cart", served(&[(80, Protocol::Http, http1_app().await), (81, Protocol::Http, rude)], "aws-eu"))
        .await;
    let client = cluster.sidecar("web", vec![]).await;
    introduce(&client, &[&gone, &alive], &[(80, Protocol::Http), (81, Protocol::Http)]);
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    for _ in 0..20 {
        let mut request = get(&format!("http://{HOST}/"));
        *request.method_mut() = Method::POST;
        assert_eq!(send(&client, request).await.status(), StatusCode::OK);
    }
    let mut request = get(&format!("http://{HOST}:81/"));
    *request.method_mut() = Method::POST;
    let response = send(&client, request).await;
    assert_eq!((response.status(), flags(&response)), (StatusCode::SERVICE_UNAVAILABLE, "UC"));
    assert_eq!(seen.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn two_authorities_are_a_bad_request() {
    let cluster = Cluster::new();
    let client = cluster.sidecar("web", vec![]).await;
    let mut stream = TcpStream::connect(client.proxy).await.unwrap();
    stream.write_all(format!("GET http://{HOST}/ HTTP/1.1\r\nhost: other.example\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    soon(stream.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("x-isthmus-response-flags: DPE"), "{answer}");
}
