//! Who issues what: a root for the mesh, an intermediate for each cluster, leaves for workloads.
//!
//! The cluster's name is in the intermediate, in a non-critical extension of our own: webpki refuses
//! unknown critical extensions and URI name constraints, and X509-SVID §4 forbids a path in a signing
//! certificate's SAN. It is read only from a verified path, never from a leaf.

use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, UnparsedPublicKey};
use isthmus_model::{ClusterName, ServiceAccount, SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// The extension of an intermediate that carries its cluster's name, as a UTF8String.
pub const CLUSTER_OID: [u64; 4] = [2, 25, 6_029_385_716_451_023_977, 1];
/// Life of an intermediate; renewed from day 30 on.
pub const INTERMEDIATE_LIFE: Duration = Duration::from_secs(90 * 86_400);
/// Longest life of a workload's certificate; renewed at half of it.
pub const WORKLOAD_LIFE_MAX: Duration = Duration::from_secs(86_400);
/// Life of a root.
pub const ROOT_LIFE: Duration = Duration::from_secs(3_650 * 86_400);
/// Certificates start this long before they are issued, for verifiers whose clock is behind.
pub const BACKDATE: Duration = Duration::from_secs(60);

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The request is not one, or its signature is wrong.
    #[error("the certificate request is malformed or not signed by its own key")]
    BadRequest(#[source] rcgen::Error),
    /// The gateway's account is not given to workloads.
    #[error("{0} is the gateways' own account; no workload is issued it")]
    Reserved(ServiceAccount),
    /// The key or certificate at hand does not work.
    #[error("the issuer's key or certificate cannot be used")]
    Issuer(#[source] rcgen::Error),
}

/// An ECDSA P-256 key. Its `Debug` form shows nothing of it.
pub struct KeyPair(rcgen::KeyPair);

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyPair(..)")
    }
}

impl KeyPair {
    /// A new key.
    ///
    /// # Errors
    /// If the system gives no randomness.
    pub fn generate() -> Result<Self, IssueError> {
        rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map(Self).map_err(IssueError::Issuer)
    }

    /// Reads a PKCS#8 key in PEM form.
    ///
    /// # Errors
    /// If it is no P-256 key.
    pub fn from_pem(pem: &str) -> Result<Self, IssueError> {
        rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map(Self)
            .map_err(IssueError::Issuer)
    }

    /// The key in PEM form: for a file of mode 0600, nowhere else.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// The key as rustls takes it.
    pub fn to_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()))
    }

    /// A request for a certificate over this key; who it is for is up to the issuer.
    ///
    /// # Errors
    /// [`IssueError::Issuer`] if signing fails.
    pub fn request(&self) -> Result<Vec<u8>, IssueError> {
        let params = CertificateParams::default();
        params.serialize_request(&self.0).map(|csr| csr.der().to_vec()).map_err(IssueError::Issuer)
    }

    /// Signs `message` with ECDSA P-256 over SHA-256; the signature in ASN.1 form.
    ///
    /// # Errors
    /// [`IssueError::Issuer`] if the system gives no randomness.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IssueError> {
        let unusable = || IssueError::Issuer(rcgen::Error::RemoteKeyError);
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, self.0.serialized_der())
            .map_err(|_| unusable())?;
        key.sign(&SystemRandom::new(), message).map(|signature| signature.as_ref().to_vec()).map_err(|_| unusable())
    }
}

/// Whether `signature` over `message` is by the key of `certificate`.
pub fn verify_signature(certificate: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let key = parsed.public_key().subject_public_key.data.as_ref();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key).verify(message, signature).is_ok()
}

/// SHA-256 over a certificate, as `sha256:<hex>`.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    format!("sha256:{}", hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate)))
}

/// A certificate chain (leaf first, without the root) and its key.
#[derive(Debug)]
pub struct Identity {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: KeyPair,
    /// Start of validity, Unix seconds.
    pub not_before: u64,
    /// End of validity, Unix seconds.
    pub not_after: u64,
}

impl Identity {
    /// Puts chain and key together; the validity is read from the leaf.
    ///
    /// # Errors
    /// If the chain is empty or its leaf no certificate.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: KeyPair) -> Result<Self, IssueError> {
        let missing = || IssueError::Issuer(rcgen::Error::CouldNotParseCertificate);
        let (_, leaf) =
            x509_parser::parse_x509_certificate(chain.first().ok_or_else(missing)?).map_err(|_| missing())?;
        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let (not_before, not_after) = (seconds(leaf.validity().not_before), seconds(leaf.validity().not_after));
        Ok(Self { chain, key, not_before, not_after })
    }
}

/// The mesh's root.
#[derive(Debug)]
pub struct RootAuthority {
    certificate: CertificateDer<'static>,
    key: KeyPair,
}

