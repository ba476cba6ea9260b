//! Stories: what a user sees of a whole mesh of real processes, told as tests.
//!
//! Each file in `tests/` is one story. It describes a mesh ([`Story`]), lets it live ([`Told`]),
//! does something to it, and judges every request by the ledger. The network, the processes and
//! the load are those of `isthmus_lab`; nothing here knows the inside of a gateway or a sidecar.
//!
//! The binary is the one that cargo built beside the tests, or `ISTHMUS_BIN`. A story that cannot
//! run prints `SKIPPED: reason`; with `ISTHMUS_STORIES=required` it fails instead.

mod scenes;
mod story;

pub use scenes::{THREE_CLOUDS, TWO_CLOUDS};
pub use story::{Story, Told, binary, mesh_host, ms, top, within};

pub use isthmus_lab::{Host, LoadReport, MeshError, Mode, PathConfig, RunningLoad, Verdict};
