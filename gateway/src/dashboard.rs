//! The dashboard: the built page of `dashboard/`, and the API it reads. Read-only, no state of its own.
//!
//! It never asks another cluster: what it shows is the gateway's [`Summary`], so it works with any
//! cluster down. Where on loopback, only loopback's own names are served, or a page on the internet
//! could read it through the operator's browser (DNS rebinding).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use futures_util::Stream;
use rust_embed::RustEmbed;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::summary::Summary;

/// The page as built by `npm run build`, committed, so that building the gateway needs no npm.
#[derive(RustEmbed)]
#[folder = "../dashboard/dist"]
struct Page;

/// At most one event a second: figures are averages over seconds, and eyes are no faster.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);
/// A comment after this silence keeps proxies between browser and gateway from closing the stream.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Nothing but the page's own files is loaded or asked, and no other site may frame it.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Serves the page and `/api/v1/{summary,stream}` from `summary`.
///
/// `listen` is where the server listens: on loopback only requests for a loopback host are answered.
pub fn router(summary: watch::Receiver<Arc<Summary>>, listen: IpAddr) -> Router {
    let page = Router::new()
        .route("/api/v1/summary", get(summary_json))
        .route("/api/v1/stream", get(summary_stream))
        .with_state(summary)
        .fallback(page_file);
    let page = match listen.is_loopback() {
        true => page.layer(middleware::from_fn(loopback_hosts_only)),
        false => page,
    };
    page.layer(middleware::map_response(secure_headers))
}

async fn summary_json(State(summary): State<watch::Receiver<Arc<Summary>>>) -> Response {
    let now = summary.borrow().clone();
    ([(header::CACHE_CONTROL, "no-store")], axum::Json(&*now)).into_response()
}

async fn summary_stream(State(summary): State<watch::Receiver<Arc<Summary>>>) -> Response {
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")];
    (headers, Body::from_stream(events(summary))).into_response()
}

/// The present summary at once, then every change, at most one an [`EVENT_INTERVAL`]; ends with the gateway.
fn events(summary: watch::Receiver<Arc<Summary>>) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let mut summary = summary;
    summary.mark_changed();
    let start = Instant::now();
    futures_util::stream::unfold((summary, start), |(mut summary, not_before)| async move {
        sleep_until(not_before).await;
        let frame = tokio::select! {
            changed = summary.changed() => {
                changed.ok()?;
                let now = summary.borrow_and_update().clone();
                let json = serde_json::to_string(&*now).ok()?;
                format!("id: {}\ndata: {json}\n\n", now.generated_at)
            }
            () = tokio::time::sleep(KEEP_ALIVE) => ":\n\n".to_owned(),
        };
        Some((Ok(Bytes::from(frame)), (summary, Instant::now() + EVENT_INTERVAL)))
    })
}

async fn page_file(request: Request) -> Response {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let path = match request.uri().path().trim_start_matches('/') {
        "" => "index.html",
        path => path,
    };
    let Some(file) = Page::get(path) else {
        return (StatusCode::NOT_FOUND, "no such page; the dashboard is at /\n").into_response();
    };
    let etag = format!("\"{}\"", hex_prefix(&file.metadata.sha256_hash()));
    if request.headers().get(header::IF_NONE_MATCH).is_some_and(|held| held.as_bytes() == etag.as_bytes()) {
        return StatusCode::NOT_MODIFIED.into_response();
    }
    let headers = [
        (header::CONTENT_TYPE, file.metadata.mimetype().to_owned()),
        (header::CACHE_CONTROL, "no-cache".to_owned()),
        (header::ETAG, etag),
    ];
    (headers, Body::from(file.data.into_owned())).into_response()
}

