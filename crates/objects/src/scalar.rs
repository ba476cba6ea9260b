//! Values that several kinds share: durations, hosts, ports, protocols, labels, `exportTo`.

use std::net::IpAddr;
use std::time::Duration;

use isthmus_model::service::{Labels, Protocol};
use isthmus_model::{Host, Namespace, ServiceName};

use crate::fields::{Fields, Item};
use crate::report::{Problem, READ_AS, Report};

/// A duration as Istio writes it (`1h30m`, `1.5s`, `100ms`); `0s` is valid, less than a millisecond is not.
pub(crate) fn duration(item: &Item<'_>, report: &mut Report) -> Option<Duration> {
    let text = item.text(report)?;
    let read = parse_duration(text);
    match read {
        Some(value) if value.is_zero() || value >= Duration::from_millis(1) => Some(value),
        Some(_) => {
            item.impossible(report, "is less than a millisecond", "use at least 1ms");
            None
        }
        None => {
            item.impossible(report, "is not a duration", "write it like 10s, 1.5s, 250ms or 1h30m");
            None
        }
    }
}

/// Longest duration: a year. What is longer is a slip, and would overflow sums with deadlines.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// Go's `time.ParseDuration`, without signs.
fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let unit_s = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        sum = sum.checked_add(Duration::try_from_secs_f64(number * unit_s).ok()?)?;
        rest = tail;
    }
    (!text.is_empty() && sum <= DURATION_MAX).then_some(sum)
}

/// A host that an object speaks of, fully qualified: a name without dots is a service of `namespace`, as in Istio.
pub(crate) fn host(item: &Item<'_>, namespace: &Namespace, report: &mut Report) -> Option<Host> {
    let text = item.text(report)?;
    if text == "*" {
        item.not_supported(report, "name the hosts; * is for ingress gateways");
        return None;
    }
    let short = !text.contains('.');
    let full = if short { format!("{text}.{namespace}.svc.cluster.local") } else { text.to_owned() };
    match full.parse::<Host>() {
        Ok(host) => {
            if host.as_str().ends_with(".svc") {
                let message = format!("{host} is taken as it stands; did you mean {host}.cluster.local?");
                item.warn(report, READ_AS, message);
            }
            Some(host)
        }
        Err(error) => {
            item.refuse(report, Problem::Impossible, error.to_string(), "write a service's name or a DNS name");
            None
        }
    }
}

/// Where a workload is reached: an IP address or a host name.
pub(crate) fn address(item: &Item<'_>, report: &mut Report) -> Option<String> {
    let text = item.text(report)?;
    if text.starts_with("unix://") {
        item.impossible(
            report,
            "is a Unix socket, which no other host reaches",
            "give the workload an IP address or host name",
        );
        return None;
    }
    if text.parse::<IpAddr>().is_ok() {
        return Some(text.to_owned());
    }
    match text.parse::<Host>() {
        Ok(host) if !host.is_wildcard() => Some(host.to_string()),
        _ => {
            item.impossible(
                report,
                "is neither an IP address nor a host name",
                "write one of these, without a port: ports stand in `ports`",
            );
            None
        }
    }
}

/// A port's name: refused if it is not a label of letters, digits and '-'.
pub(crate) fn check_port_name(item: &Item<'_>, name: &str, report: &mut Report) {
    if name.to_ascii_lowercase().parse::<ServiceName>().is_err() {
        let message = format!("{:?} is not a port name", name.chars().take(64).collect::<String>());
        let fix = "use 1-63 letters, digits and '-', starting and ending with a letter or digit";
        item.refuse(report, Problem::Impossible, message, fix);
    }
}

/// Labels: texts by name.
pub(crate) fn labels(item: &Item<'_>, report: &mut Report) -> Labels {
    let mut labels = Labels::new();
    for (key, value) in item.pairs(report) {
        let name = key.key();
        if !is_label_name(&name) {
            let message = format!("{:?} is not a label name", name.chars().take(64).collect::<String>());
            let fix = "use [prefix/]name of at most 63 letters, digits, '-', '_' and '.'";
            value.refuse(report, Problem::Impossible, message, fix);
        }
        if let Some(text) = value.text(report) {
            if text.is_empty() || is_label_text(text) {
                labels.insert(name, text.to_owned());
            } else {
                value.impossible(
                    report,
                    "is not a label value",
                    "use at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit",
                );
            }
        }
    }
    labels
}

