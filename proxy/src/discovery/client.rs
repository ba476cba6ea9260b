//! Keeps a session with every gateway replica of the own cluster: connects, registers, passes on what is told.
//!
//! What messages mean is in `super::session`. A replica that is gone is dialled again after a pause that
//! grows to [`BACKOFF_MAX`]; with all of them gone nothing of what is known is forgotten.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use isthmus_identity::tls::server_name;
use isthmus_identity::{Expect, Tls};
use isthmus_wire::discovery as wire;
use isthmus_wire::discovery::discovery_client::DiscoveryClient;
use rustc_hash::FxHashMap;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use wire::to_gateway::Message as Up;

use super::session::{Event, Reaction, Session};
use super::{Mesh, Tickets};

/// First pause before a replica is dialled again.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause in the first seconds after a session was lost: most gateways that go are restarted, and until they
/// know us again nothing passes through them.
const BACKOFF_SOON: Duration = Duration::from_millis(150);
/// How long that holds.
const SOON: Duration = Duration::from_secs(3);
/// Longest pause after that: a gateway that is back is found within this.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How often the configured names are resolved anew.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
/// Pause while none of the names resolves.
const RESOLVE_RETRY: Duration = Duration::from_secs(1);
/// Sessions at most: a cluster has a handful of replicas.
const SESSIONS_MAX: usize = 32;
/// Messages to a gateway that wait: more than it can be behind by in a second.
const OUTBOX_MAX: usize = 64;
/// How often telemetry is told.
const TELEMETRY_INTERVAL: Duration = Duration::from_secs(1);
/// An idle session is asked for a sign of life this often; silence for as long again ends it.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// What the sidecar says of itself; whoever owns a part changes it, sessions pass it on.
#[derive(Debug)]
pub struct Reported {
    /// Who we are. A registration that the member signed is added by the sessions' owner.
    pub register: watch::Sender<wire::Register>,
    /// The workload's health.
    pub health: watch::Sender<wire::HealthReport>,
}

/// Gives the telemetry of the moment; cumulative.
pub type TelemetrySource = Arc<dyn Fn() -> wire::Telemetry + Send + Sync>;

/// What sessions are made of.
pub struct Sessions {
    /// Session addresses as configured, `host:port`.
    pub gateways: Vec<String>,
    /// Proves who we are, and believes gateways of the own cluster.
    pub tls: Tls,
    /// What is filled.
    pub mesh: Mesh,
    /// Tickets asked for and told.
    pub tickets: Tickets,
    /// What we say of ourselves.
    pub reported: Arc<Reported>,
    /// Replicas that gateways told of.
    pub replicas: watch::Receiver<BTreeSet<SocketAddr>>,
    /// For the dashboard.
    pub telemetry: TelemetrySource,
    /// Everything else that gateways tell.
    pub events: mpsc::Sender<Event>,
    /// Number of sessions that stand.
    pub standing: watch::Sender<usize>,
}

