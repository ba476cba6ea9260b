//! Captures the workload's connections: packet filter rules and the original destination.
