//! The workload's certificate: enrolled once with a token, kept in the state directory, renewed at half life.
//!
//! The key never leaves the host. Key and chain are one file, replaced as a whole with mode 0600, so that a
//! crash leaves the old pair or the new one. Renewal changes what later handshakes show; no stream is dropped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use isthmus_identity::rotation::Renewal;
use isthmus_identity::state::{StateError, create_dir, from_pem, read_private, to_pem, write_private};
use isthmus_identity::tls::pinned_client_config;
use isthmus_identity::{
    Expect, Identity, IssueError, IssuerRecord, KeyPair, SharedIdentity, SharedTrust, Tls, TokenError, Trust,
    VerifyError, WorkloadToken, answers, fingerprint,
};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, ServiceAccount, SpiffeId, TrustDomain};
use isthmus_wire::discovery as wire;
use isthmus_wire::discovery::discovery_client::DiscoveryClient;
use prost::Message;
use rustls::pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::Config;
use crate::discovery::client::{channel, resolve};
use crate::metrics::Metrics;

/// Key, chain and roots.
const IDENTITY_FILE: &str = "identity.json";
/// The last word on whom to trust, as the gateway sent it.
const TRUST_FILE: &str = "trust.bin";
/// Pause before all gateways are asked again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Limit of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A clock that was set is noticed this soon.
const SLEEP_MAX: Duration = Duration::from_secs(60);

/// Why a workload has no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolError {
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its content.
    #[error("{path} is damaged ({reason}); move it away and enrol with a new token")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// First start without a token.
    #[error(
        "no certificate in {state} and no `token_file` in the config; make a token with `isthmus token create --workload {account}`"
    )]
    NoToken {
        /// The state directory.
        state: PathBuf,
        /// Whom it is for.
        account: ServiceAccount,
    },
    /// The token could not be read.
    #[error("cannot read the token file {path}")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The token is none.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The token is another workload's.
    #[error(
        "the token is for {token}, the config says {config}; make one with `isthmus token create --workload {config}`"
    )]
    OtherAccount {
        /// The token's account.
        token: ServiceAccount,
        /// The config's.
        config: ServiceAccount,
    },
    /// A gateway refused, for good.
    #[error("the gateway refused to enrol this workload: {0}")]
    Refused(String),
    /// The key or request could not be made.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// The answer is not what was asked for.
    #[error("the gateway's certificate is not usable: {0}")]
    Answer(String),
    /// The certificate is not believed.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Told to stop while waiting for a gateway.
    #[error("stopped before a gateway answered")]
    Stopped,
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    cluster: ClusterName,
    trust_domain: TrustDomain,
    key: String,
    chain: String,
    roots: String,
}

/// Who this workload is, and what it believes.
pub struct Enrolled {
    /// For all handshakes.
    pub tls: Tls,
    /// The workload.
    pub spiffe: SpiffeId,
    /// Its cluster.
    pub cluster: ClusterName,
    state: PathBuf,
    chain: parking_lot::Mutex<Vec<CertificateDer<'static>>>,
}

/// Loads the workload's identity, or enrols; waits for a gateway as long as it takes.
///
/// # Errors
/// [`EnrolError`]: what waiting would not mend, or [`EnrolError::Stopped`].
pub async fn enrol(config: &Config, shutdown: &CancellationToken) -> Result<Enrolled, EnrolError> {
    create_dir(&config.state)?;
    let path = config.state.join(IDENTITY_FILE);
    let stored = match read_private(&path)? {
        Some(bytes) => {
            let damaged =
                |error: serde_json::Error| EnrolError::Damaged { path: path.clone(), reason: error.to_string() };
            let stored: Stored = serde_json::from_slice(&bytes).map_err(damaged)?;
            Some(stored).filter(|stored| is_usable(stored, config))
        }
        None => None,
    };
    let stored = match stored {
        Some(stored) => stored,
        None => {
            let stored = first(config, shutdown).await?;
            write_private(&path, &serde_json::to_vec(&stored).map_err(|error| EnrolError::Answer(error.to_string()))?)?;
            stored
        }
    };
    Enrolled::from(stored, config, &path)
}

