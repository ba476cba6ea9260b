//! Who is believed: from a certificate chain to the workload and the cluster that vouches for it.
//!
//! The path is built by webpki against this trust domain's roots only. The cluster is read from the
//! verified intermediate; what a leaf says of its cluster is never looked at.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, ServiceAccount, SpiffeId, TrustDomain};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::prelude::{GeneralName, ParsedExtension, X509Certificate};

use crate::authority::{CLUSTER_OID, verify_signature};

/// Verifiers whose clock is off by this much still agree.
pub const CLOCK_LEEWAY: Duration = Duration::from_secs(60);

/// Certificates a peer may show: leaf, intermediate, and three roots while one is being replaced.
const CHAIN_LEN_MAX: usize = 5;

/// A cluster whose issued identities are believed, and for which namespaces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IssuerRecord {
    /// Its number.
    pub cluster_id: ClusterId,
    /// Namespaces it may issue for.
    pub may_issue: Patterns,
}

/// What is trusted: replaced whole on change.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The only trust domain whose identities are believed.
    pub trust_domain: TrustDomain,
    /// Its roots.
    pub roots: Vec<CertificateDer<'static>>,
    /// Members by name. A cluster that is not here (it left, was evicted, or is not known yet) is refused.
    pub issuers: BTreeMap<ClusterName, IssuerRecord>,
}

/// A verified peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// Its identity.
    pub spiffe: SpiffeId,
    /// The cluster that issued it; `None` for operators, whom a root certifies.
    pub cluster: Option<ClusterName>,
    /// When its certificate ends, Unix seconds.
    pub not_after: u64,
}

impl PeerIdentity {
    /// Whether this is a gateway of its cluster.
    pub fn is_gateway(&self) -> bool {
        self.cluster.is_some() && self.spiffe.account == ServiceAccount::gateway()
    }

    /// Whether this is an operator.
    pub fn is_operator(&self) -> bool {
        self.cluster.is_none() && self.spiffe.account.namespace.as_str() == OPERATORS
    }
}

/// The namespace of operators' identities.
pub const OPERATORS: &str = "isthmus-operators";

/// Why a chain is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// No certificate was shown.
    #[error("the peer showed no certificate; it is not part of the mesh, or has not enrolled yet")]
    Missing,
    /// More than any honest peer shows.
    #[error("the peer showed {0} certificates; a chain of this mesh has at most {CHAIN_LEN_MAX}")]
    TooMany(usize),
    /// Not within its validity.
    #[error(
        "certificate {what}: this clock says {}, the certificate holds from {} to {}; compare both machines' clocks (timedatectl), then renew it", utc(*now), utc(*not_before), utc(*not_after)
    )]
    Validity {
        /// `expired` or `not valid yet`.
        what: &'static str,
        /// This clock.
        now: u64,
        /// Start.
        not_before: u64,
        /// End.
        not_after: u64,
    },
    /// No path to a trusted root.
    #[error(
        "no path from the certificate to a root of trust domain {trust_domain}: {cause}; `isthmus get clusters` shows which roots are trusted"
    )]
    Untrusted {
        /// Ours.
        trust_domain: TrustDomain,
        /// webpki's word.
        cause: String,
    },
    /// The leaf is not an X509-SVID.
    #[error("the certificate is not an X509-SVID: {0}")]
    NotSvid(&'static str),
    /// An identity of another trust domain.
    #[error("identity {id} is not of trust domain {trust_domain}")]
    ForeignDomain {
        /// Theirs.
        id: SpiffeId,
        /// Ours.
        trust_domain: TrustDomain,
    },
    /// The issuing cluster is not a member.
    #[error(
        "cluster {cluster} is not a member of this mesh (it left, was evicted, or this process has not heard of it yet)"
    )]
    NotMember {
        /// The issuer.
        cluster: ClusterName,
    },
    /// The issuing cluster may not issue for that namespace.
    #[error("cluster {cluster} may not issue for namespace {}; grant it with `isthmus token create {cluster} --namespaces`", id.account.namespace)]
    NotGranted {
        /// The issuer.
        cluster: ClusterName,
        /// What it issued.
        id: SpiffeId,
    },
    /// Another peer than the one wanted.
    #[error("the peer is {found}, expected {expected}")]
    Unexpected {
        /// Who it is.
        found: String,
        /// Who was wanted.
        expected: String,
    },
}

impl VerifyError {
    /// A fixed word for metric labels.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing => "no_certificate",
            Self::TooMany(_) => "too_many_certificates",
            Self::Validity { .. } => "validity",
            Self::Untrusted { .. } => "untrusted",
            Self::NotSvid(_) => "not_svid",
            Self::ForeignDomain { .. } => "foreign_domain",
            Self::NotMember { .. } => "not_member",
            Self::NotGranted { .. } => "not_granted",
            Self::Unexpected { .. } => "unexpected_peer",
        }
    }
}

