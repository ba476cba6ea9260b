//! Who is believed and who is not: forged, foreign, expired and confused chains.

use std::collections::BTreeMap;
use std::time::Duration;

use isthmus_identity::authority::CLUSTER_OID;
use isthmus_identity::verify::cluster_of;
use isthmus_identity::{
    ClusterAuthority, Expect, IssuerRecord, KeyPair, RootAuthority, Trust, VerifyError, answers, verify_signature,
};
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
    let text = refusal.to_string();
    assert!(text.contains("clock says 2027-01-15T08:11:40Z") && text.contains("to 2027-01-15T08:10:00Z"), "{text}");
    assert!(matches!(world.refusal(&chain, NOW - 200), VerifyError::Validity { what: "not valid yet", .. }));
}

#[test]
fn an_intermediate_that_has_ended_vouches_for_nobody() {
    let world = world("corp.example");
    let later = NOW + 91 * 86_400;
    let chain = forged(&world, "aws-eu", |leaf| leaf.not_after = rcgen::date_time_ymd(2040, 1, 1));
    assert!(world.trust.verify(&chain, NOW).is_ok(), "the forged leaf is sound as long as its issuer lives");
    assert!(matches!(world.refusal(&chain, later), VerifyError::Validity { what: "expired", .. }));
}

#[test]
fn nothing_outlives_its_issuer() {
    let world = world("corp.example");
    let aws = world.cluster("aws-eu");
    let last_hour = NOW + 90 * 86_400 - 3600;
    let chain = workload(&aws, "ns/shop/sa/cart", DAY, last_hour);
    assert_eq!(world.trust.verify(&chain, last_hour).expect("believed").not_after, NOW + 90 * 86_400);
    let csr = KeyPair::generate().expect("a key").request().expect("a request");
    let account: ServiceAccount = "ns/shop/sa/cart".parse().expect("valid");
    let refused = aws.issue_workload(&csr, &account, DAY, NOW + 90 * 86_400).expect_err("the issuer has ended");
    assert_eq!(refused.reason(), "issuer_ended");
}

/// A leaf of `ns/shop/sa/cart` signed with the real key of a cluster that does as it likes.
fn forged(
    world: &World,
    cluster: &str,
    change: impl FnOnce(&mut rcgen::CertificateParams),
) -> Vec<CertificateDer<'static>> {
    let key = KeyPair::generate().expect("a key");
    let csr = key.request().expect("a request");
    let cluster: ClusterName = cluster.parse().expect("valid");
    let intermediate = world.root.issue_intermediate(&csr, &cluster, &world.domain, NOW).expect("an intermediate");
    let rogue = rcgen::KeyPair::from_pem(&key.to_pem()).expect("the same key");
    let issuer = rcgen::Issuer::from_ca_cert_der(&intermediate, &rogue).expect("an issuer");
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![uri("spiffe://corp.example/ns/shop/sa/cart")];
    params.not_before = rcgen::date_time_ymd(2027, 1, 1);
    params.not_after = rcgen::date_time_ymd(2027, 2, 1);
    change(&mut params);
    let leaf = rcgen::KeyPair::generate().expect("a key");
    vec![params.signed_by(&leaf, &issuer).expect("signed").der().clone(), intermediate]
}

fn uri(text: &str) -> rcgen::SanType {
    rcgen::SanType::URI(text.try_into().expect("ASCII"))
}

#[test]
fn a_leaf_has_exactly_one_name() {
    let world = world("corp.example");
    assert!(world.trust.verify(&forged(&world, "aws-eu", |_| {}), NOW).is_ok(), "the forger's plain leaf is sound");
    let extra = [
        uri("spiffe://corp.example/ns/bank/sa/vault"),
        uri("https://corp.example"),
        rcgen::SanType::DnsName("cart.shop".try_into().expect("ASCII")),
    ];
    for name in extra {
        let chain = forged(&world, "aws-eu", |leaf| leaf.subject_alt_names.push(name.clone()));
        assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotSvid(_)), "{name:?}");
    }
    let chain = forged(&world, "aws-eu", |leaf| leaf.subject_alt_names.clear());
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotSvid(_)), "no name");
}

