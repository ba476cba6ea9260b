//! Heads and trailers as bytes. Pure, and a fuzz target.
//!
//! ```text
//! request   scheme 1 | method 1+n | authority 2+n | path 2+n | headers
//! response  status 2 | headers
//! headers   count 1 | { name 1+n | value 2+n } ...
//! ```
//! Lengths are big-endian. Header names are lower case, as in HTTP/2 and HTTP/3; order and repeats are kept.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{Method, StatusCode, request, response};

use super::frame::HEAD_LEN_MAX;

/// Most headers of one head or trailer section, as hyper's default for HTTP/1.
pub const HEADERS_MAX: usize = 100;

/// Why a head cannot be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeadError {
    /// Too many headers.
    #[error("more than {HEADERS_MAX} headers")]
    TooMany,
    /// Too long.
    #[error("a head of more than {HEAD_LEN_MAX} bytes, or a name over 255")]
    TooLong,
}

const MALFORMED: &str = "a malformed head";

/// Encodes a request's head.
///
/// # Errors
/// [`HeadError`] if it is over the limits.
pub fn encode_request(head: &request::Parts, out: &mut BytesMut) -> Result<(), HeadError> {
    let scheme = match head.uri.scheme() {
        None => 0,
        Some(scheme) if *scheme == Scheme::HTTPS => 2,
        Some(_) => 1,
    };
    let method = head.method.as_str().as_bytes();
    let start = out.len();
    out.put_u8(scheme);
    out.put_u8(u8::try_from(method.len()).map_err(|_| HeadError::TooLong)?);
    out.put_slice(method);
    put_long(head.uri.authority().map_or("", Authority::as_str).as_bytes(), out)?;
    put_long(head.uri.path_and_query().map_or("", PathAndQuery::as_str).as_bytes(), out)?;
    encode_headers(&head.headers, out)?;
    bounded(out.len() - start)
}

/// Encodes a response's head.
///
/// # Errors
/// [`HeadError`] if it is over the limits.
pub fn encode_response(status: StatusCode, headers: &HeaderMap, out: &mut BytesMut) -> Result<(), HeadError> {
    let start = out.len();
    out.put_u16(status.as_u16());
    encode_headers(headers, out)?;
    bounded(out.len() - start)
}

/// Encodes a trailer section.
///
/// # Errors
/// [`HeadError`] if it is over the limits.
pub fn encode_trailers(trailers: &HeaderMap, out: &mut BytesMut) -> Result<(), HeadError> {
    let start = out.len();
    encode_headers(trailers, out)?;
    bounded(out.len() - start)
}

/// Decodes a request's head.
///
/// # Errors
/// A fixed text if it is not one.
pub fn decode_request(mut bytes: Bytes) -> Result<request::Parts, &'static str> {
    let scheme = take_u8(&mut bytes)?;
    let length = take_u8(&mut bytes)?;
    let method = Method::from_bytes(&take(&mut bytes, usize::from(length))?).map_err(|_| MALFORMED)?;
    let authority = take_long(&mut bytes)?;
    let path = take_long(&mut bytes)?;
    let (mut head, ()) = http::Request::new(()).into_parts();
    head.uri = uri(scheme, authority, path)?;
    head.method = method;
    head.headers = decode_headers(bytes)?;
    Ok(head)
}

/// Decodes a response's head.
///
/// # Errors
/// A fixed text if it is not one.
pub fn decode_response(mut bytes: Bytes) -> Result<response::Parts, &'static str> {
    let status = u16::from_be_bytes([take_u8(&mut bytes)?, take_u8(&mut bytes)?]);
    let (mut head, ()) = http::Response::new(()).into_parts();
    head.status = StatusCode::from_u16(status).map_err(|_| MALFORMED)?;
    head.headers = decode_headers(bytes)?;
    Ok(head)
}

/// Decodes headers or trailers that take up all of `bytes`.
///
/// # Errors
/// A fixed text if they are malformed or too many.
pub fn decode_headers(mut bytes: Bytes) -> Result<HeaderMap, &'static str> {
    let count = usize::from(take_u8(&mut bytes)?);
    if count > HEADERS_MAX {
        return Err("too many headers");
    }
    let mut headers = HeaderMap::with_capacity(count);
    for _ in 0..count {
        let length = take_u8(&mut bytes)?;
        let name = HeaderName::from_lowercase(&take(&mut bytes, usize::from(length))?).map_err(|_| MALFORMED)?;
        let value = HeaderValue::from_maybe_shared(take_long(&mut bytes)?).map_err(|_| MALFORMED)?;
        headers.append(name, value);
    }
    if bytes.is_empty() { Ok(headers) } else { Err(MALFORMED) }
}

