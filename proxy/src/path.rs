//! What every request and connection needs at hand: the mesh as known, ways to endpoints, loads, reports.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use isthmus_model::route::matching::Source;
use isthmus_model::select::{Ask, Choice, NoEndpoint};
use isthmus_model::service::Labels;
use isthmus_model::view::{ServiceView, Target};
use isthmus_model::{ClusterId, ClusterName, Locality, Namespace, SpiffeId};
use isthmus_tunnel::Carrier;
use isthmus_tunnel::cid::EndpointName;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::balance::{Balancer, InFlight};
use crate::carrier::app::{AppError, AppPool};
use crate::carrier::local::{LocalDialError, LocalPool};
use crate::carrier::spawn::Spawn;
use crate::carrier::tunnels::{TunnelDialError, Tunnels};
use crate::config::OutboundPolicy;
use crate::discovery::Mesh;
use crate::exports::Exports;
use crate::metrics::Flags;
use crate::report::Reports;
use crate::retry::Budget;

/// The workload beside us.
#[derive(Debug, Clone)]
pub struct Own {
    /// Its proven identity.
    pub spiffe: SpiffeId,
    /// Its cluster.
    pub cluster: ClusterName,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its labels.
    pub labels: Labels,
    /// Where it runs.
    pub locality: Locality,
    /// Where it listens.
    pub address: IpAddr,
    /// Where its sidecar listens.
    pub listen: IpAddr,
}

impl Own {
    /// As route matching wants it.
    pub fn source(&self) -> Source<'_> {
        Source { labels: &self.labels, namespace: &self.namespace }
    }
}

/// Shared by all connections.
pub struct DataPath {
    /// The workload.
    pub own: Own,
    /// What is known of the mesh.
    pub mesh: Mesh,
    /// Tunnels to other clusters; `None` where there is no endpoint for them.
    pub tunnels: Option<Tunnels>,
    /// Connections inside the cluster.
    pub local: LocalPool,
    /// Plain connections.
    pub app: AppPool,
    /// Loads of endpoints.
    pub balancer: Balancer,
    /// Bounds retries.
    pub budget: Mutex<Budget>,
    /// What the workload serves.
    pub exports: ArcSwap<Exports>,
    /// What may leave the mesh.
    pub policy: OutboundPolicy,
    /// The sidecar's own sockets: never a destination.
    pub own_ports: Vec<u16>,
    /// Counts what ends.
    pub reports: Reports,
    /// Tasks that connections need.
    pub spawn: Spawn,
    /// No new work; connections finish.
    pub draining: CancellationToken,
}

/// A way to an endpoint.
#[derive(Clone)]
pub enum Way {
    /// To another sidecar; the flag of losing it.
    Carrier(Arc<dyn Carrier>, Flags),
    /// Out of the mesh.
    Plain(SocketAddr),
}

/// Why there is no way to an endpoint. Nothing was sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoWay {
    /// No tunnel.
    #[error(transparent)]
    Tunnel(#[from] TunnelDialError),
    /// No connection inside the cluster.
    #[error(transparent)]
    Local(#[from] LocalDialError),
    /// No plain connection.
    #[error(transparent)]
    Plain(#[from] AppError),
    /// The host outside does not resolve.
    #[error("{host} does not resolve")]
    Resolve {
        /// The host.
        host: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Something a plain connection must never reach.
    #[error("{0} is an address of the mesh or of this sidecar, which nothing outside resolves to")]
    Forbidden(SocketAddr),
}

impl DataPath {
    /// Chooses an endpoint for a request to `port` of `service`.
    ///
    /// # Errors
    /// [`NoEndpoint`].
    pub fn choose<'a>(
        &'a self,
        service: &'a ServiceView,
        ask: AskFor<'a>,
    ) -> Result<(Choice<'a>, InFlight), NoEndpoint> {
        let ask = Ask {
            port: ask.port,
            subset: ask.subset,
            balancing: ask.balancing,
            cluster: &self.own.cluster,
            locality: &self.own.locality,
            tried: ask.tried,
            turn: 0,
            dialled: ask.dialled,
        };
        let suspect = |cluster, target: &Target| match (target, &self.tunnels) {
            (Target::Tunnel { handle, incarnation }, Some(tunnels)) => {
                tunnels.is_suspect(cluster, EndpointName { handle: *handle, incarnation: *incarnation })
            }
            _ => false,
        };
        self.balancer.choose(service, ask, suspect, Instant::now())
    }

    /// A way to the chosen endpoint, dialled if there is none.
    ///
    /// # Errors
    /// [`NoWay`].
    pub async fn way(
        &self,
        service: &ServiceView,
        choice: &Choice<'_>,
        port: u16,
        limit: Duration,
    ) -> Result<Way, NoWay> {
        match &choice.endpoint.target {
            Target::Direct(address) => {
                let connection = self.local.get(*address, &choice.backends.accounts, limit).await?;
                Ok(Way::Carrier(connection, Flags::UC))
            }
            Target::Tunnel { handle, incarnation } => {
                let name = EndpointName { handle: *handle, incarnation: *incarnation };
                let Some(tunnels) = &self.tunnels else {
                    return Err(TunnelDialError::TimedOut(Duration::ZERO).into());
                };
                let tunnel = tunnels.get(choice.backends, name, limit).await;
                self.reports.metrics().dialled(tunnel.as_ref().err().map_or("ok", TunnelDialError::reason));
                Ok(Way::Carrier(Arc::new(tunnel?), Flags::XT))
            }
            Target::Plain(host) => {
                let target = service.ports.iter().find(|one| one.number == port).map_or(port, |one| one.target);
                Ok(Way::Plain(self.outside(host, target).await?))
            }
        }
    }

    /// The address of a host outside the mesh.
    ///
    /// # Errors
    /// [`NoWay::Resolve`], or [`NoWay::Forbidden`] where the name leads back into the mesh: it would be reached
    /// in plaintext.
    pub async fn outside(&self, host: &str, port: u16) -> Result<SocketAddr, NoWay> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let failed = |source| NoWay::Resolve { host: host.to_owned(), source };
        let address = match host.parse::<IpAddr>() {
            Ok(address) => SocketAddr::new(address, port),
            Err(_) => {
                let mut found = tokio::net::lookup_host((host, port)).await.map_err(failed)?;
                found.next().ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?
            }
        };
        if self.is_own(address) {
            return Err(NoWay::Forbidden(address));
        }
        Ok(address)
    }

    /// Whether `address` is a socket of this sidecar: a request there would go round in circles, or reach the admin.
    pub fn is_own(&self, address: SocketAddr) -> bool {
        let ip = address.ip();
        let own = ip.is_loopback() || ip == self.own.address || ip == self.own.listen;
        own && self.own_ports.contains(&address.port())
    }
}

/// What [`DataPath::choose`] is asked for.
#[derive(Debug, Clone, Copy)]
pub struct AskFor<'a> {
    /// The service's port.
    pub port: u16,
    /// Labels of the subset.
    pub subset: &'a Labels,
    /// How one of equals is chosen.
    pub balancing: isthmus_model::destination::Balancing,
    /// Endpoints tried already.
    pub tried: &'a [(ClusterId, Target)],
    /// The address that the caller dialled.
    pub dialled: Option<IpAddr>,
}
