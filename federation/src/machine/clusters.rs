//! Tokens, joining, certificates, leaving: who is a member, and under which number and key.

use std::sync::Arc;

use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, TrustDomain};

use super::{At, Machine, Outcome, Rejection};
use crate::command::{ClusterFacts, token_hash};
use crate::der::{Der, Fingerprint};
use crate::registry::{CertificateRequest, ClusterRecord, GoneCluster, Mesh, TokenRecord, TokenState};
use crate::verify::Trust;

/// Clusters of one mesh. Ten times the largest known fleet; a registry of this size snapshots in a frame.
pub const CLUSTERS_MAX: usize = 1_000;
/// Join tokens that the registry keeps, open or not.
pub const TOKENS_MAX: usize = 1_000;
/// Longest life of a join token: a day. The CLI's default is 15 minutes.
pub const TOKEN_TTL_MAX_S: u64 = 24 * 3600;
/// How long a number rests after its cluster left: connection IDs and tickets carry it.
pub const NUMBER_REST_S: u64 = 7 * 24 * 3600;
/// Addresses of one cluster.
const ADDRESSES_MAX: usize = 16;
/// Longest certificate or request; P-256 ones are under 1 KiB.
const DER_LEN_MAX: usize = 8 * 1024;

impl Machine {
    #[expect(clippy::too_many_arguments, reason = "the fields of `Command::Init`, once")]
    pub(super) fn init(
        &mut self,
        at: At,
        mesh: String,
        trust_domain: TrustDomain,
        roots: Vec<Der>,
        cluster: ClusterName,
        chain: Vec<Der>,
        facts: ClusterFacts,
    ) -> Outcome {
        let _: ClusterName =
            mesh.parse().map_err(|_| Rejection::invalid("mesh", "must be a DNS label (1-63 of a-z, 0-9 and '-')"))?;
        check_facts(&facts)?;
        self.registry.mesh = Some(Arc::new(Mesh { name: mesh, trust_domain, roots }));
        self.admit(at, cluster, chain, facts, Patterns::all(), true)
    }