fn encode_headers(headers: &HeaderMap, out: &mut BytesMut) -> Result<(), HeadError> {
    if headers.len() > HEADERS_MAX {
        return Err(HeadError::TooMany);
    }
    out.put_u8(headers.len() as u8);
    for (name, value) in headers {
        out.put_u8(u8::try_from(name.as_str().len()).map_err(|_| HeadError::TooLong)?);
        out.put_slice(name.as_str().as_bytes());
        put_long(value.as_bytes(), out)?;
    }
    Ok(())
}

fn uri(scheme: u8, authority: Bytes, path: Bytes) -> Result<Uri, &'static str> {
    let mut parts = http::uri::Parts::default();
    if !authority.is_empty() {
        parts.authority = Some(Authority::from_maybe_shared(authority).map_err(|_| MALFORMED)?);
    }
    if !path.is_empty() {
        parts.path_and_query = Some(PathAndQuery::from_maybe_shared(path).map_err(|_| MALFORMED)?);
    }
    parts.scheme = match scheme {
        0 => None,
        1 => Some(Scheme::HTTP),
        2 => Some(Scheme::HTTPS),
        _ => return Err(MALFORMED),
    };
    Uri::from_parts(parts).map_err(|_| MALFORMED)
}

fn bounded(length: usize) -> Result<(), HeadError> {
    if length > HEAD_LEN_MAX { Err(HeadError::TooLong) } else { Ok(()) }
}

fn put_long(text: &[u8], out: &mut BytesMut) -> Result<(), HeadError> {
    out.put_u16(u16::try_from(text.len()).map_err(|_| HeadError::TooLong)?);
    out.put_slice(text);
    Ok(())
}

fn take_u8(bytes: &mut Bytes) -> Result<u8, &'static str> {
    if bytes.is_empty() { Err(MALFORMED) } else { Ok(bytes.get_u8()) }
}

fn take(bytes: &mut Bytes, length: usize) -> Result<Bytes, &'static str> {
    if bytes.len() < length { Err(MALFORMED) } else { Ok(bytes.split_to(length)) }
}

fn take_long(bytes: &mut Bytes) -> Result<Bytes, &'static str> {
    let length = u16::from_be_bytes([take_u8(bytes)?, take_u8(bytes)?]);
    take(bytes, usize::from(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> request::Parts {
        let request = http::Request::post("http://cart.shop.svc.clusterset.local:80/items?id=7")
            .header("x-twice", "1")
            .header("x-twice", "2")
            .header("x-bytes", HeaderValue::from_bytes(b"\xe4").expect("opaque bytes are legal"))
            .body(());
        request.expect("valid").into_parts().0
    }

    #[test]
    fn a_request_head_is_read_back_as_sent_and_no_prefix_of_it_passes() {
        let mut wire = BytesMut::new();
        encode_request(&request(), &mut wire).expect("small");
        let read = decode_request(wire.clone().freeze()).expect("whole");
        let sent = request();
        assert_eq!((read.method, read.uri, read.headers), (sent.method, sent.uri, sent.headers));
        for end in 0..wire.len() {
            assert!(decode_request(wire.clone().freeze().slice(..end)).is_err(), "{end} bytes");
        }
    }

    #[test]
    fn forms_of_uri_survive() {
        for uri in ["/just/a/path", "*", "http://h/", "https://h:1/p?q", "db.shop.svc.clusterset.local:5432"] {
            let mut sent = request();
            sent.uri = uri.parse().expect("valid");
            let mut wire = BytesMut::new();
            encode_request(&sent, &mut wire).expect("small");
            assert_eq!(decode_request(wire.freeze()).expect("whole").uri, sent.uri);
        }
    }

    #[test]
    fn a_head_over_the_limits_is_refused_by_its_sender() {
        let mut many = request();
        for number in 0..100 {
            many.headers.append("x-more", HeaderValue::from(number));
        }
        assert_eq!(encode_request(&many, &mut BytesMut::new()), Err(HeadError::TooMany));
        let mut long = request();
        let value = HeaderValue::from_bytes(&[b'a'; 40_000]).expect("legal");
        for _ in 0..2 {
            long.headers.append("x-long", value.clone());
        }
        assert_eq!(encode_request(&long, &mut BytesMut::new()), Err(HeadError::TooLong));
    }

    #[test]
    fn headers_that_http_forbids_do_not_come_in() {
        for bad in [&b"\x01\x01A\x00\x00"[..], b"\x01\x01a\x00\x01\n", b"\x01\x00\x00\x00", b"\x65", b"\x00x"] {
            assert!(decode_headers(Bytes::copy_from_slice(bad)).is_err(), "{bad:?}");
        }
    }
}
