//! One gateway replica, from its config to its last task: what is started in which order, and why.
//!
//! Forwarding comes first (tables from disk are enough), then what fills the tables. On SIGTERM the order
//! turns around: probes are answered `draining`, forwarding goes on, then everything ends.

mod glance;
mod listen;
mod upkeep;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use isthmus_federation::command::{
    ClusterFacts, Command, FORM_MAX, SignError, SignedEntry, Signer as EntrySigner, Writer,
};
use isthmus_federation::der::Der;
use isthmus_federation::member::{Member, MemberConfig, MemberHandle, Mirror};
use isthmus_identity::state::create_dir;
use isthmus_identity::{ClusterAuthority, RootAuthority, SharedIdentity};
use isthmus_model::vip::Addresses;
use isthmus_runtime::http::HttpServer;
use isthmus_runtime::readiness::Readiness;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cluster_files::ClusterFiles;
use crate::config::GatewayConfig;
use crate::distribution::server::DiscoveryService;
use crate::distribution::sidecars::Sidecars;
use crate::handles::HandleTable;
use crate::hub::Hub;
use crate::issue::{Issuer, Tokens, first_trust};
use crate::join::{JoinService, now_unix_s};
use crate::keys::TunnelKeys;
use crate::links::{LinkGlue, LinkTransport};
use crate::object_store::ObjectStore;
use crate::operator::OperatorService;
use crate::replication::{
    self, Followed, MemberClient, Registrar, ReplicaAddresses, ReplicaList, ReplicationService, read_state, to_wire,
};
use crate::router::Router;
use crate::signer::Signer;
use crate::summary::Summary;
use crate::writer::ClusterWriter;
use crate::{dashboard, local_table, publisher};
use glance::summarise;
use listen::{bind_socket, bind_tcp, serve_joins, serve_operators, serve_sessions};
use upkeep::{expire_leases, keep_addresses, renew_identity, rotate_keys, tell_sidecars, watch_registry};

/// Forwarding goes on this long after SIGTERM: peers have switched by then, streams have not noticed.
const DRAIN: Duration = Duration::from_secs(15);

/// Runs a gateway until `shutdown`, then drains; `drain` shortens that for tests and demos.
///
/// # Errors
/// What keeps it from starting, with the place and the fix; a failed store.
pub async fn run(config: GatewayConfig, drain: Option<Duration>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let gateway = Gateway::open(config)?;
    gateway.serve(drain.unwrap_or(DRAIN), shutdown).await
}

struct Gateway {
    config: GatewayConfig,
    files: Files,
    identity: SharedIdentity,
    authority: Arc<ClusterAuthority>,
    keys: watch::Sender<TunnelKeys>,
    part: Part,
    replicas: watch::Sender<ReplicaList>,
    handle: MemberHandle,
    transport: Arc<LinkTransport>,
    hub: Arc<Hub>,
    issuer: Arc<Issuer>,
    sidecars: Arc<Sidecars>,
    writer: ClusterWriter,
    router: Router,
}

/// The part that a replica plays in its cluster.
enum Part {
    /// Replica 0: the cluster's member of the federation, who alone writes.
    Member(Box<Member>),
    /// Any other: serves what the member last said.
    Follower(Mirror, MemberClient),
}

struct Files {
    facts: crate::cluster_files::ClusterFacts,
    root: Option<RootAuthority>,
}

/// The cluster's intermediate as a signer of log entries.
struct AuthoritySigner(Arc<ClusterAuthority>);

impl EntrySigner for AuthoritySigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        self.0.sign(message).map_err(|error| SignError(error.to_string()))
    }
}