/// Whether a stored certificate is of this workload and has not ended: else the token is asked for.
fn is_usable(stored: &Stored, config: &Config) -> bool {
    let path = Path::new(IDENTITY_FILE);
    let identity = KeyPair::from_pem(&stored.key)
        .ok()
        .and_then(|key| Some((key, from_pem(stored.chain.as_bytes(), path).ok()?)))
        .and_then(|(key, chain)| Identity::new(chain, key).ok());
    let usable = identity.is_some_and(|identity| identity.not_after > unix_now());
    if !usable {
        tracing::warn!(state = %config.state.display(), "the stored certificate has ended or is not usable; enrolling anew");
    }
    usable
}

impl Enrolled {
    fn from(stored: Stored, config: &Config, path: &Path) -> Result<Self, EnrolError> {
        let roots = from_pem(stored.roots.as_bytes(), path)?;
        if !roots.iter().any(|root| fingerprint(root) == config.root_fingerprint) {
            tracing::info!("the mesh's root was replaced since the config was written");
        }
        let chain = from_pem(stored.chain.as_bytes(), path)?;
        let identity = Identity::new(chain.clone(), KeyPair::from_pem(&stored.key)?)?;
        let trust = stored_trust(&config.state, &stored).unwrap_or_else(|| first_trust(&stored, roots));
        let peer = trust.verify(&chain, unix_now())?;
        if peer.spiffe.account != config.workload.account {
            return Err(EnrolError::OtherAccount {
                token: peer.spiffe.account,
                config: config.workload.account.clone(),
            });
        }
        let shared = SharedIdentity::new(&identity).map_err(|error| EnrolError::Answer(error.to_string()))?;
        let trust: SharedTrust = Arc::new(arc_swap::ArcSwap::from_pointee(trust));
        Ok(Self {
            tls: Tls { identity: shared, trust },
            spiffe: peer.spiffe,
            cluster: stored.cluster,
            state: config.state.clone(),
            chain: parking_lot::Mutex::new(chain),
        })
    }

    /// The current chain, leaf first.
    pub fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.chain.lock().clone()
    }

    /// Believes what a gateway told from now on, and after a restart.
    ///
    /// # Errors
    /// [`EnrolError::Answer`] if it cannot be read; what was believed stays.
    pub fn trust(&self, told: &wire::Trust) -> Result<(), EnrolError> {
        let domain = self.spiffe.trust_domain.clone();
        let trust = read_trust(domain, told).map_err(|reason| EnrolError::Answer(reason.to_owned()))?;
        if !trust.issuers.contains_key(&self.cluster) {
            // Evicted, or a gateway's mistake: either way nobody of the own cluster could tell us better any more.
            tracing::warn!(cluster = %self.cluster, "the own cluster is no member of the mesh any more");
        }
        self.tls.trust.store(Arc::new(trust));
        write_private(&self.state.join(TRUST_FILE), &told.encode_to_vec())?;
        Ok(())
    }

    /// Renews the certificate until `shutdown`.
    pub async fn renew(&self, gateways: &[String], metrics: &Metrics, shutdown: CancellationToken) {
        loop {
            let (not_before, not_after) = (self.tls.identity.not_before(), self.tls.identity.not_after());
            metrics.certificate(SystemTime::UNIX_EPOCH + Duration::from_secs(not_after));
            let mut renewal = Renewal::new(not_before, not_after, rand::random());
            loop {
                let wait = renewal.wait(unix_now());
                if wait.is_zero() {
                    match self.renew_once(gateways).await {
                        Ok(()) => break,
                        Err(reason) => {
                            tracing::warn!(reason, ends_unix_s = not_after, "certificate not renewed; trying again");
                            renewal.failed(unix_now());
                            continue;
                        }
                    }
                }
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(wait.min(SLEEP_MAX)) => {}
                }
            }
            tracing::info!("certificate renewed");
        }
    }

    async fn renew_once(&self, gateways: &[String]) -> Result<(), String> {
        let key = KeyPair::generate().map_err(|error| error.to_string())?;
        let csr_der = key.request().map_err(|error| error.to_string())?;
        let mut last = "no gateway resolves".to_owned();
        for address in resolve(gateways).await {
            let expect = Expect::Gateway(Some(self.cluster.clone()));
            let call = async {
                let tls = Arc::new(self.tls.client_config(&[b"h2"], expect));
                let mut client = DiscoveryClient::new(channel(address, tls).await.map_err(|error| error.to_string())?);
                let request = wire::RenewRequest { csr_der: csr_der.clone() };
                client
                    .renew(request)
                    .await
                    .map(tonic::Response::into_inner)
                    .map_err(|status| status.message().to_owned())
            };
            match tokio::time::timeout(CALL_TIMEOUT, call).await {
                Ok(Ok(answer)) => {
                    let stored =
                        stored(&key, &csr_der, &answer, &self.spiffe.account).map_err(|error| error.to_string())?;
                    return self.take(stored, key).map_err(|error| error.to_string());
                }
                Ok(Err(error)) => last = format!("{address}: {error}"),
                Err(_) => last = format!("{address}: no answer within {CALL_TIMEOUT:?}"),
            }
        }
        Err(last)
    }

    fn take(&self, stored: Stored, key: KeyPair) -> Result<(), EnrolError> {
        let path = self.state.join(IDENTITY_FILE);
        let chain = from_pem(stored.chain.as_bytes(), &path)?;
        let identity = Identity::new(chain.clone(), key)?;
        write_private(&path, &serde_json::to_vec(&stored).map_err(|error| EnrolError::Answer(error.to_string()))?)?;
        self.tls.identity.replace(&identity).map_err(|error| EnrolError::Answer(error.to_string()))?;
        *self.chain.lock() = chain;
        Ok(())
    }
}

