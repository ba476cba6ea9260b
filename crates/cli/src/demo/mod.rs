//! `isthmus demo`: three clouds on one machine, told as a story with measured times.
//!
//! Everything in it is real: processes of this binary, certificates, tokens, tunnels, a WAN with delay
//! between the clusters. The network and the processes are those of `isthmus_lab`, which the end-to-end
//! tests use too; this module knows nothing of the inside of a gateway or a sidecar.
//!
//! [`scene`] says who is there, [`steps`] what happens and what must hold, [`report`] how it is told.

pub mod report;
pub mod scene;
pub mod steps;
