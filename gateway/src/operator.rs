//! What the CLI asks: over the unix socket, whose file mode decides who may (see `operator.proto`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_federation::command::{Command, SignedEntry, token_hash};
use isthmus_federation::member::{MemberHandle, ProposeError};
use isthmus_identity::token::Secret;
use isthmus_identity::{JoinToken, WorkloadToken, fingerprint};
use isthmus_model::service::Patterns;
use isthmus_model::{ClusterName, ServiceAccount};
use isthmus_wire::operator::create_token_request::What;
use isthmus_wire::operator::operator_server::Operator;
use isthmus_wire::operator::{
    ApplyRequest, ApplyResponse, ClusterToken, CreateTokenRequest, CreateTokenResponse, DeleteRequest, File,
    GetRequest, GetResponse, ProposeRequest, ProposeResponse, RevokeTokenRequest, RevokeTokenResponse,
};
use serde::Serialize;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::distribution::sidecars::Sidecars;
use crate::hub::Hub;
use crate::issue::Issuer;
use crate::join::{now_unix_s, refused};
use crate::object_store::{ApplyError, ObjectStore};
use crate::summary::Summary;
use crate::tables;
use crate::writer::{ClusterWriter, WriteError};

/// A token's life where nothing is said.
const TOKEN_TTL: Duration = Duration::from_secs(15 * 60);
/// Longest life of a token.
const TOKEN_TTL_MAX: Duration = Duration::from_secs(7 * 86_400);
/// How long a linearizable read waits for this member to catch up.
const READ_PATIENCE: Duration = Duration::from_secs(5);

/// The operator service.
pub struct OperatorService {
    /// What is known.
    pub hub: Arc<Hub>,
    /// The cluster's objects.
    pub objects: Arc<ObjectStore>,
    /// The sidecars.
    pub sidecars: Arc<Sidecars>,
    /// Trust, for token fingerprints.
    pub issuer: Arc<Issuer>,
    /// Writes in the cluster's name.
    pub writer: ClusterWriter,
    /// The registry's member.
    pub member: MemberHandle,
    /// The mesh at a glance.
    pub summary: watch::Receiver<Arc<Summary>>,
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let request = request.into_inner();
        if request.linearizable {
            let index = self.member.read_index().await.map_err(|error| refused(error.reason(), error.to_string()))?;
            self.member
                .applied(index, READ_PATIENCE)
                .await
                .map_err(|error| refused(error.reason(), error.to_string()))?;
        }
        let json = self.table(&request)?;
        Ok(Response::new(GetResponse { json }))
    }

    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        self.check_writes()?;
        let request = request.into_inner();
        let response = match self.objects.apply(&contents(request.files), request.dry_run) {
            Ok((changes, warnings)) => ApplyResponse {
                changes,
                warnings: warnings.iter().map(ToString::to_string).collect(),
                refusals: Vec::new(),
            },
            Err(ApplyError::Refused(refusals)) => ApplyResponse { refusals, ..ApplyResponse::default() },
            Err(ApplyError::State(error)) => return Err(Status::unavailable(error.to_string())),
        };
        Ok(Response::new(response))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<ApplyResponse>, Status> {
        self.check_writes()?;
        let request = request.into_inner();
        let response = match self.objects.delete(&contents(request.files), request.dry_run) {
            Ok(changes) => ApplyResponse { changes, ..ApplyResponse::default() },
            Err(ApplyError::Refused(refusals)) => ApplyResponse { refusals, ..ApplyResponse::default() },
            Err(ApplyError::State(error)) => return Err(Status::unavailable(error.to_string())),
        };
        Ok(Response::new(response))
    }

    async fn create_token(
        &self,
        request: Request<CreateTokenRequest>,
    ) -> Result<Response<CreateTokenResponse>, Status> {
        let request = request.into_inner();
        let ttl = match request.ttl_s {
            0 => TOKEN_TTL,
            seconds => Duration::from_secs(seconds.into()),
        };
        if ttl > TOKEN_TTL_MAX {
            let text =
                format!("a token lives at most {} days, not {} s", TOKEN_TTL_MAX.as_secs() / 86_400, ttl.as_secs());
            return Err(Status::invalid_argument(text));
        }
        let expires_unix_s = now_unix_s() + ttl.as_secs();
        let token = match request.what {
            Some(What::Cluster(cluster)) => self.cluster_token(&cluster, expires_unix_s).await?,
            Some(What::Workload(workload)) => self.workload_token(&workload.account, expires_unix_s).await?,
            None => return Err(Status::invalid_argument("name a cluster, or a workload's account")),
        };
        Ok(Response::new(CreateTokenResponse { token, expires_unix_s }))
    }

    async fn revoke_token(
        &self,
        request: Request<RevokeTokenRequest>,
    ) -> Result<Response<RevokeTokenResponse>, Status> {
        let id = request.into_inner().id;
        self.writer.write(Command::RevokeToken { id }).await.map_err(|error| write_status(&error))?;
        Ok(Response::new(RevokeTokenResponse {}))
    }

    async fn propose(&self, request: Request<ProposeRequest>) -> Result<Response<ProposeResponse>, Status> {
        let entry = SignedEntry::from_bytes(&request.into_inner().entry)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let committed = self.member.propose(entry).await.map_err(|error| refused(error.reason(), error.to_string()))?;
        match committed.outcome {
            Ok(()) => Ok(Response::new(ProposeResponse { index: committed.index })),
            Err(refusal) => Err(refused(&refusal.reason, refusal.message)),
        }
    }
}

