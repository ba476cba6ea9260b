//! What a route of a `VirtualService` may ask of a request or connection.

use ipnet::IpNet;
use isthmus_model::route::matching::compile;
use isthmus_model::route::{ConnectionMatch, HttpMatch, StringMatch, TlsMatch};
use isthmus_model::{Host, Namespace};

use crate::fields::{Fields, Item};
use crate::report::{Problem, Report};
use crate::scalar::labels;
use crate::virtual_service::{is_empty_map, mesh_only};

/// Reads one `http[].match[]`.
pub(crate) fn http_match(item: &Item<'_>, report: &mut Report) -> Option<HttpMatch> {
    let mut fields = item.fields(report)?;
    // A name for people; nothing is chosen by it.
    fields.ignore(&["name"]);
    let mut one = |name| fields.take(name).and_then(|item| string_match(&item, false, report));
    let (uri, scheme, method, authority) = (one("uri"), one("scheme"), one("method"), one("authority"));
    let headers = named(&mut fields, "headers", report);
    let without_headers = named(&mut fields, "withoutHeaders", report);
    let query_params = named(&mut fields, "queryParams", report);
    let ignore_uri_case = fields.take("ignoreUriCase").and_then(|item| item.bool(report)).unwrap_or(false);
    fields.no_effect(&["statPrefix"], "metrics have fixed names", report);
    let port = fields.take("port").and_then(|item| item.port(report));
    let (source_labels, source_namespace) = source(&mut fields, report);
    fields.finish(report);
    Some(HttpMatch {
        uri,
        ignore_uri_case,
        method,
        authority,
        scheme,
        headers,
        without_headers,
        query_params,
        port,
        source_labels,
        source_namespace,
    })
}

/// Reads one `tls[].match[]`; its names must lie within the virtual service's hosts.
pub(crate) fn tls_match(item: &Item<'_>, hosts: &[Host], report: &mut Report) -> Option<TlsMatch> {
    let mut fields = item.fields(report)?;
    let items = fields.list("sniHosts", report);
    if items.is_empty() {
        fields.missing("sniHosts", report, "add the server names to match");
    }
    let mut sni_hosts = Vec::new();
    for item in &items {
        let Some(host) = item.parsed::<Host>(report, "write a DNS name") else { continue };
        if !hosts.iter().any(|one| *one == host || one.covers(&host)) {
            item.impossible(report, "is not one of the hosts", "add it to spec.hosts");
        }
        sni_hosts.push(host);
    }
    let connection = connection_match(&mut fields, report);
    fields.finish(report);
    Some(TlsMatch { sni_hosts, connection })
}

/// Takes what TLS and TCP matches have in common.
pub(crate) fn connection_match(fields: &mut Fields<'_>, report: &mut Report) -> ConnectionMatch {
    let port = fields.take("port").and_then(|item| item.port(report));
    let subnets = fields.list("destinationSubnets", report);
    let destination_subnets = subnets.iter().filter_map(|item| subnet(item, report)).collect();
    let (source_labels, source_namespace) = source(fields, report);
    ConnectionMatch { port, destination_subnets, source_labels, source_namespace }
}

fn source(fields: &mut Fields<'_>, report: &mut Report) -> (isthmus_model::service::Labels, Option<Namespace>) {
    mesh_only(fields, report);
    let source_labels = fields.take("sourceLabels").map(|item| labels(&item, report)).unwrap_or_default();
    let namespace = fields.take("sourceNamespace");
    (source_labels, namespace.and_then(|item| item.parsed(report, "write the name of a namespace")))
}

fn subnet(item: &Item<'_>, report: &mut Report) -> Option<IpNet> {
    let text = item.text(report)?;
    let net = text.parse::<IpNet>().ok().or_else(|| text.parse::<std::net::IpAddr>().map(IpNet::from).ok());
    if net.is_none() {
        item.impossible(report, "is neither an IP address nor a CIDR range", "write it like 10.0.0.0/24");
    }
    net
}

fn named(fields: &mut Fields<'_>, name: &'static str, report: &mut Report) -> Vec<(String, StringMatch)> {
    let Some(item) = fields.take(name) else { return Vec::new() };
    let mut all = Vec::new();
    for (key, value) in item.pairs(report) {
        let key = key.key();
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if name != "queryParams" && (key.is_empty() || !key.chars().all(token)) {
            value.refuse(report, Problem::Impossible, format!("{key:?} is not a header name"), "use a header's name");
        }
        if let Some(text) = string_match(&value, true, report) {
            all.push((key, text));
        }
    }
    all
}

/// One of `exact`, `prefix`, `suffix` and `regex`; an empty map means that the header or parameter is there.
fn string_match(item: &Item<'_>, may_be_present: bool, report: &mut Report) -> Option<StringMatch> {
    if may_be_present && is_empty_map(item) {
        return Some(StringMatch::Present);
    }
    let mut fields = item.fields(report)?;
    let words = ["exact", "prefix", "suffix", "regex"];
    let mut said: Vec<(&str, Item<'_>)> =
        words.into_iter().filter_map(|word| fields.take(word).map(|item| (word, item))).collect();
    fields.finish(report);
    let (Some((word, one)), true) = (said.pop(), said.is_empty()) else {
        item.impossible(report, "is not one match", "write exactly one of exact, prefix, suffix and regex");
        return None;
    };
    let text = one.text(report)?.to_owned();
    if text.is_empty() && word != "exact" {
        one.impossible(report, "is empty", "write what to compare with, or remove the match");
    }
    Some(match word {
        "exact" => StringMatch::Exact(text),
        "prefix" => StringMatch::Prefix(text),
        "suffix" => StringMatch::Suffix(text),
        _ => {
            if let Err(reason) = compile(&text) {
                let what = format!("is not an RE2 expression: {reason}");
                one.impossible(report, what, "correct it; it must match the whole text");
            }
            StringMatch::Regex(text)
        }
    })
}