impl Gateway {
    fn open(config: GatewayConfig) -> anyhow::Result<Self> {
        let files = ClusterFiles::load(&config.identity).context("cannot start without the cluster's identity")?;
        anyhow::ensure!(
            files.facts.cluster == config.cluster,
            "the config is of cluster {}, the identity in {} of cluster {}",
            config.cluster,
            config.identity.display(),
            files.facts.cluster
        );
        create_dir(&config.state)?;
        let facts = files.facts.clone();
        let roots = files.roots.clone();
        let ClusterFiles { chain, key, root, .. } = files;
        let authority = Arc::new(ClusterAuthority::load(chain, key, facts.trust_domain.clone()));
        let identity = SharedIdentity::new(&gateway_identity(&authority, &roots)?)?;
        let keys =
            TunnelKeys::load_or_create(&config.identity.join("tunnel-keys.json"), facts.cluster_id, now_unix_s())?;

        let signer: Arc<dyn EntrySigner> = Arc::new(AuthoritySigner(authority.clone()));
        let own_facts = cluster_facts(&config);
        let mut member_config =
            MemberConfig::new(&facts.mesh, facts.cluster.clone(), facts.cluster_id, config.state.join("registry"));
        if facts.founder {
            member_config.init = Some(first_entry(&facts, &authority, &roots, own_facts, &*signer)?);
        }
        let peers = facts.peers.iter().map(|peer| (peer.cluster.clone(), peer.cluster_id));
        let trust = first_trust((config.cluster.clone(), facts.cluster_id), facts.trust_domain.clone(), roots, peers);
        let transport = LinkTransport::new();
        // The member alone spends tokens and gives handles.
        let (part, handle, tokens, handles) = match config.member.filter(|_| !config.is_member()) {
            None => {
                let (member, handle) = Member::open(member_config, transport.clone())?;
                let path = config.state.join("handles.json");
                let handles = read_state::<HandleTable>(&path)?.unwrap_or_default();
                (Part::Member(Box::new(member)), handle.clone(), Tokens::Here(handle), Some((handles, path)))
            }
            Some(address) => {
                let client = MemberClient::new(address, &config.cluster, &identity, &trust);
                let registry = read_state(&registry_path(&config))?.unwrap_or_default();
                let (mirror, handle) = Mirror::new(member_config, Arc::new(registry), transport.clone());
                (Part::Follower(mirror, client.clone()), handle, Tokens::At(client), None)
            }
        };
        let registry = handle.registry().borrow().clone();
        let addresses = read_state(&addresses_path(&config))?.unwrap_or_else(|| Addresses::new(&facts.mesh));
        let hub = Hub::new(config.cluster.clone(), config.locality.clone(), registry, Arc::default(), addresses);
        let issuer = Issuer::new(config.cluster.clone(), authority.clone(), tokens, trust);
        issuer.set_registry(&hub.registry());
        let own = own_addresses(&config);
        let sidecars =
            Sidecars::new(authority.clone(), keys.cids.clone(), handles, to_wire(std::slice::from_ref(&own)));
        let writer = ClusterWriter::new(&facts.mesh, config.cluster.clone(), signer, handle.clone());
        let first = local_table::local_table(&hub, &keys, config.replica, &[], false);
        let router = Router::bind(config.at(config.ports.tunnel), config.workers, first)
            .with_context(|| format!("cannot bind UDP {}", config.at(config.ports.tunnel)))?;
        Ok(Self {
            files: Files { facts, root },
            identity,
            authority,
            keys: watch::Sender::new(keys),
            part,
            replicas: watch::Sender::new(vec![own]),
            handle,
            transport,
            hub,
            issuer,
            sidecars,
            writer,
            router,
            config,
        })
    }

