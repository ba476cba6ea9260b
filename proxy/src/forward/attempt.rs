//! One try at one endpoint.

use std::time::Duration;

use http::{Request, Response, header};
use isthmus_model::select::Choice;
use isthmus_tunnel::Carrier;
use isthmus_tunnel::carrier::{Answer, Body, CarrierError, ServiceTarget};

use super::{Failed, Resolved};
use crate::headers;
use crate::path::{DataPath, Way};

/// How often a waiting request looks whether its tunnel went silent.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Sends `request` to the chosen endpoint. Ends with [`Failed::Silent`] when `leaves` says so of a silent tunnel;
/// it is told for how long the tunnel has been silent.
pub(super) async fn send(
    path: &DataPath,
    to: &Resolved,
    choice: &Choice<'_>,
    request: Request<Body>,
    leaves: impl Fn(Duration) -> bool,
) -> Result<Answer, Failed> {
    match path.way(&to.service, choice, to.port, to.policy.connect_timeout).await? {
        Way::Carrier(carrier, lost) => {
            let target = ServiceTarget { host: to.host.clone(), port: to.port };
            // Informational responses end here: hyper's server has no way to pass them on (it answers
            // `Expect: 100-continue` itself when the body is first read).
            let mut ignore = |_: Response<()>| {};
            let sending = carrier.send(&target, request, &mut ignore);
            attended(&*carrier, sending, leaves).await?.map_err(|error| Failed::Carrier(error, lost))
        }
        Way::Plain(address) => {
            let protocol = crate::destination::protocol(&to.service, to.port);
            Ok(plain(path, address, wants_http2(protocol, &request), request, to.policy.connect_timeout).await?)
        }
    }
}

async fn attended(
    carrier: &dyn Carrier,
    sending: impl Future<Output = Result<Answer, CarrierError>>,
    leaves: impl Fn(Duration) -> bool,
) -> Result<Result<Answer, CarrierError>, Failed> {
    let mut sending = std::pin::pin!(sending);
    let mut silent = Duration::ZERO;
    loop {
        tokio::select! {
            biased;
            answer = &mut sending => return Ok(answer),
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
        silent = if carrier.is_suspect() { silent + LOOK_INTERVAL } else { Duration::ZERO };
        if silent > Duration::ZERO && leaves(silent) {
            return Err(Failed::Silent);
        }
    }
}

/// Sends `request` to an address outside the mesh.
pub(super) async fn plain(
    path: &DataPath,
    address: std::net::SocketAddr,
    http2: bool,
    mut request: Request<Body>,
    connect_timeout: Duration,
) -> Result<Answer, crate::carrier::app::AppError> {
    request.headers_mut().remove(headers::PROTOCOL);
    let mut answer = path.app.send(address, http2, request, connect_timeout, |_| {}).await?;
    match &mut answer {
        Answer::Response(response) => drop(headers::strip_hop_by_hop(response.headers_mut())),
        Answer::Upgraded(head, _) => {
            let protocol = headers::strip_hop_by_hop(head.headers_mut());
            if let Some(protocol) = protocol {
                head.headers_mut().insert(header::UPGRADE, protocol);
            }
        }
    }
    Ok(answer)
}

fn wants_http2(protocol: isthmus_model::service::Protocol, request: &Request<Body>) -> bool {
    use isthmus_model::service::Protocol;
    match protocol {
        Protocol::Http2 | Protocol::Grpc => true,
        Protocol::Auto => request.headers().contains_key(headers::PROTOCOL),
        _ => false,
    }
}
