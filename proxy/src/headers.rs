//! What a proxy may and may not pass on in a request's or response's head. Pure.
//!
//! A request has exactly one authority, used by routing, policy and log alike; two that differ are a
//! bad request. Headers that only sidecars may set never come from an application.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, request, uri};

/// Names the service a request on a connection inside the cluster is for, `host:port`.
pub const SERVICE: HeaderName = HeaderName::from_static("isthmus-service");
/// Says that the receiving sidecar did not pass a request on, and why (a reset code's word).
pub const REFUSED: HeaderName = HeaderName::from_static("isthmus-refused");
/// Says that the client speaks HTTP/2, so that a port of unknown protocol is spoken to alike.
pub const PROTOCOL: HeaderName = HeaderName::from_static("isthmus-protocol");
/// Says that a request on a connection inside the cluster upgrades, and to what; in the answer, that it did.
pub const UPGRADE: HeaderName = HeaderName::from_static("isthmus-upgrade");
/// Says that a request on a connection inside the cluster is a byte stream.
pub const STREAM: HeaderName = HeaderName::from_static("isthmus-stream");
/// Why a sidecar answered itself, in Envoy's letters, shown to the application.
pub const RESPONSE_FLAGS: HeaderName = HeaderName::from_static("x-isthmus-response-flags");
/// The verified identity of the caller, for the application (Envoy's XFCC).
pub const CLIENT_CERT: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// Where a request says it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// Lower case, without a trailing dot; an IPv6 address in brackets.
    pub host: String,
    /// If one was given.
    pub port: Option<u16>,
}

/// Why a request's head is refused with 400.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadRequest {
    /// No authority at all.
    #[error("the request names no host")]
    NoHost,
    /// More than one `Host` line.
    #[error("the request has more than one Host")]
    TwoHosts,
    /// `Host` against the request line or `:authority`.
    #[error("Host differs from the authority of the request line")]
    HostDiffers,
    /// Not a host, or with user info or a path.
    #[error("the authority is not host or host:port")]
    Authority,
    /// Neither `/...` nor `*`.
    #[error("the path does not start with /")]
    Path,
}

/// The one authority of a request.
///
/// # Errors
/// [`BadRequest`]: none, several, or two that differ.
pub fn authority(head: &request::Parts) -> Result<Authority, BadRequest> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(BadRequest::TwoHosts);
    }
    let host = host.map(|value| value.to_str().map_err(|_| BadRequest::Authority).and_then(read)).transpose()?;
    let line = head.uri.authority().map(|authority| read(authority.as_str())).transpose()?;
    if head.method != Method::CONNECT {
        let path = head.uri.path();
        if !path.starts_with('/') && path != "*" {
            return Err(BadRequest::Path);
        }
    }
    match (line, host) {
        (Some(line), Some(host)) if line != host => Err(BadRequest::HostDiffers),
        (Some(one), _) | (None, Some(one)) => Ok(one),
        (None, None) => Err(BadRequest::NoHost),
    }
}

fn read(text: &str) -> Result<Authority, BadRequest> {
    let parsed: uri::Authority = text.parse().map_err(|_| BadRequest::Authority)?;
    if parsed.as_str().contains('@') || parsed.host().is_empty() {
        return Err(BadRequest::Authority);
    }
    let port = match parsed.as_str()[parsed.host().len()..].strip_prefix(':') {
        None => None,
        Some(digits) => Some(digits.parse().ok().filter(|port| *port > 0).ok_or(BadRequest::Authority)?),
    };
    let host = parsed.host();
    Ok(Authority { host: host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase(), port })
}

/// `uri` with `host` as its authority, as HTTP/2 wants it; `None` if `host` is none.
pub fn absolute(uri: &uri::Uri, host: &HeaderValue) -> Option<uri::Uri> {
    let mut parts = uri.clone().into_parts();
    parts.scheme = Some(uri::Scheme::HTTP);
    parts.authority = Some(uri::Authority::try_from(host.as_bytes()).ok()?);
    if parts.path_and_query.is_none() {
        parts.path_and_query = Some(uri::PathAndQuery::from_static("/"));
    }
    uri::Uri::from_parts(parts).ok()
}

/// Brings a head into the one form used between here and the workload: path in the URI, authority in `Host`.
///
/// # Errors
/// [`BadRequest`], as [`authority`].
pub fn canonical(head: &mut request::Parts) -> Result<Authority, BadRequest> {
    let found = authority(head)?;
    if let Some(line) = head.uri.authority() {
        let host = HeaderValue::from_str(line.as_str()).map_err(|_| BadRequest::Authority)?;
        let path = head.uri.path_and_query().cloned().unwrap_or_else(|| uri::PathAndQuery::from_static("/"));
        head.uri = uri::Uri::from(path);
        head.headers.insert(header::HOST, host);
    }
    Ok(found)
}

