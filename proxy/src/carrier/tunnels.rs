//! Tunnels to sidecars of other clusters: one per endpoint, dialled when first needed, replaced in time.
//!
//! Which endpoint to use is decided by `balance`; this pool only makes sure that a usable tunnel to it
//! stands, that a burst dials once, and that no tunnel outlives its certificates' trust.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use isthmus_identity::{Expect, PeerIdentity, Tls};
use isthmus_model::view::Backends;
use isthmus_model::{ClusterId, ClusterName, ServiceAccount};
use isthmus_tunnel::cid::EndpointName;
use isthmus_tunnel::endpoint::{ALPN_TUNNEL, CloseReason, DialError, TunnelStats};
use isthmus_tunnel::{Dialer, Tunnel};
use parking_lot::Mutex;
use rustc_hash::FxHashMap;

use crate::discovery::{TicketError, Tickets};

/// Share of the shorter certificate's rest of life after which a tunnel takes no new streams.
const REPLACE_AFTER_SHARE: f64 = 0.8;
/// Tunnels held; one costs about 45 KiB idle.
const TUNNELS_MAX: usize = 1024;
/// A stream limit is near: another tunnel to the same endpoint is dialled.
const STREAMS_PER_TUNNEL: u32 = 3200;

type Proved = Tunnel<PeerIdentity>;
type Key = (ClusterId, EndpointName);

/// Why no tunnel to an endpoint came about. Nothing was sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelDialError {
    /// No ticket for the endpoint.
    #[error(transparent)]
    Ticket(#[from] TicketError),
    /// The dial failed.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// Nothing within the connect timeout.
    #[error("the tunnel did not stand within {0:?}")]
    TimedOut(Duration),
    /// The peer is none of the accounts that serve this service.
    #[error("the endpoint is {0}, which does not serve this service")]
    Unexpected(String),
}

impl TunnelDialError {
    /// A fixed word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Ticket(error) => error.reason(),
            Self::Dial(error) => error.reason(),
            Self::TimedOut(_) => "timed_out",
            Self::Unexpected(_) => "unexpected_peer",
        }
    }
}

/// The tunnels this sidecar dialled.
pub struct Tunnels {
    dialer: Dialer<PeerIdentity>,
    tickets: Tickets,
    tls: Tls,
    slots: Mutex<FxHashMap<Key, Arc<Slot>>>,
}

#[derive(Default)]
struct Slot {
    /// Held while dialling, so that a burst dials once.
    dialling: tokio::sync::Mutex<()>,
    current: Mutex<Option<Current>>,
}

#[derive(Clone)]
struct Current {
    tunnel: Proved,
    cluster: ClusterName,
    /// From then on a new tunnel takes its place.
    replace_at: Instant,
}

impl Current {
    fn takes_streams(&self, now: Instant) -> bool {
        !self.tunnel.is_closed() && now < self.replace_at && self.tunnel.streams() < STREAMS_PER_TUNNEL
    }
}

/// One tunnel, for people.
#[derive(Debug, Clone)]
pub struct TunnelStatus {
    /// The endpoint's cluster.
    pub cluster: ClusterName,
    /// The endpoint.
    pub handle: u32,
    /// The process behind the handle.
    pub incarnation: u16,
    /// Who proved to be there.
    pub peer: String,
    /// Whether new requests go elsewhere.
    pub suspect: bool,
    /// Its figures.
    pub stats: TunnelStats,
}

impl Tunnels {
    /// An empty pool over `dialer`.
    pub fn new(dialer: Dialer<PeerIdentity>, tickets: Tickets, tls: Tls) -> Self {
        Self { dialer, tickets, tls, slots: Mutex::default() }
    }

