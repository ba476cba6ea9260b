//! Throwaway networks: clusters, hosts and the WAN between them, on one machine.
//!
//! A [`Lab`] is a small internet that lives as long as the process. As root it is made of network
//! namespaces joined by a user-space WAN; without root, of ranges of 127.0.0.0/8 joined by relays.
//! Both obey the same [`Shaper`], so a delay, a loss or a partition means the same in both.
//!
//! Nothing outlives the process: namespaces are anonymous (held by descriptors, never by a name in
//! `/run/netns`), children die with their parent, no interface and no rule is made in the namespace
//! of the caller. Only the run directory is a file; the next lab removes those of dead processes.
//!
//! Start at [`lab`], and at [`mesh`] for gateways and sidecars in it; the emulator is [`shaper`] (pure) driven by [`wan`] and [`relay`].

pub mod dns;
pub mod error;
pub mod forward;
pub mod host;
pub mod lab;
pub mod ledger;
pub mod link;
pub mod load;
pub mod mesh;
pub mod netns;
pub mod process;
pub mod relay;
pub mod rundir;
pub mod sample;
pub mod shaper;
pub mod timetable;
pub mod tun;
pub mod wan;

pub use error::LabError;
pub use forward::Forward;
pub use host::Host;
pub use lab::{Lab, Mode};
pub use ledger::{Ledger, Verdict};
pub use load::{Load, LoadReport, RunningLoad};
pub use mesh::{Mesh, MeshError};
pub use netns::Netns;
pub use process::{Probe, Process, Program};
pub use shaper::{Burst, PathConfig, Shaper};
pub use wan::Wan;