#[test]
fn other_spellings_of_an_identity_are_refused() {
    let world = world("corp.example");
    for text in [
        "spiffe://corp.example/ns/shop/sa/cart/",
        "spiffe://corp.example/ns/shop/sa/cart\0.evil",
        "spiffe://corp.example/ns/shop/sa/../bank",
        "spiffe://corp.example:443/ns/shop/sa/cart",
        "spiffe://corp.example/ns/%73hop/sa/cart",
        "SPIFFE://corp.example/ns/shop/sa/cart",
        "spiffe://corp.example",
        "https://corp.example/ns/shop/sa/cart",
    ] {
        let chain = forged(&world, "aws-eu", |leaf| leaf.subject_alt_names = vec![uri(text)]);
        assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotSvid(_)), "{text:?}");
    }
    for domain in ["corp.example.evil", "evil-corp.example", "corp"] {
        let text = format!("spiffe://{domain}/ns/shop/sa/cart");
        let chain = forged(&world, "aws-eu", |leaf| leaf.subject_alt_names = vec![uri(&text)]);
        assert!(matches!(world.refusal(&chain, NOW), VerifyError::ForeignDomain { .. }), "{text:?}");
    }
}

#[test]
fn a_leaf_that_may_sign_is_refused() {
    let world = world("corp.example");
    let chain = forged(&world, "aws-eu", |leaf| {
        leaf.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        leaf.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    });
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotSvid(_)));
}

#[test]
fn a_leaf_for_another_use_than_tls_is_refused() {
    let world = world("corp.example");
    let chain = forged(&world, "aws-eu", |leaf| {
        leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::EmailProtection];
    });
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::Untrusted { .. }));
}

#[test]
fn what_a_leaf_says_of_its_cluster_is_not_read() {
    let world = world("corp.example");
    let claim = rcgen::CustomExtension::from_oid_content(&CLUSTER_OID, b"\x0c\x06aws-eu".to_vec());
    let chain = forged(&world, "gcp-us", |leaf| leaf.custom_extensions = vec![claim]);
    let peer = world.trust.verify(&chain, NOW).expect("believed, as who it is");
    assert_eq!(peer.cluster.expect("a cluster").as_str(), "gcp-us");
}

#[test]
fn an_intermediate_is_believed_only_from_a_root_and_only_as_such() {
    let world = world("corp.example");
    let (gcp, foreign) = (world.cluster("gcp-us"), self::world("corp.example"));
    assert_eq!(world.trust.verify_intermediate(&gcp.chain()[0], NOW).expect("believed").as_str(), "gcp-us");
    let refused = |certificate: &CertificateDer<'_>, now| {
        world.trust.verify_intermediate(certificate, now).expect_err("must be refused").reason()
    };
    assert_eq!(refused(&foreign.cluster("gcp-us").chain()[0], NOW), "untrusted");
    assert_eq!(refused(&gcp.chain()[0], NOW + 91 * 86_400), "validity");
    assert_eq!(refused(world.root.certificate(), NOW), "not_svid");
    assert_eq!(refused(&workload(&gcp, "ns/shop/sa/cart", DAY, NOW)[0], NOW), "not_svid");
    let mut damaged = gcp.chain()[0].to_vec();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    assert_eq!(refused(&damaged.into(), NOW), "untrusted");
}

#[test]
fn operators_are_certified_by_a_root_alone_and_roots_certify_nobody_else() {
    let world = world("corp.example");
    let csr = || KeyPair::generate().expect("a key").request().expect("a request");
    let certify = |id: &str| {
        let id = id.parse().expect("valid");
        vec![world.root.issue_operator(&csr(), &id, DAY, NOW).expect("issued")]
    };
    let chain = certify("spiffe://corp.example/ns/isthmus-operators/sa/ana");
    let ana = world.trust.verify(&chain, NOW).expect("believed");
    assert!(ana.is_operator() && !ana.is_gateway());
    assert!(Expect::Operator.check(&ana).is_ok());
    assert!(Expect::Member.check(&ana).is_err());
    let chain = certify("spiffe://corp.example/ns/shop/sa/cart");
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotSvid(_)));
    let account: ServiceAccount = "ns/isthmus-operators/sa/mallory".parse().expect("valid");
    let refused = world.cluster("aws-eu").issue_workload(&csr(), &account, DAY, NOW).expect_err("reserved");
    assert_eq!(refused.reason(), "reserved");
    let chain = forged(&world, "aws-eu", |leaf| {
        leaf.subject_alt_names = vec![uri("spiffe://corp.example/ns/isthmus-operators/sa/mallory")];
    });
    assert!(matches!(world.refusal(&chain, NOW), VerifyError::NotGranted { .. }), "not even by a rogue cluster");
}

