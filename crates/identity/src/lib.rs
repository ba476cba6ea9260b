//! Who is who: the mesh's root, the clusters' intermediates, workload certificates, tokens.
//!
//! Certificates are ECDSA P-256 throughout. Nothing here opens a socket or reads a clock: times come in
//! as Unix seconds (rustls hands its own to the verifiers). Start at [`authority`] for who issues what,
//! at [`verify`] for who is believed, at [`tls`] for how both reach rustls.

pub mod authority;
pub mod rotation;
pub mod state;
pub mod tls;
pub mod token;
pub mod verify;

pub use authority::{
    ClusterAuthority, Identity, IssueError, KeyPair, RootAuthority, answers, fingerprint, verify_signature,
};
pub use tls::{Expect, SharedIdentity, SharedTrust, Tls};
pub use token::{JoinToken, TokenError, WorkloadToken};
pub use verify::{IssuerRecord, PeerIdentity, Trust, VerifyError};