    pub(super) fn add_token(
        &mut self,
        at: At,
        id: String,
        hash: Fingerprint,
        cluster: ClusterName,
        namespaces: Patterns,
        expires_unix_s: u64,
    ) -> Outcome {
        if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return Err(Rejection::invalid("token id", "must be 1-64 letters, digits and '-'"));
        }
        if expires_unix_s > at.unix_s + TOKEN_TTL_MAX_S {
            return Err(Rejection::invalid("token expiry", format!("at most {TOKEN_TTL_MAX_S} s from now")));
        }
        if namespaces.0.is_empty() || namespaces.0.len() > 256 || namespaces.0.iter().any(|p| p.len() > 64) {
            return Err(Rejection::invalid("token namespaces", "1-256 patterns of at most 64 bytes"));
        }
        let tokens = Arc::make_mut(&mut self.registry.tokens);
        if tokens.contains_key(&id) || tokens.values().any(|token| token.hash == hash) {
            return Err(Rejection::invalid("token id", "is taken; make another token"));
        }
        // Tokens that ended a week ago tell nobody anything any more.
        tokens.retain(|_, token| token.expires_unix_s + NUMBER_REST_S > at.unix_s);
        if tokens.len() >= TOKENS_MAX {
            return Err(Rejection::QuotaReached { what: "join tokens".into(), max: TOKENS_MAX });
        }
        let record = TokenRecord { hash, cluster, namespaces, expires_unix_s, state: TokenState::Open };
        tokens.insert(id, Arc::new(record));
        Ok(())
    }

    pub(super) fn revoke_token(&mut self, id: &str) -> Outcome {
        let tokens = Arc::make_mut(&mut self.registry.tokens);
        let token = tokens.get_mut(id).ok_or(Rejection::TokenUnknown)?;
        match token.state {
            TokenState::Used(index) => Err(Rejection::TokenUsed { id: id.into(), index }),
            TokenState::Open | TokenState::Revoked => {
                Arc::make_mut(token).state = TokenState::Revoked;
                Ok(())
            }
        }
    }

    /// Compare-and-set: of all requests with one secret, the first in the log wins.
    pub(super) fn join_request(
        &mut self,
        at: At,
        secret: &str,
        cluster: ClusterName,
        csr: Der,
        facts: ClusterFacts,
    ) -> Outcome {
        check_facts(&facts)?;
        check_der("csr", &csr)?;
        let hash = token_hash(secret);
        let same = |token: &TokenRecord| subtle::ConstantTimeEq::ct_eq(&token.hash.0[..], &hash.0[..]).into();
        let found = self.registry.tokens.iter().find(|(_, token)| same(token));
        let (id, token) = found.map(|(id, token)| (id.clone(), token.clone())).ok_or(Rejection::TokenUnknown)?;
        match token.state {
            TokenState::Used(index) => return Err(Rejection::TokenUsed { id, index }),
            TokenState::Revoked => return Err(Rejection::TokenRevoked(id)),
            TokenState::Open if token.expires_unix_s < at.unix_s => {
                return Err(Rejection::TokenExpired { id, ago_s: at.unix_s - token.expires_unix_s });
            }
            TokenState::Open => {}
        }
        if token.cluster != cluster {
            return Err(Rejection::NameMismatch { for_cluster: token.cluster.clone(), asked: cluster });
        }
        if self.registry.clusters.contains_key(&cluster) || self.registry.requests.contains_key(&cluster) {
            return Err(Rejection::NameTaken(cluster));
        }
        if self.registry.clusters.len() + self.registry.requests.len() >= CLUSTERS_MAX {
            return Err(Rejection::QuotaReached { what: "clusters of the mesh".into(), max: CLUSTERS_MAX });
        }
        let used = TokenRecord { state: TokenState::Used(at.index), ..(*token).clone() };
        Arc::make_mut(&mut self.registry.tokens).insert(id, Arc::new(used));
        let join = Some((facts, token.namespaces.clone()));
        self.request(at, cluster, CertificateRequest { csr, join, index: at.index, unix_s: at.unix_s });
        Ok(())
    }

    pub(super) fn renew_request(&mut self, at: At, writer: &ClusterName, csr: Der) -> Outcome {
        check_der("csr", &csr)?;
        let request = CertificateRequest { csr, join: None, index: at.index, unix_s: at.unix_s };
        self.request(at, writer.clone(), request);
        Ok(())
    }

    fn request(&mut self, _at: At, cluster: ClusterName, request: CertificateRequest) {
        Arc::make_mut(&mut self.registry.requests).insert(cluster, Arc::new(request));
    }

    /// A signer's answer. What the new cluster may do comes from its token, not from the signer's entry.
    pub(super) fn grant(&mut self, at: At, cluster: ClusterName, chain: Vec<Der>) -> Outcome {
        let request =
            self.registry.requests.get(&cluster).ok_or_else(|| Rejection::NoRequest(cluster.clone()))?.clone();
        let mesh = self.registry.mesh.as_ref().ok_or(Rejection::NoMesh)?;
        let trust = Trust { domain: &mesh.trust_domain, roots: &mesh.roots, unix_s: at.unix_s };
        let unproven = |error: crate::verify::Unproven| Rejection::Unproven(error.to_string());
        let named = self.verify.cluster(trust, &chain).map_err(unproven)?;
        if named != cluster {
            return Err(Rejection::NotYours(format!(
                "the certificate is for cluster {named}, the request {cluster}'s"
            )));
        }
        let first = chain.first().ok_or_else(|| Rejection::Unproven("an empty chain".into()))?;
        self.verify.answers(&request.csr, first).map_err(unproven)?;
        match request.join.clone() {
            Some((facts, namespaces)) => self.admit(at, cluster.clone(), chain, facts, namespaces, false)?,
            None => {
                let clusters = Arc::make_mut(&mut self.registry.clusters);
                let record = clusters.get_mut(&cluster).ok_or_else(|| Rejection::NotAMember(cluster.clone()))?;
                let record = Arc::make_mut(record);
                record.previous = std::mem::replace(&mut record.chain, chain);
            }
        }
        Arc::make_mut(&mut self.registry.requests).remove(&cluster);
        Ok(())
    }

    fn admit(
        &mut self,
        at: At,
        name: ClusterName,
        chain: Vec<Der>,
        facts: ClusterFacts,
        namespaces: Patterns,
        signer: bool,
    ) -> Outcome {
        let id = self.free_number(at.unix_s)?;
        Arc::make_mut(&mut self.registry.gone).remove(&id);
        let record = ClusterRecord {
            id,
            name: name.clone(),
            chain,
            previous: Vec::new(),
            facts,
            may_issue: namespaces.clone(),
            may_export: namespaces,
            signer,
            joined_index: at.index,
            joined_unix_s: at.unix_s,
        };
        Arc::make_mut(&mut self.registry.clusters).insert(name, Arc::new(record));
        Ok(())
    }

    /// The smallest number that no member has and that has rested long enough.
    fn free_number(&self, unix_s: u64) -> Result<ClusterId, Rejection> {
        let taken: std::collections::BTreeSet<u16> = self.registry.clusters.values().map(|c| c.id.0).collect();
        let rests = |id: u16| {
            let gone = self.registry.gone.get(&ClusterId(id));
            gone.is_some_and(|gone| unix_s < gone.left_unix_s + NUMBER_REST_S)
        };
        (1..=u16::MAX)
            .find(|id| !taken.contains(id) && !rests(*id))
            .map(ClusterId)
            .ok_or(Rejection::QuotaReached { what: "cluster numbers".into(), max: usize::from(u16::MAX) })
    }

    pub(super) fn update_cluster(&mut self, writer: &ClusterName, facts: ClusterFacts) -> Outcome {
        check_facts(&facts)?;
        let clusters = Arc::make_mut(&mut self.registry.clusters);
        let record = clusters.get_mut(writer).ok_or_else(|| Rejection::NotAMember(writer.clone()))?;
        Arc::make_mut(record).facts = facts;
        Ok(())
    }

    pub(super) fn set_signer(&mut self, cluster: &ClusterName, signer: bool) -> Outcome {
        if !signer {
            self.not_the_last_signer(cluster)?;
        }
        let clusters = Arc::make_mut(&mut self.registry.clusters);
        let record = clusters.get_mut(cluster).ok_or_else(|| Rejection::NotAMember(cluster.clone()))?;
        Arc::make_mut(record).signer = signer;
        Ok(())
    }

    fn not_the_last_signer(&self, cluster: &ClusterName) -> Outcome {
        let other = self.registry.clusters.values().any(|record| record.signer && record.name != *cluster);
        match self.member(cluster)?.signer && !other {
            true => Err(Rejection::LastSigner(cluster.clone())),
            false => Ok(()),
        }
    }

    /// Leave or eviction: everything the cluster wrote goes with it, its number rests.
    pub(super) fn remove(&mut self, at: At, name: ClusterName, evicted: bool) -> Outcome {
        self.not_the_last_signer(&name)?;
        let registry = &mut self.registry;
        let record =
            Arc::make_mut(&mut registry.clusters).remove(&name).ok_or_else(|| Rejection::NotAMember(name.clone()))?;
        Arc::make_mut(&mut registry.exports).remove(&name);
        Arc::make_mut(&mut registry.service_entries).remove(&name);
        Arc::make_mut(&mut registry.requests).remove(&name);
        Arc::make_mut(&mut registry.writers).remove(&format!("cluster/{name}"));
        let issuers = record.chain.first().into_iter().chain(record.previous.first()).map(Der::fingerprint).collect();
        let gone = GoneCluster { name, issuers, left_unix_s: at.unix_s, evicted };
        Arc::make_mut(&mut registry.gone).insert(record.id, Arc::new(gone));
        Ok(())
    }
}

fn check_facts(facts: &ClusterFacts) -> Outcome {
    if facts.addresses.len() > ADDRESSES_MAX {
        return Err(Rejection::invalid("addresses", format!("{} of at most {ADDRESSES_MAX}", facts.addresses.len())));
    }
    for address in &facts.addresses {
        let port =
            address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse().ok());
        if address.len() > 262 || port.is_none_or(|port: u16| port == 0) {
            let shown: String = address.chars().take(64).collect();
            return Err(Rejection::invalid("addresses", format!("{shown:?} is not host:port")));
        }
    }
    let texts =
        [&facts.provider, &facts.version, &facts.locality.region, &facts.locality.zone, &facts.locality.subzone];
    match texts.into_iter().any(|text| text.len() > 128) {
        true => Err(Rejection::invalid("facts", "provider, version and locality: at most 128 bytes each")),
        false => Ok(()),
    }
}

fn check_der(field: &str, der: &Der) -> Outcome {
    match der.0.len() {
        1..=DER_LEN_MAX => Ok(()),
        len => Err(Rejection::invalid(field, format!("{len} bytes, must be 1-{DER_LEN_MAX}"))),
    }
}
