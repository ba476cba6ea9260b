//! Who issues what: a root for the mesh, an intermediate for each cluster, leaves for workloads.
//!
//! The cluster's name is in the intermediate, in a non-critical extension of our own: webpki refuses
//! unknown critical extensions and URI name constraints, and X509-SVID §4 forbids a path in a signing
//! certificate's SAN. It is read only from a verified path, never from a leaf.

use std::time::Duration;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use isthmus_model::{ClusterName, ServiceAccount, SpiffeId, TrustDomain};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, PublicKeyData as _, SanType, SerialNumber, SigningKey as _,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use zeroize::Zeroize as _;

use crate::verify::{OPERATORS, utc};

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
/// Longest signing request that is read: ours have some 200 bytes, those of common tools below 2 KiB.
pub const CSR_LEN_MAX: usize = 4096;
/// Longest life of anything issued, so that no sum of times leaves the range of certificates.
const LIFE_MAX: Duration = ROOT_LIFE;

/// Why a certificate was not issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The request is not one, or its signature is wrong.
    #[error("the certificate request is malformed or not signed by its own key")]
    BadRequest(#[source] rcgen::Error),
    /// The request is for a key that is not used here, or too long.
    #[error("the certificate request is refused: {0}; make one with a fresh ECDSA P-256 key")]
    UnfitRequest(&'static str),
    /// The account is not given to workloads.
    #[error("{0} is reserved for gateways and operators; no workload is issued it: use another service account")]
    Reserved(ServiceAccount),
    /// The issuer's own certificate has ended.
    #[error("the issuer's own certificate ended at {not_after} and this clock says {now}: renew it first")]
    IssuerEnded {
        /// When it ended.
        not_after: String,
        /// This clock.
        now: String,
    },
    /// A message that could be a certificate.
    #[error("the cluster's key signs records only, and this message could be read as a certificate")]
    NotARecord,
    /// The key or certificate at hand does not work.
    #[error("the issuer's key or certificate cannot be used")]
    Issuer(#[source] rcgen::Error),
}

impl IssueError {
    /// A fixed word for statuses and metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::BadRequest(_) | Self::UnfitRequest(_) => "bad_csr",
            Self::Reserved(_) => "reserved",
            Self::IssuerEnded { .. } => "issuer_ended",
            Self::NotARecord => "not_a_record",
            Self::Issuer(_) => "issuer",
        }
    }
}

/// An ECDSA P-256 key. Its `Debug` form shows nothing of it.
pub struct KeyPair(rcgen::KeyPair);

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyPair(..)")
    }
}

impl Drop for KeyPair {
    fn drop(&mut self) {
        self.0.zeroize();
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
        self.0.sign(message).map_err(IssueError::Issuer)
    }
}

/// Whether `signature` over `message` is by the key of `certificate`.
pub fn verify_signature(certificate: &CertificateDer<'_>, message: &[u8], signature: &[u8]) -> bool {
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let key = parsed.public_key().subject_public_key.data.as_ref();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key).verify(message, signature).is_ok()
}

/// Whether `certificate` answers the request `csr`: the same key, and the request signed by it.
pub fn answers(csr: &[u8], certificate: &CertificateDer<'_>) -> bool {
    match (parse_request(csr), x509_parser::parse_x509_certificate(certificate)) {
        (Ok(asked), Ok((_, given))) => {
            asked.public_key.der_bytes() == given.public_key().subject_public_key.data.as_ref()
        }
        _ => false,
    }
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
    /// Start of the leaf's validity, Unix seconds.
    pub not_before: u64,
    /// End of the first certificate of the chain that ends, Unix seconds.
    pub not_after: u64,
}

impl Identity {
    /// Puts chain and key together; the validity is read from the certificates.
    ///
    /// # Errors
    /// If the chain is empty, one is no certificate, or the key is not the leaf's.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: KeyPair) -> Result<Self, IssueError> {
        let unusable = |error| IssueError::Issuer(error);
        let leaf = chain.first().ok_or(unusable(rcgen::Error::CouldNotParseCertificate))?;
        let (not_before, mut not_after) = validity_of(leaf)?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(leaf).map_err(|_| unusable(rcgen::Error::CouldNotParseCertificate))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.0.der_bytes() {
            return Err(unusable(rcgen::Error::CouldNotParseKeyPair));
        }
        for above in &chain[1..] {
            not_after = not_after.min(validity_of(above)?.1);
        }
        Ok(Self { chain, key, not_before, not_after })
    }
}

