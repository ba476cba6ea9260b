//! How identity and trust reach rustls: hot-swappable, TLS 1.3 only, no resumption, no 0-RTT.
//!
//! Resumption would skip the client's verification, so it is off everywhere; a renewed certificate or
//! a changed trust is used by the next handshake without new configs.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use isthmus_model::{ClusterName, ServiceAccount};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::authority::{Identity, fingerprint};
use crate::verify::{PeerIdentity, Trust, VerifyError};

/// What is trusted now, shared by all that verify.
pub type SharedTrust = Arc<ArcSwap<Trust>>;

/// The certificate in use now, shared by all handshakes.
#[derive(Clone)]
pub struct SharedIdentity(Arc<ArcSwap<Current>>);

struct Current {
    certified: Arc<CertifiedKey>,
    not_before: u64,
    not_after: u64,
}

impl std::fmt::Debug for SharedIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedIdentity(until {})", self.not_after())
    }
}

impl SharedIdentity {
    /// Shares `identity`.
    ///
    /// # Errors
    /// If rustls cannot use the key.
    pub fn new(identity: &Identity) -> Result<Self, rustls::Error> {
        Ok(Self(Arc::new(ArcSwap::from_pointee(current(identity)?))))
    }

    /// Uses `identity` from the next handshake on.
    ///
    /// # Errors
    /// If rustls cannot use the key; the old one stays.
    pub fn replace(&self, identity: &Identity) -> Result<(), rustls::Error> {
        self.0.store(Arc::new(current(identity)?));
        Ok(())
    }

    /// Start of the current certificate, Unix seconds.
    pub fn not_before(&self) -> u64 {
        self.0.load().not_before
    }

    /// End of the current certificate, Unix seconds.
    pub fn not_after(&self) -> u64 {
        self.0.load().not_after
    }

    /// What a handshake shows: the chain, and behind it the roots that are not in it yet.
    fn certified(&self, roots: &[CertificateDer<'static>]) -> Arc<CertifiedKey> {
        let certified = &self.0.load().certified;
        let mut missing = roots.iter().filter(|root| !certified.cert.contains(root)).peekable();
        if missing.peek().is_none() {
            return certified.clone();
        }
        let chain = certified.cert.iter().chain(missing).cloned().collect();
        Arc::new(CertifiedKey::new(chain, certified.key.clone()))
    }
}

fn current(identity: &Identity) -> Result<Current, rustls::Error> {
    let key = provider().key_provider.load_private_key(identity.key.to_der())?;
    let certified = Arc::new(CertifiedKey::new(identity.chain.clone(), key));
    Ok(Current { certified, not_before: identity.not_before, not_after: identity.not_after })
}

/// Whom a handshake accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Expect {
    /// Anyone of a member cluster, workload or gateway; who may do what is decided per request.
    Member,
    /// A workload, of one cluster if named; no gateway.
    Workload(Option<ClusterName>),
    /// A workload of `cluster` that runs as one of `accounts`: what an export lists.
    Accounts {
        /// The cluster.
        cluster: ClusterName,
        /// The accounts.
        accounts: Vec<ServiceAccount>,
    },
    /// A gateway; of one cluster if named.
    Gateway(Option<ClusterName>),
    /// An operator.
    Operator,
}

impl Expect {
    /// Whether `peer` is whom this expects.
    ///
    /// # Errors
    /// [`VerifyError::Unexpected`].
    pub fn check(&self, peer: &PeerIdentity) -> Result<(), VerifyError> {
        let ok = match self {
            Self::Member => peer.cluster.is_some(),
            Self::Workload(cluster) => {
                peer.cluster.is_some() && !peer.is_gateway() && (cluster.is_none() || *cluster == peer.cluster)
            }
            Self::Accounts { cluster, accounts } => {
                peer.cluster.as_ref() == Some(cluster) && accounts.contains(&peer.spiffe.account)
            }
            Self::Gateway(cluster) => peer.is_gateway() && (cluster.is_none() || *cluster == peer.cluster),
            Self::Operator => peer.is_operator(),
        };
        let cluster = peer.cluster.as_ref().map_or("no cluster", ClusterName::as_str);
        ok.then_some(()).ok_or_else(|| VerifyError::Unexpected {
            found: format!("{} of {cluster}", peer.spiffe),
            expected: self.to_string(),
        })
    }
}