    async fn serve(self, drain: Duration, shutdown: CancellationToken) -> anyhow::Result<()> {
        // Forwarding outlives everything else: it ends when `running` is dropped.
        let shared = self.router.shared();
        let running = Router::start(&shared)?;
        let stop = CancellationToken::new();
        let readiness = Readiness::new();
        let registry_known = readiness.condition("registry", "the log was not heard yet");
        let mut tasks = JoinSet::new();

        let objects = ObjectStore::open(&self.config.state, self.config.objects.clone(), self.hub.clone())?;
        let (summary_sender, summary) = watch::channel(Arc::new(Summary::default()));
        let links = LinkGlue {
            hub: self.hub.clone(),
            sidecars: self.sidecars.clone(),
            issuer: self.issuer.clone(),
            identity: self.identity.clone(),
            member: self.handle.clone(),
            keys: self.keys.subscribe(),
            facts: self.files.facts.clone(),
            replica: self.config.replica,
            advertised: self.config.advertise.clone(),
        };
        let sessions = bind_tcp(self.config.at(self.config.ports.sessions)).await?;
        let socket = bind_socket(&self.config.socket)?;
        let links = links.start(self.router, &self.transport, &mut tasks, stop.clone())?;
        let operator = OperatorService {
            hub: self.hub.clone(),
            objects: objects.clone(),
            sidecars: self.sidecars.clone(),
            issuer: self.issuer.clone(),
            writer: self.writer.clone(),
            member: self.handle.clone(),
            summary: summary.clone(),
        };
        serve_operators(operator, socket, &mut tasks, &stop);
        let dashboard = HttpServer::bind(
            "dashboard",
            self.config.dashboard,
            dashboard::router(summary, self.config.dashboard.ip()),
        )
        .await?;
        tasks.spawn(dashboard.run(stop.clone()));
        let health = HttpServer::bind("health", self.config.at(self.config.ports.health), readiness.router()).await?;
        tasks.spawn(health.run(stop.clone()));
        let metrics = crate::metrics::registry(
            shared.clone(),
            self.hub.clone(),
            self.sidecars.clone(),
            self.handle.clone(),
            links.clone(),
        );
        let metrics = isthmus_runtime::metrics::router(metrics);
        let metrics = HttpServer::bind("metrics", self.config.at(self.config.ports.metrics), metrics).await?;
        tasks.spawn(metrics.run(stop.clone()));

        tasks.spawn(objects.clone().run(stop.clone()));
        tasks.spawn(watch_registry(
            self.hub.clone(),
            self.issuer.clone(),
            self.handle.clone(),
            registry_known,
            stop.clone(),
        ));
        tasks.spawn(expire_leases(self.hub.clone(), stop.clone()));
        tasks.spawn(local_table::run(
            self.hub.clone(),
            self.keys.subscribe(),
            shared,
            (self.config.replica, self.replicas.subscribe()),
            shutdown.clone(),
            stop.clone(),
        ));
        tasks.spawn(tell_sidecars(
            self.sidecars.clone(),
            self.keys.subscribe(),
            self.replicas.subscribe(),
            stop.clone(),
        ));
        tasks.spawn(renew_identity(self.identity.clone(), self.authority, self.issuer.clone(), stop.clone()));
        tasks.spawn(summarise(
            self.hub.clone(),
            self.handle.clone(),
            links,
            self.config.dashboard,
            summary_sender,
            stop.clone(),
        ));
        let discovery =
            DiscoveryService::new(self.hub.clone(), self.sidecars.clone(), self.issuer.clone(), stop.clone());
        let keys_path = self.config.identity.join("tunnel-keys.json");
        let mut part = match self.part {
            Part::Member(member) => {
                let path = self.config.state.join("replicas.json");
                let registrar = Registrar::open(own_addresses(&self.config), path, self.replicas.clone())?;
                let replication = ReplicationService {
                    hub: self.hub.clone(),
                    objects,
                    member: self.handle.clone(),
                    keys: self.keys.subscribe(),
                    issuer: self.issuer.clone(),
                    registrar: registrar.clone(),
                    stop: stop.clone(),
                };
                serve_sessions(&self.identity, &self.issuer, discovery, Some(replication), sessions, &mut tasks, &stop);
                let joins = bind_tcp(self.config.at(self.config.ports.tunnel)).await?;
                let join = JoinService::new(self.writer.clone(), self.handle.clone());
                serve_joins(&self.identity, &self.issuer, join, joins, &mut tasks, &stop);
                tasks.spawn(registrar.run(stop.clone()));
                tasks.spawn(keep_addresses(self.hub.clone(), addresses_path(&self.config), stop.clone()));
                tasks.spawn(publisher::run(
                    self.hub.clone(),
                    self.writer.clone(),
                    cluster_facts(&self.config),
                    self.replicas.subscribe(),
                    stop.clone(),
                ));
                tasks.spawn(rotate_keys(self.keys, keys_path, stop.clone()));
                if let Some(root) = self.files.root {
                    let signer = Signer::new(root, self.config.cluster.clone(), self.writer, self.handle.clone());
                    tasks.spawn(signer.run(stop.clone()));
                }
                tokio::spawn(member.run(stop.clone()))
            }
            Part::Follower(mirror, client) => {
                serve_sessions(&self.identity, &self.issuer, discovery, None, sessions, &mut tasks, &stop);
                let followed = Followed {
                    mirror,
                    hub: self.hub.clone(),
                    objects,
                    keys: (self.keys, keys_path),
                    list: self.replicas,
                    registry_path: registry_path(&self.config),
                    addresses_path: addresses_path(&self.config),
                };
                tokio::spawn(replication::follow(followed, client, own_addresses(&self.config), stop.clone()))
            }
        };
        tracing::info!(cluster = %self.config.cluster, replica = self.config.replica, listen = %self.config.listen, "gateway is up");

        tokio::select! {
            () = shutdown.cancelled() => {}
            _ = &mut part => tracing::error!("the registry's member has ended; serving what is known"),
        }
        shutdown.cancelled().await;
        tracing::info!(?drain, "draining: peers and sidecars move to other replicas");
        self.handle.transfer_leader().await;
        tokio::time::sleep(drain).await;
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        if !part.is_finished() {
            let _ = part.await;
        }
        let _ = std::fs::remove_file(&self.config.socket);
        drop(running);
        Ok(())
    }
}

