//! What the mesh means: names, services, routes, policies and the choices made over them.
//!
//! Pure: no clock, no I/O, no async runtime. Everything here is a value that can be compared,
//! printed and sent; decisions take their facts, `now` and their random numbers as arguments.
//! How these values are written by users is in `isthmus-objects`; how they travel in `isthmus-wire`.

pub mod authn;
pub mod destination;
pub mod locality;
pub mod merge;
pub mod names;
pub mod route;
pub mod select;
pub mod service;
pub mod spiffe;
pub mod view;
pub mod vip;

pub use locality::Locality;
pub use names::{ClusterId, ClusterName, Host, NameError, Namespace, ObjectName, ServiceName, WorkloadName};
pub use spiffe::{ServiceAccount, SpiffeId, TrustDomain};