fn is_label_name(name: &str) -> bool {
    match name.split_once('/') {
        Some((prefix, name)) => prefix.parse::<Host>().is_ok() && is_label_text(name),
        None => is_label_text(name),
    }
}

fn is_label_text(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && ends(text.chars().next())
        && ends(text.chars().last())
}

/// `exportTo`: namespaces, `.` for the own, `*` for all, `~` for none. Nothing said means all.
pub(crate) fn export_to(fields: &mut Fields<'_>, report: &mut Report) -> Vec<String> {
    let Some(item) = fields.take("exportTo") else { return vec!["*".to_owned()] };
    let mut all = Vec::new();
    for one in item.list(report) {
        let Some(text) = one.text(report) else { continue };
        if !matches!(text, "." | "*" | "~") && text.parse::<Namespace>().is_err() {
            one.impossible(report, "is not a namespace", "use a namespace, \".\" for the own or \"*\" for all");
        } else if all.iter().any(|have| have == text) {
            one.refuse(report, Problem::Duplicate, format!("{text:?} is there twice"), "remove one of them");
        }
        all.push(text.to_owned());
    }
    if all.len() > 1 && all.iter().any(|one| one == "*" || one == "~") {
        item.impossible(report, "names * or ~ beside others", "leave * or ~ alone, or name namespaces only");
    }
    // An empty list means what no list means.
    if all.is_empty() { vec!["*".to_owned()] } else { all }
}

/// Protocols that Istio knows, and how we carry them.
const PROTOCOLS: [(&str, Option<Protocol>); 14] = [
    ("http", Some(Protocol::Http)),
    ("http2", Some(Protocol::Http2)),
    ("h2c", Some(Protocol::Http2)),
    ("grpc", Some(Protocol::Grpc)),
    ("grpc-web", Some(Protocol::Http)),
    ("https", Some(Protocol::Tls)),
    ("tls", Some(Protocol::Tls)),
    ("tcp", Some(Protocol::Tcp)),
    ("mongo", Some(Protocol::Tcp)),
    ("mysql", Some(Protocol::Tcp)),
    ("redis", Some(Protocol::Tcp)),
    ("udp", Some(Protocol::Udp)),
    ("http_proxy", None),
    ("sctp", None),
];

/// The protocol that `word` names; `Some(None)` if it is known and not carried.
pub(crate) fn protocol(word: &str) -> Option<Option<Protocol>> {
    PROTOCOLS.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, protocol)| *protocol)
}

/// The protocol that a port's name says: `http`, `http-admin`; `grpc-web` before `grpc`.
pub(crate) fn protocol_of_name(name: &str) -> Option<Protocol> {
    let web = name == "grpc-web" || name.starts_with("grpc-web-");
    let word = if web { "grpc-web" } else { name.split('-').next().unwrap_or(name) };
    protocol(word).flatten()
}

/// Names of protocols for messages.
pub(crate) const PROTOCOL_WORDS: &str = "HTTP, HTTP2, GRPC, HTTPS, TLS, TCP or UDP";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_does() {
        for (text, ms) in [
            ("10s", Some(10_000)),
            ("1.5s", Some(1_500)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("0s", Some(0)),
            ("0", Some(0)),
            ("", None),
            ("10", None),
            ("-1s", None),
            ("1 s", None),
            ("s", None),
            ("1d", None),
            ("1..5s", None),
            ("99999999999999999999h", None),
            ("1e3s", None),
        ] {
            assert_eq!(parse_duration(text).map(|value| value.as_millis()), ms, "{text:?}");
        }
    }

    #[test]
    fn port_names_say_their_protocol() {
        for (name, said) in [
            ("http", Some(Protocol::Http)),
            ("http-admin", Some(Protocol::Http)),
            ("http2-x", Some(Protocol::Http2)),
            ("grpc-web", Some(Protocol::Http)),
            ("grpc-api", Some(Protocol::Grpc)),
            ("mysql", Some(Protocol::Tcp)),
            ("https", Some(Protocol::Tls)),
            ("httpadmin", None),
            ("web", None),
            ("", None),
        ] {
            assert_eq!(protocol_of_name(name), said, "{name}");
        }
    }
}