impl RootAuthority {
    /// Founds a mesh: a new root key and its certificate.
    ///
    /// # Errors
    /// [`IssueError::Issuer`].
    pub fn create(mesh: &str, trust_domain: &TrustDomain, now: u64) -> Result<Self, IssueError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&format!("isthmus root {mesh}"));
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        validity(&mut params, now, ROOT_LIFE);
        let certificate = params.self_signed(&key.0).map_err(IssueError::Issuer)?.der().clone();
        Ok(Self { certificate, key })
    }

    /// A root from its files.
    pub fn load(certificate: CertificateDer<'static>, key: KeyPair) -> Self {
        Self { certificate, key }
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Its key in PEM form.
    pub fn key_pem(&self) -> String {
        self.key.to_pem()
    }

    /// The intermediate of `cluster` for the key of a request: path length 0, the name in its extension.
    ///
    /// # Errors
    /// [`IssueError::BadRequest`], [`IssueError::Issuer`].
    pub fn issue_intermediate(
        &self,
        csr: &[u8],
        cluster: &ClusterName,
        trust_domain: &TrustDomain,
        now: u64,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let mut request = parse_request(csr)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = name(&format!("isthmus cluster {cluster}"));
        params.subject_alt_names = vec![uri(&format!("spiffe://{trust_domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let mut text = vec![0x0c, u8::try_from(cluster.as_str().len()).unwrap_or(63)];
        text.extend_from_slice(cluster.as_str().as_bytes());
        params.custom_extensions = vec![CustomExtension::from_oid_content(&CLUSTER_OID, text)];
        validity(&mut params, now, INTERMEDIATE_LIFE);
        request.params = params;
        request.signed_by(&self.issuer()?).map(|one| one.der().clone()).map_err(IssueError::Issuer)
    }

    /// An operator's certificate: `spiffe://<td>/ns/isthmus-operators/sa/<name>`.
    ///
    /// # Errors
    /// [`IssueError::Issuer`].
    pub fn issue_operator(
        &self,
        csr: &[u8],
        operator: &SpiffeId,
        life: Duration,
        now: u64,
    ) -> Result<CertificateDer<'static>, IssueError> {
        let mut request = parse_request(csr)?;
        request.params = leaf(operator, now, life)?;
        request.signed_by(&self.issuer()?).map(|one| one.der().clone()).map_err(IssueError::Issuer)
    }

    fn issuer(&self) -> Result<Issuer<'static, &rcgen::KeyPair>, IssueError> {
        Issuer::from_ca_cert_der(&self.certificate, &self.key.0).map_err(IssueError::Issuer)
    }
}

/// A cluster's intermediate: issues to its own workloads, alone, with all other clusters down.
#[derive(Debug)]
pub struct ClusterAuthority {
    chain: Vec<CertificateDer<'static>>,
    key: KeyPair,
    trust_domain: TrustDomain,
}

impl ClusterAuthority {
    /// From its files: the intermediate first, without the root.
    pub fn load(chain: Vec<CertificateDer<'static>>, key: KeyPair, trust_domain: TrustDomain) -> Self {
        Self { chain, key, trust_domain }
    }

    /// The intermediate, without the root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The trust domain it issues for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Signs `message` with the intermediate's key: log entries, registrations.
    ///
    /// # Errors
    /// [`IssueError::Issuer`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IssueError> {
        self.key.sign(message)
    }

    /// A workload's certificate for the key of its request: leaf first, then the intermediate.
    ///
    /// # Errors
    /// [`IssueError::Reserved`] for the gateways' account, [`IssueError::BadRequest`], [`IssueError::Issuer`].
    pub fn issue_workload(
        &self,
        csr: &[u8],
        account: &ServiceAccount,
        life: Duration,
        now: u64,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        if *account == ServiceAccount::gateway() {
            return Err(IssueError::Reserved(account.clone()));
        }
        self.issue(csr, account, life.min(WORKLOAD_LIFE_MAX), now)
    }

    /// A gateway's own identity: a fresh key and its certificate.
    ///
    /// # Errors
    /// [`IssueError::Issuer`].
    pub fn issue_gateway(&self, now: u64) -> Result<Identity, IssueError> {
        let key = KeyPair::generate()?;
        let chain = self.issue(&key.request()?, &ServiceAccount::gateway(), WORKLOAD_LIFE_MAX, now)?;
        Identity::new(chain, key)
    }

    fn issue(
        &self,
        csr: &[u8],
        account: &ServiceAccount,
        life: Duration,
        now: u64,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let mut request = parse_request(csr)?;
        request.params = leaf(&account.in_domain(&self.trust_domain), now, life)?;
        let own = self.chain.first().ok_or(IssueError::Issuer(rcgen::Error::CouldNotParseCertificate))?;
        let issuer = Issuer::from_ca_cert_der(own, &self.key.0).map_err(IssueError::Issuer)?;
        let leaf = request.signed_by(&issuer).map_err(IssueError::Issuer)?.der().clone();
        Ok(std::iter::once(leaf).chain(self.chain.iter().cloned()).collect())
    }
}

fn parse_request(csr: &[u8]) -> Result<CertificateSigningRequestParams, IssueError> {
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr)).map_err(IssueError::BadRequest)
}

fn leaf(id: &SpiffeId, now: u64, life: Duration) -> Result<CertificateParams, IssueError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&id.to_string())?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    validity(&mut params, now, life);
    Ok(params)
}

fn uri(text: &str) -> Result<SanType, IssueError> {
    text.try_into().map(SanType::URI).map_err(IssueError::Issuer)
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

fn validity(params: &mut CertificateParams, now: u64, life: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(now.saturating_sub(BACKDATE.as_secs()));
    params.not_after = epoch + Duration::from_secs(now) + life;
    // 16 random bytes: serials tell certificates apart in logs, and never repeat.
    let mut serial: [u8; 16] = rand::random();
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
}
