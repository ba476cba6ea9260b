//! Who is believed and who is not: forged, foreign, expired and confused chains.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_identity::verify::cluster_of;
use isthmus_identity::{ClusterAuthority, IssuerRecord, KeyPair, RootAuthority, Trust, VerifyError};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, ServiceAccount, TrustDomain};
use rustls_pki_types::CertificateDer;

const NOW: u64 = 1_800_000_000;
const DAY: Duration = Duration::from_secs(86_400);

struct World {
    root: RootAuthority,
    domain: TrustDomain,
    trust: Trust,
}

fn world(name: &str) -> World {
    let domain: TrustDomain = name.parse().expect("valid");
    let root = RootAuthority::create("test", &domain, NOW).expect("a root");
    let mut issuers = BTreeMap::new();
    for (id, (cluster, namespaces)) in [("aws-eu", "*"), ("gcp-us", "shop*")].into_iter().enumerate() {
        let may_issue = Patterns(vec![namespaces.to_owned()]);
        let id = ClusterId(u16::try_from(id).expect("few") + 1);
        issuers.insert(cluster.parse().expect("valid"), IssuerRecord { cluster_id: id, may_issue });
    }
    let trust = Trust { trust_domain: domain.clone(), roots: vec![root.certificate().clone()], issuers };
    World { root, domain, trust }
}

impl World {
    fn cluster(&self, name: &str) -> ClusterAuthority {
        let key = KeyPair::generate().expect("a key");
        let cluster: ClusterName = name.parse().expect("valid");
        let csr = key.request().expect("a request");
        let intermediate = self.root.issue_intermediate(&csr, &cluster, &self.domain, NOW).expect("an intermediate");
        assert_eq!(cluster_of(&intermediate), Some(cluster));
        ClusterAuthority::load(vec![intermediate], key, self.domain.clone())
    }

    fn refusal(&self, chain: &[CertificateDer<'_>], now: u64) -> VerifyError {
        self.trust.verify(chain, now).expect_err("must be refused")
    }
}

fn workload(authority: &ClusterAuthority, account: &str, life: Duration, now: u64) -> Vec<CertificateDer<'static>> {
    let key = KeyPair::generate().expect("a key");
    let account: ServiceAccount = account.parse().expect("valid");
    authority.issue_workload(&key.request().expect("a request"), &account, life, now).expect("a certificate")
}

#[test]
fn a_workload_is_known_with_its_cluster() {
    let world = world("corp.example");
    let chain = workload(&world.cluster("gcp-us"), "ns/shop/sa/cart", DAY, NOW);
    let peer = world.trust.verify(&chain, NOW).expect("believed");
    assert_eq!(peer.spiffe.to_string(), "spiffe://corp.example/ns/shop/sa/cart");
    assert_eq!(peer.cluster.expect("a cluster").as_str(), "gcp-us");
    assert!(!peer.spiffe.account.eq(&ServiceAccount::gateway()));
}

#[test]
fn a_cluster_may_issue_only_for_namespaces_granted_to_it() {
    let world = world("corp.example");
    let chain = workload(&world.cluster("gcp-us"), "ns/bank/sa/vault", DAY, NOW);
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotGranted { .. }));
    let chain = workload(&world.cluster("aws-eu"), "ns/isthmus-operators/sa/root", DAY, NOW);
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotGranted { .. }), "not even with `*`");
}

#[test]
fn a_cluster_that_left_is_refused() {
    let world = world("corp.example");
    let chain = workload(&world.cluster("evicted"), "ns/shop/sa/cart", DAY, NOW);
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotMember { .. }));
}

#[test]
fn no_workload_is_issued_the_gateways_account() {
    let world = world("corp.example");
    let csr = KeyPair::generate().expect("a key").request().expect("a request");
    let refused = world.cluster("aws-eu").issue_workload(&csr, &ServiceAccount::gateway(), DAY, NOW);
    assert!(refused.is_err());
    let gateway = world.cluster("aws-eu").issue_gateway(NOW).expect("its own way");
    assert!(world.trust.verify(&gateway.chain, NOW).expect("believed").is_gateway());
}

