//! Why a request of the workload could not be served, and the answer it gets instead.

use http::{HeaderValue, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use isthmus_model::Host;
use isthmus_model::select::NoEndpoint;
use isthmus_tunnel::ResetCode;
use isthmus_tunnel::carrier::{Body, CarrierError, CarrierErrorKind};

use crate::carrier::app::AppError;
use crate::headers;
use crate::metrics::Flags;
use crate::path::NoWay;
use crate::retry;

/// Why a request was not served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failed {
    /// No route of the VirtualService wants it.
    #[error("no route of {0}'s VirtualService matches this request")]
    NoRoute(Host),
    /// The mesh does not know the host.
    #[error("{0} is not a service that the mesh knows or that is exported to this cluster")]
    NoService(Host),
    /// The DestinationRule does not have the subset.
    #[error("the route names subset {0:?}, which the DestinationRule does not define")]
    NoSubset(String),
    /// Nobody to send it to.
    #[error("{host}: {reason}")]
    NoEndpoint {
        /// The service.
        host: Host,
        /// Why.
        reason: NoEndpoint,
    },
    /// The endpoint could not be reached.
    #[error("{0}")]
    NoWay(#[from] NoWay),
    /// The carrier failed.
    #[error("{0}")]
    Carrier(CarrierError, Flags),
    /// The plain connection failed.
    #[error("{0}")]
    App(#[from] AppError),
    /// A try took too long.
    #[error("no answer within the route's perTryTimeout")]
    TryTimeout,
    /// All of it took too long.
    #[error("no answer within the route's timeout")]
    Timeout,
    /// The tunnel went silent while the request was in it.
    #[error("the tunnel went silent while the request was in it")]
    Silent,
    /// A mesh address that nobody knows.
    #[error("the address is the mesh's and no service is known there; it is never passed on in plaintext")]
    UnknownAddress,
    /// The outbound policy.
    #[error("the host is not in the registry, and outbound_traffic_policy is REGISTRY_ONLY")]
    Blocked,
    /// A head that cannot be.
    #[error("{0}")]
    BadRequest(headers::BadRequest),
}

impl Failed {
    /// As the retry rules see it; `None` if another try would not help.
    pub fn failure(&self) -> Option<retry::Failure<'static>> {
        match self {
            Self::NoWay(NoWay::Forbidden(_)) => None,
            Self::NoWay(_) => Some(retry::Failure::Connect),
            Self::App(error) if error.not_processed() => Some(retry::Failure::Connect),
            Self::App(_) | Self::Silent => Some(retry::Failure::Lost),
            Self::TryTimeout => Some(retry::Failure::TryTimeout),
            Self::Carrier(error, _) => match &error.kind {
                CarrierErrorKind::Unsendable(_) | CarrierErrorKind::Body(_) => None,
                _ if error.not_processed => Some(retry::Failure::Refused),
                CarrierErrorKind::Reset(_) | CarrierErrorKind::Protocol(_) => None,
                _ => Some(retry::Failure::Lost),
            },
            _ => None,
        }
    }

    /// Whether it speaks against the endpoint, so that others go first for a while.
    pub fn blames_endpoint(&self) -> bool {
        match self {
            Self::NoWay(NoWay::Forbidden(_)) => false,
            Self::NoWay(_) | Self::App(_) | Self::Silent => true,
            Self::Carrier(error, _) => match &error.kind {
                CarrierErrorKind::Lost(_) => true,
                CarrierErrorKind::Reset(code) => matches!(code, ResetCode::Refused | ResetCode::ConnectFailed),
                _ => false,
            },
            _ => false,
        }
    }

    /// The status that the workload sees.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::NoRoute(_) => StatusCode::NOT_FOUND,
            Self::TryTimeout | Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Blocked => StatusCode::BAD_GATEWAY,
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::Carrier(error, _) => match &error.kind {
                CarrierErrorKind::Reset(ResetCode::NotExported | ResetCode::Denied) => StatusCode::FORBIDDEN,
                CarrierErrorKind::Unsendable(_) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                CarrierErrorKind::Body(_) => StatusCode::BAD_REQUEST,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            },
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Envoy's letters, and our two.
    pub fn flags(&self) -> Flags {
        match self {
            Self::NoRoute(_) => Flags::NR,
            Self::NoService(_) | Self::NoSubset(_) => Flags::NC,
            Self::NoEndpoint { .. } | Self::UnknownAddress | Self::Blocked => Flags::UH,
            Self::NoWay(_) => Flags::UF,
            Self::App(error) if error.not_processed() => Flags::UF,
            Self::App(_) => Flags::UC,
            Self::TryTimeout | Self::Timeout => Flags::UT,
            Self::Silent => Flags::XT,
            Self::BadRequest(_) => Flags::DPE,
            Self::Carrier(error, lost) => match &error.kind {
                CarrierErrorKind::Reset(ResetCode::NotExported | ResetCode::Denied) => Flags::UAEX,
                CarrierErrorKind::Reset(ResetCode::ConnectFailed | ResetCode::Refused) => Flags::UF,
                CarrierErrorKind::Reset(_) => Flags::UR,
                CarrierErrorKind::Body(_) => Flags::DC,
                CarrierErrorKind::Unsendable(_) => Flags::DPE,
                _ => *lost,
            },
        }
    }

    /// A fixed word for the failover metric.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoWay(_) => "unreachable",
            Self::Silent => "silent",
            Self::TryTimeout => "try_timeout",
            Self::Carrier(error, _) => error.reason(),
            Self::App(_) => "lost",
            _ => "other",
        }
    }
}

/// The answer that a sidecar gives itself: status, flags, and the reason as text.
pub fn answer(failed: &Failed, flags: Flags) -> Response<Body> {
    let text = format!("isthmus: {failed} ({flags})\n");
    let mut response = Response::new(Body::new(Full::from(text).map_err(|never| match never {})));
    *response.status_mut() = failed.status();
    let head = response.headers_mut();
    head.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    if let Ok(flags) = HeaderValue::try_from(flags.to_string()) {
        head.insert(headers::RESPONSE_FLAGS, flags);
    }
    response
}
