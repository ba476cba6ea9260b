//! How signatures and certificate chains in the log are judged: behind a trait, so that a simulation may
//! use keys that repeat. What an implementation answers depends on its arguments only.

use std::collections::BTreeMap;

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use isthmus_identity::authority::verify_signature;
use isthmus_identity::verify::cluster_of;
use isthmus_model::{ClusterName, TrustDomain};
use rustls_pki_types::CertificateDer;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::der::Der;

/// The mesh's trust, as the log knows it, at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    /// The trust domain.
    pub domain: &'a TrustDomain,
    /// Root certificates.
    pub roots: &'a [Der],
    /// The log's time, by which validity is judged.
    pub unix_s: u64,
}

/// Why a chain or signature does not hold, in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unproven(pub String);

/// Judges chains and signatures. Reads no clock.
pub trait Verify: Send + Sync {
    /// The cluster that an intermediate was issued for: from the verified path, never from a leaf.
    ///
    /// # Errors
    /// If the chain does not lead to a root, has ended, or names no cluster.
    fn cluster(&self, trust: Trust<'_>, chain: &[Der]) -> Result<ClusterName, Unproven>;

    /// The operator's name from a chain that a root signed.
    ///
    /// # Errors
    /// If the chain does not lead to a root, has ended, or is not an operator's.
    fn operator(&self, trust: Trust<'_>, chain: &[Der]) -> Result<String, Unproven>;

    /// Whether `signature` over `message` was made by the key of `certificate` (ECDSA P-256, SHA-256, ASN.1).
    ///
    /// # Errors
    /// If it was not, or the certificate is none.
    fn signature(&self, certificate: &Der, message: &[u8], signature: &[u8]) -> Result<(), Unproven>;

    /// Whether `certificate` answers `csr`: the same public key, and the request signed by it.
    ///
    /// # Errors
    /// If it does not.
    fn answers(&self, csr: &Der, certificate: &Der) -> Result<(), Unproven>;
}

/// Judges real certificates: intermediates signed by a root, operators' chains, ECDSA P-256.
#[derive(Debug, Clone, Copy, Default)]
pub struct Certificates;

impl Verify for Certificates {
    fn cluster(&self, trust: Trust<'_>, chain: &[Der]) -> Result<ClusterName, Unproven> {
        let [intermediate] = chain else {
            return Err(Unproven(format!("a chain of {} certificates; an intermediate stands alone", chain.len())));
        };
        let parsed = parse(intermediate)?;
        let now = i64::try_from(trust.unix_s).unwrap_or(i64::MAX);
        let (from, to) = (parsed.validity().not_before.timestamp(), parsed.validity().not_after.timestamp());
        let leeway = i64::try_from(isthmus_identity::verify::CLOCK_LEEWAY.as_secs()).unwrap_or(0);
        if now.saturating_add(leeway) < from || now.saturating_sub(leeway) > to {
            let text = format!("the log's time is {now}, the intermediate holds from {from} to {to} (Unix seconds)");
            return Err(Unproven(text));
        }
        let constraints = parsed.basic_constraints().ok().flatten().map(|found| found.value);
        if !constraints.is_some_and(|found| found.ca && found.path_len_constraint == Some(0)) {
            return Err(Unproven("not an intermediate of path length 0".into()));
        }
        let signed = |root: &&Der| {
            let root_der = CertificateDer::from(root.0.as_slice());
            let issued = parse(root).is_ok_and(|root| root.subject().as_raw() == parsed.issuer().as_raw());
            issued && verify_signature(&root_der, parsed.tbs_certificate.as_ref(), &parsed.signature_value.data)
        };
        if !trust.roots.iter().any(|root| signed(&root)) {
            return Err(Unproven(format!("no root of trust domain {} signed this intermediate", trust.domain)));
        }
        let der = CertificateDer::from(intermediate.0.as_slice());
        cluster_of(&der).ok_or_else(|| Unproven("the intermediate names no cluster".into()))
    }

    fn operator(&self, trust: Trust<'_>, chain: &[Der]) -> Result<String, Unproven> {
        let owned = |der: &Der| CertificateDer::from(der.0.clone());
        let by = isthmus_identity::Trust {
            trust_domain: trust.domain.clone(),
            roots: trust.roots.iter().map(owned).collect(),
            // No cluster may vouch for an operator.
            issuers: BTreeMap::new(),
        };
        let chain: Vec<CertificateDer<'_>> = chain.iter().map(owned).collect();
        let peer = by.verify(&chain, trust.unix_s).map_err(|error| Unproven(error.to_string()))?;
        match peer.is_operator() {
            true => Ok(peer.spiffe.account.name.to_string()),
            false => Err(Unproven(format!("{} is no operator", peer.spiffe))),
        }
    }

    fn signature(&self, certificate: &Der, message: &[u8], signature: &[u8]) -> Result<(), Unproven> {
        match verify_signature(&CertificateDer::from(certificate.0.as_slice()), message, signature) {
            true => Ok(()),
            false => Err(Unproven("the signature is not by the writer's certificate".into())),
        }
    }

    fn answers(&self, csr: &Der, certificate: &Der) -> Result<(), Unproven> {
        let (_, request) = X509CertificationRequest::from_der(&csr.0)
            .map_err(|_| Unproven("the request is not a PKCS#10 structure".into()))?;
        let wanted = &request.certification_request_info.subject_pki;
        let issued = parse(certificate)?;
        if wanted.raw != issued.public_key().raw {
            return Err(Unproven("the certificate is for another key than the request".into()));
        }
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, wanted.subject_public_key.data.as_ref());
        key.verify(request.certification_request_info.raw, &request.signature_value.data)
            .map_err(|_| Unproven("the request is not signed by its own key".into()))
    }
}

fn parse(der: &Der) -> Result<X509Certificate<'_>, Unproven> {
    match x509_parser::parse_x509_certificate(&der.0) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(Unproven("bytes follow the certificate".into())),
        Err(_) => Err(Unproven("not a certificate".into())),
    }
}

