//! The seam between routing a request and the protocol that carries it to a sidecar.
//!
//! A tunnel ([`crate::Tunnel`]) is one carrier; HTTP/2 over TLS inside a cluster is another. Whoever routes knows
//! only this trait, so that another protocol can stand behind it.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use isthmus_model::Host;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::stream::ResetCode;

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A streaming body with trailers.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;
/// A future that is not tied to a type.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Bytes in both directions, with half-close.
pub trait ByteIo: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteIo for T {}

/// The service and port that a request or byte stream is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceTarget {
    /// The service's host.
    pub host: Host,
    /// Its port.
    pub port: u16,
}

/// What came back.
pub enum Answer {
    /// A response; its body goes on streaming.
    Response(http::Response<Body>),
    /// 101, or 2xx to CONNECT: from here on there are only bytes.
    Upgraded(http::Response<()>, Box<dyn ByteIo>),
}

/// Why a request or byte stream did not come to its end.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct CarrierError {
    /// What happened.
    pub kind: CarrierErrorKind,
    /// True only if the workload provably never saw the request: another endpoint may be asked whatever the method.
    pub not_processed: bool,
}

/// What happened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CarrierErrorKind {
    /// The far sidecar ended the stream.
    #[error("the peer ended the stream: {0}")]
    Reset(ResetCode),
    /// The tunnel or connection underneath is gone.
    #[error("the connection to the peer is gone: {0}")]
    Lost(String),
    /// The request cannot be carried as it is: a head over the limits.
    #[error("the request cannot be carried: {0}")]
    Unsendable(&'static str),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Protocol(&'static str),
    /// The request's own body failed while it was sent.
    #[error("the request's body failed")]
    Body(#[source] BoxError),
}

impl CarrierError {
    /// A fixed word for metrics.
    pub fn reason(&self) -> &'static str {
        match &self.kind {
            CarrierErrorKind::Reset(code) => code.as_str(),
            CarrierErrorKind::Lost(_) => "lost",
            CarrierErrorKind::Unsendable(_) => "unsendable",
            CarrierErrorKind::Protocol(_) => "protocol",
            CarrierErrorKind::Body(_) => "request_body",
        }
    }
}

/// Carries requests and byte streams to one sidecar.
pub trait Carrier: Send + Sync {
    /// Sends `request` to `target`. `on_informational` sees every 1xx head but 101 before the answer.
    fn send<'a>(
        &'a self,
        target: &'a ServiceTarget,
        request: http::Request<Body>,
        on_informational: &'a mut (dyn FnMut(http::Response<()>) + Send),
    ) -> BoxFuture<'a, Result<Answer, CarrierError>>;

    /// Opens a byte stream to `target`; returns once it is asked for, not once it is taken up.
    fn open<'a>(&'a self, target: &'a ServiceTarget) -> BoxFuture<'a, Result<Box<dyn ByteIo>, CarrierError>>;

    /// Whether new requests should rather go elsewhere: nothing was heard of sent data for too long, or it closes.
    fn is_suspect(&self) -> bool;
}
