//! Edges as Istio's series when somebody scrapes, and as telemetry for the cluster's gateway.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use isthmus_wire::{LATENCY_BUCKETS_MS, discovery};
use prometheus::proto::{Bucket, Counter, Histogram, LabelPair, Metric, MetricFamily, MetricType};

use super::edge::{Cells, Edge, Party, Reporter, ResponseCells, ResponseKey, SIZE_BUCKETS};

/// Names and help texts of the families, in the order of [`families`].
pub(super) const FAMILIES: [(&str, &str, MetricType); 8] = [
    ("istio_requests_total", "Requests", MetricType::COUNTER),
    ("istio_request_duration_milliseconds", "Duration of requests", MetricType::HISTOGRAM),
    ("istio_request_bytes", "Size of request bodies", MetricType::HISTOGRAM),
    ("istio_response_bytes", "Size of response bodies", MetricType::HISTOGRAM),
    ("istio_tcp_connections_opened_total", "Connections opened", MetricType::COUNTER),
    ("istio_tcp_connections_closed_total", "Connections closed", MetricType::COUNTER),
    ("istio_tcp_sent_bytes_total", "Bytes sent by servers on connections", MetricType::COUNTER),
    ("istio_tcp_received_bytes_total", "Bytes received by servers on connections", MetricType::COUNTER),
];

/// All series of `edges`.
pub(super) fn families<'a>(edges: impl Iterator<Item = &'a Edge>) -> Vec<MetricFamily> {
    let mut families: Vec<Vec<Metric>> = FAMILIES.iter().map(|_| Vec::new()).collect();
    for edge in edges {
        let base = labels(edge);
        for (key, cells) in edge.responses.load().iter() {
            let labels = with_response(&base, key);
            for (family, metric) in families.iter_mut().zip(response_metrics(&labels, cells)) {
                family.push(metric);
            }
        }
        if edge.tcp.opened.load(Relaxed) > 0 {
            let labels = with(&base, [("request_protocol", "tcp".to_owned()), ("response_flags", "-".to_owned())]);
            let tcp = &edge.tcp;
            for (family, cell) in families[4..].iter_mut().zip([&tcp.opened, &tcp.closed, &tcp.sent, &tcp.received]) {
                family.push(counter(&labels, cell));
            }
        }
    }
    FAMILIES
        .iter()
        .zip(families)
        .map(|((name, help, kind), metrics)| {
            let mut family = MetricFamily::default();
            family.set_name((*name).to_owned());
            family.set_help((*help).to_owned());
            family.set_field_type(*kind);
            family.set_metric(metrics);
            family
        })
        .collect()
}

