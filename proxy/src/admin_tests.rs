//! The pages over HTTP, as an operator reads them.

use std::net::SocketAddr;
use std::path::Path;

use isthmus_model::service::{Location, Resolution};
use isthmus_model::view::{Endpoint, Freshness};
use isthmus_runtime::Readiness;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::metrics::Metrics;

const CONFIG: &str = "state: data\ngateways: [127.1.0.1]\ntoken_file: very-secret-token\nroot_fingerprint: sha256:\
    0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\nworkload: {namespace: shop, name: web-1}\n";

fn view() -> View {
    let endpoint = |handle, healthy| Endpoint {
        target: Target::Tunnel { handle, incarnation: 3 },
        weight: 1,
        locality: None,
        labels: [("version".to_owned(), "v2".to_owned())].into(),
        healthy,
    };
    let service = ServiceView {
        host: "cart.shop.svc.clusterset.local".parse().unwrap(),
        addresses: vec![[240, 240, 0, 7].into()],
        ports: vec![],
        location: Location::MeshInternal,
        resolution: Resolution::Static,
        backends: vec![Backends {
            cluster: "gcp-us".parse().unwrap(),
            cluster_id: isthmus_model::ClusterId(2),
            locality: isthmus_model::Locality::parse("us-east1/us-east1-b"),
            freshness: Freshness::Suspect,
            rtt_us: Some(81_000),
            ports: vec![80],
            accounts: vec![],
            endpoints: vec![endpoint(7, true), endpoint(9, false)],
        }],
    };
    let mut view = View { version: 1042, ..View::default() };
    view.services.insert(service.host.clone(), Arc::new(service));
    view
}

fn certificates() -> Certificates {
    let now = SystemTime::now();
    let certificate = Certificate {
        subject: "spiffe://corp/ns/shop/sa/web".into(),
        serial: "0a1b".into(),
        not_before: now - Duration::from_secs(60),
        not_after: now + Duration::from_secs(3_600),
    };
    let expired =
        Certificate { not_after: now - Duration::from_secs(1), subject: "root".into(), ..certificate.clone() };
    Certificates { chain: vec![certificate], roots: vec![expired] }
}

#[test]
fn what_is_public_of_a_certificate_is_read_from_its_bytes() {
    use isthmus_identity::authority::{ClusterAuthority, KeyPair, RootAuthority};
    const NOW: u64 = 1_790_000_000;
    let (domain, life) = ("corp".parse().unwrap(), Duration::from_secs(3_600));
    let root = RootAuthority::create("test", &domain, NOW).unwrap();
    let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let cluster = "aws-eu".parse().unwrap();
    let ca = root.issue_intermediate(&ca_key.request().unwrap(), &cluster, &domain, NOW).unwrap();
    let ca = ClusterAuthority::load(vec![ca], ca_key, domain);
    let account = isthmus_model::ServiceAccount { namespace: "shop".parse().unwrap(), name: "cart".parse().unwrap() };
    let chain = ca.issue_workload(&key.request().unwrap(), &account, life, NOW).unwrap();
    let shown = Certificate::from_der(&chain[0]).expect("a certificate");
    assert_eq!(shown.subject, "spiffe://corp/ns/shop/sa/cart");
    assert_eq!(shown.not_after, SystemTime::UNIX_EPOCH + Duration::from_secs(NOW) + life);
    assert!(!shown.serial.is_empty() && shown.serial.bytes().all(|byte| byte.is_ascii_hexdigit()));
    assert_eq!(Certificate::from_der(b"no certificate"), None);
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn an_operator_sees_what_the_sidecar_knows_and_no_secret() {
    let registry = isthmus_runtime::metrics::registry("proxy");
    let metrics = Metrics::new(&registry);
    metrics.dialled("ok");
    let shutdown = CancellationToken::new();
    let admin = Admin::new("proxy", registry, Readiness::new(), None, shutdown.clone());
    let config = Arc::new(Config::parse(CONFIG, Path::new("/etc/isthmus/proxy.yaml")).unwrap());
    let mesh = Mesh::with_view(view());
    let sources = Sources {
        config,
        mesh,
        certificates: Box::new(certificates),
        tunnels: Box::new(|| json!({ "gcp-us/7": "open" })),
    };
    let server = with_pages(admin, sources).bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
    let address = server.local_addr().unwrap();
    let running = tokio::spawn(server.run(shutdown.clone()));

    let read = async |path: &str| serde_json::from_str::<Value>(&get(address, path).await).expect(path);
    let dump = read("/config_dump").await;
    assert_eq!(dump["view"]["version"], 1042);
    assert_eq!(dump["view"]["services"]["cart.shop.svc.clusterset.local"]["addresses"][0], "240.240.0.7");
    assert_eq!(dump["settings"]["workload"]["name"], "web-1");
    assert_eq!(dump["settings"]["token"], "<redacted>");
    assert!(!dump.to_string().contains("very-secret-token"));

    let backend = &read("/clusters").await["cart.shop.svc.clusterset.local"][0];
    assert_eq!((&backend["cluster"], &backend["healthy"]), (&json!("gcp-us"), &json!(1)));
    assert_eq!((&backend["freshness"], &backend["rtt_us"]), (&json!("suspect"), &json!(81_000)));
    assert_eq!(backend["endpoints"][1]["target"], "tunnel 9.3");

    let certs = read("/certs").await;
    assert_eq!(certs["cert_chain"][0]["subject"], "spiffe://corp/ns/shop/sa/web");
    assert_eq!((&certs["cert_chain"][0]["expired"], &certs["ca_cert"][0]["expired"]), (&json!(false), &json!(true)));
    assert_eq!(read("/tunnels").await["gcp-us/7"], "open");
    assert_eq!(read("/listeners").await["dns"][0], "127.0.0.1:15053");
    assert!(get(address, "/stats").await.contains("isthmus_proxy_dials_total{result=\"ok\"} 1"));
    assert!(get(address, "/").await.contains("/config_dump"));

    shutdown.cancel();
    running.await.unwrap();
}