impl Trust {
    /// Verifies a chain (leaf first) at `now` (Unix seconds).
    ///
    /// # Errors
    /// [`VerifyError`]; never panics on what a peer sends.
    pub fn verify(&self, chain: &[CertificateDer<'_>], now: u64) -> Result<PeerIdentity, VerifyError> {
        let (leaf, intermediates) = chain.split_first().ok_or(VerifyError::Missing)?;
        if chain.len() > CHAIN_LEN_MAX {
            return Err(VerifyError::TooMany(chain.len()));
        }
        let (spiffe, not_after) = read_leaf(leaf, now)?;
        if spiffe.trust_domain != self.trust_domain {
            return Err(VerifyError::ForeignDomain { id: spiffe, trust_domain: self.trust_domain.clone() });
        }
        let cluster = self.path(leaf, intermediates, now)?;
        if let Some(cluster) = &cluster {
            let Some(issuer) = self.issuers.get(cluster) else {
                return Err(VerifyError::NotMember { cluster: cluster.clone() });
            };
            let namespace = spiffe.account.namespace.as_str();
            // Every cluster has gateways; operators are certified by roots alone.
            let granted = spiffe.account == ServiceAccount::gateway() || issuer.may_issue.cover(namespace);
            if !granted || namespace == OPERATORS {
                return Err(VerifyError::NotGranted { cluster: cluster.clone(), id: spiffe });
            }
        } else if spiffe.account.namespace.as_str() != OPERATORS {
            return Err(VerifyError::NotSvid("a root certifies clusters and operators, not workloads"));
        }
        Ok(PeerIdentity { spiffe, cluster, not_after })
    }

    /// The cluster that an intermediate was issued for: signed by a root of this trust domain, path length 0,
    /// valid at `now`. Whether the cluster is a member is not asked.
    ///
    /// # Errors
    /// [`VerifyError`]; never panics on what a peer sends.
    pub fn verify_intermediate(&self, intermediate: &CertificateDer<'_>, now: u64) -> Result<ClusterName, VerifyError> {
        let parsed = parse(intermediate)?;
        in_time(&parsed, now)?;
        let limited =
            matches!(parsed.basic_constraints(), Ok(Some(c)) if c.value.ca && c.value.path_len_constraint == Some(0));
        let signs = matches!(parsed.key_usage(), Ok(Some(usage)) if usage.value.key_cert_sign());
        if !(limited && signs) {
            return Err(VerifyError::NotSvid("it is not the intermediate of a cluster: CA, path length 0, may sign"));
        }
        let (message, signature) = (parsed.tbs_certificate.as_ref(), parsed.signature_value.data.as_ref());
        let signed_by = |root: &CertificateDer<'_>| {
            parse(root).is_ok_and(|root| root.subject().as_raw() == parsed.issuer().as_raw())
                && verify_signature(root, message, signature)
        };
        if !self.roots.iter().any(signed_by) {
            return Err(self.untrusted("none of the roots signed it".into()));
        }
        if uri_of(&parsed)? != format!("spiffe://{}", self.trust_domain) {
            return Err(self.untrusted("it names another trust domain".into()));
        }
        cluster_of(intermediate).ok_or(VerifyError::NotSvid("it names no cluster"))
    }

    fn untrusted(&self, cause: String) -> VerifyError {
        VerifyError::Untrusted { trust_domain: self.trust_domain.clone(), cause }
    }

    /// Builds the path; returns the cluster of its intermediate, `None` if a root signed the leaf itself.
    fn path(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: u64,
    ) -> Result<Option<ClusterName>, VerifyError> {
        let untrusted = |cause| self.untrusted(cause);
        let anchors: Vec<TrustAnchor<'_>> =
            self.roots.iter().filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
        let cert = EndEntityCert::try_from(leaf).map_err(|error| untrusted(error.to_string()))?;
        // Usage "client": leaves carry both usages, so either proves the same.
        let at = |seconds| {
            cert.verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &anchors,
                intermediates,
                UnixTime::since_unix_epoch(Duration::from_secs(seconds)),
                KeyUsage::client_auth(),
                None,
                None,
            )
        };
        let path = match at(now) {
            // A clock a little ahead or behind: once more with the leeway towards validity.
            Err(webpki::Error::CertExpired { .. }) => at(now.saturating_sub(CLOCK_LEEWAY.as_secs())),
            Err(webpki::Error::CertNotValidYet { .. }) => at(now.saturating_add(CLOCK_LEEWAY.as_secs())),
            other => other,
        };
        let path = match path {
            Ok(path) => path,
            // The leaf's own validity was judged before: it is one above that has ended or not begun.
            Err(webpki::Error::CertExpired { .. } | webpki::Error::CertNotValidYet { .. }) => {
                for above in intermediates {
                    in_time(&parse(above)?, now)?;
                }
                return Err(untrusted("a root has ended".into()));
            }
            Err(error) => return Err(untrusted(error.to_string())),
        };
        let mut issuers = path.intermediate_certificates();
        match (issuers.next(), issuers.next()) {
            (None, _) => Ok(None),
            (Some(issuer), None) => cluster_of(&issuer.der()).map(Some).ok_or(VerifyError::NotSvid(
                "its issuer carries no cluster name: it is not an intermediate of this mesh",
            )),
            (Some(_), Some(_)) => Err(VerifyError::NotSvid("more than one intermediate stands above it")),
        }
    }
}

