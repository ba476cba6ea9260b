//! Real handshakes over the configs: post-quantum key exchange, no resumption, both sides verified.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use arc_swap::ArcSwap;
use isthmus_identity::tls::{client_config, peer_identity, pinned_client_config, refusal, server_config, server_name};
use isthmus_identity::{
    ClusterAuthority, Expect, Identity, IssuerRecord, KeyPair, RootAuthority, SharedIdentity, SharedTrust, Trust,
    fingerprint,
};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, TrustDomain};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

struct Mesh {
    root: RootAuthority,
    aws: ClusterAuthority,
    trust: SharedTrust,
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs()
}

fn mesh() -> Mesh {
    let domain: TrustDomain = "corp.example".parse().expect("valid");
    let root = RootAuthority::create("test", &domain, now()).expect("a root");
    let key = KeyPair::generate().expect("a key");
    let name: ClusterName = "aws-eu".parse().expect("valid");
    let csr = key.request().expect("a request");
    let intermediate = root.issue_intermediate(&csr, &name, &domain, now()).expect("an intermediate");
    let issuer = IssuerRecord { cluster_id: ClusterId(1), may_issue: Patterns::all() };
    let trust = Trust {
        trust_domain: domain.clone(),
        roots: vec![root.certificate().clone()],
        issuers: [(name, issuer)].into(),
    };
    Mesh {
        root,
        aws: ClusterAuthority::load(vec![intermediate], key, domain),
        trust: Arc::new(ArcSwap::from_pointee(trust)),
    }
}

impl Mesh {
    fn workload(&self, account: &str) -> SharedIdentity {
        let key = KeyPair::generate().expect("a key");
        let csr = key.request().expect("a request");
        let life = std::time::Duration::from_secs(3600);
        let chain = self.aws.issue_workload(&csr, &account.parse().expect("valid"), life, now()).expect("issued");
        SharedIdentity::new(&Identity::new(chain, key).expect("whole")).expect("usable")
    }
}

/// Runs both ends in memory until the handshake is over; returns the ends.
fn shake(client: ClientConfig, server: ServerConfig) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    shake_shared(Arc::new(client), Arc::new(server))
}

fn shake_shared(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
    let mut client = ClientConnection::new(client, server_name())?;
    let mut server = ServerConnection::new(server)?;
    for _ in 0..10 {
        let mut wire = Vec::new();
        client.write_tls(&mut wire).expect("memory");
        server.read_tls(&mut wire.as_slice()).expect("memory");
        server.process_new_packets()?;
        let mut wire = Vec::new();
        server.write_tls(&mut wire).expect("memory");
        client.read_tls(&mut wire.as_slice()).expect("memory");
        client.process_new_packets()?;
    }
    Ok((client, server))
}

#[test]
fn both_ends_are_verified_over_a_post_quantum_exchange() {
    let mesh = mesh();
    let (cart, web) = (mesh.workload("ns/shop/sa/cart"), mesh.workload("ns/shop/sa/web"));
    let accounts = Expect::Accounts {
        cluster: "aws-eu".parse().expect("valid"),
        accounts: vec!["ns/shop/sa/cart".parse().expect("valid")],
    };
    let client = client_config(&web, &mesh.trust, accounts, &[b"isthmus-tunnel/1"]);
    let server = server_config(&cart, &mesh.trust, Some(Expect::Member), &[b"isthmus-tunnel/1"]);
    let (mut client, mut server) = shake(client, server).expect("believed");
    let group = client.negotiated_key_exchange_group().expect("done").name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(client.tls13_tickets_received(), 0, "resumption is off");
    let peer = peer_identity(&mesh.trust, server.peer_certificates().expect("shown")).expect("believed");
    assert_eq!(peer.spiffe.account.to_string(), "ns/shop/sa/web");

    client.writer().write_all(b"hello").expect("memory");
    let mut wire = Vec::new();
    client.write_tls(&mut wire).expect("memory");
    server.read_tls(&mut wire.as_slice()).expect("memory");
    server.process_new_packets().expect("sound");
    let mut text = [0; 5];
    server.reader().read_exact(&mut text).expect("five bytes");
    assert_eq!(&text, b"hello");
}