#[cfg(test)]
mod tests {
    use isthmus_identity::{KeyPair, RootAuthority};

    use super::*;

    const NOW: u64 = 1_800_000_000;

    struct World {
        domain: TrustDomain,
        root: RootAuthority,
        roots: Vec<Der>,
    }

    fn world(domain: &str) -> World {
        let domain: TrustDomain = domain.parse().unwrap();
        let root = RootAuthority::create("m", &domain, NOW).unwrap();
        let roots = vec![Der(root.certificate().to_vec())];
        World { domain, root, roots }
    }

    impl World {
        fn trust(&self, unix_s: u64) -> Trust<'_> {
            Trust { domain: &self.domain, roots: &self.roots, unix_s }
        }

        fn intermediate(&self, key: &KeyPair, name: &str) -> Der {
            let csr = key.request().unwrap();
            Der(self.root.issue_intermediate(&csr, &name.parse().unwrap(), &self.domain, NOW).unwrap().to_vec())
        }

        fn operator(&self, key: &KeyPair, account: &str) -> Der {
            let id = format!("spiffe://{}/{account}", self.domain).parse().unwrap();
            let life = std::time::Duration::from_secs(86_400);
            Der(self.root.issue_operator(&key.request().unwrap(), &id, life, NOW).unwrap().to_vec())
        }
    }

    #[test]
    fn an_intermediate_names_its_cluster_and_signs() {
        let (world, key) = (world("a.example"), KeyPair::generate().unwrap());
        let chain = [world.intermediate(&key, "aws-eu")];
        assert_eq!(Certificates.cluster(world.trust(NOW), &chain).unwrap().as_str(), "aws-eu");
        let signature = key.sign(b"entry").unwrap();
        assert_eq!(Certificates.signature(&chain[0], b"entry", &signature), Ok(()));
        assert!(Certificates.signature(&chain[0], b"other", &signature).is_err());
    }

    #[test]
    fn a_foreign_root_an_ended_one_and_a_leaf_are_refused() {
        let (own, other, key) = (world("a.example"), world("b.example"), KeyPair::generate().unwrap());
        assert!(Certificates.cluster(own.trust(NOW), &[other.intermediate(&key, "x")]).is_err(), "foreign root");
        let ended = own.trust(NOW + 91 * 86_400);
        assert!(Certificates.cluster(ended, &[own.intermediate(&key, "x")]).is_err(), "after 90 days");
        let leaf = own.operator(&key, "ns/isthmus-operators/sa/ann");
        assert!(Certificates.cluster(own.trust(NOW), &[leaf]).is_err(), "not an intermediate");
        assert!(Certificates.cluster(own.trust(NOW), &[Der(vec![0x30, 0x03, 1, 2, 3])]).is_err(), "garbage");
    }

    #[test]
    fn only_a_root_makes_operators() {
        let (world, key) = (world("a.example"), KeyPair::generate().unwrap());
        let operator = [world.operator(&key, "ns/isthmus-operators/sa/ann")];
        assert_eq!(Certificates.operator(world.trust(NOW), &operator).unwrap(), "ann");
        let workload = [world.operator(&key, "ns/shop/sa/cart")];
        assert!(Certificates.operator(world.trust(NOW), &workload).is_err());
    }

    #[test]
    fn a_certificate_answers_the_request_with_its_key_only() {
        let (world, key, other) = (world("a.example"), KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let certificate = world.intermediate(&key, "x");
        assert_eq!(Certificates.answers(&Der(key.request().unwrap()), &certificate), Ok(()));
        assert!(Certificates.answers(&Der(other.request().unwrap()), &certificate).is_err());
        assert!(Certificates.answers(&Der(b"junk".to_vec()), &certificate).is_err());
    }
}
