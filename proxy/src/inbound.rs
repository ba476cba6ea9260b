//! Port 15008 and tunnels: takes requests and streams of other sidecars for the own workload.
//!
//! Whoever calls has proved who it is and from which cluster. Each request and each stream names a service and a
//! port, never an address; the workload's own exports say what that is here and whether the caller's cluster may
//! have it. Port 15006 takes captured plaintext, and refuses it unless a PeerAuthentication permits it.

pub mod local;
pub mod plain;
mod serve;
pub mod tunnel;

use isthmus_identity::{PeerIdentity, Trust};

/// Whether a peer that was believed when it connected still is.
pub fn is_trusted(trust: &Trust, peer: &PeerIdentity) -> bool {
    let Some(cluster) = &peer.cluster else { return false };
    peer.spiffe.trust_domain == trust.trust_domain
        && trust
            .issuers
            .get(cluster)
            .is_some_and(|issuer| issuer.may_issue.cover(peer.spiffe.account.namespace.as_str()))
}

/// Ends when `peer` is believed no more.
pub(crate) async fn distrusted(
    trust: isthmus_identity::SharedTrust,
    mut changed: tokio::sync::watch::Receiver<u64>,
    peer: &PeerIdentity,
) {
    loop {
        if !is_trusted(&trust.load(), peer) {
            return;
        }
        if changed.changed().await.is_err() {
            // Nobody changes trust any more.
            std::future::pending::<()>().await;
        }
    }
}
