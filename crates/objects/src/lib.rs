//! Kubernetes and Istio YAML, read strictly: what the user wrote in, proven values of `isthmus-model` out.
//!
//! As written is [`tree`]: nodes that know their line. As proven is [`Object`]. In between stands one
//! reader per kind, built from [`fields`], which collects every problem of a file instead of stopping at
//! the first. Nothing is applied by halves: a file with one problem yields problems only. No field is
//! ignored silently: it is served, refused with its path, or answered by a warning. Reads no files itself.

mod destination_rule;
mod document;
mod fields;
mod object;
mod peer_authentication;
mod report;
mod scalar;
mod service;
mod service_entry;
mod service_export;
mod set;
mod suggest;
mod tree;
mod virtual_service;
mod virtual_service_match;
mod workload;

pub use document::{Read, read};
pub use object::{JsonError, Kind, Object, ObjectKey, ServiceExport};
pub use report::{Place, Problem, Refusal, Warning};
pub use set::ObjectSet;
