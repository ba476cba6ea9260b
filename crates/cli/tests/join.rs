//! The built `isthmus join` against a gateway's TLS and join service: a real handshake, a real grant.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isthmus_gateway::cluster_files::ClusterFiles;
use isthmus_gateway::config::GatewayConfig;
use isthmus_identity::tls::server_config;
use isthmus_identity::token::Secret;
use isthmus_identity::{ClusterAuthority, JoinToken, KeyPair, RootAuthority, SharedIdentity, Trust, fingerprint};
use isthmus_model::{ClusterName, TrustDomain};
use isthmus_wire::join::join_event::Event;
use isthmus_wire::join::join_server::{Join, JoinServer};
use isthmus_wire::join::{DryRun, Granted, JoinEvent, JoinRequest};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

type Events = Pin<Box<dyn Stream<Item = Result<JoinEvent, Status>> + Send>>;

/// A gateway of mesh `corp` that grants whatever is asked, as soon as it may.
#[derive(Clone)]
struct Gateway {
    root: Arc<RootAuthority>,
    /// Streams that end before the grant.
    cut_off: Arc<Mutex<u32>>,
    requests: Arc<Mutex<Vec<JoinRequest>>>,
    clock_offset_ms: i64,
}

#[tonic::async_trait]
impl Join for Gateway {
    type JoinStream = Events;

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        self.requests.lock().expect("unpoisoned").push(request.clone());
        let says = |event| Ok(JoinEvent { event: Some(event) });
        let mut events = vec![says(Event::Progress("token accepted, waiting for a signer".into()))];
        let mut cut_off = self.cut_off.lock().expect("unpoisoned");
        if request.dry_run {
            let server_unix_ms = now_s() as i64 * 1_000 + self.clock_offset_ms;
            events = vec![says(Event::DryRun(DryRun { server_unix_ms, expires_unix_s: now_s() + 600 }))];
        } else if *cut_off > 0 {
            *cut_off -= 1;
        } else {
            let cluster: ClusterName = request.cluster.parse().map_err(|_| Status::invalid_argument("name"))?;
            let chain = self.root.issue_intermediate(&request.csr_der, &cluster, &domain(), now_s());
            events.push(says(Event::Granted(Granted {
                chain_der: vec![chain.map_err(|_| Status::invalid_argument("bad CSR"))?.to_vec()],
                roots_der: vec![self.root.certificate().to_vec()],
                cluster_id: 2,
                mesh: "corp".into(),
                trust_domain: "corp".into(),
                peers: Vec::new(),
                log_index: 7,
            })));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn domain() -> TrustDomain {
    "corp".parse().expect("valid")
}

fn gateway() -> Gateway {
    let root = RootAuthority::create("corp", &domain(), now_s()).expect("a root");
    Gateway { root: Arc::new(root), cut_off: Arc::default(), requests: Arc::default(), clock_offset_ms: 0 }
}

/// Serves on TLS with a gateway's certificate; gives a token for `gcp-us`.
async fn serve(gateway: &Gateway) -> JoinToken {
    let key = KeyPair::generate().expect("a key");
    let csr = key.request().expect("a request");
    let name = "aws-eu".parse().expect("valid");
    let intermediate = gateway.root.issue_intermediate(&csr, &name, &domain(), now_s()).expect("granted");
    let authority = ClusterAuthority::load(vec![intermediate], key, domain());
    let identity = SharedIdentity::new(&authority.issue_gateway(now_s()).expect("issued")).expect("usable");
    let roots = vec![gateway.root.certificate().clone()];
    let trust = Trust { trust_domain: domain(), roots, issuers: BTreeMap::new() };
    let trust = Arc::new(arc_swap::ArcSwap::from_pointee(trust));
    let config = Arc::new(server_config(&identity, &trust, None, &[b"isthmus-join/1"]));

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener).then(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let mut tls = acceptor.accept(stream?).await?;
            // tonic serves a pipe; what goes through it goes through TLS.
            let (inside, mut outside) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut tls, &mut outside).await });
            Ok::<_, std::io::Error>(inside)
        }
    });
    // A client that refuses our certificate ends its handshake, not the server.
    let incoming = incoming.filter(Result::is_ok);
    let service = JoinServer::new(gateway.clone());
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    JoinToken {
        mesh: "corp".into(),
        cluster: "gcp-us".parse().expect("valid"),
        id: "t1".into(),
        gateways: vec![address.to_string()],
        root_fingerprint: fingerprint(gateway.root.certificate()),
        secret: Secret::generate(),
    }
}

