//! Istio `VirtualService`: hosts, and routes by HTTP, TLS and TCP.
//!
//! What a match may say is in `virtual_service_match`.

use isthmus_model::route::{HttpRoute, RetryPolicy, TcpRoute, TlsRoute, VirtualService, WeightedDestination};
use isthmus_model::{Host, Namespace, ObjectName};

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::report::{Problem, READ_AS, Report};
use crate::scalar::{duration, export_to, host};
use crate::suggest::nearest;
use crate::tree::Value;
use crate::virtual_service_match::{connection_match, http_match, tls_match};

/// Parts of an HTTP route that are not served yet.
const HTTP_LATER: [&str; 13] = [
    "redirect",
    "directResponse",
    "delegate",
    "rewrite",
    "fault",
    "mirror",
    "mirrors",
    "mirrorPercentage",
    "mirrorPercent",
    "mirror_percent",
    "corsPolicy",
    "headers",
    "websocketUpgrade",
];

/// Reads a virtual service.
pub(crate) fn read(metadata: &Metadata<'_>, mut spec: Fields<'_>, report: &mut Report) -> Option<VirtualService> {
    let name = metadata.parsed_name::<ObjectName>(report);
    let namespace = &metadata.namespace;
    let hosts_item = spec.need("hosts", report);
    let hosts = hosts_item.map(|item| read_hosts(&item, namespace, report)).unwrap_or_default();
    mesh_only(&mut spec, report);
    let export_to = export_to(&mut spec, report);
    let http_items = spec.list("http", report);
    let http: Vec<HttpRoute> = http_items.iter().filter_map(|item| http_route(item, namespace, report)).collect();
    warn_unreachable(&http_items, &http, report);
    let tls_items = spec.list("tls", report);
    let tls: Vec<TlsRoute> = tls_items.iter().filter_map(|item| tls_route(item, namespace, &hosts, report)).collect();
    let tcp_items = spec.list("tcp", report);
    let tcp: Vec<TcpRoute> = tcp_items.iter().filter_map(|item| tcp_route(item, namespace, report)).collect();
    if http_items.is_empty() && tls_items.is_empty() && tcp_items.is_empty() {
        spec.missing("http", report, "add at least one route under http, tls or tcp");
    }
    spec.finish(report);
    Some(VirtualService { namespace: namespace.clone(), name: name?, hosts, http, tls, tcp, export_to })
}

fn read_hosts(item: &Item<'_>, namespace: &Namespace, report: &mut Report) -> Vec<Host> {
    let items = item.list(report);
    if items.is_empty() {
        item.impossible(report, "names no host", "add at least one host");
    }
    let mut hosts: Vec<Host> = Vec::new();
    for item in items {
        let Some(host) = host(&item, namespace, report) else { continue };
        if hosts.contains(&host) {
            item.refuse(report, Problem::Duplicate, format!("host {host} is there twice"), "remove one of them");
        }
        hosts.push(host);
    }
    hosts
}

/// `gateways`: only the sidecars (`mesh`) are served, which is what no list means too.
pub(crate) fn mesh_only(fields: &mut Fields<'_>, report: &mut Report) {
    for item in fields.list("gateways", report) {
        if item.text(report).is_some_and(|name| name != "mesh") {
            let message = format!("gateway {} is not supported yet", item.node.shown());
            item.refuse(report, Problem::NotSupported, message, "use mesh, or leave gateways out");
        }
    }
}

fn http_route(item: &Item<'_>, namespace: &Namespace, report: &mut Report) -> Option<HttpRoute> {
    let mut fields = item.fields(report)?;
    let name = fields.take("name").and_then(|item| item.text(report)).map(str::to_owned);
    let matches = fields.list("match", report);
    let matches = matches.iter().filter_map(|item| http_match(item, report)).collect();
    fields.not_supported(&HTTP_LATER, report);
    let destinations = destinations(&mut fields, namespace, true, report);
    let timeout = fields.take("timeout").and_then(|item| duration(&item, report)).filter(|limit| !limit.is_zero());
    let retries = fields.take("retries").and_then(|item| retries(&item, report));
    fields.finish(report);
    Some(HttpRoute { name, matches, destinations, timeout, retries })
}

fn tls_route(item: &Item<'_>, namespace: &Namespace, hosts: &[Host], report: &mut Report) -> Option<TlsRoute> {
    let mut fields = item.fields(report)?;
    let items = fields.list("match", report);
    if items.is_empty() {
        fields.missing("match", report, "add a match with sniHosts");
    }
    let matches = items.iter().filter_map(|item| tls_match(item, hosts, report)).collect();
    let destinations = destinations(&mut fields, namespace, false, report);
    fields.finish(report);
    Some(TlsRoute { matches, destinations })
}

fn tcp_route(item: &Item<'_>, namespace: &Namespace, report: &mut Report) -> Option<TcpRoute> {
    let mut fields = item.fields(report)?;
    let items = fields.list("match", report);
    let matches = items.iter().filter_map(|item| {
        let mut fields = item.fields(report)?;
        let read = connection_match(&mut fields, report);
        fields.not_supported(&["sourceSubnet"], report);
        fields.finish(report);
        Some(read)
    });
    let matches = matches.collect();
    let destinations = destinations(&mut fields, namespace, false, report);
    fields.finish(report);
    Some(TcpRoute { matches, destinations })
}