#[test]
fn foreign_roots_and_look_alike_domains_are_refused() {
    let world = world("corp.example");
    let same_name = self::world("corp.example");
    let chain = workload(&same_name.cluster("aws-eu"), "ns/shop/sa/cart", DAY, NOW);
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::Untrusted { .. }), "another root of our own name");
    for other in ["corp.example.evil", "evil.corp.example", "corp"] {
        let chain = workload(&self::world(other).cluster("aws-eu"), "ns/shop/sa/cart", DAY, NOW);
        assert!(matches!(world.refusal(&chain, NOW), VerifyError::ForeignDomain { .. }), "{other}");
    }
}

#[test]
fn an_intermediate_that_names_another_cluster_in_no_certificate_of_ours_does_not_help() {
    // A workload's key cannot sign: its certificate is no CA, whatever stands beside it in the chain.
    let world = world("corp.example");
    let aws = world.cluster("aws-eu");
    let mallory = KeyPair::generate().expect("a key");
    let account: ServiceAccount = "ns/shop/sa/mallory".parse().expect("valid");
    let csr = mallory.request().expect("a request");
    let chain = aws.issue_workload(&csr, &account, DAY, NOW).expect("a certificate");
    let forged = ClusterAuthority::load(chain, mallory, world.domain.clone());
    let chain = workload(&forged, "ns/bank/sa/vault", DAY, NOW);
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::Untrusted { .. }));
}

#[test]
fn a_signing_certificate_is_no_identity() {
    let world = world("corp.example");
    let aws = world.cluster("aws-eu");
    assert!(matches!(world.refusal(aws.chain(), NOW), VerifyError::NotSvid(_)));
    let root = [world.root.certificate().clone()];
    assert!(matches!(world.refusal(&root, NOW), VerifyError::NotSvid(_)));
}

#[test]
fn validity_is_judged_with_a_minute_of_leeway_and_names_both_clocks() {
    let world = world("corp.example");
    let chain = workload(&world.cluster("aws-eu"), "ns/shop/sa/cart", Duration::from_secs(600), NOW);
    assert!(world.trust.verify(&chain, NOW + 630).is_ok(), "within the leeway");
    let refusal = world.refusal(&chain, NOW + 700);
    assert!(matches!(refusal, VerifyError::Validity { what: "expired", .. }));
    assert!(refusal.to_string().contains(&(NOW + 700).to_string()));
    assert!(matches!(world.refusal(&chain, NOW - 200), VerifyError::Validity { what: "not valid yet", .. }));
}

#[test]
fn an_intermediate_that_has_ended_vouches_for_nobody() {
    let world = world("corp.example");
    let later = NOW + 91 * 86_400;
    let chain = workload(&world.cluster("aws-eu"), "ns/shop/sa/cart", DAY, later);
    assert!(matches!(world.refusal(&chain, later), VerifyError::Untrusted { .. }));
}

#[test]
fn bytes_that_are_no_certificate_are_refused_without_panic() {
    let world = world("corp.example");
    let chain = workload(&world.cluster("aws-eu"), "ns/shop/sa/cart", DAY, NOW);
    let leaf = chain[0].to_vec();
    for len in 0..leaf.len() {
        let cut = [CertificateDer::from(leaf[..len].to_vec())];
        assert!(world.trust.verify(&cut, NOW).is_err());
    }
    for at in 0..leaf.len() {
        let mut changed = leaf.clone();
        changed[at] ^= 0x55;
        let chain = [CertificateDer::from(changed), chain[1].clone()];
        assert!(world.trust.verify(&chain, NOW).is_err(), "byte {at}");
    }
    assert_eq!(world.refusal(&[], NOW), VerifyError::Missing);
}