async fn join(token: &JoinToken, state: &TempDir, more: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_isthmus"));
    command.arg("join").arg(token.to_string()).arg("--state").arg(state.path()).args(more);
    let output = tokio::time::timeout(Duration::from_secs(20), command.output()).await.expect("in time").expect("runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn a_join_leaves_an_identity_and_a_config_that_a_gateway_starts_from() {
    let gateway = gateway();
    let token = serve(&gateway).await;
    let state = TempDir::new().expect("writable");
    let more = ["--advertise", "gw.example.com:15443", "--locality", "us-east1/b"];
    let (code, stdout, stderr) = join(&token, &state, &more).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("isthmus gateway --config") && stderr.contains("✓"), "{stdout}{stderr}");
    assert!(!stderr.contains(token.secret.reveal()), "the secret is printed");

    let files = ClusterFiles::load(&state.path().join("identity")).expect("an identity");
    assert_eq!((files.facts.cluster.as_str(), files.facts.cluster_id.0, files.facts.founder), ("gcp-us", 2, false));
    assert!(files.root.is_none(), "the root key never leaves its cluster");
    let config = GatewayConfig::load(&state.path().join("gateway.yaml")).expect("a config");
    assert_eq!(config.advertise, ["gw.example.com:15443"]);

    let request = gateway.requests.lock().expect("unpoisoned").pop().expect("asked");
    assert_eq!((request.locality.as_str(), request.secret), ("us-east1/b", token.secret.reveal().as_bytes().to_vec()));

    let (code, _, stderr) = join(&token, &state, &[]).await;
    assert_eq!(code, 1, "a second join into the same directory");
    assert!(stderr.contains("holds a cluster's identity already"), "{stderr}");
}

#[tokio::test]
async fn a_gateway_of_another_mesh_gets_neither_the_secret_nor_a_request() {
    let gateway = gateway();
    let mut token = serve(&gateway).await;
    let other = RootAuthority::create("corp", &domain(), now_s()).expect("a root");
    token.root_fingerprint = fingerprint(other.certificate());
    let state = TempDir::new().expect("writable");
    let (code, _, stderr) = join(&token, &state, &[]).await;
    assert_eq!(code, 3, "{stderr}");
    assert!(stderr.contains("no gateway of the token can be used"), "{stderr}");
    assert!(gateway.requests.lock().expect("unpoisoned").is_empty());
    assert!(!ClusterFiles::exist(&state.path().join("identity")));
}

#[tokio::test]
async fn a_join_that_was_cut_off_is_repeated_with_the_same_key() {
    let gateway = gateway();
    *gateway.cut_off.lock().expect("unpoisoned") = 1;
    let token = serve(&gateway).await;
    let state = TempDir::new().expect("writable");
    let (code, _, stderr) = join(&token, &state, &[]).await;
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("run the same command again"), "{stderr}");
    let (code, _, stderr) = join(&token, &state, &[]).await;
    assert_eq!(code, 0, "{stderr}");
    let requests = gateway.requests.lock().expect("unpoisoned");
    assert_eq!(requests[0].csr_der, requests[1].csr_der);
}

#[tokio::test]
async fn a_dry_run_consumes_and_writes_nothing_and_names_a_wrong_clock() {
    let mut gateway = gateway();
    let token = serve(&gateway).await;
    let state = TempDir::new().expect("writable");
    let (code, stdout, stderr) = join(&token, &state, &["--dry-run"]).await;
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("nothing was consumed"), "{stdout}");
    assert!(gateway.requests.lock().expect("unpoisoned").iter().all(|request| request.dry_run));
    assert_eq!(std::fs::read_dir(state.path()).expect("readable").count(), 0);

    gateway.clock_offset_ms = 90_000;
    let token = serve(&gateway).await;
    let (code, _, stderr) = join(&token, &state, &["--dry-run"]).await;
    assert_eq!(code, 1);
    assert!(stderr.contains("behind the gateway's") && stderr.contains("NTP"), "{stderr}");
}

#[tokio::test]
async fn a_token_without_an_answering_gateway_names_each_address() {
    let mut token = serve(&gateway()).await;
    token.gateways = vec!["127.0.0.1:1".into(), "nowhere.invalid:15443".into()];
    let state = TempDir::new().expect("writable");
    let (code, _, stderr) = join(&token, &state, &[]).await;
    assert_eq!(code, 3);
    for part in ["127.0.0.1:1", "refused", "nowhere.invalid:15443: name not resolved"] {
        assert!(stderr.contains(part), "{part} is missing in {stderr}");
    }
}
