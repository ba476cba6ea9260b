//! Dialling: one ticket, one handshake, one tunnel.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use isthmus_model::ClusterId;
use quinn::ConnectionId;
use rustls::pki_types::CertificateDer;
use tokio::sync::oneshot;

use super::tunnel::{self, Tunnel};
use super::{Cid, EndpointName, Shared};

/// Why a dial led to no tunnel. Nothing was processed in any case.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The destination's gateway would not let the ticket pass.
    #[error("the destination refused the dial: {0}")]
    Refused(String),
    /// No answer in time.
    #[error("no answer from the endpoint; check that a gateway of both clusters is up and reachable over UDP")]
    TimedOut,
    /// The handshake failed: a certificate was not accepted, for one.
    #[error("the handshake failed")]
    Handshake(#[source] quinn::ConnectionError),
    /// The peer's certificates name nobody.
    #[error("the peer's certificate names no identity of this mesh")]
    NoIdentity,
    /// The TLS config cannot dial QUIC, or the endpoint is closed.
    #[error("cannot dial")]
    Local(#[source] io::Error),
}

impl DialError {
    /// A fixed word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused(_) => "refused",
            Self::TimedOut => "timed_out",
            Self::Handshake(_) => "handshake",
            Self::NoIdentity => "no_identity",
            Self::Local(_) => "local",
        }
    }
}

/// Dials tunnels.
pub struct Dialer<P> {
    pub(super) shared: Arc<Shared<P>>,
}

impl<P> Clone for Dialer<P> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

impl<P: Clone + Send + Sync + 'static> Dialer<P> {
    /// Dials `name` of `cluster` with one unused ticket. `tls` says whom to accept; its ALPN is
    /// [`super::ALPN_TUNNEL`], it offers a certificate and resumes nothing.
    ///
    /// # Errors
    /// [`DialError`]. The ticket is used up in any case.
    pub async fn dial(
        &self,
        cluster: ClusterId,
        name: EndpointName,
        ticket: Cid,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Tunnel<P>, DialError> {
        let (notice, refused) = oneshot::channel();
        self.shared.dialling.lock().insert(ticket, notice);
        // Also forgets the dial when this future is dropped.
        let _guard = Forget { shared: &self.shared, ticket };
        let result = tokio::select! {
            biased;
            Ok(reason) = refused => Err(DialError::Refused(reason)),
            connected = self.connect(cluster, name, ticket, tls) => connected,
            () = tokio::time::sleep(self.shared.config.dial_timeout) => Err(DialError::TimedOut),
        };
        let counters = &self.shared.counters;
        let counter = if result.is_ok() { &counters.dialled } else { &counters.dials_failed };
        counter.fetch_add(1, Ordering::Relaxed);
        result
    }

    async fn connect(
        &self,
        cluster: ClusterId,
        name: EndpointName,
        ticket: Cid,
        tls: Arc<rustls::ClientConfig>,
    ) -> Result<Tunnel<P>, DialError> {
        let shared = &self.shared;
        let mut config = shared.config.client(tls).map_err(DialError::Local)?;
        config.initial_dst_cid_provider(Arc::new(move || ConnectionId::new(ticket.as_bytes())));
        let connecting = shared
            .quinn
            .connect_with(config, shared.socket.virtual_address(), &server_name(cluster, name))
            .map_err(|error| DialError::Local(io::Error::other(error)))?;
        let connection = connecting.await.map_err(|error| match error {
            quinn::ConnectionError::TimedOut => DialError::TimedOut,
            error => DialError::Handshake(error),
        })?;
        let peer = identify(shared, &connection).ok_or(DialError::NoIdentity)?;
        Ok(tunnel::dialled(shared, connection, peer, cluster, name))
    }
}

struct Forget<'a, P> {
    shared: &'a Shared<P>,
    ticket: Cid,
}

impl<P> Drop for Forget<'_, P> {
    fn drop(&mut self) {
        self.shared.dialling.lock().remove(&self.ticket);
    }
}

/// Who is at the other end; `None` if it showed no certificate or an unknown one.
pub(super) fn identify<P>(shared: &Shared<P>, connection: &quinn::Connection) -> Option<P> {
    let identity = connection.peer_identity()?;
    let certificates = identity.downcast_ref::<Vec<CertificateDer<'static>>>()?;
    (shared.identify)(certificates)
}

/// ClientHellos are readable on the wire: the name says nothing and is always as long.
fn server_name(cluster: ClusterId, name: EndpointName) -> String {
    let mut seed = [0; 8];
    seed[..2].copy_from_slice(&cluster.0.to_be_bytes());
    seed[2..6].copy_from_slice(&name.handle.to_be_bytes());
    seed[6..].copy_from_slice(&name.incarnation.to_be_bytes());
    format!("t{:016x}.invalid", xxhash_rust::xxh3::xxh3_64(&seed))
}