impl std::fmt::Display for Expect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let of =
            |cluster: &Option<ClusterName>| cluster.as_ref().map_or("any cluster".into(), |c| format!("cluster {c}"));
        match self {
            Self::Member => f.write_str("a workload or gateway of any cluster"),
            Self::Workload(cluster) => write!(f, "a workload of {}", of(cluster)),
            Self::Accounts { cluster, accounts } => {
                let names: Vec<String> = accounts.iter().map(ToString::to_string).collect();
                write!(f, "one of [{}] of cluster {cluster}", names.join(", "))
            }
            Self::Gateway(cluster) => write!(f, "a gateway of {}", of(cluster)),
            Self::Operator => f.write_str("an operator"),
        }
    }
}

/// The crypto of all connections: aws-lc-rs, TLS 1.3 suites, X25519MLKEM768 preferred.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
    Arc::new(CryptoProvider {
        // AES-128 first: 8.2 GB/s a core where AES-256 gives 6.8 (packets of 1440 bytes).
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..default_provider()
    })
});

/// A client that shows `identity` and accepts `expect`.
pub fn client_config(identity: &SharedIdentity, trust: &SharedTrust, expect: Expect, alpn: &[&[u8]]) -> ClientConfig {
    let verifier = Arc::new(Verifier { trust: trust.clone(), expect });
    let mut config = client_builder()
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(Shown { identity: identity.clone(), roots: None }));
    finish_client(&mut config, alpn);
    config
}

/// A client that shows nothing and accepts exactly a gateway whose chain ends in the root of `root_fingerprint`.
///
/// For joins and first certificates: the peer's cluster is not known yet, its root is.
pub fn pinned_client_config(root_fingerprint: &str, alpn: &[&[u8]]) -> ClientConfig {
    let verifier = Arc::new(Pinned { fingerprint: root_fingerprint.to_owned() });
    let mut config = client_builder().dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
    finish_client(&mut config, alpn);
    config
}

/// A server that shows `identity` and accepts `expect`; `None` accepts clients without a certificate too
/// (whoever shows one is still verified as [`Expect::Member`]), and shows the roots behind its chain to those who
/// know a fingerprint only.
pub fn server_config(
    identity: &SharedIdentity,
    trust: &SharedTrust,
    expect: Option<Expect>,
    alpn: &[&[u8]],
) -> ServerConfig {
    let mandatory = expect.is_some();
    let shown = Shown { identity: identity.clone(), roots: (!mandatory).then(|| trust.clone()) };
    let verifier = Verifier { trust: trust.clone(), expect: expect.unwrap_or(Expect::Member) };
    let verifier = Arc::new(ClientSide { verifier, mandatory });
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("aws-lc-rs speaks TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(shown));
    finish_server(&mut config, alpn);
    config
}

fn client_builder() -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("aws-lc-rs speaks TLS 1.3")
}

fn finish_client(config: &mut ClientConfig, alpn: &[&[u8]]) {
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
}

fn finish_server(config: &mut ServerConfig, alpn: &[&[u8]]) {
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
}

/// The name that a TLS client sends where it must send one: the same for all, so that it tells nothing. Peers are
/// judged by SPIFFE identity alone.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from("isthmus.invalid").expect("a known DNS name")
}

/// Identity and trust together: what whoever makes connections carries. Clones see the same.
#[derive(Debug, Clone)]
pub struct Tls {
    /// What this process shows.
    pub identity: SharedIdentity,
    /// What it believes.
    pub trust: SharedTrust,
}