/// `route`: destinations and their weights.
fn destinations(
    fields: &mut Fields<'_>,
    namespace: &Namespace,
    http: bool,
    report: &mut Report,
) -> Vec<WeightedDestination> {
    let items = fields.list("route", report);
    if items.is_empty() {
        fields.missing("route", report, "add at least one destination");
        return Vec::new();
    }
    let read: Vec<_> = items.iter().filter_map(|item| destination(item, namespace, http, report)).collect();
    if read.len() > 1 && read.iter().all(|one| one.weight == 0) {
        let message = "several destinations, and no weight above 0";
        fields.item().refuse(report, Problem::Impossible, message, "give each destination a weight");
    }
    match read.as_slice() {
        // The weight of a single destination means nothing, and 0 does not switch it off.
        [only] => vec![WeightedDestination { weight: 100, ..only.clone() }],
        _ => read,
    }
}

fn destination(item: &Item<'_>, namespace: &Namespace, http: bool, report: &mut Report) -> Option<WeightedDestination> {
    let mut fields = item.fields(report)?;
    // Shares are usually percent; the bound keeps any sum of them within u32.
    let weight = fields.take("weight").and_then(|item| item.number(report, 0..=1_000_000)).unwrap_or(0);
    if http {
        fields.not_supported(&["headers"], report);
    }
    let inner = fields.need("destination", report).and_then(|item| item.fields(report));
    fields.finish(report);
    let mut inner = inner?;
    let host = inner.need("host", report).and_then(|item| {
        let host = host(&item, namespace, report)?;
        if host.is_wildcard() {
            item.impossible(report, "is a wildcard", "name one host to send to");
        }
        Some(host)
    });
    let subset = inner.take("subset").and_then(|item| item.text(report)).map(str::to_owned);
    let port = inner.take("port").and_then(|item| {
        let mut fields = item.fields(report)?;
        let port = fields.need("number", report).and_then(|item| item.port(report));
        fields.finish(report);
        port
    });
    inner.finish(report);
    Some(WeightedDestination { host: host?, subset: subset.filter(|name| !name.is_empty()), port, weight })
}

/// Conditions that Istio accepts in `retryOn`, beside status codes.
const RETRY_ON: [&str; 17] = [
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
    "unknown",
];

fn retries(item: &Item<'_>, report: &mut Report) -> Option<RetryPolicy> {
    let mut fields = item.fields(report)?;
    // Istio sets no bound; more than 100 tries of one request would only be an outage made worse.
    let attempts_item = fields.take("attempts");
    let attempts = attempts_item.as_ref().and_then(|item| item.number(report, 0..=100));
    let per_try = fields.take("perTryTimeout");
    let per_try_timeout = per_try.as_ref().and_then(|item| duration(item, report)).filter(|limit| !limit.is_zero());
    let retry_on_item = fields.take("retryOn");
    let retry_on = retry_on_item.as_ref().map(|item| retry_on(item, report)).unwrap_or_default();
    if let (Some(0), Some(item)) = (attempts, per_try.or(retry_on_item)) {
        item.impossible(report, "stands beside attempts 0", "remove it, or set attempts");
    }
    // Retries go to other endpoints first, wherever they are; the other value is not served.
    for (name, served) in [("retryIgnorePreviousHosts", true), ("retryRemoteLocalities", true)] {
        if let Some(item) = fields.take(name)
            && item.bool(report).is_some_and(|value| value != served)
        {
            item.not_supported(report, format!("use {served}, or leave it out"));
        }
    }
    fields.not_supported(&["backoff"], report);
    fields.finish(report);
    // Istio's default where only other fields are given.
    Some(RetryPolicy { attempts: attempts.unwrap_or(2), per_try_timeout, retry_on })
}

fn retry_on(item: &Item<'_>, report: &mut Report) -> Vec<String> {
    let words = item.text(report).unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty());
    let words: Vec<&str> = words.collect();
    for word in &words {
        let status = word.parse::<u16>().is_ok_and(|code| (100..600).contains(&code));
        if !status && !RETRY_ON.contains(word) {
            let fix = match nearest(word, RETRY_ON) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("use status codes or {}", RETRY_ON.join(", ")),
            };
            let message = format!("retryOn {:?} is not a condition", word.chars().take(64).collect::<String>());
            item.refuse(report, Problem::Impossible, message, fix);
        }
    }
    words.into_iter().map(str::to_owned).collect()
}

/// Routes behind one that takes every request are never used.
fn warn_unreachable(items: &[Item<'_>], routes: &[HttpRoute], report: &mut Report) {
    // Only where every route was read do places and routes belong together.
    if items.len() != routes.len() {
        return;
    }
    let takes_all = |route: &HttpRoute| route.matches.is_empty() || route.matches.contains(&Default::default());
    let Some(last) = routes.iter().position(takes_all) else { return };
    for item in items.iter().skip(last + 1) {
        item.warn(report, READ_AS, format!("this route is never used: http[{last}] takes every request"));
    }
}

/// Whether a field is there and is an empty map: Istio's "is present".
pub(crate) fn is_empty_map(item: &Item<'_>) -> bool {
    matches!(&item.node.value, Value::Map(entries) if entries.is_empty())
}
