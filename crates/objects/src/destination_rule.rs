//! Istio `DestinationRule`: subsets, and how a host's endpoints are used.

use std::time::Duration;

use isthmus_model::ObjectName;
use isthmus_model::destination::{Balancing, DestinationRule, Subset, TrafficPolicy};

use crate::document::Metadata;
use crate::fields::{Fields, Item};
use crate::report::{DEPRECATED, Problem, READ_AS, Report};
use crate::scalar::{duration, export_to, host, labels};

/// Reads a destination rule.
pub(crate) fn read(metadata: &Metadata<'_>, mut spec: Fields<'_>, report: &mut Report) -> Option<DestinationRule> {
    let name = metadata.parsed_name::<ObjectName>(report);
    let namespace = metadata.namespace.clone();
    let host = spec.need("host", report).and_then(|item| host(&item, &namespace, report));
    let policy = spec.take("trafficPolicy").and_then(|item| traffic_policy(&item, report)).unwrap_or_default();
    let mut subsets: Vec<Subset> = Vec::new();
    for item in spec.list("subsets", report) {
        let Some(subset) = subset(&item, report) else { continue };
        if subsets.iter().any(|have| have.name == subset.name) {
            let message = format!("subset {:?} is there twice", subset.name);
            item.refuse(report, Problem::Duplicate, message, "rename one of them");
        }
        subsets.push(subset);
    }
    spec.not_supported(&["workloadSelector"], report);
    let export_to = export_to(&mut spec, report);
    spec.finish(report);
    Some(DestinationRule { namespace, name: name?, host: host?, policy, subsets, export_to })
}

fn subset(item: &Item<'_>, report: &mut Report) -> Option<Subset> {
    let mut fields = item.fields(report)?;
    let name = fields.need("name", report);
    let labels = fields.take("labels").map(|item| labels(&item, report)).unwrap_or_default();
    let policy = fields.take("trafficPolicy").and_then(|item| traffic_policy(&item, report));
    fields.finish(report);
    let name_item = name?;
    let name = name_item.text(report)?;
    if name.is_empty()
        || name.len() > 63
        || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.')
    {
        name_item.impossible(report, "is not a subset's name", "use letters, digits, '-', '_' and '.'");
    }
    Some(Subset { name: name.to_owned(), labels, policy })
}

fn traffic_policy(item: &Item<'_>, report: &mut Report) -> Option<TrafficPolicy> {
    let mut fields = item.fields(report)?;
    let mut policy = settings(&mut fields, report);
    for item in fields.list("portLevelSettings", report) {
        let Some(mut fields) = item.fields(report) else { continue };
        let port = fields.need("port", report).and_then(|item| {
            let mut fields = item.fields(report)?;
            let port = fields.need("number", report).and_then(|item| item.port(report));
            fields.finish(report);
            port
        });
        let settings = settings(&mut fields, report);
        fields.finish(report);
        let Some(port) = port else { continue };
        if policy.ports.iter().any(|(have, _)| *have == port) {
            item.refuse(report, Problem::Duplicate, format!("port {port} is there twice"), "unite the two");
        }
        policy.ports.push((port, settings));
    }
    fields.not_supported(&["tunnel", "proxyProtocol", "retryBudget"], report);
    fields.finish(report);
    Some(policy)
}

/// What a policy and a port's settings have in common.
fn settings(fields: &mut Fields<'_>, report: &mut Report) -> TrafficPolicy {
    let balancing = fields.take("loadBalancer").and_then(|item| balancing(&item, report));
    let connect_timeout = fields.take("connectionPool").and_then(|item| connect_timeout(&item, report));
    if let Some(item) = fields.take("tls") {
        tls(&item, report);
    }
    fields.not_supported(&["outlierDetection"], report);
    TrafficPolicy { balancing, connect_timeout, ports: Vec::new() }
}

/// Values of `simple`, with Istio's two other spellings of its default.
const SIMPLE: [(&str, Balancing); 6] = [
    ("ROUND_ROBIN", Balancing::RoundRobin),
    ("LEAST_REQUEST", Balancing::LeastRequest),
    ("RANDOM", Balancing::Random),
    ("PASSTHROUGH", Balancing::Passthrough),
    ("LEAST_CONN", Balancing::LeastRequest),
    ("UNSPECIFIED", Balancing::LeastRequest),
];

fn balancing(item: &Item<'_>, report: &mut Report) -> Option<Balancing> {
    let mut fields = item.fields(report)?;
    let simple = fields.take("simple");
    let later = ["consistentHash", "localityLbSetting", "warmupDurationSecs", "warmup"];
    fields.not_supported(&later, report);
    fields.finish(report);
    let item = simple?;
    let balancing = item.word(report, &SIMPLE)?;
    if item.text(report) == Some("LEAST_CONN") {
        item.warn(report, DEPRECATED, "LEAST_CONN is deprecated; write LEAST_REQUEST");
    }
    if balancing == Balancing::Passthrough {
        item.warn(
            report,
            READ_AS,
            "PASSTHROUGH holds where the dialled address is an endpoint's; others are drawn at random",
        );
    }
    Some(balancing)
}

fn connect_timeout(item: &Item<'_>, report: &mut Report) -> Option<Duration> {
    let mut fields = item.fields(report)?;
    fields.not_supported(&["http"], report);
    let tcp = fields.take("tcp");
    fields.finish(report);
    let mut fields = tcp?.fields(report)?;
    let limit = fields.take("connectTimeout").and_then(|item| {
        let limit = duration(&item, report)?;
        if limit.is_zero() {
            item.impossible(report, "leaves no time to connect", "use at least 1ms");
        }
        Some(limit)
    });
    fields.not_supported(&["maxConnections", "idleTimeout", "maxConnectionDuration", "tcpKeepalive"], report);
    fields.finish(report);
    limit
}

/// `ISTIO_MUTUAL` is what is done in the mesh anyway; everything else is not served.
fn tls(item: &Item<'_>, report: &mut Report) {
    let Some(mut fields) = item.fields(report) else { return };
    let mode = fields.need("mode", report);
    let modes = [("ISTIO_MUTUAL", true), ("DISABLE", false), ("SIMPLE", false), ("MUTUAL", false)];
    if let Some(item) = mode
        && item.word(report, &modes) == Some(false)
    {
        item.not_supported(report, "use ISTIO_MUTUAL or leave tls out: the mesh's own mTLS is always used");
    }
    let later = [
        "clientCertificate",
        "privateKey",
        "caCertificates",
        "caCrl",
        "credentialName",
        "sni",
        "subjectAltNames",
        "insecureSkipVerify",
    ];
    fields.not_supported(&later, report);
    fields.finish(report);
}
