//! The two line formats. Pure: an [`Entry`] in, text out.
//!
//! Text is Istio's 24-operator default line, byte for byte. JSON has Istio's 24 keys and, behind
//! them, what a mesh of clusters adds: both clusters, the tunnel and the proven peer.

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use super::escape::{self, Place};
use crate::metrics::Flags;

/// How the request travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tunnel {
    /// Not between sidecars: plaintext, or to somewhere outside the mesh.
    #[default]
    None,
    /// Inside the cluster, mTLS over TCP.
    Local,
    /// Between clusters, QUIC.
    Quic,
    /// Between clusters, on a link that had to fall back to TCP.
    Tcp,
}

impl Tunnel {
    fn as_str(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Local => "local",
            Self::Quic => "quic",
            Self::Tcp => "tcp",
        }
    }
}

/// One finished request or connection. Empty text and `None` mean: not known, or not applicable.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "the fields are the keys of Istio's format, documented there")]
pub struct Entry<'a> {
    /// When it began; `None` is written as the epoch.
    pub start_time: Option<SystemTime>,
    pub method: &'a str,
    pub path: &'a str,
    /// `HTTP/1.1`, `HTTP/2`; empty for byte streams.
    pub protocol: &'a str,
    pub response_code: u16,
    pub response_flags: Flags,
    /// Fixed words such as `via_upstream`.
    pub response_code_details: &'a str,
    pub connection_termination_details: &'a str,
    pub upstream_transport_failure_reason: &'a str,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub duration: Duration,
    /// Until the first byte of the response came.
    pub upstream_service_time: Option<Duration>,
    pub x_forwarded_for: &'a str,
    pub user_agent: &'a str,
    pub request_id: &'a str,
    pub authority: &'a str,
    /// Address, or `cluster/handle` of an endpoint behind a tunnel.
    pub upstream_host: &'a str,
    /// `outbound|8443|v2|host`.
    pub upstream_cluster: &'a str,
    pub upstream_local_address: Option<SocketAddr>,
    pub downstream_local_address: Option<SocketAddr>,
    pub downstream_remote_address: Option<SocketAddr>,
    pub requested_server_name: &'a str,
    pub route_name: &'a str,
    pub source_cluster: &'a str,
    pub destination_cluster: &'a str,
    pub tunnel: Tunnel,
    pub tunnel_rtt: Option<Duration>,
    /// SPIFFE id that the other side proved.
    pub peer_spiffe: &'a str,
    pub trace_id: &'a str,
}

/// Istio's default line, with its line end.
pub fn render_text(entry: &Entry<'_>) -> String {
    use Place::{Bare, Quoted};
    let mut line = String::with_capacity(512);
    let put = |line: &mut String, before: &str, value: &str, place| {
        line.push_str(before);
        escape::text(line, value, place);
    };
    line.push('[');
    push_time(&mut line, entry.start_time);
    put(&mut line, "] \"", entry.method, Bare);
    put(&mut line, " ", entry.path, Quoted);
    put(&mut line, " ", entry.protocol, Bare);
    push(&mut line, format_args!("\" {} {}", entry.response_code, entry.response_flags));
    put(&mut line, " ", entry.response_code_details, Bare);
    put(&mut line, " ", entry.connection_termination_details, Bare);
    put(&mut line, " \"", entry.upstream_transport_failure_reason, Quoted);
    let duration = entry.duration.as_millis();
    push(&mut line, format_args!("\" {} {} {duration} ", entry.bytes_received, entry.bytes_sent));
    match entry.upstream_service_time {
        Some(time) => push(&mut line, format_args!("{}", time.as_millis())),
        None => line.push('-'),
    }
    put(&mut line, " \"", entry.x_forwarded_for, Quoted);
    put(&mut line, "\" \"", entry.user_agent, Quoted);
    put(&mut line, "\" \"", entry.request_id, Quoted);
    put(&mut line, "\" \"", entry.authority, Quoted);
    put(&mut line, "\" \"", entry.upstream_host, Quoted);
    put(&mut line, "\" ", entry.upstream_cluster, Bare);
    for address in [entry.upstream_local_address, entry.downstream_local_address, entry.downstream_remote_address] {
        match address {
            Some(address) => push(&mut line, format_args!(" {address}")),
            None => line.push_str(" -"),
        }
    }
    put(&mut line, " ", entry.requested_server_name, Bare);
    put(&mut line, " ", entry.route_name, Bare);
    line.push('\n');
    line
}