#[test]
fn requests_that_are_damaged_oversized_or_for_other_keys_are_refused() {
    let world = world("corp.example");
    let aws = world.cluster("aws-eu");
    let account: ServiceAccount = "ns/shop/sa/cart".parse().expect("valid");
    let reason = |csr: &[u8]| aws.issue_workload(csr, &account, DAY, NOW).expect_err("must be refused").reason();
    let good = KeyPair::generate().expect("a key").request().expect("a request");
    let mut damaged = good.clone();
    damaged[good.len() - 1] ^= 1;
    assert_eq!(reason(&damaged), "bad_csr");
    assert_eq!(reason(&[]), "bad_csr");
    assert_eq!(reason(&vec![0x30; 5000]), "bad_csr");
    let other = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key");
    let csr = rcgen::CertificateParams::default().serialize_request(&other).expect("a request");
    assert_eq!(reason(csr.der()), "bad_csr");
    // Whatever names a request asks for, the issuer decides.
    let mut params = rcgen::CertificateParams::default();
    params.subject_alt_names = vec![uri("spiffe://corp.example/ns/bank/sa/vault")];
    let csr = params.serialize_request(&rcgen::KeyPair::generate().expect("a key")).expect("a request");
    let chain = aws.issue_workload(csr.der(), &account, DAY, NOW).expect("issued");
    assert_eq!(world.trust.verify(&chain, NOW).expect("believed").spiffe.account, account);
    assert!(answers(csr.der(), &chain[0]) && !answers(&good, &chain[0]));
}

#[test]
fn records_are_signed_and_certificates_in_their_guise_are_not() {
    let world = world("corp.example");
    let aws = world.cluster("aws-eu");
    let signature = aws.sign(b"isthmus log entry").expect("signed");
    assert!(verify_signature(&aws.chain()[0], b"isthmus log entry", &signature));
    assert!(!verify_signature(&aws.chain()[0], b"isthmus log entrz", &signature));
    assert!(!verify_signature(&world.cluster("aws-eu").chain()[0], b"isthmus log entry", &signature), "another key");
    let (_, parsed) = x509_parser::parse_x509_certificate(&aws.chain()[0]).expect("a certificate");
    assert_eq!(aws.sign(parsed.tbs_certificate.as_ref()).expect_err("refused").reason(), "not_a_record");
}

#[test]
fn each_expectation_names_whom_it_wanted() {
    let world = world("corp.example");
    let aws = world.cluster("aws-eu");
    let cart = world.trust.verify(&workload(&aws, "ns/shop/sa/cart", DAY, NOW), NOW).expect("believed");
    let gateway = world.trust.verify(&aws.issue_gateway(NOW).expect("issued").chain, NOW).expect("believed");
    let of = |name: &str| Some(name.parse::<ClusterName>().expect("valid"));
    assert!(Expect::Workload(of("aws-eu")).check(&cart).is_ok());
    assert!(Expect::Workload(None).check(&gateway).is_err());
    assert!(Expect::Gateway(of("aws-eu")).check(&gateway).is_ok());
    let refused = Expect::Gateway(of("gcp-us")).check(&gateway).expect_err("another cluster").to_string();
    assert!(refused.contains("sa/gateway of aws-eu, expected a gateway of cluster gcp-us"), "{refused}");
    let refused = Expect::Workload(of("gcp-us")).check(&cart).expect_err("another cluster").to_string();
    assert!(refused.contains("expected a workload of cluster gcp-us"), "{refused}");
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