impl OperatorService {
    /// The cluster's objects are written at its member, which tells the other replicas.
    fn check_writes(&self) -> Result<(), Status> {
        match self.member.is_member() {
            true => Ok(()),
            false => Err(refused(ProposeError::NotMember.reason(), ProposeError::NotMember.to_string())),
        }
    }

    fn table(&self, request: &GetRequest) -> Result<Vec<u8>, Status> {
        let registry = self.hub.registry();
        let now = Instant::now();
        match request.what.as_str() {
            "status" => json(&**self.summary.borrow()),
            "clusters" => json(&self.summary.borrow().clusters),
            "links" => json(&self.summary.borrow().links),
            "services" => json(&self.summary.borrow().services),
            "exports" => json(&tables::exports(&registry)),
            "imports" => json(&tables::imports(&self.hub, &registry, now)),
            "endpoints" => json(&tables::endpoints(&self.hub)),
            "tokens" => json(&tables::tokens(&registry, now_unix_s())),
            "config" => json(&self.objects.rows()),
            "proxies" => json(&tables::proxies(&self.hub, &self.sidecars.connected(), now)),
            "registry" => json(&*registry),
            other => Err(Status::invalid_argument(format!("there is no table {other:?}"))),
        }
    }

    async fn cluster_token(&self, wanted: &ClusterToken, expires_unix_s: u64) -> Result<String, Status> {
        let cluster: ClusterName =
            wanted.cluster.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        let registry = self.hub.registry();
        if registry.clusters.contains_key(&cluster) {
            let text = format!("{cluster} is a member already; choose another name");
            return Err(refused("name_taken", text));
        }
        let mesh = registry
            .mesh
            .as_ref()
            .ok_or_else(|| refused("no_mesh", "this gateway has not heard of its mesh yet".into()))?;
        let gateways: Vec<String> =
            registry.clusters.values().flat_map(|record| record.facts.addresses.iter().cloned()).collect();
        if gateways.is_empty() {
            let text = "no cluster of the mesh can be dialled; give one an address: `advertise: [host:15443]` in its gateway.yaml";
            return Err(refused("not_dialable", text.into()));
        }
        let secret = Secret::generate();
        let id = format!("{:08x}", rand::random::<u32>());
        let namespaces =
            if wanted.namespaces.is_empty() { Patterns::all() } else { Patterns(wanted.namespaces.clone()) };
        let command = Command::AddToken {
            id: id.clone(),
            hash: token_hash(secret.reveal()),
            cluster: cluster.clone(),
            namespaces,
            expires_unix_s,
        };
        self.writer.write(command).await.map_err(|error| write_status(&error))?;
        let token = JoinToken {
            mesh: mesh.name.clone(),
            cluster,
            id,
            gateways,
            root_fingerprint: self.root_fingerprint()?,
            secret,
        };
        Ok(token.to_string())
    }

    async fn workload_token(&self, account: &str, expires_unix_s: u64) -> Result<String, Status> {
        let account: ServiceAccount = account.parse().map_err(|error| Status::invalid_argument(format!("{error}")))?;
        if account == ServiceAccount::gateway() {
            return Err(refused("reserved", format!("{account} is the gateways' own account")));
        }
        let secret = Secret::generate();
        self.check_writes()?;
        self.member
            .mint_workload_token(secret.hash(), account.clone(), expires_unix_s)
            .await
            .map_err(|error| refused(error.reason(), error.to_string()))?;
        let token = WorkloadToken {
            cluster: self.hub.own().clone(),
            account,
            root_fingerprint: self.root_fingerprint()?,
            secret,
        };
        Ok(token.to_string())
    }

    fn root_fingerprint(&self) -> Result<String, Status> {
        let trust = self.issuer.shared().load();
        trust.roots.first().map(fingerprint).ok_or_else(|| Status::internal("no root is trusted"))
    }
}

fn contents(files: Vec<File>) -> Vec<(String, Vec<u8>)> {
    files.into_iter().map(|file| (file.name, file.content)).collect()
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, Status> {
    serde_json::to_vec(value).map_err(|error| Status::internal(error.to_string()))
}

fn write_status(error: &WriteError) -> Status {
    refused(error.reason(), error.to_string())
}
