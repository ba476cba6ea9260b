//! SPIFFE identities as this mesh uses them: `spiffe://<trust-domain>/ns/<ns>/sa/<sa>` (SPIFFE-ID §2, Istio's path).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is no SPIFFE ID of this mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a SPIFFE ID: {reason}")]
pub struct SpiffeError {
    value: String,
    reason: &'static str,
}

fn refused(value: &str, reason: &'static str) -> SpiffeError {
    SpiffeError { value: value.chars().take(64).collect(), reason }
}

/// A trust domain name: 1-255 of a-z, 0-9, `.`, `-`, `_` (SPIFFE-ID §2.1).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain(Box<str>);

impl TrustDomain {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if text.is_empty() || text.len() > 255 || !text.bytes().all(ok) {
            return Err(refused(text, "a trust domain is 1-255 of a-z, 0-9, '.', '-' and '_'"));
        }
        Ok(Self(text.into()))
    }
}

impl TryFrom<String> for TrustDomain {
    type Error = SpiffeError;
    fn try_from(text: String) -> Result<Self, SpiffeError> {
        text.parse()
    }
}

impl From<TrustDomain> for String {
    fn from(domain: TrustDomain) -> Self {
        domain.0.into()
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A service account of a namespace, equal in all clusters: what a workload is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: crate::Namespace,
    /// Its name; `default` where nothing else is said.
    pub name: crate::ServiceName,
}

impl ServiceAccount {
    /// The account every gateway runs as.
    pub fn gateway() -> Self {
        let label = "known labels are valid";
        Self { namespace: "isthmus-system".parse().expect(label), name: "gateway".parse().expect(label) }
    }

    /// This account as an identity of `trust_domain`.
    pub fn in_domain(&self, trust_domain: &TrustDomain) -> SpiffeId {
        SpiffeId { trust_domain: trust_domain.clone(), account: self.clone() }
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ns/{}/sa/{}", self.namespace, self.name)
    }
}

impl FromStr for ServiceAccount {
    type Err = SpiffeError;
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let shape = || refused(text, "expected ns/<namespace>/sa/<service-account>");
        let (namespace, name) = text.strip_prefix("ns/").and_then(|rest| rest.split_once("/sa/")).ok_or_else(shape)?;
        Ok(Self { namespace: namespace.parse().map_err(|_| shape())?, name: name.parse().map_err(|_| shape())? })
    }
}

/// A workload's identity.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    /// The mesh's trust domain.
    pub trust_domain: TrustDomain,
    /// The service account.
    pub account: ServiceAccount,
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/{}", self.trust_domain, self.account)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;
    /// Strict: scheme, trust domain and path in exactly one spelling, no port, query, fragment or escapes.
    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| refused(text, "it must start with spiffe://"))?;
        let (domain, path) = rest.split_once('/').ok_or_else(|| refused(text, "it has no path"))?;
        Ok(Self { trust_domain: domain.parse()?, account: path.parse()? })
    }
}

impl TryFrom<String> for SpiffeId {
    type Error = SpiffeError;
    fn try_from(text: String) -> Result<Self, SpiffeError> {
        text.parse()
    }
}

impl From<SpiffeId> for String {
    fn from(id: SpiffeId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_back_as_written() {
        let text = "spiffe://corp.example/ns/shop/sa/cart";
        assert_eq!(text.parse::<SpiffeId>().expect("valid").to_string(), text);
    }

    #[test]
    fn other_spellings_are_refused() {
        for bad in [
            "spiffe://Corp/ns/a/sa/b",
            "spiffe://corp:1/ns/a/sa/b",
            "spiffe://u@corp/ns/a/sa/b",
            "spiffe://corp/ns/a/sa/b/",
            "spiffe://corp//ns/a/sa/b",
            "spiffe://corp/ns/a/sa/..",
            "spiffe://corp/ns/a/sa/b?x",
            "spiffe://corp/ns/a/sa/b#x",
            "spiffe://corp/ns/%61/sa/b",
            "SPIFFE://corp/ns/a/sa/b",
            "spiffe://corp/ns/a/sa/b\0",
            "spiffe://corp",
            "",
        ] {
            assert!(bad.parse::<SpiffeId>().is_err(), "{bad:?}");
        }
    }
}