/// The first certificate, against the token.
async fn first(config: &Config, shutdown: &CancellationToken) -> Result<Stored, EnrolError> {
    let account = &config.workload.account;
    let no_token = || EnrolError::NoToken { state: config.state.clone(), account: account.clone() };
    let path = config.token_file.as_ref().ok_or_else(no_token)?;
    let text = std::fs::read_to_string(path).map_err(|source| EnrolError::TokenFile { path: path.clone(), source })?;
    let text = text.trim();
    let token = WorkloadToken::decode(text)?;
    if token.account != *account {
        return Err(EnrolError::OtherAccount { token: token.account, config: account.clone() });
    }
    let key = KeyPair::generate()?;
    let csr_der = key.request()?;
    let tls = Arc::new(pinned_client_config(&config.root_fingerprint, &[b"h2"]));
    loop {
        for address in resolve(&config.gateways).await {
            let call = async {
                let mut client =
                    DiscoveryClient::new(channel(address, Arc::clone(&tls)).await.map_err(|error| chain_of(&error))?);
                let request = wire::EnrolRequest { token: text.to_owned(), csr_der: csr_der.clone() };
                match client.enrol(request).await {
                    Ok(answer) => Ok(Ok(answer.into_inner())),
                    Err(status) if is_final(&status) => Ok(Err(EnrolError::Refused(status.message().to_owned()))),
                    Err(status) => Err(status.message().to_owned()),
                }
            };
            match tokio::time::timeout(CALL_TIMEOUT, call).await {
                Ok(Ok(Ok(answer))) => return first_answer(config, &key, &csr_der, &answer),
                Ok(Ok(Err(refused))) => return Err(refused),
                Ok(Err(reason)) => tracing::warn!(gateway = %address, reason, "not enrolled yet"),
                Err(_) => tracing::warn!(gateway = %address, after = ?CALL_TIMEOUT, "no answer; not enrolled yet"),
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return Err(EnrolError::Stopped),
            () = tokio::time::sleep(RETRY_PAUSE) => {}
        }
    }
}

fn first_answer(
    config: &Config,
    key: &KeyPair,
    csr: &[u8],
    answer: &wire::CertificateResponse,
) -> Result<Stored, EnrolError> {
    // The handshake proved that the pinned root stands behind the gateway; its word on further roots counts.
    let pinned =
        answer.roots_der.iter().any(|root| fingerprint(&CertificateDer::from(root.clone())) == config.root_fingerprint);
    if !pinned {
        return Err(EnrolError::Answer("the pinned root is not among the roots it names".into()));
    }
    stored(key, csr, answer, &config.workload.account)
}

/// Checks an answer and makes of it what is stored.
fn stored(
    key: &KeyPair,
    csr: &[u8],
    answer: &wire::CertificateResponse,
    account: &ServiceAccount,
) -> Result<Stored, EnrolError> {
    let bad = |reason: &str| EnrolError::Answer(reason.to_owned());
    let chain: Vec<CertificateDer<'static>> =
        answer.chain_der.iter().map(|der| CertificateDer::from(der.clone())).collect();
    let roots: Vec<CertificateDer<'static>> =
        answer.roots_der.iter().map(|der| CertificateDer::from(der.clone())).collect();
    let leaf = chain.first().ok_or_else(|| bad("it is empty"))?;
    if !answers(csr, leaf) {
        return Err(bad("it is for another key"));
    }
    let stored = Stored {
        cluster: answer.cluster.parse().map_err(|_| bad("its cluster is not named"))?,
        trust_domain: answer.trust_domain.parse().map_err(|_| bad("its trust domain is not named"))?,
        key: key.to_pem(),
        chain: to_pem(&chain),
        roots: to_pem(&roots),
    };
    let peer = first_trust(&stored, roots).verify(&chain, unix_now())?;
    if peer.spiffe.account != *account || peer.cluster.as_ref() != Some(&stored.cluster) {
        return Err(bad("it is for another workload or of another cluster"));
    }
    Ok(stored)
}

/// Before a gateway has told more: the own cluster, and nobody else.
fn first_trust(stored: &Stored, roots: Vec<CertificateDer<'static>>) -> Trust {
    let own = IssuerRecord { cluster_id: ClusterId(0), may_issue: Patterns::all() };
    Trust { trust_domain: stored.trust_domain.clone(), roots, issuers: BTreeMap::from([(stored.cluster.clone(), own)]) }
}

fn stored_trust(state: &Path, stored: &Stored) -> Option<Trust> {
    let bytes = read_private(&state.join(TRUST_FILE)).ok()??;
    let told = wire::Trust::decode(&bytes[..]).ok()?;
    read_trust(stored.trust_domain.clone(), &told).ok().filter(|trust| trust.issuers.contains_key(&stored.cluster))
}

fn read_trust(trust_domain: TrustDomain, told: &wire::Trust) -> Result<Trust, &'static str> {
    if told.roots_der.is_empty() {
        return Err("trust without a root");
    }
    let mut issuers = BTreeMap::new();
    for issuer in &told.issuers {
        let cluster: ClusterName = issuer.cluster.parse().map_err(|_| "an issuer's cluster is no name")?;
        let cluster_id = ClusterId(issuer.cluster_id.try_into().map_err(|_| "an issuer's number is out of range")?);
        issuers.insert(cluster, IssuerRecord { cluster_id, may_issue: Patterns(issuer.may_issue.clone()) });
    }
    for evicted in &told.evicted {
        issuers.retain(|cluster, _| cluster.as_str() != evicted);
    }
    let roots = told.roots_der.iter().map(|der| CertificateDer::from(der.clone())).collect();
    Ok(Trust { trust_domain, roots, issuers })
}

/// Whether asking again, or another gateway, would not help.
fn is_final(status: &tonic::Status) -> bool {
    let reason = status.metadata().get("isthmus-reason").and_then(|reason| reason.to_str().ok()).unwrap_or_default();
    match reason {
        "not_member" => false,
        "" => matches!(status.code(), Code::InvalidArgument | Code::PermissionDenied),
        reason => reason.starts_with("token_") || reason == "bad_csr",
    }
}

fn chain_of(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
