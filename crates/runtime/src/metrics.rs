//! The process's counters as Prometheus text.

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus::core::Collector;
use prometheus::{Encoder, IntGaugeVec, Opts, Registry, TextEncoder};

/// A registry with the process's own figures (memory, CPU, descriptors) and `isthmus_build_info`.
pub fn registry(component: &'static str) -> Registry {
    let registry = Registry::new();
    register(&registry, prometheus::process_collector::ProcessCollector::for_self());
    let info = Opts::new("isthmus_build_info", "1, with the version of the running process");
    if let Ok(info) = IntGaugeVec::new(info, &["component", "version"]) {
        info.with_label_values(&[component, env!("CARGO_PKG_VERSION")]).set(1);
        register(&registry, info);
    }
    registry
}

/// Adds `collector` to `registry`. A name that is already taken is logged as an error and not
/// counted: a forgotten counter is no reason to stop traffic.
pub fn register(registry: &Registry, collector: impl Collector + 'static) {
    if let Err(error) = registry.register(Box::new(collector)) {
        tracing::error!(%error, "a metric is not exported");
    }
}

/// All series as text (exposition format 0.0.4).
pub fn text(registry: &Registry) -> String {
    let mut text = Vec::new();
    if let Err(error) = TextEncoder::new().encode(&registry.gather(), &mut text) {
        tracing::error!(%error, "metrics are incomplete");
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// [`text`] as an HTTP answer.
pub fn response(registry: &Registry) -> Response {
    ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text(registry)).into_response()
}

/// `/metrics`, and `/stats/prometheus` where Istio's scrape annotations look.
pub fn router(registry: Registry) -> Router {
    let again = registry.clone();
    Router::new()
        .route("/metrics", get(async move || response(&registry)))
        .route("/stats/prometheus", get(async move || response(&again)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_and_the_process_are_always_there() {
        let text = text(&registry("proxy"));
        assert!(text.contains("isthmus_build_info{component=\"proxy\",version=\""), "{text}");
        assert!(text.contains("process_resident_memory_bytes"), "{text}");
    }

    #[test]
    fn a_second_metric_of_one_name_is_refused_without_a_panic() {
        let registry = Registry::new();
        let counter = prometheus::IntCounter::new("isthmus_test_total", "x").unwrap();
        register(&registry, counter.clone());
        register(&registry, counter);
        assert_eq!(registry.gather().len(), 1);
    }
}
