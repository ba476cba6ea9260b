//! A sidecar's end of all its tunnels: one QUIC endpoint, client and server at once.
//!
//! [`TunnelEndpoint`] owns the socket and what is known of dials and endpoints that are gone; [`Tunnel`] is one
//! connection. It trusts what the TLS configs it is given verify, and asks its `identify` hook who the peer is.
//! Which endpoint to dial and when to stop using a tunnel is decided elsewhere (the sidecar's `tunnels`).

mod config;
mod dial;
mod incoming;
mod mint;
mod tunnel;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use isthmus_model::ClusterId;
use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::TunnelConfig;
pub use dial::{DialError, Dialer};
pub use incoming::{IncomingTunnel, PendingStream};
pub use mint::{CidMint, MintIdentity};
pub(crate) use tunnel::StreamGuard;
pub use tunnel::{CloseReason, OpenError, Tunnel, TunnelStats};

use crate::cid::{Cid, CidKind, EndpointName};
use crate::seen::{Seen, SeenTickets};
use crate::socket::{UdpPort, VirtualGatewaySocket};
use tunnel::TunnelState;

/// ALPN of tunnels between sidecars.
pub const ALPN_TUNNEL: &[u8] = b"isthmus-tunnel/1";

/// Who the peer of a tunnel is, read from its verified certificates.
pub type Identify<P> = Arc<dyn Fn(&[CertificateDer<'static>]) -> Option<P> + Send + Sync>;

/// What an endpoint is built from.
pub struct EndpointParts<P> {
    /// The bound UDP socket (port 15008).
    pub port: UdpPort,
    /// Mints this endpoint's connection IDs.
    pub mint: Arc<CidMint>,
    /// Verifies callers. ALPN [`ALPN_TUNNEL`], TLS 1.3, client certificates required, no resumption.
    pub server_tls: Arc<rustls::ServerConfig>,
    /// Names a verified peer.
    pub identify: Identify<P>,
    /// Timeouts, windows, sizes.
    pub config: TunnelConfig,
}

/// Events of an endpoint, counted since its start.
#[derive(Debug, Default)]
pub struct EndpointCounters {
    /// Tunnels accepted.
    pub accepted: AtomicU64,
    /// Dials that led to a tunnel.
    pub dialled: AtomicU64,
    /// Dials that did not.
    pub dials_failed: AtomicU64,
    /// First packets without a ticket: a replayed endpoint ID, for one.
    pub ticketless: AtomicU64,
    /// Tickets shown twice.
    pub tickets_replayed: AtomicU64,
    /// First packets refused because too many tickets are remembered.
    pub tickets_full: AtomicU64,
}

/// Tunnels that proved themselves and wait to be taken; whoever takes them is not slower than handshakes.
const PROVED_MAX: usize = 64;

type TunnelKey = (ClusterId, EndpointName);

pub(crate) struct Shared<P> {
    quinn: quinn::Endpoint,
    socket: Arc<VirtualGatewaySocket>,
    mint: Arc<CidMint>,
    identify: Identify<P>,
    config: TunnelConfig,
    counters: EndpointCounters,
    seen: Mutex<SeenTickets>,
    /// Dials in progress, by ticket.
    dialling: Mutex<FxHashMap<Cid, oneshot::Sender<String>>>,
    /// Tunnels that we dialled, to be closed when their endpoint is gone.
    dialled: Mutex<FxHashMap<TunnelKey, Vec<std::sync::Weak<TunnelState<P>>>>>,
    /// Tunnels that proved themselves and wait to be taken.
    proved: mpsc::Sender<IncomingTunnel<P>>,
    proved_next: tokio::sync::Mutex<mpsc::Receiver<IncomingTunnel<P>>>,
    tasks: TaskTracker,
}

/// One sidecar's tunnels.
pub struct TunnelEndpoint<P> {
    shared: Arc<Shared<P>>,
}

impl<P> Clone for TunnelEndpoint<P> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<P: Clone + Send + Sync + 'static> TunnelEndpoint<P> {
    /// Starts an endpoint; nothing passes before [`TunnelEndpoint::set_gateways`] and [`TunnelEndpoint::run`].
    ///
    /// # Errors
    /// As the system says, or `InvalidInput` if the TLS config cannot serve QUIC. Needs a tokio runtime.
    pub fn new(parts: EndpointParts<P>) -> io::Result<Self> {
        let EndpointParts { port, mint, server_tls, identify, config } = parts;
        let socket = VirtualGatewaySocket::new(port, mint.clone())?;
        let quinn = quinn::Endpoint::new_with_abstract_socket(
            config.endpoint(&mint),
            Some(config.server(server_tls)?),
            socket.clone(),
            Arc::new(quinn::TokioRuntime),
        )?;
        let (proved, proved_next) = mpsc::channel(PROVED_MAX);
        let shared = Shared {
            quinn,
            socket,
            mint,
            identify,
            config,
            counters: EndpointCounters::default(),
            seen: Mutex::default(),
            dialling: Mutex::default(),
            dialled: Mutex::default(),
            proved,
            proved_next: tokio::sync::Mutex::new(proved_next),
            tasks: TaskTracker::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Lets callers in and probes the gateways until `shutdown`, then closes every tunnel and waits for its tasks.
    pub async fn run(&self, shutdown: CancellationToken) {
        self.shared.tasks.spawn(incoming::admit_all(self.shared.clone()));
        self.shared.socket.clone().run_probes(shutdown).await;
        self.shared.quinn.close(CloseReason::Shutdown.code(), b"");
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.quinn.wait_idle().await;
    }

    /// Replaces the UDP addresses of this cluster's gateways.
    pub fn set_gateways(&self, addresses: Vec<SocketAddr>) {
        self.shared.socket.set_gateways(addresses);
    }

    /// The socket: gateways as seen, buffers, offload.
    pub fn socket(&self) -> &VirtualGatewaySocket {
        &self.shared.socket
    }

    /// What mints this endpoint's connection IDs; new keys and names take effect with the next ID.
    pub fn mint(&self) -> &CidMint {
        &self.shared.mint
    }

    /// Counters.
    pub fn counters(&self) -> &EndpointCounters {
        &self.shared.counters
    }

    /// Judges new callers by `tls` from now on.
    ///
    /// # Errors
    /// `InvalidInput` if it cannot serve QUIC.
    pub fn set_server_tls(&self, tls: Arc<rustls::ServerConfig>) -> io::Result<()> {
        self.shared.quinn.set_server_config(Some(self.shared.config.server(tls)?));
        Ok(())
    }

    /// The next tunnel that proved its identity. Cancel-safe; stop calling it when you stop the endpoint.
    pub async fn accept(&self) -> Option<IncomingTunnel<P>> {
        self.shared.proved_next.lock().await.recv().await
    }

    /// The gateway's word that `ticket` was refused: ends the dial that uses it, if one does.
    pub fn refused(&self, ticket: &Cid, reason: &str) {
        if let Some(dial) = self.shared.dialling.lock().remove(ticket) {
            // The dial may have ended by itself at this moment.
            let _ = dial.send(reason.to_owned());
        }
    }

    /// The gateway's word that this process is no more: closes the tunnels to it at once.
    pub fn gone(&self, cluster: ClusterId, name: EndpointName) {
        for tunnel in self.shared.dialled.lock().remove(&(cluster, name)).unwrap_or_default() {
            if let Some(tunnel) = tunnel.upgrade() {
                tunnel.close(CloseReason::Gone);
            }
        }
    }

    /// The path to `cluster` changed underneath: tunnels to it are marked, to be replaced if they do not recover.
    pub fn path_changed(&self, cluster: ClusterId) {
        self.shared.socket.path_changed(cluster);
        let dialled = self.shared.dialled.lock();
        for tunnel in dialled.iter().filter(|((of, _), _)| *of == cluster).flat_map(|(_, tunnels)| tunnels) {
            if let Some(tunnel) = tunnel.upgrade() {
                tunnel.path_changed(Instant::now());
            }
        }
    }

    /// Dials tunnels.
    pub fn dialer(&self) -> Dialer<P> {
        Dialer { shared: self.shared.clone() }
    }
}

impl<P> Shared<P> {
    /// Whether a first packet may open a tunnel: only a ticket for us, and only once. An endpoint ID must not,
    /// although the gateways let it pass: a client's later Initials carry one.
    fn admits(&self, first_dcid: &quinn::ConnectionId) -> bool {
        let ticket = Cid::from_slice(first_dcid)
            .filter(|cid| cid.kind() == CidKind::Ticket && cid.cluster() == self.mint.current().keys.cluster());
        let counter = match ticket {
            None => &self.counters.ticketless,
            Some(ticket) => match self.seen.lock().mark(ticket, Instant::now()) {
                Seen::First => return true,
                Seen::Again => &self.counters.tickets_replayed,
                Seen::Full => &self.counters.tickets_full,
            },
        };
        counter.fetch_add(1, Ordering::Relaxed);
        false
    }
}
