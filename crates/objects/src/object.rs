//! What a document came to: one proven object.

use std::fmt;

use isthmus_model::authn::PeerAuthentication;
use isthmus_model::destination::DestinationRule;
use isthmus_model::route::VirtualService;
use isthmus_model::service::{Patterns, Service, ServiceEntry, Workload};
use isthmus_model::view::Resource;
use isthmus_model::{Namespace, ServiceName};

/// A service that is exported under its mesh name (MCS `ServiceExport`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceExport {
    /// The service's namespace.
    pub namespace: Namespace,
    /// The service's name.
    pub name: ServiceName,
    /// Clusters that may call it (annotation `isthmus.io/visible-to`); all where nothing is said.
    pub visible_to: Patterns,
}

/// The kinds that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Kubernetes `Service`.
    Service,
    /// Istio `WorkloadEntry`.
    WorkloadEntry,
    /// Istio `ServiceEntry`.
    ServiceEntry,
    /// MCS `ServiceExport`.
    ServiceExport,
    /// Istio `VirtualService`.
    VirtualService,
    /// Istio `DestinationRule`.
    DestinationRule,
    /// Istio `PeerAuthentication`.
    PeerAuthentication,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Service,
        Self::WorkloadEntry,
        Self::ServiceEntry,
        Self::ServiceExport,
        Self::VirtualService,
        Self::DestinationRule,
        Self::PeerAuthentication,
    ];

    /// As in YAML's `kind`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::ServiceEntry => "ServiceEntry",
            Self::ServiceExport => "ServiceExport",
            Self::VirtualService => "VirtualService",
            Self::DestinationRule => "DestinationRule",
            Self::PeerAuthentication => "PeerAuthentication",
        }
    }

    /// The values of `apiVersion` that are read, the newest first.
    pub fn api_versions(self) -> &'static [&'static str] {
        match self {
            Self::Service => &["v1"],
            Self::WorkloadEntry | Self::ServiceEntry | Self::VirtualService | Self::DestinationRule => {
                &["networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3"]
            }
            Self::PeerAuthentication => &["security.istio.io/v1", "security.istio.io/v1beta1"],
            Self::ServiceExport => &["multicluster.x-k8s.io/v1beta1", "multicluster.x-k8s.io/v1alpha1"],
        }
    }

    /// Whether it holds for the whole mesh, and so goes through the log as an operator's write; the
    /// other kinds belong to the cluster that has them.
    pub fn is_mesh_wide(self) -> bool {
        matches!(self, Self::VirtualService | Self::DestinationRule | Self::PeerAuthentication)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Names one object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.kind, self.namespace, self.name)
    }
}

/// A proven object. Host names in it are fully qualified.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    /// Kubernetes `Service`.
    Service(Service),
    /// Istio `WorkloadEntry`.
    WorkloadEntry(Workload),
    /// Istio `ServiceEntry`.
    ServiceEntry(ServiceEntry),
    /// MCS `ServiceExport`.
    ServiceExport(ServiceExport),
    /// Istio `VirtualService`.
    VirtualService(VirtualService),
    /// Istio `DestinationRule`.
    DestinationRule(DestinationRule),
    /// Istio `PeerAuthentication`.
    PeerAuthentication(PeerAuthentication),
}

/// Why a configuration record of the log is not an object.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    /// Not JSON of a resource, or of a newer form.
    #[error("not a configuration record this version reads; upgrade this gateway")]
    Malformed(#[from] serde_json::Error),
    /// JSON of a resource that is no mesh-wide configuration.
    #[error(
        "a record of mesh-wide configuration holds one VirtualService, DestinationRule or PeerAuthentication, not {0}"
    )]
    NotConfig(&'static str),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Service(_) => Kind::Service,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::ServiceExport(_) => Kind::ServiceExport,
            Self::VirtualService(_) => Kind::VirtualService,
            Self::DestinationRule(_) => Kind::DestinationRule,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
        }
    }

    /// Its namespace.
    pub fn namespace(&self) -> &Namespace {
        match self {
            Self::Service(one) => &one.namespace,
            Self::WorkloadEntry(one) => &one.namespace,
            Self::ServiceEntry(one) => &one.namespace,
            Self::ServiceExport(one) => &one.namespace,
            Self::VirtualService(one) => &one.namespace,
            Self::DestinationRule(one) => &one.namespace,
            Self::PeerAuthentication(one) => &one.namespace,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Service(one) => one.name.as_str(),
            Self::WorkloadEntry(one) => one.name.as_str(),
            Self::ServiceEntry(one) => one.name.as_str(),
            Self::ServiceExport(one) => one.name.as_str(),
            Self::VirtualService(one) => one.name.as_str(),
            Self::DestinationRule(one) => one.name.as_str(),
            Self::PeerAuthentication(one) => one.name.as_str(),
        }
    }

    /// Kind, namespace and name.
    pub fn key(&self) -> ObjectKey {
        ObjectKey { kind: self.kind(), namespace: self.namespace().clone(), name: self.name().to_owned() }
    }

    /// The record of mesh-wide configuration in the log: JSON of `model::view::Resource`. `None` for
    /// kinds that are not [mesh-wide](Kind::is_mesh_wide).
    pub fn to_json(&self) -> Option<String> {
        let resource = match self {
            Self::VirtualService(one) => Resource::VirtualService(one.clone()),
            Self::DestinationRule(one) => Resource::DestinationRule(one.clone()),
            Self::PeerAuthentication(one) => Resource::PeerAuthentication(vec![one.clone()]),
            Self::Service(_) | Self::WorkloadEntry(_) | Self::ServiceEntry(_) | Self::ServiceExport(_) => return None,
        };
        serde_json::to_string(&resource).ok()
    }

    /// Reads back what [`Object::to_json`] wrote.
    ///
    /// # Errors
    /// [`JsonError`]; a field this version does not know is refused, never ignored.
    pub fn from_json(json: &str) -> Result<Self, JsonError> {
        match serde_json::from_str(json)? {
            Resource::VirtualService(one) => Ok(Self::VirtualService(one)),
            Resource::DestinationRule(one) => Ok(Self::DestinationRule(one)),
            Resource::PeerAuthentication(mut all) => match (all.pop(), all.is_empty()) {
                (Some(one), true) => Ok(Self::PeerAuthentication(one)),
                _ => Err(JsonError::NotConfig("none or several")),
            },
            Resource::Service(_) => Err(JsonError::NotConfig("a service")),
            Resource::MeshRanges(_) => Err(JsonError::NotConfig("address ranges")),
        }
    }
}
