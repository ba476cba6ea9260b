//! Answers the workload's DNS questions from the view of the mesh; forwards the rest.
//!
//! Authoritative for `clusterset.local` and for the hosts of ServiceEntries that have an address.
//! Everything else goes to the upstream resolvers as it was asked. Where no gateway could say whether
//! a name exists the answer is SERVFAIL, never NXDOMAIN: absence is only what somebody knows.
//! No recursion, no zone transfer, no DNSSEC validation. What a packet means is in `message` (the
//! decoder of unproven input), what the mesh says in `zone`; both are pure. The loops are in `server`.

mod cache;
pub mod message;
mod server;
mod upstream;
mod zone;

pub use server::{DnsServer, addresses};
pub use upstream::{Upstreams, name_servers};
