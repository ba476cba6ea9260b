//! Parsed, length-bounded names. A value of these types is always valid; nothing downstream checks again.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name was refused. The text names the value and the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Not an RFC 1123 label.
    #[error(
        "{what} {value:?} is not a DNS label: use 1-63 of a-z, 0-9 and '-', starting and ending with a letter or digit"
    )]
    Label {
        /// Which name it was meant to be.
        what: &'static str,
        /// The refused text, shortened to 64 bytes.
        value: String,
    },
    /// Not an RFC 1123 subdomain.
    #[error(
        "{what} {value:?} is not a name: use labels of a-z, 0-9 and '-' joined by dots, at most 253 bytes, starting and ending with a letter or digit"
    )]
    Subdomain {
        /// Which name it was meant to be.
        what: &'static str,
        /// The refused text, shortened to 64 bytes.
        value: String,
    },
    /// Not a DNS name.
    #[error(
        "host {value:?} is not a DNS name: labels of a-z, 0-9, '-' and '_' joined by dots, at most 253 bytes, `*` only as the whole first label"
    )]
    Host {
        /// The refused text, shortened to 64 bytes.
        value: String,
    },
}

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
    !bytes.is_empty()
        && bytes.len() <= 63
        && bytes.iter().all(inner)
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-'
}

fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident, $error:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                if $check(text) {
                    Ok(Self(text.into()))
                } else {
                    Err(NameError::$error { what: $what, value: shortened(text) })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// The name of a cluster, unique in the mesh (an RFC 1123 label).
    ClusterName,
    "cluster name",
    is_label,
    Label
);
name!(
    /// A namespace (an RFC 1123 label), as in Kubernetes.
    Namespace,
    "namespace",
    is_label,
    Label
);
name!(
    /// The name of a service within its namespace (an RFC 1123 label).
    ServiceName,
    "service name",
    is_label,
    Label
);
name!(
    /// The name of a workload within its namespace (an RFC 1123 label).
    WorkloadName,
    "workload name",
    is_label,
    Label
);

name!(
    /// The name of an Istio object that nothing is called by (an RFC 1123 subdomain): `reviews.canary`.
    ObjectName,
    "object name",
    is_subdomain,
    Subdomain
);

/// A cluster's number: assigned by the log at join, carried in every connection ID. Zero is never assigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(pub u16);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lower-case DNS name of at most 253 bytes; may be a wildcard (`*.example.com`).
///
/// Parsing lower-cases and drops one trailing dot, so two spellings of a host are equal.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Host(Box<str>);

/// The zone of services that span clusters (KEP-1645).
pub const MESH_ZONE: &str = "clusterset.local";
/// The zone of services of one cluster.
pub const CLUSTER_ZONE: &str = "cluster.local";

impl Host {
    /// `<service>.<namespace>.svc.clusterset.local` (KEP-1645).
    pub fn mesh(namespace: &Namespace, service: &ServiceName) -> Self {
        Self(format!("{service}.{namespace}.svc.{MESH_ZONE}").into())
    }

    /// `<service>.<namespace>.svc.cluster.local`.
    pub fn cluster(namespace: &Namespace, service: &ServiceName) -> Self {
        Self(format!("{service}.{namespace}.svc.{CLUSTER_ZONE}").into())
    }

    /// The host as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the first label is `*`.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }

    /// Whether `self`, a host or a wildcard, covers `other` (Istio: `*.a.b` covers `x.a.b` and `x.y.a.b`, not `a.b`).
    pub fn covers(&self, other: &Host) -> bool {
        match self.0.strip_prefix('*') {
            Some(suffix) => other.0.len() > suffix.len() && other.0.ends_with(suffix),
            None => self == other,
        }
    }

    /// The service and namespace of a `svc.clusterset.local` or `svc.cluster.local` host.
    pub fn service(&self) -> Option<(ServiceName, Namespace)> {
        let rest = self.0.strip_suffix(MESH_ZONE).or_else(|| self.0.strip_suffix(CLUSTER_ZONE))?;
        let (service, namespace) = rest.strip_suffix(".svc.")?.split_once('.')?;
        Some((service.parse().ok()?, namespace.parse().ok()?))
    }

    /// Whether this is a name of the mesh zone (`*.svc.clusterset.local`).
    pub fn is_mesh(&self) -> bool {
        self.0.ends_with(".svc.clusterset.local")
    }

    /// Whether this is a name of the cluster's own zone (`*.svc.cluster.local`).
    pub fn is_cluster(&self) -> bool {
        self.0.ends_with(".svc.cluster.local")
    }
}

impl FromStr for Host {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let lower = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        let refused = || NameError::Host { value: shortened(text) };
        if lower.is_empty() || lower.len() > 253 {
            return Err(refused());
        }
        let labels = lower.strip_prefix("*.").unwrap_or(&lower);
        let ok = |label: &str| {
            !label.is_empty()
                && label.len() <= 63
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if labels.split('.').all(ok) { Ok(Self(lower.into())) } else { Err(refused()) }
    }
}

impl TryFrom<String> for Host {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Host> for String {
    fn from(host: Host) -> Self {
        host.0.into()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_a_host_are_equal() {
        assert_eq!("Cart.Shop.svc.clusterset.local.".parse::<Host>(), "cart.shop.svc.clusterset.local".parse());
    }

    #[test]
    fn a_mesh_host_names_its_service() {
        let host: Host = "cart.shop.svc.clusterset.local".parse().expect("valid");
        let (service, namespace) = host.service().expect("a service");
        assert_eq!((service.as_str(), namespace.as_str()), ("cart", "shop"));
        assert_eq!(Host::mesh(&namespace, &service), host);
    }

    #[test]
    fn bad_names_are_refused() {
        for bad in ["", "-a", "a-", "A", "a.b", "a b", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?}");
        }
        for bad in ["", ".", "a..b", "*", "a.*.b", "a/b", "a\0.b", &"x.".repeat(130)] {
            assert!(bad.parse::<Host>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_of_objects_may_have_dots() {
        for good in ["a", "reviews.canary", "a-b.c1", &format!("{0}.{0}", "x".repeat(63))] {
            assert!(good.parse::<ObjectName>().is_ok(), "{good:?}");
        }
        for bad in ["", ".", "a..b", "a.", ".a", "A.b", "a_b", "*.a", &"x.".repeat(127)] {
            assert!(bad.parse::<ObjectName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_wildcard_covers_what_is_below_it_only() {
        let wild: Host = "*.example.com".parse().expect("valid");
        assert!(wild.covers(&"a.b.example.com".parse().expect("valid")));
        assert!(!wild.covers(&"example.com".parse().expect("valid")));
        assert!(!wild.covers(&"evilexample.com".parse().expect("valid")));
    }
}