/// Start and end of a certificate's validity, Unix seconds.
fn validity_of(certificate: &CertificateDer<'_>) -> Result<(u64, u64), IssueError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|_| IssueError::Issuer(rcgen::Error::CouldNotParseCertificate))?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    Ok((seconds(parsed.validity().not_before), seconds(parsed.validity().not_after)))
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
        validity(&mut params, now, now.saturating_add(ROOT_LIFE.as_secs()));
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
        validity(&mut params, now, end_of_life(&self.certificate, INTERMEDIATE_LIFE, now)?);
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
        request.params = leaf(operator, now, end_of_life(&self.certificate, life, now)?)?;
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
    /// [`IssueError::NotARecord`], [`IssueError::Issuer`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, IssueError> {
        // The same key signs certificates. What is signed there is a DER SEQUENCE; whoever got one past here as
        // a record would have issued himself a certificate.
        match message.first() {
            Some(&DER_SEQUENCE) => Err(IssueError::NotARecord),
            _ => self.key.sign(message),
        }
    }

    /// A workload's certificate for the key of its request: leaf first, then the intermediate.
    ///
    /// # Errors
    /// [`IssueError::Reserved`] for gateways' and operators' accounts, [`IssueError::BadRequest`],
    /// [`IssueError::UnfitRequest`], [`IssueError::IssuerEnded`], [`IssueError::Issuer`].
    pub fn issue_workload(
        &self,
        csr: &[u8],
        account: &ServiceAccount,
        life: Duration,
        now: u64,
    ) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        if *account == ServiceAccount::gateway() || account.namespace.as_str() == OPERATORS {
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
        let own = self.chain.first().ok_or(IssueError::Issuer(rcgen::Error::CouldNotParseCertificate))?;
        request.params = leaf(&account.in_domain(&self.trust_domain), now, end_of_life(own, life, now)?)?;
        let issuer = Issuer::from_ca_cert_der(own, &self.key.0).map_err(IssueError::Issuer)?;
        let leaf = request.signed_by(&issuer).map_err(IssueError::Issuer)?.der().clone();
        Ok(std::iter::once(leaf).chain(self.chain.iter().cloned()).collect())
    }
}

/// Reads a request: its own signature holds and its key is ECDSA P-256. What it asks to be called is ignored.
fn parse_request(csr: &[u8]) -> Result<CertificateSigningRequestParams, IssueError> {
    if csr.len() > CSR_LEN_MAX {
        return Err(IssueError::UnfitRequest("it is longer than 4 KiB"));
    }
    let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr))
        .map_err(IssueError::BadRequest)?;
    match *request.public_key.algorithm() == rcgen::PKCS_ECDSA_P256_SHA256 {
        true => Ok(request),
        false => Err(IssueError::UnfitRequest("its key is not ECDSA P-256")),
    }
}

/// When something issued now for `life` ends: never after its issuer.
fn end_of_life(issuer: &CertificateDer<'_>, life: Duration, now: u64) -> Result<u64, IssueError> {
    let (_, not_after) = validity_of(issuer)?;
    match now < not_after {
        true => Ok(now.saturating_add(life.min(LIFE_MAX).as_secs()).min(not_after)),
        false => Err(IssueError::IssuerEnded { not_after: utc(not_after), now: utc(now) }),
    }
}

fn leaf(id: &SpiffeId, now: u64, not_after: u64) -> Result<CertificateParams, IssueError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(&id.to_string())?];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    validity(&mut params, now, not_after);
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

fn validity(params: &mut CertificateParams, now: u64, not_after: u64) {
    params.not_before = date(now.saturating_sub(BACKDATE.as_secs()));
    params.not_after = date(not_after);
    params.use_authority_key_identifier_extension = true;
    // 16 random bytes: serials tell certificates apart in logs, and never repeat. Positive, without a leading
    // zero (RFC 5280 §4.1.2.2).
    let mut serial: [u8; 16] = rand::random();
    serial[0] = serial[0] & 0x3f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
}

/// A certificate's time; the last one it can name (RFC 5280 §4.1.2.5) if `seconds` is beyond.
fn date(seconds: u64) -> time::OffsetDateTime {
    let last = rcgen::date_time_ymd(9999, 12, 31);
    let given = i64::try_from(seconds).ok().and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(seconds).ok());
    given.unwrap_or(last).min(last)
}

const DER_SEQUENCE: u8 = 0x30;