/// One JSON object, with a line end. Sizes, times and the code are numbers; what is absent is null.
pub fn render_json(entry: &Entry<'_>) -> String {
    let mut line = String::with_capacity(1024);
    line.push_str("{\"start_time\":\"");
    push_time(&mut line, entry.start_time);
    line.push('"');
    let text = |line: &mut String, key: &str, value: &str| {
        push(line, format_args!(",\"{key}\":"));
        escape::json(line, value);
    };
    let address = |line: &mut String, key: &str, value: Option<SocketAddr>| match value {
        Some(address) => push(line, format_args!(",\"{key}\":\"{address}\"")),
        None => push(line, format_args!(",\"{key}\":null")),
    };
    let number = |line: &mut String, key: &str, value: Option<u128>| match value {
        Some(number) => push(line, format_args!(",\"{key}\":{number}")),
        None => push(line, format_args!(",\"{key}\":null")),
    };
    text(&mut line, "route_name", entry.route_name);
    text(&mut line, "method", entry.method);
    text(&mut line, "path", entry.path);
    text(&mut line, "protocol", entry.protocol);
    number(&mut line, "response_code", Some(entry.response_code.into()));
    push(&mut line, format_args!(",\"response_flags\":\"{}\"", entry.response_flags));
    text(&mut line, "response_code_details", entry.response_code_details);
    text(&mut line, "connection_termination_details", entry.connection_termination_details);
    number(&mut line, "bytes_received", Some(entry.bytes_received.into()));
    number(&mut line, "bytes_sent", Some(entry.bytes_sent.into()));
    number(&mut line, "duration", Some(entry.duration.as_millis()));
    number(&mut line, "upstream_service_time", entry.upstream_service_time.map(|time| time.as_millis()));
    text(&mut line, "x_forwarded_for", entry.x_forwarded_for);
    text(&mut line, "user_agent", entry.user_agent);
    text(&mut line, "request_id", entry.request_id);
    text(&mut line, "authority", entry.authority);
    text(&mut line, "upstream_host", entry.upstream_host);
    text(&mut line, "upstream_cluster", entry.upstream_cluster);
    address(&mut line, "upstream_local_address", entry.upstream_local_address);
    address(&mut line, "downstream_local_address", entry.downstream_local_address);
    address(&mut line, "downstream_remote_address", entry.downstream_remote_address);
    text(&mut line, "requested_server_name", entry.requested_server_name);
    text(&mut line, "upstream_transport_failure_reason", entry.upstream_transport_failure_reason);
    text(&mut line, "source_cluster", entry.source_cluster);
    text(&mut line, "destination_cluster", entry.destination_cluster);
    text(&mut line, "tunnel", entry.tunnel.as_str());
    number(&mut line, "tunnel_rtt_us", entry.tunnel_rtt.map(|rtt| rtt.as_micros()));
    text(&mut line, "peer_spiffe", entry.peer_spiffe);
    text(&mut line, "trace_id", entry.trace_id);
    line.push_str("}\n");
    line
}

fn push(line: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = line.write_fmt(text);
}