fn gateway_identity(
    authority: &ClusterAuthority,
    roots: &[rustls::pki_types::CertificateDer<'static>],
) -> anyhow::Result<isthmus_identity::Identity> {
    let mut identity = authority.issue_gateway(now_unix_s())?;
    // The root travels along for joiners and new workloads, who know only its fingerprint.
    identity.chain.extend(roots.iter().cloned());
    Ok(identity)
}

fn cluster_facts(config: &GatewayConfig) -> ClusterFacts {
    ClusterFacts {
        addresses: config.advertise.clone(),
        locality: config.locality.clone(),
        provider: String::new(),
        version: env!("CARGO_PKG_VERSION").into(),
        form_max: FORM_MAX,
    }
}

fn first_entry(
    facts: &crate::cluster_files::ClusterFacts,
    authority: &ClusterAuthority,
    roots: &[rustls::pki_types::CertificateDer<'static>],
    own: ClusterFacts,
    signer: &dyn EntrySigner,
) -> Result<SignedEntry, SignError> {
    let command = Command::Init {
        mesh: facts.mesh.clone(),
        trust_domain: facts.trust_domain.clone(),
        roots: roots.iter().map(|der| Der(der.to_vec())).collect(),
        cluster: facts.cluster.clone(),
        chain: authority.chain().iter().map(|der| Der(der.to_vec())).collect(),
        facts: own,
    };
    SignedEntry::sign(&Writer::Cluster(facts.cluster.clone()), &facts.mesh, now_unix_s() * 1_000_000, command, signer)
}

fn own_addresses(config: &GatewayConfig) -> ReplicaAddresses {
    ReplicaAddresses {
        number: config.replica,
        udp: config.at(config.ports.tunnel),
        sessions: config.at(config.ports.sessions),
        advertise: config.advertise.clone(),
    }
}

fn addresses_path(config: &GatewayConfig) -> PathBuf {
    config.state.join("addresses.json")
}

/// Where a replica keeps what the member last said of the registry.
fn registry_path(config: &GatewayConfig) -> PathBuf {
    config.state.join("registry.json")
}