    /// The tunnel to `name` of `backends`' cluster, dialled if there is none that takes streams.
    ///
    /// # Errors
    /// [`TunnelDialError`]. Nothing was sent.
    pub async fn get(
        &self,
        backends: &Backends,
        name: EndpointName,
        connect_timeout: Duration,
    ) -> Result<Proved, TunnelDialError> {
        let slot = self.slot((backends.cluster_id, name));
        let standing = || {
            let current = slot.current.lock();
            current.as_ref().filter(|current| current.takes_streams(Instant::now())).map(|one| one.tunnel.clone())
        };
        let mut suspect = None;
        match standing() {
            Some(tunnel) if !tunnel.is_suspect() => return serving(tunnel, &backends.accounts),
            other => suspect = other.or(suspect),
        }
        let _dialling = slot.dialling.lock().await;
        if let Some(tunnel) = standing().filter(|tunnel| !tunnel.is_suspect()) {
            return serving(tunnel, &backends.accounts);
        }
        match self.dial(backends, name, connect_timeout).await {
            Ok(tunnel) => {
                let (cluster, replace_at) = (backends.cluster.clone(), self.replace_at(tunnel.peer()));
                // The one before drains: it is closed when its last stream's holder lets go.
                *slot.current.lock() = Some(Current { tunnel: tunnel.clone(), cluster, replace_at });
                serving(tunnel, &backends.accounts)
            }
            // The old one is silent, but the only one there is.
            Err(error) => suspect.ok_or(error).and_then(|tunnel| serving(tunnel, &backends.accounts)),
        }
    }

    /// Whether requests to `name` should rather go elsewhere.
    pub fn is_suspect(&self, cluster: ClusterId, name: EndpointName) -> bool {
        let slots = self.slots.lock();
        let current = slots.get(&(cluster, name)).and_then(|slot| slot.current.lock().clone());
        current.is_some_and(|current| !current.tunnel.is_closed() && current.tunnel.is_suspect())
    }

    /// All that stand.
    pub fn status(&self) -> Vec<TunnelStatus> {
        let slots = self.slots.lock();
        let standing = slots.iter().filter_map(|((_, name), slot)| {
            let Current { tunnel, cluster, .. } = slot.current.lock().clone()?;
            (!tunnel.is_closed()).then(|| TunnelStatus {
                cluster,
                handle: name.handle,
                incarnation: name.incarnation,
                peer: tunnel.peer().spiffe.to_string(),
                suspect: tunnel.is_suspect(),
                stats: tunnel.stats(),
            })
        });
        standing.collect()
    }

    /// Closes the tunnels whose peers are trusted no more.
    pub fn judge_again(&self, trusted: impl Fn(&PeerIdentity) -> bool) {
        for slot in self.slots.lock().values() {
            let mut current = slot.current.lock();
            if let Some(gone) = current.take_if(|current| !trusted(current.tunnel.peer())) {
                gone.tunnel.close(CloseReason::Denied);
            }
        }
    }

    fn slot(&self, key: Key) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        if slots.len() >= TUNNELS_MAX && !slots.contains_key(&key) {
            let closed = |slot: &Slot| slot.current.lock().as_ref().is_none_or(|current| current.tunnel.is_closed());
            slots.retain(|_, slot| Arc::strong_count(slot) > 1 || !closed(slot));
        }
        Arc::clone(slots.entry(key).or_default())
    }

    async fn dial(
        &self,
        backends: &Backends,
        name: EndpointName,
        connect_timeout: Duration,
    ) -> Result<Proved, TunnelDialError> {
        let expect = Expect::Accounts { cluster: backends.cluster.clone(), accounts: backends.accounts.clone() };
        let tls = Arc::new(self.tls.client_config(&[ALPN_TUNNEL], expect));
        let dial = async {
            let ticket = self.tickets.take(backends.cluster_id, name).await?;
            Ok(self.dialer.dial(backends.cluster_id, name, ticket, tls).await?)
        };
        tokio::time::timeout(connect_timeout, dial).await.unwrap_or(Err(TunnelDialError::TimedOut(connect_timeout)))
    }

    fn replace_at(&self, peer: &PeerIdentity) -> Instant {
        let own = self.tls.identity.not_after();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let left = own.min(peer.not_after).saturating_sub(now.as_secs());
        Instant::now() + Duration::from_secs(left).mul_f64(REPLACE_AFTER_SHARE)
    }
}

/// The accounts that serve a service are checked at each use: they differ between services of one endpoint.
fn serving(tunnel: Proved, accounts: &[ServiceAccount]) -> Result<Proved, TunnelDialError> {
    if accounts.contains(&tunnel.peer().spiffe.account) {
        return Ok(tunnel);
    }
    Err(TunnelDialError::Unexpected(tunnel.peer().spiffe.to_string()))
}
