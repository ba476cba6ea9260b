//! The other side: a replica that follows its cluster's member.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use isthmus_federation::member::Mirror;
use isthmus_federation::registry::Registry;
use isthmus_identity::tls::{client_config, server_name};
use isthmus_identity::{Expect, SharedIdentity, SharedTrust};
use isthmus_model::ClusterName;
use isthmus_model::vip::Addresses;
use isthmus_wire::discovery::discovery_client::DiscoveryClient;
use isthmus_wire::discovery::{CertificateResponse, EnrolRequest};
use isthmus_wire::replica::replication_client::ReplicationClient;
use isthmus_wire::replica::{FollowRequest, State};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::{ReplicaAddresses, ReplicaList, STATE_LEN_MAX, write_state};
use crate::hub::Hub;
use crate::keys::TunnelKeys;
use crate::object_store::ObjectStore;

/// Pause before the member is dialled again.
const RETRY: Duration = Duration::from_millis(500);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A silent connection is asked for a sign of life this often; silence for as long again ends it.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// The way to the member, from another replica. Cheap to clone.
#[derive(Clone)]
pub struct MemberClient {
    address: SocketAddr,
    tls: Arc<rustls::ClientConfig>,
}

impl MemberClient {
    /// Dials `address`, and believes only a gateway of `own` there.
    pub fn new(address: SocketAddr, own: &ClusterName, identity: &SharedIdentity, trust: &SharedTrust) -> Self {
        let tls = client_config(identity, trust, Expect::Gateway(Some(own.clone())), &[b"h2"]);
        Self { address, tls: Arc::new(tls) }
    }

    async fn channel(&self) -> Result<Channel, Status> {
        let (tls, address) = (self.tls.clone(), self.address);
        let connector = tower::service_fn(move |_: http::Uri| {
            let tls = tls.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let stream = TlsConnector::from(tls).connect(server_name(), tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(stream))
            }
        });
        let endpoint = Endpoint::from_static("http://gateway.isthmus.invalid")
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        let connecting = endpoint.connect_with_connector(connector);
        let unreachable = |error: String| Status::unavailable(format!("replica 0 at {address}: {error}"));
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(channel)) => Ok(channel),
            Ok(Err(error)) => Err(unreachable(innermost(&error))),
            Err(_) => Err(unreachable(format!("no answer within {CONNECT_TIMEOUT:?}"))),
        }
    }

    /// Passes an enrolment on: only the member can spend a token.
    ///
    /// # Errors
    /// The member's, or `UNAVAILABLE` if it cannot be reached.
    pub async fn enrol(&self, token: &str, csr: &[u8]) -> Result<CertificateResponse, Status> {
        let mut client = DiscoveryClient::new(self.channel().await?);
        let request = EnrolRequest { token: token.to_owned(), csr_der: csr.to_vec() };
        client.enrol(request).await.map(Response::into_inner)
    }
}

fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// What a replica fills with what it hears, and where it keeps that.
pub struct Followed {
    /// Registry and status.
    pub mirror: Mirror,
    /// Addresses.
    pub hub: Arc<Hub>,
    /// Objects.
    pub objects: Arc<ObjectStore>,
    /// Tunnel keys, and their file.
    pub keys: (watch::Sender<TunnelKeys>, PathBuf),
    /// All replicas.
    pub list: watch::Sender<ReplicaList>,
    /// Where the registry lies, and the virtual addresses.
    pub registry_path: PathBuf,
    /// See `registry_path`.
    pub addresses_path: PathBuf,
}

/// Follows the member until `stop`. What was heard stays when it is gone.
pub async fn follow(followed: Followed, client: MemberClient, own: ReplicaAddresses, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            status = followed.once(&client, &own) => {
                tracing::warn!(member = %client.address, %status, "the member is not followed; serving its last word");
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

impl Followed {
    async fn once(&self, client: &MemberClient, own: &ReplicaAddresses) -> Status {
        match self.listen(client, own).await {
            Ok(()) => Status::unavailable("it ended the stream"),
            Err(status) => status,
        }
    }

    async fn listen(&self, client: &MemberClient, own: &ReplicaAddresses) -> Result<(), Status> {
        let mut replication = ReplicationClient::new(client.channel().await?).max_decoding_message_size(STATE_LEN_MAX);
        let request = FollowRequest {
            number: own.number.into(),
            udp_address: own.udp.to_string(),
            session_address: own.sessions.to_string(),
            advertise: own.advertise.clone(),
        };
        let mut states = replication.follow(request).await?.into_inner();
        tracing::info!(member = %client.address, "following the member");
        while let Some(state) = states.message().await? {
            self.take(&state);
        }
        Ok(())
    }

    /// Takes what changed. A part that cannot be read is left out, and said.
    fn take(&self, state: &State) {
        // Trust and registry first: what follows may need them.
        self.part("registry", &state.registry, |registry: Registry| {
            self.keep(&self.registry_path, &registry);
            self.mirror.set_registry(Arc::new(registry));
        });
        self.part("status", &state.status, |status| self.mirror.set_status(status));
        if !state.tunnel_keys.is_empty() {
            match TunnelKeys::from_json(&state.tunnel_keys) {
                Ok(keys) => {
                    if let Err(error) = keys.store(&self.keys.1) {
                        tracing::error!(%error, "tunnel keys are not kept");
                    }
                    self.keys.0.send_replace(keys);
                }
                Err(what) => tracing::error!(%what, "tunnel keys of the member are not usable"),
            }
        }
        if !state.objects.is_empty()
            && let Err(error) = self.objects.adopt(&state.objects)
        {
            tracing::error!(%error, "the member's objects are not usable; the last ones stay");
        }
        self.part("addresses", &state.addresses, |addresses: Addresses| {
            self.keep(&self.addresses_path, &addresses);
            self.hub.set_addresses(addresses);
        });
        self.part("replicas", &state.replicas, |list: ReplicaList| {
            isthmus_runtime::watched::replace(&self.list, list);
        });
    }

    fn part<T: DeserializeOwned>(&self, what: &str, json: &[u8], take: impl FnOnce(T)) {
        if json.is_empty() {
            return;
        }
        match serde_json::from_slice(json) {
            Ok(value) => take(value),
            // A newer member, most likely.
            Err(error) => tracing::error!(%error, part = what, "not understood; upgrade this replica"),
        }
    }

    fn keep(&self, path: &Path, value: &impl Serialize) {
        if let Err(error) = write_state(path, value) {
            tracing::error!(%error, "not kept: this replica could not start without its member");
        }
    }
}