impl Tls {
    /// [`client_config`] over both.
    pub fn client_config(&self, alpn: &[&[u8]], expect: Expect) -> ClientConfig {
        client_config(&self.identity, &self.trust, expect, alpn)
    }

    /// [`server_config`] over both; clients without a certificate are refused.
    pub fn server_config(&self, alpn: &[&[u8]], expect: Expect) -> ServerConfig {
        server_config(&self.identity, &self.trust, Some(expect), alpn)
    }

    /// [`peer_identity`] under the current trust.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub fn peer_identity(&self, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, VerifyError> {
        peer_identity(&self.trust, chain)
    }
}

/// Verifies a finished handshake's chain once more, for its identity.
///
/// # Errors
/// [`VerifyError`].
pub fn peer_identity(trust: &SharedTrust, chain: &[CertificateDer<'_>]) -> Result<PeerIdentity, VerifyError> {
    trust.load().verify(chain, unix_now())
}

fn unix_now() -> u64 {
    UnixTime::now().as_secs()
}

#[derive(Debug)]
struct Shown {
    identity: SharedIdentity,
    roots: Option<SharedTrust>,
}

impl Shown {
    fn current(&self) -> Arc<CertifiedKey> {
        match &self.roots {
            Some(trust) => self.identity.certified(&trust.load().roots),
            None => self.identity.certified(&[]),
        }
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

struct Verifier {
    trust: SharedTrust,
    expect: Expect,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Verifier({:?})", self.expect)
    }
}

impl Verifier {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<CertificateDer<'_>> =
            std::iter::once(leaf).chain(intermediates).map(|one| CertificateDer::from(one.as_ref())).collect();
        let verified = self.trust.load().verify(&chain, now.as_secs()).and_then(|peer| self.expect.check(&peer));
        verified.map_err(|error| {
            tracing::debug!(%error, "certificate refused");
            refused(error)
        })
    }
}

fn refused(error: VerifyError) -> rustls::Error {
    rustls::Error::InvalidCertificate(rustls::CertificateError::Other(rustls::OtherError(Arc::new(error))))
}

/// Why this side's verifier refused the peer, if that is what ended the handshake.
pub fn refusal(error: &rustls::Error) -> Option<&VerifyError> {
    match error {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => other.0.downcast_ref(),
        _ => None,
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    PROVIDER.signature_verification_algorithms
}

macro_rules! handshake_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.2 is not spoken here".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, signature, &algorithms())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            algorithms().supported_schemes()
        }
    };
}

impl ServerCertVerifier for Verifier {
    /// The name is not looked at: peers are judged by their SPIFFE identity alone.
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now).map(|()| ServerCertVerified::assertion())
    }

    handshake_signatures!();
}

#[derive(Debug)]
struct ClientSide {
    verifier: Verifier,
    mandatory: bool,
}

impl ClientCertVerifier for ClientSide {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verifier.verify(leaf, intermediates, now).map(|()| ClientCertVerified::assertion())
    }

    handshake_signatures!();
}

/// Accepts a gateway of whatever cluster whose path ends in one known root.
#[derive(Debug)]
struct Pinned {
    fingerprint: String,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let untrusted = || {
            refused(VerifyError::Unexpected {
                found: "another root".into(),
                expected: format!("the root {} of the token", self.fingerprint),
            })
        };
        // The root itself is sent along, so that it can be compared and then trusted for this one path.
        let root = intermediates.iter().find(|one| fingerprint(one) == self.fingerprint).ok_or_else(untrusted)?;
        let chain: Vec<CertificateDer<'_>> =
            std::iter::once(leaf).chain(intermediates).map(|one| CertificateDer::from(one.as_ref())).collect();
        crate::verify::verify_pinned_gateway(&chain, root, now.as_secs()).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    handshake_signatures!();
}

/// How long before its end a tunnel's shorter certificate lets it take no new streams: at 80 % of its life.
pub fn takes_streams_until(not_before: u64, not_after: u64) -> Duration {
    Duration::from_secs(not_before + (not_after.saturating_sub(not_before)) * 4 / 5)
}