#[test]
fn another_account_than_the_exported_one_is_refused() {
    let mesh = mesh();
    let (mallory, web) = (mesh.workload("ns/shop/sa/mallory"), mesh.workload("ns/shop/sa/web"));
    let accounts = Expect::Accounts {
        cluster: "aws-eu".parse().expect("valid"),
        accounts: vec!["ns/shop/sa/cart".parse().expect("valid")],
    };
    let client = client_config(&web, &mesh.trust, accounts, &[b"x"]);
    let server = server_config(&mallory, &mesh.trust, Some(Expect::Member), &[b"x"]);
    let refused = shake(client, server).expect_err("refused").to_string();
    assert!(refused.contains("mallory"), "{refused}");
}

#[test]
fn a_workload_is_no_gateway_and_a_joiner_needs_the_right_root() {
    let mesh = mesh();
    let web = mesh.workload("ns/shop/sa/web");
    let server = || server_config(&web, &mesh.trust, None, &[b"x"]);
    let client = client_config(&web, &mesh.trust, Expect::Gateway(None), &[b"x"]);
    assert!(shake(client, server()).is_err());

    let root = fingerprint(mesh.root.certificate());
    assert!(shake(pinned_client_config(&root, &[b"x"]), server()).is_err(), "not a gateway");
    let gateway = mesh.aws.issue_gateway(now()).expect("issued");
    let gateway = SharedIdentity::new(&gateway).expect("usable");
    let server = || server_config(&gateway, &mesh.trust, None, &[b"x"]);
    shake(pinned_client_config(&root, &[b"x"]), server()).expect("the right root");
    let other = fingerprint(self::mesh().root.certificate());
    assert!(shake(pinned_client_config(&other, &[b"x"]), server()).is_err(), "another root");
}

#[test]
fn a_client_without_certificate_is_admitted_only_where_one_may_come_to_enrol() {
    let mesh = mesh();
    let gateway = SharedIdentity::new(&mesh.aws.issue_gateway(now()).expect("issued")).expect("usable");
    let client = || pinned_client_config(&fingerprint(mesh.root.certificate()), &[b"x"]);
    let (_, server) = shake(client(), server_config(&gateway, &mesh.trust, None, &[b"x"])).expect("to enrol");
    assert!(server.peer_certificates().is_none());
    assert!(shake(client(), server_config(&gateway, &mesh.trust, Some(Expect::Member), &[b"x"])).is_err());
}

#[test]
fn two_visits_are_two_full_handshakes() {
    let mesh = mesh();
    let (cart, web) = (mesh.workload("ns/shop/sa/cart"), mesh.workload("ns/shop/sa/web"));
    let server = Arc::new(server_config(&cart, &mesh.trust, Some(Expect::Member), &[b"x"]));
    let client = Arc::new(client_config(&web, &mesh.trust, Expect::Workload(None), &[b"x"]));
    for visit in ["first", "second"] {
        let (client, server) = shake_shared(client.clone(), server.clone()).expect("believed");
        assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full), "{visit}");
        assert_eq!(server.handshake_kind(), Some(rustls::HandshakeKind::Full), "{visit}");
        assert_eq!(client.tls13_tickets_received(), 0);
    }
}

#[test]
fn a_changed_trust_and_a_renewed_identity_count_from_the_next_handshake_on() {
    let mesh = mesh();
    let (cart, web) = (mesh.workload("ns/shop/sa/cart"), mesh.workload("ns/shop/sa/web"));
    let server = Arc::new(server_config(&cart, &mesh.trust, Some(Expect::Member), &[b"x"]));
    let client = Arc::new(client_config(&web, &mesh.trust, Expect::Member, &[b"x"]));
    let (_, before) = shake_shared(client.clone(), server.clone()).expect("believed");
    let shown = before.peer_certificates().expect("shown")[0].clone();

    let key = KeyPair::generate().expect("a key");
    let csr = key.request().expect("a request");
    let account = "ns/shop/sa/web".parse().expect("valid");
    let chain = mesh.aws.issue_workload(&csr, &account, std::time::Duration::from_secs(3600), now()).expect("issued");
    web.replace(&Identity::new(chain, key).expect("whole")).expect("usable");
    let (_, after) = shake_shared(client.clone(), server.clone()).expect("believed");
    assert_ne!(after.peer_certificates().expect("shown")[0], shown);

    let mut without = Trust::clone(&mesh.trust.load());
    without.issuers.clear();
    mesh.trust.store(Arc::new(without));
    let error = shake_shared(client, server).expect_err("evicted");
    assert_eq!(refusal(&error).expect("a verdict of ours").reason(), "not_member");
    let chain = after.peer_certificates().expect("shown");
    assert_eq!(peer_identity(&mesh.trust, chain).expect_err("evicted").reason(), "not_member");
}