fn hex_prefix(hash: &[u8; 32]) -> String {
    hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

async fn loopback_hosts_only(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    if is_loopback_host(host) {
        return next.run(request).await;
    }
    let text = "this dashboard listens on loopback and answers only to localhost and loopback addresses\n";
    (StatusCode::FORBIDDEN, text).into_response()
}

/// Whether a `Host` header names this machine: `localhost`, or a loopback address, with any port.
fn is_loopback_host(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !host.ends_with(']') => name,
        _ => host,
    };
    let name = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

async fn secure_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(CONTENT_SECURITY_POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    response
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use futures_util::StreamExt as _;
    use tower::ServiceExt as _;

    use super::*;

    fn dashboard(listen: Ipv4Addr) -> (watch::Sender<Arc<Summary>>, Router) {
        let (sender, receiver) = watch::channel(Arc::new(Summary { mesh: "corp".into(), ..Summary::default() }));
        (sender, router(receiver, listen.into()))
    }

    async fn get(router: Router, path: &str, host: &str) -> Response {
        let request = Request::get(path).header(header::HOST, host).body(Body::empty()).expect("request");
        router.oneshot(request).await.expect("infallible")
    }

    #[tokio::test]
    async fn the_summary_is_served_as_json_and_never_cached() {
        let (_sender, router) = dashboard(Ipv4Addr::LOCALHOST);
        let response = get(router, "/api/v1/summary", "127.0.0.1:15080").await;
        assert_eq!(response.headers()[header::CACHE_CONTROL], "no-store");
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.expect("body");
        let summary: Summary = serde_json::from_slice(&body).expect("a summary");
        assert_eq!(summary.mesh, "corp");
    }

    #[tokio::test]
    async fn on_loopback_a_foreign_host_name_is_refused() {
        let (_sender, router) = dashboard(Ipv4Addr::LOCALHOST);
        for host in ["evil.example", "evil.example:15080", "127.0.0.1.evil.example", "10.0.0.1", ""] {
            let response = get(router.clone(), "/api/v1/summary", host).await;
            assert_eq!(response.status(), StatusCode::FORBIDDEN, "{host}");
        }
        for host in ["localhost", "LOCALHOST:80", "127.9.1.1:15080", "[::1]", "[::1]:15080"] {
            assert_eq!(get(router.clone(), "/", host).await.status(), StatusCode::OK, "{host}");
        }
    }

    #[tokio::test]
    async fn elsewhere_any_host_name_is_served() {
        let (_sender, router) = dashboard(Ipv4Addr::UNSPECIFIED);
        assert_eq!(get(router, "/", "mesh.example").await.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn the_page_may_load_only_its_own_files() {
        let (_sender, router) = dashboard(Ipv4Addr::LOCALHOST);
        let response = get(router, "/", "localhost").await;
        assert_eq!(response.headers()[header::CONTENT_SECURITY_POLICY], CONTENT_SECURITY_POLICY);
        assert!(response.headers()[header::CONTENT_TYPE].to_str().expect("text").starts_with("text/html"));
    }

    #[tokio::test]
    async fn a_path_outside_the_page_is_not_found() {
        let (_sender, router) = dashboard(Ipv4Addr::LOCALHOST);
        for path in ["/../Cargo.toml", "/..%2fCargo.toml", "/nothing.js"] {
            assert_eq!(get(router.clone(), path, "localhost").await.status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_stream_tells_each_change_at_most_once_a_second() {
        let (sender, receiver) = watch::channel(Arc::new(Summary::default()));
        let start = Instant::now();
        let mut events = Box::pin(events(receiver));
        assert!(next_event(&mut events).await.contains("\"generated_at\":0"), "the present state comes at once");
        for generated_at in 1..=5 {
            sender.send_replace(Arc::new(Summary { generated_at, ..Summary::default() }));
        }
        assert!(next_event(&mut events).await.contains("\"generated_at\":5"), "only the last of a burst");
        assert!(start.elapsed() >= EVENT_INTERVAL);
        assert_eq!(next_event(&mut events).await, ":\n\n", "silence is filled");
        drop(sender);
        assert!(events.next().await.is_none(), "ends with the gateway");
    }

    async fn next_event<E: std::fmt::Debug>(events: &mut (impl Stream<Item = Result<Bytes, E>> + Unpin)) -> String {
        let bytes = events.next().await.expect("an event").expect("infallible");
        String::from_utf8(bytes.to_vec()).expect("text")
    }
}
