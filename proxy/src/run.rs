//! A sidecar from start to end: identity, sessions, sockets, and everybody's tasks.
//!
//! Meant for a single-threaded runtime: one core serves a workload, and a second thread costs 13-23 %.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_identity::{Expect, PeerIdentity};
use isthmus_model::ClusterId;
use isthmus_runtime::{Admin, BindError, HttpServer, LogHandle, Readiness, metrics};
use isthmus_tunnel::cid::EndpointName;
use isthmus_tunnel::endpoint::{ALPN_TUNNEL, CidMint, EndpointParts};
use isthmus_tunnel::socket::UdpPort;
use isthmus_tunnel::{CidKeys, TunnelConfig, TunnelEndpoint};
use isthmus_wire::discovery as wire;
use rustls::pki_types::CertificateDer;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::access_log::AccessLog;
use crate::admin::{Certificate, Certificates, Sources, with_pages};
use crate::balance::Balancer;
use crate::capture::{Capture, CaptureError, GROUP, Redirect, Rules, enter_group};
use crate::carrier::app::AppPool;
use crate::carrier::local::LocalPool;
use crate::carrier::spawn::Spawn;
use crate::carrier::tunnels::{TunnelStatus, Tunnels};
use crate::config::CaptureMode;
use crate::discovery::client::{Reported, Sessions, resolve};
use crate::discovery::{Mesh, Tickets};
use crate::dns::DnsServer;
use crate::identity::{EnrolError, Enrolled, enrol};
use crate::metrics::{Metrics, Party};
use crate::path::{DataPath, Own};
use crate::report::Reports;
use crate::retry::Budget;
use crate::told::Told;
use crate::{Config, health, inbound, outbound};

