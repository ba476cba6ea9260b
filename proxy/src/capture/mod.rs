//! Captures the workload's connections: packet filter rules and the original destination.
//!
//! Works on the network namespace that the process is in, and only on an own table in it. What the
//! rules say is pure ([`Rules`]); [`Capture`] puts them in force and takes them away.
//!
//! **Whose packets are the sidecar's own?** They must pass untouched, or it would talk to itself
//! forever. A uid does not tell: on machines and in throwaway namespaces workload and sidecar are
//! both root. A socket mark would have to be set on every socket that any library opens; the one
//! forgotten loops. So the process changes its *group* ([`enter_group`]) before it opens sockets and
//! the rules pass that group, as Istio's pass gid 1337: files and capabilities stay as they are, and
//! every socket is covered.

mod apply;
mod original_dst;
mod rules;

pub use apply::{Capture, CaptureError, enter_group};
pub use original_dst::original_dst;
pub use rules::{GROUP, PortRange, Redirect, Rules, TABLE};