/// Edges summed up per host, cluster and direction. Cumulative since the process started.
pub(super) fn telemetry<'a>(edges: impl Iterator<Item = &'a Edge>) -> discovery::Telemetry {
    let mut sums: BTreeMap<(String, String, &'static str), discovery::Edge> = BTreeMap::new();
    for edge in edges {
        let Some(host) = &edge.labels.service else { continue };
        let direction = match edge.labels.reporter {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        };
        let cluster = edge.labels.destination.cluster.to_string();
        let sum = sums.entry((host.to_string(), cluster, direction)).or_insert_with_key(|key| discovery::Edge {
            destination_host: key.0.clone(),
            destination_cluster: key.1.clone(),
            direction: direction.to_owned(),
            latency_counts: vec![0; LATENCY_BUCKETS_MS.len() + 1],
            ..Default::default()
        });
        for (key, cells) in edge.responses.load().iter() {
            add_response(sum, key, cells);
        }
        sum.requests += edge.tcp.closed.load(Relaxed);
        sum.errors += edge.tcp.failed.load(Relaxed);
        sum.bytes_sent += edge.tcp.received.load(Relaxed);
        sum.bytes_received += edge.tcp.sent.load(Relaxed);
        sum.failovers += edge.failovers.load(Relaxed);
    }
    discovery::Telemetry { edges: sums.into_values().collect() }
}

fn add_response(sum: &mut discovery::Edge, key: &ResponseKey, cells: &ResponseCells) {
    let requests = cells.requests.load(Relaxed);
    sum.requests += requests;
    // What the caller experienced as failure: no answer, a server's error, or a gRPC status other than OK.
    if key.code == 0 || key.code >= 500 || key.grpc_status.is_some_and(|status| status != 0) {
        sum.errors += requests;
    }
    let counts = cells.duration.buckets.iter().chain([&cells.duration.beyond]);
    for (total, count) in sum.latency_counts.iter_mut().zip(counts) {
        *total += count.load(Relaxed);
    }
    sum.bytes_sent += cells.request_bytes.sum.load(Relaxed);
    sum.bytes_received += cells.response_bytes.sum.load(Relaxed);
}

fn response_metrics(labels: &[LabelPair], cells: &ResponseCells) -> [Metric; 4] {
    [
        counter(labels, &cells.requests),
        histogram(labels, &cells.duration, &LATENCY_BUCKETS_MS, 1e3),
        histogram(labels, &cells.request_bytes, &SIZE_BUCKETS, 1.0),
        histogram(labels, &cells.response_bytes, &SIZE_BUCKETS, 1.0),
    ]
}

fn counter(labels: &[LabelPair], cell: &AtomicU64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(cell.load(Relaxed) as f64);
    let mut metric = Metric::from_label(labels.to_vec());
    metric.set_counter(counter);
    metric
}

/// `scale` is how many of the sum's units make one of the histogram's.
fn histogram<const N: usize>(labels: &[LabelPair], cells: &Cells<N>, bounds: &[f64; N], scale: f64) -> Metric {
    let mut total = 0;
    let buckets = cells.buckets.iter().zip(bounds).map(|(count, bound)| {
        total += count.load(Relaxed);
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(total);
        bucket
    });
    let buckets = buckets.collect();
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets);
    // From the same reads as the buckets, so that `+Inf` is never below the last of them.
    histogram.set_sample_count(total + cells.beyond.load(Relaxed));
    histogram.set_sample_sum(cells.sum.load(Relaxed) as f64 / scale);
    let mut metric = Metric::from_label(labels.to_vec());
    metric.set_histogram(histogram);
    metric
}

fn labels(edge: &Edge) -> Vec<LabelPair> {
    let labels = &edge.labels;
    let host = labels.service.as_ref().map_or("unknown", |host| host.as_str());
    let service = labels.service.as_ref().and_then(|host| host.service());
    let (name, namespace) = match &service {
        Some((name, namespace)) => (name.as_str(), namespace.as_str()),
        None => (host, "unknown"),
    };
    let mut pairs = vec![
        pair("connection_security_policy", labels.security.as_str()),
        pair("destination_service", host),
        pair("destination_service_name", name),
        pair("destination_service_namespace", namespace),
        pair("reporter", labels.reporter.as_str()),
    ];
    pairs.extend(party("source", &labels.source));
    pairs.extend(party("destination", &labels.destination));
    pairs
}

fn party(side: &str, party: &Party) -> [LabelPair; 8] {
    let named =
        |name: &str, value: &str| pair(&format!("{side}_{name}"), if value.is_empty() { "unknown" } else { value });
    [
        named("app", &party.app),
        named("canonical_revision", &party.canonical_revision),
        named("canonical_service", &party.canonical_service),
        named("cluster", &party.cluster),
        named("principal", &party.principal),
        named("version", &party.version),
        named("workload", &party.workload),
        named("workload_namespace", &party.namespace),
    ]
}

fn with_response(base: &[LabelPair], key: &ResponseKey) -> Vec<LabelPair> {
    let grpc = key.grpc_status.map(|status| status.to_string()).unwrap_or_default();
    with(
        base,
        [
            ("grpc_response_status", grpc),
            ("request_protocol", key.protocol.as_str().to_owned()),
            ("response_code", key.code.to_string()),
            ("response_flags", key.flags.to_string()),
        ],
    )
}

fn with<const N: usize>(base: &[LabelPair], more: [(&str, String); N]) -> Vec<LabelPair> {
    let mut labels = base.to_vec();
    labels.extend(more.iter().map(|(name, value)| pair(name, value)));
    labels.sort_by(|a, b| a.name().cmp(b.name()));
    labels
}

fn pair(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}