/// The cluster an intermediate belongs to. Believe it only of a verified path.
pub fn cluster_of(intermediate: &CertificateDer<'_>) -> Option<ClusterName> {
    let parsed = parse(intermediate).ok()?;
    // An error if there are two: which of them counts must not depend on who reads.
    let found = parsed.get_extension_unique(&cluster_oid()).ok()??;
    match found.value {
        [0x0c, len @ ..0x80, text @ ..] if usize::from(*len) == text.len() => {
            std::str::from_utf8(text).ok()?.parse().ok()
        }
        _ => None,
    }
}

fn cluster_oid() -> x509_parser::der_parser::Oid<'static> {
    x509_parser::der_parser::Oid::from(&CLUSTER_OID).expect("a constant of four valid arcs")
}

/// The identity and end of a leaf, by the rules of X509-SVID §§2-5.
fn read_leaf(leaf: &CertificateDer<'_>, now: u64) -> Result<(SpiffeId, u64), VerifyError> {
    let parsed = parse(leaf)?;
    match parsed.basic_constraints() {
        Ok(Some(constraints)) if constraints.value.ca => {
            return Err(VerifyError::NotSvid("it is a signing certificate"));
        }
        Ok(_) => {}
        Err(_) => return Err(VerifyError::NotSvid("its basic constraints are broken")),
    }
    let not_after = in_time(&parsed, now)?;
    let id =
        uri_of(&parsed)?.parse().map_err(|_| VerifyError::NotSvid("its URI is not spiffe://<td>/ns/<ns>/sa/<sa>"))?;
    Ok((id, not_after))
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, VerifyError> {
    match x509_parser::parse_x509_certificate(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(VerifyError::NotSvid("bytes follow the certificate")),
        Err(_) => Err(VerifyError::NotSvid("it is not a certificate")),
    }
}

/// Judges a certificate's validity with the leeway; returns its end.
fn in_time(parsed: &X509Certificate<'_>, now: u64) -> Result<u64, VerifyError> {
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    let (not_before, not_after) = (seconds(parsed.validity().not_before), seconds(parsed.validity().not_after));
    let leeway = CLOCK_LEEWAY.as_secs();
    if now > not_after.saturating_add(leeway) {
        return Err(VerifyError::Validity { what: "expired", now, not_before, not_after });
    }
    if now.saturating_add(leeway) < not_before {
        return Err(VerifyError::Validity { what: "not valid yet", now, not_before, not_after });
    }
    Ok(not_after)
}

/// A point in time as people read it: `2026-01-31T08:00:00Z`.
pub(crate) fn utc(seconds: u64) -> String {
    let Some(t) = i64::try_from(seconds).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok()) else {
        return format!("{seconds} s after 1970");
    };
    let (date, clock) = (t.date(), t.time());
    let (year, month, day) = date.to_calendar_date();
    let (hour, minute, second) = clock.as_hms();
    format!("{year:04}-{:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z", u8::from(month))
}

/// The one URI SAN. Other kinds of names beside it are refused too: nobody here issues them.
fn uri_of<'a>(parsed: &X509Certificate<'a>) -> Result<&'a str, VerifyError> {
    let mut names = Vec::new();
    for extension in parsed.extensions() {
        if let ParsedExtension::SubjectAlternativeName(san) = extension.parsed_extension() {
            names.extend(san.general_names.iter().cloned());
        }
    }
    match names.as_slice() {
        [GeneralName::URI(uri)] => Ok(uri),
        _ => Err(VerifyError::NotSvid("it must carry exactly one name, a URI")),
    }
}

/// Verifies that `chain` is a gateway's, of whatever cluster, under exactly `root`.
///
/// For joins and first certificates, where the mesh's members are not known yet.
pub(crate) fn verify_pinned_gateway(
    chain: &[CertificateDer<'_>],
    root: &CertificateDer<'_>,
    now: u64,
) -> Result<(), VerifyError> {
    let leaf = chain.first().ok_or(VerifyError::Missing)?;
    let (spiffe, _) = read_leaf(leaf, now)?;
    let mut trust = Trust {
        trust_domain: spiffe.trust_domain.clone(),
        roots: vec![CertificateDer::from(root.to_vec())],
        issuers: BTreeMap::new(),
    };
    let cluster = trust.path(leaf, chain.get(1..).unwrap_or_default(), now)?;
    if let Some(cluster) = cluster {
        let any = IssuerRecord { cluster_id: ClusterId(0), may_issue: Patterns::all() };
        trust.issuers.insert(cluster, any);
    }
    let peer = trust.verify(chain, now)?;
    if peer.is_gateway() {
        return Ok(());
    }
    Err(VerifyError::Unexpected { found: peer.spiffe.to_string(), expected: "a gateway".into() })
}
