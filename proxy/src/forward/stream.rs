//! Byte streams: the loop over endpoints until one is connected.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use isthmus_model::Host;
use isthmus_model::route::matching::ConnectionFacts;
use isthmus_model::view::ServiceView;
use isthmus_tunnel::carrier::{ByteIo, ServiceTarget};

use super::{Failed, resolve};
use crate::balance::InFlight;
use crate::carrier::app::connect;
use crate::destination::route_connection;
use crate::path::{AskFor, DataPath, NoWay, Way};
use crate::report::StreamReport;
use crate::retry::{Failure, Retries};

/// A connected byte stream.
pub struct Opened {
    /// Towards the service.
    pub io: Box<dyn ByteIo>,
    /// Counted when dropped.
    pub report: StreamReport,
    /// The endpoint's load.
    pub in_flight: InFlight,
}

/// Connects to an endpoint of `service` at `port`. Nothing was sent on any that failed.
///
/// # Errors
/// [`Failed`], the last one if several endpoints were tried.
pub async fn open(
    path: &DataPath,
    service: &Arc<ServiceView>,
    sni: Option<&Host>,
    dialled: Option<SocketAddr>,
    port: u16,
) -> Result<Opened, Failed> {
    let known = path.mesh.snapshot();
    let address = dialled.map(|address| address.ip());
    let facts = ConnectionFacts { port, address, source: path.own.source() };
    let routed = route_connection(&known, service, sni, &facts, &mut rand::rng());
    let to = resolve(path, &known, service, routed, address).await?;
    // Connecting is safe to repeat: it counts as a request of which nothing was processed.
    let mut retries = Retries::new(None, &http::Method::CONNECT);
    let mut tried = Vec::new();
    let mut last = None;
    loop {
        let ask = AskFor {
            port: to.port,
            subset: &to.subset,
            balancing: to.policy.balancing,
            tried: &tried,
            dialled: to.dialled,
        };
        let (choice, in_flight) = match path.choose(&to.service, ask) {
            Ok(chosen) if !chosen.0.repeated => chosen,
            // All were tried.
            Ok(_) => return Err(last.unwrap_or(Failed::NoService(to.host))),
            Err(reason) => return Err(last.unwrap_or(Failed::NoEndpoint { host: to.host, reason })),
        };
        let reached = path.reports.reached(&to.host, &choice, to.port);
        if choice.failover {
            reached.edge.failed_over();
            path.reports.metrics().failed_over(last.as_ref().map_or("no_local_endpoint", Failed::reason));
        }
        let connecting = async {
            match path.way(&to.service, &choice, to.port, to.policy.connect_timeout).await? {
                Way::Carrier(carrier, lost) => {
                    let target = ServiceTarget { host: to.host.clone(), port: to.port };
                    carrier.open(&target).await.map_err(|error| Failed::Carrier(error, lost))
                }
                Way::Plain(address) => {
                    let stream = connect(address, to.policy.connect_timeout).await.map_err(NoWay::from)?;
                    Ok(Box::new(stream) as Box<dyn ByteIo>)
                }
            }
        };
        let failed = match connecting.await {
            Ok(io) => {
                in_flight.answered();
                return Ok(Opened { io, report: path.reports.stream(reached), in_flight });
            }
            Err(failed) => failed,
        };
        if failed.blames_endpoint() {
            in_flight.failed(Instant::now());
        }
        let unprocessed = matches!(failed.failure(), Some(Failure::Connect | Failure::Refused));
        if !unprocessed || !retries.again(Failure::Connect, &mut path.budget.lock(), Instant::now()) {
            return Err(failed);
        }
        tried.push((choice.backends.cluster_id, choice.endpoint.target.clone()));
        last = Some(failed);
    }
}
