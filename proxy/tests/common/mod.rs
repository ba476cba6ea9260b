//! Two and more sidecars of one cluster in one process, with real sockets on loopback and fed views: no gateway.
#![allow(dead_code, clippy::unwrap_used, reason = "each test file uses a part; a failed setup is a failed test")]

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use isthmus_identity::{ClusterAuthority, Identity, IssuerRecord, KeyPair, RootAuthority, SharedIdentity, Tls, Trust};
use isthmus_model::service::{Labels, Location, Patterns, Protocol, Resolution, ServicePort};
use isthmus_model::view::{Backends, Endpoint, Freshness, ServiceView, Target, View};
use isthmus_model::{ClusterId, ClusterName, Host, Locality, ServiceAccount, TrustDomain};
use isthmus_proxy::balance::Balancer;
use isthmus_proxy::carrier::app::AppPool;
use isthmus_proxy::carrier::local::LocalPool;
use isthmus_proxy::carrier::spawn::Spawn;
use isthmus_proxy::config::OutboundPolicy;
use isthmus_proxy::exports::Exports;
use isthmus_proxy::metrics::{Metrics, Party};
use isthmus_proxy::path::{DataPath, Own};
use isthmus_proxy::report::Reports;
use isthmus_proxy::retry::Budget;
use isthmus_proxy::{Mesh, inbound, outbound};
use isthmus_wire::discovery as wire;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// The service that tests call.
pub const HOST: &str = "cart.shop.svc.clusterset.local";
/// Nothing takes longer.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub fn host() -> Host {
    HOST.parse().unwrap()
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// A cluster that issues identities.
pub struct Cluster {
    authority: ClusterAuthority,
    trust: Trust,
    name: ClusterName,
}

impl Cluster {
    pub fn new() -> Self {
        let domain: TrustDomain = "mesh.test".parse().unwrap();
        let name: ClusterName = "aws-eu".parse().unwrap();
        let root = RootAuthority::create("test", &domain, now()).unwrap();
        let key = KeyPair::generate().unwrap();
        let intermediate = root.issue_intermediate(&key.request().unwrap(), &name, &domain, now()).unwrap();
        let issuer = IssuerRecord { cluster_id: ClusterId(1), may_issue: Patterns::all() };
        let trust = Trust {
            trust_domain: domain.clone(),
            roots: vec![root.certificate().clone()],
            issuers: BTreeMap::from([(name.clone(), issuer)]),
        };
        Self { authority: ClusterAuthority::load(vec![intermediate], key, domain), trust, name }
    }

    fn tls(&self, account: &ServiceAccount) -> Tls {
        let key = KeyPair::generate().unwrap();
        let life = Duration::from_secs(3600);
        let chain = self.authority.issue_workload(&key.request().unwrap(), account, life, now()).unwrap();
        let identity = Identity::new(chain, key).unwrap();
        Tls {
            identity: SharedIdentity::new(&identity).unwrap(),
            trust: Arc::new(arc_swap::ArcSwap::from_pointee(self.trust.clone())),
        }
    }

