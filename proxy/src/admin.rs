//! The operator's view into a running sidecar, on loopback only.
