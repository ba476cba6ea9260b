//! Admits clusters: port 15443 over TCP, ALPN `isthmus-join/1` (see `join.proto`).
//!
//! Any gateway of the mesh admits; the log decides (token used once, name free) and a signer grants.

use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isthmus_federation::command::{ClusterFacts, Command, FORM_MAX, token_hash};
use isthmus_federation::der::Der;
use isthmus_federation::member::MemberHandle;
use isthmus_federation::registry::{Registry, TokenState};
use isthmus_model::{ClusterName, Locality};
use isthmus_wire::join::join_event::Event;
use isthmus_wire::join::join_server::Join;
use isthmus_wire::join::{DryRun, Granted, JoinEvent, JoinRequest, Peer};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::writer::{ClusterWriter, WriteError};

/// How long a joiner is kept waiting for a signer before it is told who is silent.
const GRANT_PATIENCE: Duration = Duration::from_secs(60);
/// Joins at once; each holds a stream and a waiter.
const JOINS_MAX: usize = 64;

/// The join service.
pub struct JoinService {
    writer: ClusterWriter,
    member: MemberHandle,
    slots: std::sync::Arc<tokio::sync::Semaphore>,
}

impl JoinService {
    /// A service that writes through `writer`.
    pub fn new(writer: ClusterWriter, member: MemberHandle) -> Self {
        Self { writer, member, slots: std::sync::Arc::new(tokio::sync::Semaphore::new(JOINS_MAX)) }
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<JoinEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Join for JoinService {
    type JoinStream = Events;

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        let slot = self.slots.clone().try_acquire_owned().map_err(|_| {
            refused("limited", format!("{JOINS_MAX} clusters are joining through this gateway; try again in a minute"))
        })?;
        let admission = Admission::check(&request)?;
        check_token(&self.member.registry().borrow(), &admission, now_unix_s())?;
        let (events, stream) = mpsc::channel(8);
        if request.dry_run {
            let expires = token_expiry(&self.member.registry().borrow(), &admission);
            let event = DryRun { server_unix_ms: now_unix_ms(), expires_unix_s: expires };
            let _ = events.send(Ok(JoinEvent { event: Some(Event::DryRun(event)) })).await;
        } else {
            let (writer, member) = (self.writer.clone(), self.member.clone());
            // Ends with the joiner's stream or after GRANT_PATIENCE, whichever is first.
            tokio::spawn(async move {
                let result = tokio::select! {
                    () = events.closed() => return,
                    result = admit(admission, &writer, &member, &events) => result,
                };
                let _ = events.send(result.map(|granted| JoinEvent { event: Some(Event::Granted(granted)) })).await;
                drop(slot);
            });
        }
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

struct Admission {
    cluster: ClusterName,
    secret: String,
    csr: Der,
    facts: ClusterFacts,
}

impl Admission {
    fn check(request: &JoinRequest) -> Result<Self, Status> {
        let invalid = |text: String| refused("name_mismatch", text);
        let cluster: ClusterName = request.cluster.parse().map_err(|error| invalid(format!("{error}")))?;
        let secret = String::from_utf8(request.secret.clone()).map_err(|_| refused("token_unknown", UNKNOWN.into()))?;
        Ok(Self {
            cluster,
            secret,
            csr: Der(request.csr_der.clone()),
            facts: ClusterFacts {
                addresses: request.gateway_addresses.clone(),
                locality: Locality::parse(&request.locality),
                provider: String::new(),
                version: request.version.clone(),
                form_max: FORM_MAX,
            },
        })
    }
}

const UNKNOWN: &str =
    "unknown join token: it belongs to another mesh, or was mistyped; make one with `isthmus token create CLUSTER`";

/// Early answers for what the log would refuse anyway; the log has the last word.
fn check_token(registry: &Registry, admission: &Admission, now_unix_s: u64) -> Result<(), Status> {
    let hash = token_hash(&admission.secret);
    let Some(token) = registry.tokens.values().find(|token| token.hash == hash) else {
        return Err(refused("token_unknown", UNKNOWN.into()));
    };
    let name = &admission.cluster;
    if token.cluster != *name {
        let text = format!("this token is for cluster {}, not {name}; the name is part of the token", token.cluster);
        return Err(refused("name_mismatch", text));
    }
    match token.state {
        TokenState::Used(_) => Err(refused(
            "token_used",
            format!("this token was used already; make a new one with `isthmus token create {name}`"),
        )),
        TokenState::Revoked => Err(refused(
            "token_revoked",
            format!("this token was revoked; make a new one with `isthmus token create {name}`"),
        )),
        TokenState::Open if token.expires_unix_s <= now_unix_s => {
            let text = format!(
                "this token expired {} s ago by this gateway's clock ({now_unix_s}); make a new one with `isthmus token create {name}`",
                now_unix_s - token.expires_unix_s
            );
            Err(refused("token_expired", text))
        }
        TokenState::Open if registry.clusters.contains_key(name) => Err(refused(
            "name_taken",
            format!("a cluster named {name} is a member already; let it leave first, or choose another name"),
        )),
        TokenState::Open => Ok(()),
    }
}

fn token_expiry(registry: &Registry, admission: &Admission) -> u64 {
    let hash = token_hash(&admission.secret);
    registry.tokens.values().find(|token| token.hash == hash).map_or(0, |token| token.expires_unix_s)
}

async fn admit(
    admission: Admission,
    writer: &ClusterWriter,
    member: &MemberHandle,
    events: &mpsc::Sender<Result<JoinEvent, Status>>,
) -> Result<Granted, Status> {
    let name = admission.cluster.clone();
    let say = |text: String| JoinEvent { event: Some(Event::Progress(text)) };
    let command = Command::JoinRequest {
        secret: admission.secret,
        cluster: name.clone(),
        csr: admission.csr,
        facts: admission.facts,
    };
    let index = writer.write(command).await.map_err(|error| match error {
        WriteError::Refused(refusal) => refused(&refusal.reason, refusal.message),
        error => refused(error.reason(), format!("{error}")),
    })?;
    let _ = events.send(Ok(say("token accepted, waiting for a signer".into()))).await;
    let mut registry = member.registry();
    let granted =
        registry.wait_for(|registry| registry.clusters.get(&name).is_some_and(|record| record.joined_index > index));
    match tokio::time::timeout(GRANT_PATIENCE, granted).await {
        Ok(Ok(registry)) => granted_of(&registry, &name),
        Ok(Err(_)) => Err(refused("stopped", "this gateway is shutting down; the request stays, join again".into())),
        Err(_) => {
            let registry = member.registry().borrow().clone();
            let signers: Vec<&str> =
                registry.clusters.values().filter(|one| one.signer).map(|one| one.name.as_str()).collect();
            let text = format!(
                "no signer answered within {} s; known signers: {}. Start one of their gateways; the request stays in the log",
                GRANT_PATIENCE.as_secs(),
                signers.join(", ")
            );
            Err(refused("no_signer", text))
        }
    }
}

fn granted_of(registry: &Registry, name: &ClusterName) -> Result<Granted, Status> {
    let record = registry.clusters.get(name).ok_or_else(|| Status::internal("the grant has vanished"))?;
    let mesh = registry.mesh.as_ref().ok_or_else(|| Status::internal("the mesh has no name"))?;
    let peers = registry.clusters.values().filter(|peer| peer.name != *name).map(|peer| Peer {
        cluster: peer.name.to_string(),
        cluster_id: peer.id.0.into(),
        gateway_addresses: peer.facts.addresses.clone(),
    });
    Ok(Granted {
        chain_der: record.chain.iter().map(|der| der.0.clone()).collect(),
        roots_der: mesh.roots.iter().map(|der| der.0.clone()).collect(),
        cluster_id: record.id.0.into(),
        mesh: mesh.name.clone(),
        trust_domain: mesh.trust_domain.to_string(),
        peers: peers.collect(),
        log_index: registry.index,
    })
}

/// A status whose reason is a fixed word in the metadata `isthmus-reason`.
pub(crate) fn refused(reason: &str, message: String) -> Status {
    let mut status = Status::failed_precondition(message);
    if let Ok(value) = reason.parse() {
        status.metadata_mut().insert("isthmus-reason", value);
    }
    status
}

pub(crate) fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn now_unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as i64)
}