impl Sessions {
    /// Keeps sessions until `shutdown`; on return all have ended.
    pub async fn run(self, shutdown: CancellationToken) {
        let shared = Arc::new(Shared { sessions: self, primary: watch::Sender::new(None) });
        let mut tasks = JoinSet::new();
        let mut running: FxHashMap<SocketAddr, CancellationToken> = FxHashMap::default();
        let mut replicas = shared.sessions.replicas.clone();
        let mut known = BTreeSet::new();
        loop {
            let resolved = resolve(&shared.sessions.gateways).await;
            let pause = if resolved.is_empty() { RESOLVE_RETRY } else { RESOLVE_INTERVAL };
            if !resolved.is_empty() {
                known = resolved;
            }
            let told = replicas.borrow_and_update().clone();
            let wanted: BTreeSet<SocketAddr> = known.union(&told).copied().take(SESSIONS_MAX).collect();
            running.retain(|address, token| {
                let keep = wanted.contains(address);
                if !keep {
                    token.cancel();
                }
                keep
            });
            for address in wanted {
                running.entry(address).or_insert_with(|| {
                    let token = shutdown.child_token();
                    tasks.spawn(Arc::clone(&shared).keep(address, token.clone()));
                    token
                });
            }
            while tasks.try_join_next().is_some() {}
            tokio::select! {
                () = shutdown.cancelled() => break,
                Ok(()) = replicas.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        while tasks.join_next().await.is_some() {}
    }
}

/// All addresses of `gateways`; those that do not resolve now are left out.
pub async fn resolve(gateways: &[String]) -> BTreeSet<SocketAddr> {
    let mut addresses = BTreeSet::new();
    for gateway in gateways {
        match tokio::net::lookup_host(gateway).await {
            Ok(found) => addresses.extend(found),
            Err(error) => tracing::warn!(gateway, %error, "gateway does not resolve"),
        }
    }
    addresses
}

/// A gRPC channel to the gateway at `address`.
///
/// # Errors
/// As tonic says; the chain names the cause.
pub async fn channel(address: SocketAddr, tls: Arc<rustls::ClientConfig>) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: http::Uri| {
        let tls = Arc::clone(&tls);
        async move {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let stream = TlsConnector::from(tls).connect(server_name(), tcp).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    Endpoint::from_static("http://gateway.isthmus.invalid")
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
}

struct Shared {
    sessions: Sessions,
    /// The session that subscribes.
    primary: watch::Sender<Option<SocketAddr>>,
}

impl Shared {
    /// One replica: a session after the other until told to stop.
    async fn keep(self: Arc<Self>, address: SocketAddr, shutdown: CancellationToken) {
        let mut pause = BACKOFF_MIN;
        let mut lost: Option<Instant> = None;
        loop {
            let mut stood = false;
            tokio::select! {
                () = shutdown.cancelled() => break,
                ended = self.talk(address, &mut stood) => {
                    tracing::info!(gateway = %address, error = %Chain(&*ended), "session ended");
                }
            }
            self.end(address, stood);
            if stood {
                lost = Some(Instant::now());
            }
            let longest = if lost.is_some_and(|lost| lost.elapsed() < SOON) { BACKOFF_SOON } else { BACKOFF_MAX };
            pause = if stood { BACKOFF_MIN } else { (pause * 2).min(longest) };
            let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(jittered) => {}
            }
        }
        self.end(address, true);
    }

    fn end(&self, address: SocketAddr, stood: bool) {
        if stood {
            self.sessions.standing.send_modify(|count| *count = count.saturating_sub(1));
        }
        self.primary.send_if_modified(|primary| primary.take_if(|one| *one == address).is_some());
    }

    /// One session, to its end.
    async fn talk(&self, address: SocketAddr, stood: &mut bool) -> Box<dyn std::error::Error + Send + Sync> {
        let tls = self.sessions.tls.client_config(&[b"h2"], Expect::Gateway(None));
        let connecting = tokio::time::timeout(CONNECT_TIMEOUT, channel(address, Arc::new(tls)));
        let channel = match connecting.await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return error.into(),
            Err(_) => return format!("no answer within {CONNECT_TIMEOUT:?}").into(),
        };
        match self.converse(address, channel, stood).await {
            Ok(()) => "the gateway ended the session".into(),
            Err(error) => error,
        }
    }

    /// Whoever stands while there is no primary becomes it.
    fn become_primary(&self, address: SocketAddr) -> bool {
        self.primary.send_if_modified(|primary| {
            let vacant = primary.is_none();
            *primary = primary.or(Some(address));
            vacant
        })
    }

    async fn converse(
        &self,
        address: SocketAddr,
        channel: Channel,
        stood: &mut bool,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let own = &self.sessions;
        let (outbox, messages) = mpsc::channel(OUTBOX_MAX);
        let send = async |message: Up| outbox.send(wire::ToGateway { message: Some(message) }).await;
        let mut health = own.reported.health.subscribe();
        let first = own.reported.register.borrow().clone();
        send(Up::Register(first)).await?;
        let first_health = *health.borrow_and_update();
        send(Up::Health(first_health)).await?;

        let mut client = DiscoveryClient::new(channel);
        let mut inbox = client.session(ReceiverStream::new(messages)).await?.into_inner();
        *stood = true;
        own.standing.send_modify(|count| *count += 1);
        tracing::info!(gateway = %address, "session stands");

        let mut session = Session::default();
        let (mut wanted, mut questions) = (own.mesh.asked(), own.tickets.asked());
        let mut primary = self.primary.subscribe();
        let mut telemetry = tokio::time::interval(TELEMETRY_INTERVAL);
        telemetry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        primary.mark_changed();
        let mut is_primary = false;
        loop {
            tokio::select! {
                message = inbox.message() => match message? {
                    None => return Ok(()),
                    Some(message) => match session.handle(message, &own.mesh.snapshot()) {
                        Reaction::Learn { known, absent, ack } => {
                            if is_primary {
                                own.mesh.replace(*known, absent);
                            }
                            send(ack).await?;
                        }
                        Reaction::Send(message) => send(message).await?,
                        Reaction::Tell(Event::Tickets(tickets)) => own.tickets.told(&tickets),
                        // The owner of the events ended: so does the process.
                        Reaction::Tell(event) => own.events.send(event).await?,
                        Reaction::Ignore => {}
                    },
                },
                Ok(()) = wanted.changed(), if is_primary => {
                    for message in session.subscribe(&own.mesh.wanted()) {
                        send(message).await?;
                    }
                }
                Ok(()) = questions.changed(), if is_primary => {
                    for question in own.tickets.questions() {
                        send(Up::Tickets(question)).await?;
                    }
                }
                Ok(()) = health.changed() => {
                    let report = *health.borrow_and_update();
                    send(Up::Health(report)).await?;
                }
                // To every replica: each shows all of its cluster's traffic.
                _ = telemetry.tick() => {
                    let report = (own.telemetry)();
                    if !report.edges.is_empty() {
                        send(Up::Telemetry(report)).await?;
                    }
                }
                Ok(()) = primary.changed(), if !is_primary => {
                    primary.borrow_and_update();
                    is_primary = self.become_primary(address);
                    if is_primary {
                        tracing::info!(gateway = %address, "asks this gateway from now on");
                        send(session.take_over(&own.mesh.snapshot())).await?;
                        wanted.mark_changed();
                        questions.mark_changed();
                    }
                }
            }
        }
    }
}

/// An error with its causes, for the log.
struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