/// `2026-11-23T10:15:30.123Z`, as Envoy's `%START_TIME%`.
fn push_time(line: &mut String, time: Option<SystemTime>) {
    let time = time.unwrap_or(SystemTime::UNIX_EPOCH);
    let time = jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    push(line, format_args!("{time:.3}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry<'static> {
        Entry {
            start_time: Some(SystemTime::UNIX_EPOCH + Duration::from_millis(1_606_339_588_409)),
            method: "GET",
            path: "/status/418",
            protocol: "HTTP/1.1",
            response_code: 418,
            response_code_details: "via_upstream",
            bytes_sent: 135,
            duration: Duration::from_millis(4),
            upstream_service_time: Some(Duration::from_millis(4)),
            user_agent: "curl/7.73.0-DEV",
            request_id: "84961386-6d84-929d-98bd-c5aee93b5c88",
            authority: "httpbin:8000",
            upstream_host: "10.44.1.27:80",
            upstream_cluster: "outbound|8000||httpbin.foo.svc.cluster.local",
            upstream_local_address: Some(([10, 44, 1, 23], 37652).into()),
            downstream_local_address: Some(([10, 0, 45, 184], 8000).into()),
            downstream_remote_address: Some(([10, 44, 1, 23], 46520).into()),
            route_name: "default",
            ..Entry::default()
        }
    }

    /// The example line of Istio's own documentation (tasks/observability/logs/access-log).
    #[test]
    fn the_text_line_is_istios_byte_for_byte() {
        let istio = "[2020-11-25T21:26:28.409Z] \"GET /status/418 HTTP/1.1\" 418 - via_upstream - \"-\" 0 135 4 4 \"-\" \
            \"curl/7.73.0-DEV\" \"84961386-6d84-929d-98bd-c5aee93b5c88\" \"httpbin:8000\" \"10.44.1.27:80\" \
            outbound|8000||httpbin.foo.svc.cluster.local 10.44.1.23:37652 10.0.45.184:8000 10.44.1.23:46520 - default\n";
        assert_eq!(render_text(&entry()), istio);
    }

    #[test]
    fn the_json_line_has_istios_keys_and_ours() {
        let tunnel_rtt = Some(Duration::from_micros(81_250));
        let entry = Entry {
            source_cluster: "aws-eu",
            destination_cluster: "gcp-us",
            tunnel: Tunnel::Quic,
            tunnel_rtt,
            peer_spiffe: "spiffe://corp/ns/shop/sa/cart",
            response_flags: Flags::UF | Flags::URX,
            ..entry()
        };
        let line = render_json(&entry);
        let read: serde_json::Value = serde_json::from_str(&line).expect("valid JSON");
        let keys = read.as_object().expect("an object").len();
        assert_eq!(keys, 24 + 6, "{line}");
        assert_eq!(read["start_time"], "2020-11-25T21:26:28.409Z");
        assert_eq!(read["response_code"], 418);
        assert_eq!(read["duration"], 4);
        assert_eq!(read["response_flags"], "UF,URX");
        assert_eq!(read["x_forwarded_for"], serde_json::Value::Null);
        assert_eq!((&read["tunnel"], &read["tunnel_rtt_us"]), (&"quic".into(), &81_250.into()));
        assert_eq!(read["destination_cluster"], "gcp-us");
    }

    #[test]
    fn what_a_caller_sends_cannot_make_a_second_line_or_a_second_key() {
        let evil = "/\r\n\",\"response_code\":200,\"x\":\"\x1b[2J\u{2028}";
        let entry = Entry {
            method: evil,
            path: evil,
            user_agent: evil,
            authority: evil,
            requested_server_name: evil,
            x_forwarded_for: evil,
            request_id: evil,
            ..entry()
        };
        let text = render_text(&entry);
        assert_eq!(text.lines().count(), 1, "{text:?}");
        assert!(!text.trim_end().chars().any(char::is_control), "{text:?}");
        let json = render_json(&entry);
        assert_eq!(json.lines().count(), 1);
        let read: serde_json::Value = serde_json::from_str(&json).expect("valid JSON");
        assert_eq!((&read["response_code"], &read["path"]), (&418.into(), &evil.into()));
    }
}
