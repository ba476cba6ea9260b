//! A process's own page for its operator, on loopback only.
//!
//! Pages are closures of the component. Reading is GET; whatever changes the process is POST. A
//! browser on the same machine is no operator: `Host` must be a loopback name (DNS rebinding) and
//! `Origin`, if there is one, too (a form on a foreign site may post to 127.0.0.1).
//! Components must not put keys or tokens on a page: whoever has a shell here may read it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Query, Request};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use axum::{Router, http};
use prometheus::Registry;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{BindError, HttpServer, LogHandle, Readiness, metrics};

/// Why the admin page was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// Not a loopback address.
    #[error("the admin page would listen on {0}, which others can reach; use an address of 127.0.0.0/8 or ::1")]
    NotLoopback(SocketAddr),
    /// The port could not be opened.
    #[error(transparent)]
    Bind(#[from] BindError),
}

/// The pages of one process.
pub struct Admin {
    router: Router,
    pages: Vec<(&'static str, &'static str)>,
}

impl Admin {
    /// `/server_info`, `/ready`, `/stats` and `/stats/prometheus`, `/logging` (POST `?level=FILTER`
    /// changes it), and POST `/quitquitquit`, which fires `shutdown`.
    pub fn new(
        component: &'static str,
        registry: Registry,
        readiness: Readiness,
        logging: Option<LogHandle>,
        shutdown: CancellationToken,
    ) -> Self {
        let started = Instant::now();
        let (stats, prometheus) = (registry.clone(), registry);
        let quit = async move || {
            tracing::info!("shutting down: /quitquitquit was posted");
            shutdown.cancel();
            "shutting down\n"
        };
        let (shown, changed) = (logging.clone(), logging);
        let admin = Self { router: Router::new(), pages: Vec::new() }
            .page("/server_info", "version, process id and uptime", move || {
                json!({
                    "component": component,
                    "version": env!("CARGO_PKG_VERSION"),
                    "pid": std::process::id(),
                    "uptime_s": started.elapsed().as_secs(),
                })
            })
            .listed("/ready", "conditions that must hold before work is sent here")
            .listed("/stats", "all metrics as text; also /stats/prometheus")
            .listed("/logging", "the log filter; POST ?level=info,isthmus_proxy=debug changes it")
            .listed("/quitquitquit", "POST: drain and exit");
        let router = admin
            .router
            .route("/ready", get(async move || readiness.response()))
            .route("/stats", get(async move || metrics::response(&stats)))
            .route("/stats/prometheus", get(async move || metrics::response(&prometheus)))
            .route(
                "/logging",
                get(async move || logging_page(shown.as_ref())).post(async move |Query(query): Query<LoggingQuery>| {
                    change_logging(changed.as_ref(), &query.level)
                }),
            )
            .route("/quitquitquit", post(quit));
        Self { router, pages: admin.pages }
    }

    /// Adds a page that shows what `content` returns as JSON; `about` is its line in the index.
    #[must_use]
    pub fn page(
        mut self,
        path: &'static str,
        about: &'static str,
        content: impl Fn() -> Value + Send + Sync + 'static,
    ) -> Self {
        let content = Arc::new(content);
        self.router = self.router.route(path, get(async move || Json(content())));
        self.listed(path, about)
    }

    /// Adds routes of the component's own making, e.g. a POST.
    #[must_use]
    pub fn merge(mut self, router: Router) -> Self {
        self.router = self.router.merge(router);
        self
    }

    fn listed(mut self, path: &'static str, about: &'static str) -> Self {
        self.pages.push((path, about));
        self
    }

    /// All pages, with an index at `/`, behind the checks of the module's header.
    pub fn router(self) -> Router {
        let index: String = self.pages.iter().map(|(path, about)| format!("{path:<20} {about}\n")).collect();
        self.router.route("/", get(async move || index)).layer(middleware::from_fn(refuse_strangers))
    }

    /// Opens the pages on `address`.
    ///
    /// # Errors
    /// [`AdminError`] if others could reach it, or the port is taken.
    pub async fn bind(self, address: SocketAddr) -> Result<HttpServer, AdminError> {
        if !address.ip().is_loopback() {
            return Err(AdminError::NotLoopback(address));
        }
        Ok(HttpServer::bind("admin", address, self.router()).await?)
    }
}

#[derive(serde::Deserialize)]
struct LoggingQuery {
    level: String,
}

fn logging_page(logging: Option<&LogHandle>) -> Response {
    match logging {
        Some(handle) => Json(json!({ "filter": handle.filter() })).into_response(),
        None => (StatusCode::NOT_FOUND, "logging was not set up by this process\n").into_response(),
    }
}