/// Time for the mesh to hear that this sidecar drains, before it refuses anything.
const DRAIN_NOTICE: Duration = Duration::from_millis(500);
/// Events of gateways that wait to be taken in: a burst of a change of trust and a few hundred ends of endpoints.
const EVENTS_MAX: usize = 512;
/// Connections of the workload at once: each may hold two buffers of 8 KiB and up.
const CONNECTIONS_MAX: usize = 16 * 1024;
/// How long connections may take to notice that nobody uses them any more.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// Out of descriptors, most likely: a pause lets open connections give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why a sidecar could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// No identity.
    #[error(transparent)]
    Enrol(#[from] EnrolError),
    /// A socket.
    #[error("cannot listen on {address} ({what}); another process may have it: change `ports.{what}` or `listen`")]
    Listen {
        /// Which port.
        what: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A page server.
    #[error(transparent)]
    Page(#[from] BindError),
    /// The admin page.
    #[error("{0}")]
    Admin(String),
    /// Capturing.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The access log.
    #[error("cannot start the access log")]
    AccessLog(#[source] std::io::Error),
}

/// Runs a sidecar until `shutdown`, then drains. On return none of its tasks is left.
///
/// # Errors
/// [`RunError`] if it cannot start; nothing it opened stays open.
pub async fn run(config: Config, logging: Option<LogHandle>, shutdown: CancellationToken) -> Result<(), RunError> {
    if config.capture == CaptureMode::Transparent {
        own_packets()?;
    }
    let registry = metrics::registry("proxy");
    let metrics = Metrics::new(&registry);
    let readiness = Readiness::new();
    let ready = readiness.condition("registered", "no gateway has registered this sidecar yet");
    let sockets = Sockets::open(&config).await?;

    // Pages answer while the sidecar waits for a gateway: `ready` says what it waits for.
    let ending = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let page = async |name, port, router| HttpServer::bind(name, config.at(port), router).await;
    tasks.spawn(
        page("metrics", config.ports.metrics, isthmus_runtime::metrics::router(registry.clone()))
            .await?
            .run(ending.clone()),
    );
    tasks.spawn(page("health", config.ports.health, readiness.router()).await?.run(ending.clone()));

    let enrolled = match enrol(&config, &shutdown).await {
        Ok(enrolled) => Arc::new(enrolled),
        Err(EnrolError::Stopped) => {
            end(ending, tasks).await;
            return Ok(());
        }
        Err(error) => {
            end(ending, tasks).await;
            return Err(error.into());
        }
    };
    let access = match access_log(&config, &metrics) {
        Ok(access) => access,
        Err(error) => {
            end(ending, tasks).await;
            return Err(RunError::AccessLog(error));
        }
    };
    let parts = Parts { config: Arc::new(config), enrolled, metrics, registry, readiness, logging, access };
    let capture = match parts.start(sockets, &mut tasks, &ending, &shutdown).await {
        Ok(started) => started,
        Err(error) => {
            end(ending, tasks).await;
            return Err(error);
        }
    };
    let Started { path, reported, mut registered, capture } = capture;
    let waiting = async {
        if registered.wait_for(|registered| *registered).await.is_ok() {
            ready.met();
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = waiting => {}
    }
    ready.unmet("draining");
    drain(&path, &reported, parts.config.drain_timeout).await;
    if let Some(capture) = capture
        && let Err(error) = capture.remove()
    {
        tracing::warn!(%error, "packet filter rules stay behind");
    }
    end(ending, tasks).await;
    if let Some(access) = &parts.access {
        // Whoever reads the log may be too slow: then its last lines are lost.
        let _ = tokio::time::timeout(END_TIMEOUT, access.flush()).await;
    }
    path.local.clear();
    path.app.clear();
    path.spawn.0.close();
    if tokio::time::timeout(END_TIMEOUT, path.spawn.0.wait()).await.is_err() {
        tracing::warn!(tasks = path.spawn.0.len(), "connections did not end in time");
    }
    Ok(())
}

/// Makes sure, before any socket is opened, that the rules can tell our packets from the workload's: by the group, or
/// by the user where the process has one of its own and may not change its group.
fn own_packets() -> Result<(), CaptureError> {
    match enter_group(GROUP) {
        Err(_) if own_user().is_some() => Ok(()),
        entered => entered,
    }
}

/// The user that the sidecar runs as, if that is not root.
fn own_user() -> Option<u32> {
    let user = nix::unistd::geteuid();
    (!user.is_root()).then_some(user.as_raw())
}

/// The access log, on standard output as Envoy's: the sidecar's own words go to standard error.
fn access_log(config: &Config, metrics: &Metrics) -> std::io::Result<Option<AccessLog>> {
    if !config.log.access {
        return Ok(None);
    }
    AccessLog::start(config.log.format, std::io::stdout(), metrics.clone()).map(Some)
}

/// Tells the mesh, then lets open requests and streams finish.
async fn drain(path: &DataPath, reported: &Reported, drain_timeout: Duration) {
    tracing::info!(?drain_timeout, "draining");
    reported.health.send_modify(|report| report.draining = true);
    tokio::time::sleep(DRAIN_NOTICE.min(drain_timeout)).await;
    path.draining.cancel();
    let drained = tokio::time::timeout(drain_timeout, async {
        while path.reports.open() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    if drained.await.is_err() {
        tracing::warn!(open = path.reports.open(), "requests and streams closed: drain_timeout ran out");
    }
}

async fn end(ending: CancellationToken, mut tasks: JoinSet<()>) {
    ending.cancel();
    while tasks.join_next().await.is_some() {}
}

/// The sidecar's sockets, opened before anything else so that a taken port is said at once.
struct Sockets {
    outbound: Option<TcpListener>,
    inbound: Option<TcpListener>,
    mtls: TcpListener,
    tunnel: UdpPort,
}

impl Sockets {
    async fn open(config: &Config) -> Result<Self, RunError> {
        let listen = async |what, port| {
            let address = config.at(port);
            TcpListener::bind(address).await.map_err(|source| RunError::Listen { what, address, source })
        };
        let outbound = match config.capture {
            CaptureMode::None => None,
            _ => Some(listen("outbound", config.ports.outbound).await?),
        };
        let inbound = match config.capture {
            CaptureMode::Transparent => Some(listen("inbound", config.ports.inbound).await?),
            _ => None,
        };
        let mtls = listen("mtls", config.ports.mtls).await?;
        let address = config.at(mtls.local_addr().map_or(config.ports.mtls, |address| address.port()));
        let tunnel =
            UdpPort::bind(address, false).map_err(|source| RunError::Listen { what: "mtls", address, source })?;
        Ok(Self { outbound, inbound, mtls, tunnel })
    }
}

/// What a start needs.
struct Parts {
    config: Arc<Config>,
    enrolled: Arc<Enrolled>,
    metrics: Metrics,
    registry: prometheus::Registry,
    readiness: Readiness,
    logging: Option<LogHandle>,
    access: Option<AccessLog>,
}

/// What runs.
struct Started {
    path: Arc<DataPath>,
    reported: Arc<Reported>,
    registered: watch::Receiver<bool>,
    capture: Option<Capture>,
}

impl Parts {
    async fn start(
        &self,
        sockets: Sockets,
        tasks: &mut JoinSet<()>,
        ending: &CancellationToken,
        shutdown: &CancellationToken,
    ) -> Result<Started, RunError> {
        let config = &self.config;
        let mtls = sockets.mtls.local_addr().unwrap_or_else(|_| config.at(config.ports.mtls));
        let listening = |source| RunError::Listen { what: "mtls", address: mtls, source };
        let (mesh, tickets) = (Mesh::default(), Tickets::default());
        let endpoint = self.endpoint(sockets.tunnel).map_err(listening)?;
        let path = Arc::new(self.data_path(mesh.clone(), &endpoint, tickets.clone()));
        let reported = Arc::new(self.reported(mtls.port()).await);
        let (replicas, told_replicas) = watch::channel(BTreeSet::new());
        let (trust_changed, trust_watch) = watch::channel(0);
        let (registered, registered_watch) = watch::channel(false);
        let (events, told_events) = mpsc::channel(EVENTS_MAX);
        let tls = self.enrolled.tls.clone();

        let told = Told {
            endpoint: endpoint.clone(),
            path: Arc::clone(&path),
            enrolled: Arc::clone(&self.enrolled),
            tickets: tickets.clone(),
            reported: Arc::clone(&reported),
            replicas,
            trust_changed,
            registered,
        };
        tasks.spawn(told.run(told_events, ending.clone()));
        let telemetry = self.metrics.clone();
        let sessions = Sessions {
            gateways: config.gateways.clone(),
            tls: tls.clone(),
            mesh: mesh.clone(),
            tickets,
            reported: Arc::clone(&reported),
            replicas: told_replicas,
            telemetry: Arc::new(move || telemetry.telemetry()),
            events,
            standing: watch::Sender::new(0),
        };
        tasks.spawn(sessions.run(ending.clone()));
        let (enrolled, gateways, metrics, token) =
            (Arc::clone(&self.enrolled), config.gateways.clone(), self.metrics.clone(), ending.clone());
        tasks.spawn(async move { enrolled.renew(&gateways, &metrics, token).await });

        tasks.spawn(inbound::tunnel::run(
            Arc::clone(&path),
            endpoint.clone(),
            tls.trust.clone(),
            trust_watch.clone(),
            ending.clone(),
        ));
        tasks.spawn(inbound::local::run(Arc::clone(&path), sockets.mtls, tls, trust_watch, ending.clone()));
        let closing = ending.clone();
        tasks.spawn(async move { endpoint.run(closing).await });
        if let Some(listener) = sockets.inbound {
            tasks.spawn(inbound::plain::run(Arc::clone(&path), listener, ending.clone()));
        }
        if let Some(listener) = sockets.outbound {
            tasks.spawn(accept_outbound(Arc::clone(&path), listener, ending.clone()));
        }
        self.probe_health(&path, &reported, tasks, ending);
        if config.dns.enabled {
            let addresses = crate::dns::addresses(config.listen, config.ports.dns);
            let dns = DnsServer::bind(&addresses, &config.dns.upstream, mesh.clone(), self.metrics.clone()).await?;
            tasks.spawn(dns.run(ending.clone()));
        }
        self.admin(&path, tasks, ending, shutdown).await?;
        let capture = self.capture()?;
        Ok(Started { path, reported, registered: registered_watch, capture })
    }

    fn endpoint(&self, port: UdpPort) -> std::io::Result<TunnelEndpoint<PeerIdentity>> {
        let tls = self.enrolled.tls.clone();
        // Until a gateway registers us, nothing is dialled and no ticket is for us: these name nobody.
        let nobody = CidKeys::new(ClusterId(0), 0, rand::random());
        let mint = CidMint::new(Arc::new(nobody), EndpointName { handle: 0, incarnation: 0 });
        TunnelEndpoint::new(EndpointParts {
            port,
            mint,
            server_tls: Arc::new(tls.server_config(&[ALPN_TUNNEL], Expect::Workload(None))),
            identify: Arc::new(move |chain| tls.peer_identity(chain).ok()),
            config: TunnelConfig::default(),
        })
    }

    fn data_path(&self, mesh: Mesh, endpoint: &TunnelEndpoint<PeerIdentity>, tickets: Tickets) -> DataPath {
        let (config, enrolled) = (&self.config, &self.enrolled);
        let workload = &config.workload;
        let own = Own {
            spiffe: enrolled.spiffe.clone(),
            cluster: enrolled.cluster.clone(),
            namespace: workload.namespace.clone(),
            labels: workload.labels.clone(),
            locality: config.locality.clone(),
            address: workload.address,
            listen: config.listen,
        };
        let party = Party::new(
            workload.name.as_str(),
            Some(&workload.namespace),
            &workload.labels,
            Some(&enrolled.spiffe),
            Some(&enrolled.cluster),
        );
        let (spawn, now) = (Spawn::default(), Instant::now());
        let ports = &config.ports;
        DataPath {
            own,
            mesh,
            tunnels: Some(Tunnels::new(endpoint.dialer(), tickets, enrolled.tls.clone())),
            local: LocalPool::new(enrolled.tls.clone(), enrolled.cluster.clone(), spawn.clone()),
            app: AppPool::new(spawn.clone()),
            balancer: Balancer::new(now),
            budget: parking_lot::Mutex::new(Budget::new(now)),
            exports: arc_swap::ArcSwap::default(),
            policy: config.outbound,
            own_ports: vec![
                ports.admin,
                ports.outbound,
                ports.inbound,
                ports.mtls,
                ports.metrics,
                ports.health,
                ports.dns,
            ],
            reports: Reports::new(self.metrics.clone(), self.access.clone(), party),
            spawn,
            draining: CancellationToken::new(),
        }
    }

    async fn reported(&self, mtls_port: u16) -> Reported {
        let config = &self.config;
        let ip = match config.advertise {
            Some(ip) => ip,
            None if !config.listen.is_unspecified() => config.listen,
            None => facing(&config.gateways).await,
        };
        let address = SocketAddr::new(ip, mtls_port).to_string();
        let workload = &config.workload;
        let register = wire::Register {
            namespace: workload.namespace.to_string(),
            workload: workload.name.to_string(),
            labels: workload.labels.clone().into_iter().collect(),
            mtls_address: address.clone(),
            tunnel_address: address,
            locality: config.locality.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            signed: None,
            process_id: rand::random::<[u8; 16]>().to_vec(),
            ports: workload.ports.iter().map(|(name, port)| (name.clone(), u32::from(*port))).collect(),
            weight: workload.weight,
        };
        let health = wire::HealthReport { healthy: true, draining: false };
        Reported { register: watch::Sender::new(register), health: watch::Sender::new(health) }
    }

    fn probe_health(
        &self,
        path: &Arc<DataPath>,
        reported: &Arc<Reported>,
        tasks: &mut JoinSet<()>,
        ending: &CancellationToken,
    ) {
        let (path, reported, ending) = (Arc::clone(path), Arc::clone(reported), ending.clone());
        let own: Vec<u16> = self.config.workload.ports.values().copied().collect();
        tasks.spawn(async move {
            let ports = || {
                let served = path.exports.load().target_ports();
                if served.is_empty() { own.clone() } else { served }
            };
            health::run(path.own.address, ports, &reported.health, ending).await;
        });
    }

    async fn admin(
        &self,
        path: &Arc<DataPath>,
        tasks: &mut JoinSet<()>,
        ending: &CancellationToken,
        shutdown: &CancellationToken,
    ) -> Result<(), RunError> {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let admin =
            Admin::new("proxy", self.registry.clone(), self.readiness.clone(), self.logging.clone(), shutdown.clone());
        let admin = with_pages(admin, self.sources(path));
        let server = admin.bind(SocketAddr::new(ip, self.config.ports.admin)).await;
        tasks.spawn(server.map_err(|error| RunError::Admin(error.to_string()))?.run(ending.clone()));
        Ok(())
    }

    fn sources(&self, path: &Arc<DataPath>) -> Sources {
        let (enrolled, path_of_page) = (Arc::clone(&self.enrolled), Arc::clone(path));
        let show = |chain: &[CertificateDer<'_>]| chain.iter().filter_map(|der| Certificate::from_der(der)).collect();
        Sources {
            config: Arc::clone(&self.config),
            mesh: path.mesh.clone(),
            certificates: Box::new(move || Certificates {
                chain: show(&enrolled.chain()),
                roots: show(&enrolled.tls.trust.load().roots),
            }),
            tunnels: Box::new(move || connections(&path_of_page)),
        }
    }

    fn capture(&self) -> Result<Option<Capture>, RunError> {
        let (config, ports) = (&self.config, &self.config.ports);
        if config.capture != CaptureMode::Transparent {
            return Ok(None);
        }
        let redirect = Redirect {
            listen: config.listen,
            outbound: ports.outbound,
            inbound: ports.inbound,
            dns: config.dns.enabled.then_some(ports.dns),
        };
        let mut rules = Rules::new(redirect, vec![ports.mtls, ports.metrics, ports.health]);
        rules.own_user = own_user();
        let capture = Capture::apply(&rules)?;
        self.metrics.capturing("transparent");
        Ok(Some(capture))
    }
}

/// Tunnels and local connections, for the admin page.
fn connections(path: &DataPath) -> serde_json::Value {
    let tunnels = path.tunnels.as_ref().map(Tunnels::status).unwrap_or_default().into_iter().map(|tunnel| {
        let TunnelStatus { cluster, handle, incarnation, peer, suspect, stats } = tunnel;
        json!({
            "cluster": cluster,
            "endpoint": format!("{handle}.{incarnation}"),
            "peer": peer,
            "suspect": suspect,
            "rtt_us": u64::try_from(stats.rtt.as_micros()).unwrap_or(u64::MAX),
            "streams": stats.streams,
            "bytes_sent": stats.bytes_sent,
            "bytes_received": stats.bytes_received,
            "packets_lost": stats.packets_lost,
            "mtu": stats.mtu,
        })
    });
    let local =
        path.local.connections().into_iter().map(|(address, peer)| json!({ "address": address, "peer": peer.spiffe }));
    let exports = path.exports.load();
    let served = exports.entries().map(|(host, port, served)| {
        json!({ "host": host, "port": port, "target_port": served.target_port, "visible_to": served.visible_to })
    });
    json!({
        "tunnels": tunnels.collect::<Vec<_>>(),
        "local": local.collect::<Vec<_>>(),
        "serves": served.collect::<Vec<_>>(),
    })
}

/// Takes the workload's connections until `shutdown`; on return all have ended.
async fn accept_outbound(path: Arc<DataPath>, listener: TcpListener, shutdown: CancellationToken) {
    let connections = tokio_util::task::TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => accepted,
            () = tokio::time::sleep(ACCEPT_PAUSE), if connections.len() >= CONNECTIONS_MAX => continue,
        };
        match accepted {
            Ok((stream, _)) => {
                let (path, shutdown) = (Arc::clone(&path), shutdown.clone());
                connections.spawn(async move {
                    tokio::select! {
                        () = outbound::serve(path, stream) => {}
                        () = shutdown.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    connections.close();
    connections.wait().await;
}

/// The own address that faces the gateways: where others of the cluster reach us, too.
async fn facing(gateways: &[String]) -> IpAddr {
    let find = |gateway: SocketAddr| {
        let any: SocketAddr = if gateway.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any).ok()?;
        // Sends nothing: the system only looks up its route.
        socket.connect(gateway).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    resolve(gateways).await.into_iter().find_map(find).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}
