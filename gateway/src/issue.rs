//! Certificates for this cluster's workloads, and who is trusted: from the log to TLS and to sidecars.
//!
//! Signing is local: all other clusters may be down. A changed trust is published to sidecars as soon as
//! the log says so, before any certificate that needs it.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use isthmus_federation::member::MemberHandle;
use isthmus_federation::registry::Registry;
use isthmus_identity::authority::WORKLOAD_LIFE_MAX;
use isthmus_identity::{ClusterAuthority, IssuerRecord, SharedTrust, Trust, WorkloadToken};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, ServiceAccount, TrustDomain};
use isthmus_wire::discovery::{self, CertificateResponse, IssuerGrant};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tonic::Status;

use crate::join::{now_unix_s, refused};
use crate::replication::MemberClient;

/// Who can spend a workload's token: the member alone, so that of many uses exactly one wins.
pub enum Tokens {
    /// This replica is the member.
    Here(MemberHandle),
    /// The member is asked.
    At(MemberClient),
}

/// Issues to workloads, and keeps what is trusted.
pub struct Issuer {
    own: ClusterName,
    authority: Arc<ClusterAuthority>,
    tokens: Tokens,
    shared: SharedTrust,
    /// Nothing until the log says who is a member: less than a sidecar knows would end its tunnels.
    published: watch::Sender<Option<discovery::Trust>>,
}

impl Issuer {
    /// An issuer with the cluster's `authority`, which keeps `trust` as the log has it.
    pub fn new(own: ClusterName, authority: Arc<ClusterAuthority>, tokens: Tokens, trust: SharedTrust) -> Arc<Self> {
        Arc::new(Self { own, authority, tokens, shared: trust, published: watch::Sender::new(None) })
    }

    /// What TLS believes.
    pub fn shared(&self) -> &SharedTrust {
        &self.shared
    }

    /// What sidecars are told to believe, once the log has said it.
    pub fn trust(&self) -> watch::Receiver<Option<discovery::Trust>> {
        self.published.subscribe()
    }

    /// The log moved on.
    pub fn set_registry(&self, registry: &Registry) {
        let Some(trust) = trust_of(registry) else { return };
        let wire = Some(to_wire(&trust));
        self.shared.store(Arc::new(trust));
        isthmus_runtime::watched::replace(&self.published, wire);
    }

    /// The account that a chain proves, if it is a workload of this cluster.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` with the reason.
    pub fn own_workload(&self, chain: &[CertificateDer<'_>]) -> Result<ServiceAccount, Status> {
        let unauthenticated = |text: String| Status::unauthenticated(text);
        let peer = isthmus_identity::tls::peer_identity(&self.shared, chain)
            .map_err(|error| unauthenticated(error.to_string()))?;
        if peer.cluster.as_ref() != Some(&self.own) || peer.is_gateway() {
            let text = format!("{} is not a workload of cluster {}", peer.spiffe, self.own);
            return Err(unauthenticated(text));
        }
        Ok(peer.spiffe.account)
    }

    /// Whether a chain proves a gateway of this cluster.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` with the reason.
    pub fn own_gateway(&self, chain: &[CertificateDer<'_>]) -> Result<(), Status> {
        let peer = isthmus_identity::tls::peer_identity(&self.shared, chain)
            .map_err(|error| Status::unauthenticated(error.to_string()))?;
        if peer.cluster.as_ref() == Some(&self.own) && peer.is_gateway() {
            return Ok(());
        }
        Err(Status::unauthenticated(format!("{} is not a gateway of cluster {}", peer.spiffe, self.own)))
    }

    /// A workload's first certificate, against its one-time token.
    ///
    /// # Errors
    /// A status whose `isthmus-reason` is `token_unknown`, `token_used`, `token_expired`, `not_member` or `bad_csr`.
    pub async fn enrol(&self, encoded: &str, csr: &[u8]) -> Result<CertificateResponse, Status> {
        let token = WorkloadToken::decode(encoded).map_err(|error| refused(error.reason(), error.to_string()))?;
        if token.cluster != self.own {
            let text = format!("this token is for cluster {}, this gateway is of {}", token.cluster, self.own);
            return Err(refused("token_unknown", text));
        }
        let member = match &self.tokens {
            Tokens::Here(member) => member,
            Tokens::At(client) => return client.enrol(encoded, csr).await,
        };
        // Before the token is spent: a request that cannot be granted must not cost it.
        self.issue(&token.account, csr)?;
        let account = member
            .use_workload_token(token.secret.hash())
            .await
            .map_err(|error| refused(error.reason(), error.to_string()))?;
        tracing::info!(%account, "workload enrolled");
        self.issue(&account, csr)
    }

    /// A fresh certificate for whom the caller already is.
    ///
    /// # Errors
    /// A status whose `isthmus-reason` is `bad_csr`.
    pub fn renew(&self, account: &ServiceAccount, csr: &[u8]) -> Result<CertificateResponse, Status> {
        self.issue(account, csr)
    }

    fn issue(&self, account: &ServiceAccount, csr: &[u8]) -> Result<CertificateResponse, Status> {
        let chain = self
            .authority
            .issue_workload(csr, account, WORKLOAD_LIFE_MAX, now_unix_s())
            .map_err(|error| refused("bad_csr", error.to_string()))?;
        Ok(CertificateResponse {
            chain_der: chain.iter().map(|der| der.to_vec()).collect(),
            roots_der: self.shared.load().roots.iter().map(|der| der.to_vec()).collect(),
            cluster: self.own.to_string(),
            trust_domain: self.authority.trust_domain().to_string(),
        })
    }
}

/// Whom to trust until the log says more: `roots`, the own cluster, and of `peers` (known from the join) the
/// gateways alone.
pub fn first_trust(
    own: (ClusterName, ClusterId),
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    peers: impl Iterator<Item = (ClusterName, ClusterId)>,
) -> SharedTrust {
    let gateways_only = |cluster_id| IssuerRecord { cluster_id, may_issue: Patterns(Vec::new()) };
    let mut issuers: BTreeMap<_, _> = peers.map(|(name, id)| (name, gateways_only(id))).collect();
    issuers.insert(own.0, IssuerRecord { cluster_id: own.1, may_issue: Patterns::all() });
    Arc::new(ArcSwap::from_pointee(Trust { trust_domain, roots, issuers }))
}

/// What the log's members may issue; `None` before the mesh is known.
pub fn trust_of(registry: &Registry) -> Option<Trust> {
    let mesh = registry.mesh.as_ref()?;
    let issuers = registry.clusters.values().map(|record| {
        let issuer = IssuerRecord { cluster_id: record.id, may_issue: record.may_issue.clone() };
        (record.name.clone(), issuer)
    });
    Some(Trust {
        trust_domain: mesh.trust_domain.clone(),
        roots: mesh.roots.iter().map(|der| CertificateDer::from(der.0.clone())).collect(),
        issuers: issuers.collect(),
    })
}

fn to_wire(trust: &Trust) -> discovery::Trust {
    let issuers = trust.issuers.iter().map(|(cluster, issuer)| IssuerGrant {
        cluster: cluster.to_string(),
        may_issue: issuer.may_issue.0.clone(),
        cluster_id: issuer.cluster_id.0.into(),
    });
    discovery::Trust {
        roots_der: trust.roots.iter().map(|der| der.to_vec()).collect(),
        issuers: issuers.collect(),
        evicted: Vec::new(),
    }
}
