//! Real handshakes over the configs: post-quantum key exchange, no resumption, both sides verified.

use std::io::{Read as _, Write as _};
use std::sync::Arc;

use arc_swap::ArcSwap;
use isthmus_identity::tls::{client_config, peer_identity, pinned_client_config, server_config};
use isthmus_identity::{
    ClusterAuthority, Expect, Identity, IssuerRecord, KeyPair, RootAuthority, SharedIdentity, SharedTrust, Trust,
    fingerprint,
};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterId, ClusterName, TrustDomain};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};
use rustls_pki_types::ServerName;

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
    let name = ServerName::try_from("anything.invalid").expect("a name");
    let mut client = ClientConnection::new(Arc::new(client), name)?;
    let mut server = ServerConnection::new(Arc::new(server))?;
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
    let mut gateway = mesh.aws.issue_gateway(now()).expect("issued");
    gateway.chain.push(mesh.root.certificate().clone());
    let gateway = SharedIdentity::new(&gateway).expect("usable");
    let server = || server_config(&gateway, &mesh.trust, None, &[b"x"]);
    shake(pinned_client_config(&root, &[b"x"]), server()).expect("the right root");
    let other = fingerprint(self::mesh().root.certificate());
    assert!(shake(pinned_client_config(&other, &[b"x"]), server()).is_err(), "another root");
}
