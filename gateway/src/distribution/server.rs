//! The streams to sidecars, port 15012: enrolment, renewal and sessions (see `discovery.proto`).
//!
//! Owns sockets and tasks; what a sidecar hears next is decided in [`super::session`], what is true
//! in [`crate::hub`], who may have which certificate in [`crate::issue`].

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use isthmus_model::view::ResourceName;
use isthmus_model::{Locality, ServiceAccount};
use isthmus_wire::discovery::discovery_server::Discovery;
use isthmus_wire::discovery::to_gateway::Message as Up;
use isthmus_wire::discovery::to_proxy::Message as Down;
use isthmus_wire::discovery::{
    CertificateResponse, EnrolRequest, Exports, GatewayDraining, LinkStates, Register, Registered, RenewRequest,
    ServedPort, Subscribe, TicketRequest, ToGateway, ToProxy,
};
use tokio::sync::{broadcast, mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status, Streaming};

use super::session::Session;
use super::sidecars::{Registration, Sidecars};
use crate::hub::Hub;
use crate::issue::Issuer;
use crate::join::refused;
use crate::locals::{LabelsOf, Local, WorkloadKey};
use crate::tls_incoming::PeerInfo;

/// Changes are gathered for this long before a delta is computed: far below the 500 ms that a change may
/// take to a remote sidecar, far above the cost of one delta.
const GATHER: Duration = Duration::from_millis(5);
/// Messages that wait for a slow sidecar; deltas are not queued, so this is tickets and events.
const OUTGOING_MAX: usize = 256;
/// The first message must come within this time.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the figures of links are told; a change of their ways is told at once.
const LINKS_EVERY: Duration = Duration::from_secs(1);

/// The discovery service of one replica.
pub struct DiscoveryService {
    shared: Arc<Shared>,
}

struct Shared {
    hub: Arc<Hub>,
    sidecars: Arc<Sidecars>,
    issuer: Arc<Issuer>,
    shutdown: CancellationToken,
    sessions: AtomicU64,
}

impl DiscoveryService {
    /// A service over `hub`; sessions end when `shutdown` fires.
    pub fn new(hub: Arc<Hub>, sidecars: Arc<Sidecars>, issuer: Arc<Issuer>, shutdown: CancellationToken) -> Self {
        Self { shared: Arc::new(Shared { hub, sidecars, issuer, shutdown, sessions: AtomicU64::new(1) }) }
    }
}

type Downstream = Pin<Box<dyn Stream<Item = Result<ToProxy, Status>> + Send>>;