/// Takes away what is for one connection only (RFC 9110 §7.6.1), and everything `Connection` lists.
///
/// Returns the protocol that an HTTP/1 request or response upgrades to.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) -> Option<HeaderValue> {
    let mut upgrade = None;
    if headers.contains_key(header::CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            .collect();
        for name in listed {
            let removed = headers.remove(&name);
            if name == header::UPGRADE {
                upgrade = removed;
            }
        }
        headers.remove(header::CONNECTION);
    }
    let trailers = headers.get(header::TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in [header::UPGRADE, header::TE, header::TRANSFER_ENCODING, header::PROXY_AUTHENTICATE] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection"] {
        headers.remove(name);
    }
    // gRPC asks for trailers this way, end to end (RFC 9113 §8.2.2 allows it).
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    upgrade
}

/// Takes away what only a sidecar may say: an application's word for it would be a forgery.
pub fn strip_forged(headers: &mut HeaderMap) {
    if headers.keys().any(is_reserved) {
        let forged: Vec<HeaderName> = headers.keys().filter(|name| is_reserved(name)).cloned().collect();
        for name in forged {
            headers.remove(name);
        }
    }
}

/// Whether `name` is ours, `_` being read as `-`: many applications take the one for the other.
fn is_reserved(name: &HeaderName) -> bool {
    let same = |byte: u8, other: u8| byte == other || (byte == b'_' && other == b'-');
    let starts = |prefix: &str| {
        let (name, prefix) = (name.as_str().as_bytes(), prefix.as_bytes());
        name.len() >= prefix.len() && name.iter().zip(prefix).all(|(byte, other)| same(*byte, *other))
    };
    let whole = |text: &str| name.as_str().len() == text.len() && starts(text);
    starts("isthmus-") || starts("x-isthmus-") || whole("x-forwarded-client-cert")
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(uri: &str, hosts: &[&str]) -> request::Parts {
        let mut builder = Request::builder().uri(uri);
        for host in hosts {
            builder = builder.header("host", *host);
        }
        builder.body(()).expect("a request").into_parts().0
    }

    #[test]
    fn spellings_of_one_authority_agree() {
        let expected = Authority { host: "cart.example".into(), port: Some(80) };
        assert_eq!(authority(&head("/", &["Cart.Example.:80"])), Ok(expected.clone()));
        assert_eq!(authority(&head("http://cart.example:80/x", &["cart.example:80"])), Ok(expected));
        assert_eq!(authority(&head("/", &["[::1]:8080"])).expect("valid").host, "[::1]");
    }

    #[test]
    fn a_request_with_no_or_two_authorities_is_refused() {
        assert_eq!(authority(&head("/", &[])), Err(BadRequest::NoHost));
        assert_eq!(authority(&head("/", &["a", "a"])), Err(BadRequest::TwoHosts));
        assert_eq!(authority(&head("http://a/", &["b"])), Err(BadRequest::HostDiffers));
        for bad in ["u@a", "a/b", "a:0", "a:99999", "a:", ":80", ""] {
            assert_eq!(authority(&head("/", &[bad])), Err(BadRequest::Authority), "{bad:?}");
        }
    }

    #[test]
    fn absolute_and_origin_form_become_one() {
        let mut absolute_form = head("http://Cart.example/x?y", &[]);
        let mut origin_form = head("/x?y", &["Cart.example"]);
        for head in [&mut absolute_form, &mut origin_form] {
            assert_eq!(canonical(head).expect("valid").host, "cart.example");
            assert_eq!(
                (head.uri.to_string(), head.headers["host"].to_str().ok()),
                ("/x?y".into(), Some("Cart.example"))
            );
            let back = absolute(&head.uri, &head.headers["host"]).expect("an authority");
            assert_eq!(back.to_string(), "http://Cart.example/x?y");
        }
    }

    #[test]
    fn connection_headers_stop_here_and_grpc_keeps_its_trailers() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "keep-alive, x-private, Upgrade"),
            ("x-private", "1"),
            ("upgrade", "websocket"),
            ("keep-alive", "5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("accept", "*/*"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        assert_eq!(strip_hop_by_hop(&mut headers), Some(HeaderValue::from_static("websocket")));
        let left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(
            (left.len(), headers.contains_key("accept"), headers["te"].to_str().ok()),
            (2, true, Some("trailers"))
        );
    }

    #[test]
    fn forged_identity_is_taken_away_however_it_is_spelled() {
        let mut headers = HeaderMap::new();
        for name in [
            "isthmus-service",
            "isthmus_service",
            "x-isthmus-x",
            "X-Forwarded-Client-Cert",
            "x_forwarded_client_cert",
            "x-forwarded-for",
        ] {
            headers.append(name.parse::<HeaderName>().expect("a name"), HeaderValue::from_static("forged"));
        }
        strip_forged(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-forwarded-for"]);
    }
}
