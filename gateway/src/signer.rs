//! Answers requests for intermediates, on gateways that hold the root key: joins and renewals.
//!
//! The second of a join's two log entries. Several signers may answer at once; the log takes the first.

use std::time::Duration;

use isthmus_federation::command::Command;
use isthmus_federation::der::Der;
use isthmus_federation::member::MemberHandle;
use isthmus_federation::registry::Registry;
use isthmus_identity::RootAuthority;
use isthmus_model::ClusterName;
use tokio_util::sync::CancellationToken;

use crate::join::now_unix_s;
use crate::writer::{ClusterWriter, WriteError};

/// Pause after an answer that did not reach the log.
const RETRY: Duration = Duration::from_secs(1);

/// A signer: the root key and the right to write.
pub struct Signer {
    root: RootAuthority,
    own: ClusterName,
    writer: ClusterWriter,
    member: MemberHandle,
}

impl Signer {
    /// A signer in cluster `own`.
    pub fn new(root: RootAuthority, own: ClusterName, writer: ClusterWriter, member: MemberHandle) -> Self {
        Self { root, own, writer, member }
    }

    /// Answers until `shutdown`. Does nothing while the log does not list this cluster as a signer.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut registry = self.member.registry();
        loop {
            let next = next_request(&registry.borrow_and_update(), &self.own);
            let Some((cluster, csr, domain)) = next else {
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    changed = registry.changed() => if changed.is_err() { return },
                }
                continue;
            };
            let answered = self.answer(&cluster, &csr, &domain).await;
            if let Err(error) = answered {
                tracing::warn!(%cluster, %error, "request for an intermediate not answered");
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }

    async fn answer(
        &self,
        cluster: &ClusterName,
        csr: &[u8],
        domain: &isthmus_model::TrustDomain,
    ) -> Result<(), WriteError> {
        let issued = self.root.issue_intermediate(csr, cluster, domain, now_unix_s());
        let certificate = match issued {
            Ok(certificate) => certificate,
            Err(error) => return Err(isthmus_federation::command::SignError(error.to_string()).into()),
        };
        let grant = Command::Grant { cluster: cluster.clone(), chain: vec![Der(certificate.to_vec())] };
        match self.writer.write(grant).await {
            Ok(index) => {
                tracing::info!(%cluster, index, "intermediate granted");
                Ok(())
            }
            // Another signer was faster, or the request is gone: either way it is answered.
            Err(WriteError::Refused(refusal)) => {
                tracing::debug!(%cluster, reason = %refusal.reason, "grant not needed");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// The oldest request, if `own` is a signer.
fn next_request(registry: &Registry, own: &ClusterName) -> Option<(ClusterName, Vec<u8>, isthmus_model::TrustDomain)> {
    registry.clusters.get(own).filter(|record| record.signer)?;
    let domain = registry.mesh.as_ref()?.trust_domain.clone();
    let (cluster, request) = registry.requests.iter().min_by_key(|(_, request)| request.index)?;
    Some((cluster.clone(), request.csr.0.clone(), domain))
}