fn change_logging(logging: Option<&LogHandle>, filter: &str) -> Response {
    match logging.map(|handle| handle.set_filter(filter)) {
        Some(Err(error)) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
        Some(Ok(())) | None => logging_page(logging),
    }
}

async fn refuse_strangers(request: Request, next: Next) -> Response {
    match judge(request.headers(), request.uri()) {
        Ok(()) => next.run(request).await,
        Err(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
    }
}

fn judge(headers: &HeaderMap, uri: &http::Uri) -> Result<(), &'static str> {
    const HOST: &str = "Host must be localhost or a loopback address: this page is for this machine only";
    const ORIGIN: &str = "refused: another site asked for this page";
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next().and_then(|host| host.to_str().ok()).ok_or(HOST)?;
    if hosts.next().is_some() || !is_loopback(host) {
        return Err(HOST);
    }
    if uri.authority().is_some_and(|authority| !is_loopback(authority.as_str())) {
        return Err(HOST);
    }
    for origin in headers.get_all(header::ORIGIN) {
        let origin = origin.to_str().ok().and_then(|origin| origin.strip_prefix("http://"));
        if !origin.is_some_and(is_loopback) {
            return Err(ORIGIN);
        }
    }
    Ok(())
}

/// Whether `authority` (`host`, `host:port`, `[v6]:port`) can only mean this machine.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !authority.ends_with(']') => host,
        _ => authority,
    };
    let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::Method;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;

    fn admin(shutdown: &CancellationToken) -> Router {
        Admin::new("test", metrics::registry("test"), Readiness::new(), None, shutdown.clone())
            .page("/clusters", "endpoints", || json!({ "cart": 2 }))
            .router()
    }

    async fn ask(router: &Router, method: Method, path: &str, headers: &[(&str, &str)]) -> (StatusCode, String) {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_page_of_the_component_is_served_and_listed() {
        let router = admin(&CancellationToken::new());
        let host = [("host", "localhost:15000")];
        assert_eq!(ask(&router, Method::GET, "/clusters", &host).await, (StatusCode::OK, "{\"cart\":2}".into()));
        assert!(ask(&router, Method::GET, "/", &host).await.1.contains("/clusters"));
        assert!(ask(&router, Method::GET, "/stats", &host).await.1.contains("isthmus_build_info"));
        assert_eq!(ask(&router, Method::GET, "/ready", &host).await.0, StatusCode::OK);
        assert!(ask(&router, Method::GET, "/server_info", &host).await.1.contains("\"component\":\"test\""));
    }

    #[tokio::test]
    async fn only_loopback_names_are_answered() {
        let router = admin(&CancellationToken::new());
        for host in ["localhost", "LOCALHOST:15000", "127.0.0.1:15000", "127.9.9.9", "[::1]:15000", "[::1]"] {
            assert_eq!(ask(&router, Method::GET, "/clusters", &[("host", host)]).await.0, StatusCode::OK, "{host}");
        }
        for host in ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:15000", "10.0.0.1", "", ":15000"]
        {
            let answer = ask(&router, Method::GET, "/clusters", &[("host", host)]).await;
            assert_eq!(answer.0, StatusCode::FORBIDDEN, "{host}");
        }
        let two = [("host", "localhost"), ("host", "evil.example")];
        assert_eq!(ask(&router, Method::GET, "/clusters", &two).await.0, StatusCode::FORBIDDEN);
        assert_eq!(ask(&router, Method::GET, "/clusters", &[]).await.0, StatusCode::FORBIDDEN);
    }

    #[tokio::test]
    async fn quitting_takes_a_post_and_no_foreign_site_may_send_it() {
        let shutdown = CancellationToken::new();
        let router = admin(&shutdown);
        let host = ("host", "127.0.0.1:15000");
        assert_eq!(ask(&router, Method::GET, "/quitquitquit", &[host]).await.0, StatusCode::METHOD_NOT_ALLOWED);
        for origin in ["http://evil.example", "null", "https://localhost"] {
            let answer = ask(&router, Method::POST, "/quitquitquit", &[host, ("origin", origin)]).await;
            assert_eq!(answer.0, StatusCode::FORBIDDEN, "{origin}");
        }
        assert!(!shutdown.is_cancelled());
        assert_eq!(ask(&router, Method::POST, "/quitquitquit", &[host]).await.0, StatusCode::OK);
        assert!(shutdown.is_cancelled());
    }

    #[tokio::test]
    async fn an_address_that_others_reach_is_refused() {
        let admin = Admin::new("test", Registry::new(), Readiness::new(), None, CancellationToken::new());
        let error = admin.bind(SocketAddr::from(([0, 0, 0, 0], 0))).await.expect_err("not loopback");
        assert!(error.to_string().contains("0.0.0.0:0"), "{error}");
    }
}