    /// A running sidecar of `account`; `exports` is what its workload serves.
    pub async fn sidecar(&self, account: &str, exports: Vec<wire::ServedPort>) -> Sidecar {
        let account = ServiceAccount { namespace: "shop".parse().unwrap(), name: account.parse().unwrap() };
        let tls = self.tls(&account);
        let spawn = Spawn::default();
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let outbound = TcpListener::bind((loopback, 0)).await.unwrap();
        let mtls = TcpListener::bind((loopback, 0)).await.unwrap();
        let (proxy, address) = (outbound.local_addr().unwrap(), mtls.local_addr().unwrap());
        let metrics = Metrics::new(&isthmus_runtime::metrics::registry("proxy"));
        let exports = Exports::read(&wire::Exports { version: 1, ports: exports }, &[]).unwrap();
        let path = Arc::new(DataPath {
            own: Own {
                spiffe: account.in_domain(&self.trust.trust_domain),
                cluster: self.name.clone(),
                namespace: account.namespace.clone(),
                labels: Labels::new(),
                locality: Locality::default(),
                address: loopback,
                listen: loopback,
            },
            mesh: Mesh::default(),
            tunnels: None,
            local: LocalPool::new(tls.clone(), self.name.clone(), spawn.clone()),
            app: AppPool::new(spawn.clone()),
            balancer: Balancer::new(Instant::now()),
            budget: parking_lot::Mutex::new(Budget::new(Instant::now())),
            exports: arc_swap::ArcSwap::from_pointee(exports),
            policy: OutboundPolicy::AllowAny,
            own_ports: vec![proxy.port()],
            reports: Reports::new(metrics, None, Party::default()),
            spawn,
            draining: CancellationToken::new(),
        });
        let ending = CancellationToken::new();
        let (trust_changed, watching) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(inbound::local::run(Arc::clone(&path), mtls, tls.clone(), watching, ending.clone()));
        let for_outbound = Arc::clone(&path);
        tasks.spawn(async move {
            while let Ok((stream, _)) = outbound.accept().await {
                tokio::spawn(outbound::serve(Arc::clone(&for_outbound), stream));
            }
        });
        Sidecar { path, tls, proxy, address, account, trust_changed, ending, _tasks: tasks }
    }
}

/// A running sidecar.
pub struct Sidecar {
    pub path: Arc<DataPath>,
    pub tls: Tls,
    /// Its HTTP proxy.
    pub proxy: SocketAddr,
    /// Its mTLS port.
    pub address: SocketAddr,
    pub account: ServiceAccount,
    pub trust_changed: watch::Sender<u64>,
    pub ending: CancellationToken,
    _tasks: JoinSet<()>,
}

/// Ports of the test service, as an export of all of them to `cluster`.
pub fn served(ports: &[(u16, Protocol, SocketAddr)], cluster: &str) -> Vec<wire::ServedPort> {
    let one = |(port, protocol, app): &(u16, Protocol, SocketAddr)| wire::ServedPort {
        host: HOST.into(),
        port: (*port).into(),
        target_port: app.port().into(),
        protocol: serde_json::to_value(protocol).unwrap().as_str().unwrap().into(),
        visible_to: vec![cluster.into()],
    };
    ports.iter().map(one).collect()
}

/// Tells `client` that the test service runs behind `servers`.
pub fn introduce(client: &Sidecar, servers: &[&Sidecar], ports: &[(u16, Protocol)]) {
    let endpoint = |server: &&Sidecar| Endpoint {
        target: Target::Direct(server.address),
        weight: 1,
        locality: None,
        labels: Labels::new(),
        healthy: true,
    };
    let service = ServiceView {
        host: host(),
        addresses: vec![IpAddr::from([240, 240, 0, 7])],
        ports: ports
            .iter()
            .map(|(number, protocol)| ServicePort {
                number: *number,
                name: String::new(),
                protocol: *protocol,
                target: *number,
            })
            .collect(),
        location: Location::MeshInternal,
        resolution: Resolution::Static,
        backends: vec![Backends {
            cluster: client.path.own.cluster.clone(),
            cluster_id: ClusterId(1),
            locality: Locality::default(),
            freshness: Freshness::Fresh,
            rtt_us: None,
            ports: ports.iter().map(|(number, _)| *number).collect(),
            accounts: servers.first().map(|server| server.account.clone()).into_iter().collect(),
            endpoints: servers.iter().map(endpoint).collect(),
        }],
    };
    let mut view = View { version: 1, ..View::default() };
    view.by_address.insert(service.addresses[0], service.host.clone());
    view.services.insert(service.host.clone(), Arc::new(service));
    client.path.mesh.replace(view, []);
}

/// A TCP application: `serve` gets each connection.
pub async fn app<F, R>(serve: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    // Ends with the test's runtime.
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// `within` or a failed test.
pub async fn soon<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("in time")
}
