//! Keys that repeat: a certificate is a name, a signature a hash. Only for the simulation and tests.
//!
//! Real ECDSA signatures differ from run to run, so a run with them would not replay. What is tested with
//! these is what apply does with the answers; that the answers are right is tested in [`crate::verify`].

use isthmus_model::{ClusterName, TrustDomain};

use crate::command::{SignError, Signer};
use crate::der::{Der, Fingerprint};
use crate::verify::{Trust, Unproven, Verify};

/// Signs as the holder of one certificate.
#[derive(Debug, Clone)]
pub struct ToySigner(pub Der);

/// `cluster:NAME:SERIAL`.
pub fn cluster_certificate(name: &str, serial: u64) -> Der {
    Der(format!("cluster:{name}:{serial}").into_bytes())
}

/// `operator:NAME`.
pub fn operator_certificate(name: &str) -> Der {
    Der(format!("operator:{name}").into_bytes())
}

/// The request that [`cluster_certificate`] answers.
pub fn request(name: &str, serial: u64) -> Der {
    Der(format!("request:{name}:{serial}").into_bytes())
}

fn tag(certificate: &Der, message: &[u8]) -> Vec<u8> {
    Fingerprint::of(&certificate.0).chain(0, message).0.to_vec()
}

impl Signer for ToySigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        Ok(tag(&self.0, message))
    }
}

/// Judges what [`ToySigner`] makes.
#[derive(Debug, Clone, Copy)]
pub struct ToyVerify;

impl Verify for ToyVerify {
    fn cluster(&self, trust: Trust<'_>, chain: &[Der]) -> Result<ClusterName, Unproven> {
        let _: &TrustDomain = trust.domain;
        let text = chain.first().and_then(|der| std::str::from_utf8(&der.0).ok()).unwrap_or_default();
        let name = text.strip_prefix("cluster:").and_then(|rest| rest.split(':').next());
        name.and_then(|name| name.parse().ok()).ok_or_else(|| Unproven("no cluster's chain".into()))
    }

    fn operator(&self, _trust: Trust<'_>, chain: &[Der]) -> Result<String, Unproven> {
        let text = chain.first().and_then(|der| std::str::from_utf8(&der.0).ok()).unwrap_or_default();
        text.strip_prefix("operator:").map(str::to_owned).ok_or_else(|| Unproven("no operator's chain".into()))
    }

    fn signature(&self, certificate: &Der, message: &[u8], signature: &[u8]) -> Result<(), Unproven> {
        match tag(certificate, message) == signature {
            true => Ok(()),
            false => Err(Unproven("signature does not fit".into())),
        }
    }

    fn answers(&self, csr: &Der, certificate: &Der) -> Result<(), Unproven> {
        let same = csr.0.strip_prefix(b"request:") == certificate.0.strip_prefix(b"cluster:");
        if same { Ok(()) } else { Err(Unproven("another key".into())) }
    }
}