#[tonic::async_trait]
impl Discovery for DiscoveryService {
    type SessionStream = Downstream;

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<CertificateResponse>, Status> {
        let request = request.into_inner();
        self.shared.issuer.enrol(&request.token, &request.csr_der).await.map(Response::new)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<CertificateResponse>, Status> {
        let account = self.shared.account(&request)?;
        self.shared.issuer.renew(&account, &request.get_ref().csr_der).map(Response::new)
    }

    async fn session(&self, request: Request<Streaming<ToGateway>>) -> Result<Response<Downstream>, Status> {
        let account = self.shared.account(&request)?;
        let local = request.extensions().get::<Arc<PeerInfo>>().map(|info| info.local.ip());
        let (down, stream) = mpsc::channel(OUTGOING_MAX);
        let shared = self.shared.clone();
        let up = request.into_inner();
        // Ends with the stream or with `shutdown`, which the server's own shutdown waits for.
        tokio::spawn(async move {
            if let Err(status) = shared.serve(account, local, up, &down).await {
                tracing::info!(%status, "sidecar session ended");
                let _ = down.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Shared {
    /// Whom the caller proves to be: a workload of this cluster.
    fn account<T>(&self, request: &Request<T>) -> Result<ServiceAccount, Status> {
        let info = request.extensions().get::<Arc<PeerInfo>>();
        let chain = info.map(|info| info.chain.as_slice()).unwrap_or_default();
        self.issuer.own_workload(chain)
    }

    async fn serve(
        &self,
        account: ServiceAccount,
        local: Option<IpAddr>,
        mut up: Streaming<ToGateway>,
        down: &mpsc::Sender<Result<ToProxy, Status>>,
    ) -> Result<(), Status> {
        let first = tokio::time::timeout(REGISTER_TIMEOUT, up.message());
        let first = first.await.map_err(|_| Status::deadline_exceeded("no registration within 5 s"))??;
        let Some(Up::Register(register)) = first.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("the first message of a session is its registration"));
        };
        let (key, registration) = self.register(&account, &register).await?;
        let mut conversation = Conversation {
            shared: self,
            labels: register.labels.clone().into_iter().collect(),
            number: self.sessions.fetch_add(1, Ordering::Relaxed),
            process: (registration.handle, registration.incarnation),
            key: key.clone(),
            session: Session::default(),
            down,
            served: None,
            links_sent: None,
            local,
        };
        self.sidecars.opened(&key, conversation.process, conversation.number, register.version.clone());
        let result = conversation.run(&mut up, registration).await;
        let last = self.sidecars.closed(&key, conversation.process, conversation.number);
        match &result {
            Ok(End::Stopping) => {}
            Ok(End::Left) if last => self.hub.unregister(&key, conversation.process),
            // A stream that the sidecar itself gave up; a dead one's connection breaks.
            Err(status) if last && status.code() == Code::Cancelled => self.hub.unregister(&key, conversation.process),
            Err(_) if last => self.hub.lost(&key, conversation.process),
            Ok(End::Left) | Err(_) => {}
        }
        self.hub.forget_traffic(conversation.number);
        result.map(drop)
    }

    async fn register(
        &self,
        account: &ServiceAccount,
        register: &Register,
    ) -> Result<(WorkloadKey, Registration), Status> {
        let invalid = |what: &str, error: &dyn std::fmt::Display| Status::invalid_argument(format!("{what}: {error}"));
        let namespace = register.namespace.parse().map_err(|error| invalid("namespace", &error))?;
        let workload = register.workload.parse().map_err(|error| invalid("workload", &error))?;
        let key: WorkloadKey = (namespace, workload);
        if key.0 != account.namespace {
            let text = format!("{account} may not register a workload of namespace {}", key.0);
            return Err(refused("namespace", text));
        }
        let address = |what: &str, text: &str| text.parse::<SocketAddr>().map_err(|error| invalid(what, &error));
        let mut ports = std::collections::BTreeMap::new();
        for (name, port) in &register.ports {
            let port = u16::try_from(*port).map_err(|error| invalid("ports", &error))?;
            ports.insert(name.clone(), port);
        }
        let registration = self.sidecars.registration(account, &key, register).await?;
        let local = Local {
            handle: registration.handle,
            incarnation: registration.incarnation,
            account: account.clone(),
            labels: register.labels.clone().into_iter().collect(),
            ports,
            mtls_address: address("mtls_address", &register.mtls_address)?,
            tunnel_address: address("tunnel_address", &register.tunnel_address)?,
            locality: Some(register.locality.as_str()).filter(|text| !text.is_empty()).map(Locality::parse),
            weight: register.weight.max(1),
            healthy: true,
            draining: false,
        };
        self.hub.register(key.clone(), local);
        Ok((key, registration))
    }
}

/// How a session ends that did not fail.
enum End {
    /// This gateway goes away; the sidecar does not.
    Stopping,
    /// The sidecar ended it.
    Left,
}

/// One session's running state.
struct Conversation<'a> {
    shared: &'a Shared,
    key: WorkloadKey,
    labels: LabelsOf,
    number: u64,
    process: (u32, u16),
    session: Session,
    down: &'a mpsc::Sender<Result<ToProxy, Status>>,
    served: Option<Vec<ServedPort>>,
    links_sent: Option<Instant>,
    /// The address of this replica as the sidecar dialled it.
    local: Option<IpAddr>,
}

impl Conversation<'_> {
    async fn run(&mut self, up: &mut Streaming<ToGateway>, registration: Registration) -> Result<End, Status> {
        let hub = &self.shared.hub;
        let mut generation = hub.generation();
        let mut gone = hub.gone();
        let mut notices = hub.notices();
        let mut keys = self.shared.sidecars.keys();
        let mut trust = self.shared.issuer.trust();
        self.say(Down::Registered(Registered {
            signed: Some(registration.signed),
            cluster: hub.own().to_string(),
            cluster_id: hub.own_id().0.into(),
        }))
        .await?;
        let (first_keys, first_trust) = (keys.borrow_and_update().clone(), trust.borrow_and_update().clone());
        self.say(Down::EndpointKeys(first_keys)).await?;
        if let Some(trust) = first_trust {
            self.say(Down::Trust(trust)).await?;
        }
        let mut replicas = self.shared.sidecars.replica_changes();
        self.say(Down::Replicas(self.shared.sidecars.replicas(self.local))).await?;
        self.tell_changes().await?;
        let mut links = tokio::time::interval(LINKS_EVERY);
        let mut paths = self.shared.sidecars.link_states();
        loop {
            tokio::select! {
                () = self.shared.shutdown.cancelled() => {
                    self.say(Down::Draining(GatewayDraining {})).await?;
                    return Ok(End::Stopping);
                }
                message = up.message() => match message? {
                    Some(message) => self.hear(message).await?,
                    None => return Ok(End::Left),
                },
                Ok(()) = generation.changed() => {
                    tokio::time::sleep(GATHER).await;
                    generation.borrow_and_update();
                    self.tell_changes().await?;
                }
                Ok(()) = keys.changed() => {
                    let keys = keys.borrow_and_update().clone();
                    self.say(Down::EndpointKeys(keys)).await?;
                }
                Ok(()) = trust.changed() => {
                    let now = trust.borrow_and_update().clone();
                    if let Some(trust) = now {
                        self.say(Down::Trust(trust)).await?;
                    }
                }
                Ok(()) = replicas.changed() => {
                    replicas.mark_unchanged();
                    self.say(Down::Replicas(self.shared.sidecars.replicas(self.local))).await?;
                }
                event = gone.recv() => match event {
                    Ok(event) => self.say(Down::Gone(event)).await?,
                    Err(broadcast::error::RecvError::Lagged(missed)) => tracing::warn!(missed, "slow sidecar missed events"),
                    Err(broadcast::error::RecvError::Closed) => return Ok(End::Stopping),
                },
                Ok(notice) = notices.recv() => {
                    if let Some(refused) = self.shared.sidecars.notice_for(self.process, &notice) {
                        self.say(Down::DialRefused(refused)).await?;
                    }
                }
                Ok(()) = paths.changed() => self.tell_links(&mut paths).await?,
                _ = links.tick() => self.tell_links(&mut paths).await?,
            }
        }
    }

    async fn hear(&mut self, message: ToGateway) -> Result<(), Status> {
        match message.message {
            Some(Up::Subscribe(subscribe)) => {
                self.subscribe(subscribe)?;
                self.tell_changes().await
            }
            Some(Up::Ack(ack)) => {
                if !ack.error.is_empty() {
                    tracing::warn!(workload = %self.key.1, version = ack.version, error = %ack.error, "sidecar refused its config");
                }
                self.session.acknowledge(ack.version, ack.error);
                self.tell_changes().await
            }
            Some(Up::Tickets(request)) => self.mint(request).await,
            Some(Up::Health(report)) => {
                self.shared.hub.report_health(&self.key, report.healthy, report.draining);
                Ok(())
            }
            Some(Up::Telemetry(telemetry)) => {
                self.shared.hub.report_traffic(self.number, &telemetry.edges, Instant::now());
                Ok(())
            }
            Some(Up::Register(_)) => Err(Status::invalid_argument("a session registers once")),
            None => Ok(()),
        }
    }

    fn subscribe(&mut self, subscribe: Subscribe) -> Result<(), Status> {
        let parse = |names: Vec<String>| {
            let one = |name: String| serde_json::from_str::<ResourceName>(&name);
            names.into_iter().map(one).collect::<Result<Vec<_>, _>>()
        };
        let bad = |error: serde_json::Error| Status::invalid_argument(format!("subscription: {error}"));
        let (add, remove) = (parse(subscribe.add).map_err(bad)?, parse(subscribe.remove).map_err(bad)?);
        if let Some(held) = subscribe.held {
            self.session.hold(held.resources.into_iter().map(|one| (one.name, one.version)));
        }
        let dropped = self.session.subscribe(add, &remove);
        if dropped > 0 {
            tracing::warn!(workload = %self.key.1, dropped, "sidecar asks for more names than a session holds");
        }
        Ok(())
    }

    async fn mint(&mut self, request: TicketRequest) -> Result<(), Status> {
        let tickets = self.shared.sidecars.mint(&self.shared.hub, &request);
        self.say(Down::Tickets(tickets)).await
    }

    async fn tell_changes(&mut self) -> Result<(), Status> {
        let served: Vec<ServedPort> = self.shared.hub.served(&self.key).into_iter().map(served_port).collect();
        // Before the log was heard nobody can say that an export has ended.
        if self.served.as_ref() != Some(&served) && self.shared.hub.registry().mesh.is_some() {
            self.served = Some(served.clone());
            let version = *self.shared.hub.generation().borrow();
            self.say(Down::Exports(Exports { version, ports: served })).await?;
        }
        let source = self.shared.hub.source(&self.key, &self.labels);
        if let Some(delta) = self.session.poll_delta(&source) {
            self.say(Down::Delta(delta)).await?;
        }
        self.shared.sidecars.progress(self.number, &self.session);
        Ok(())
    }

    async fn tell_links(&mut self, paths: &mut watch::Receiver<LinkStates>) -> Result<(), Status> {
        let states = paths.borrow_and_update().clone();
        if !states.links.is_empty() || self.links_sent.is_some() {
            self.links_sent = Some(Instant::now());
            self.say(Down::Links(states)).await?;
        }
        Ok(())
    }

    async fn say(&self, message: Down) -> Result<(), Status> {
        let message = ToProxy { message: Some(message) };
        self.down.send(Ok(message)).await.map_err(|_| Status::cancelled("the sidecar has gone"))
    }
}

fn served_port(served: crate::locals::Served) -> ServedPort {
    ServedPort {
        host: served.host.to_string(),
        port: served.port.into(),
        target_port: served.target.into(),
        protocol: served.protocol,
        visible_to: served.visible_to,
    }
}
