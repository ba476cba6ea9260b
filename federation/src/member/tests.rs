//! Real members in one process: real disks, real keys, real time, links of channels.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use isthmus_identity::{KeyPair, RootAuthority};
use isthmus_model::service::{Export, Patterns, Protocol, ServicePort};
use isthmus_model::{ClusterId, ClusterName, TrustDomain};
use isthmus_wire::federation::{Call, RaftFrame};
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::command::{ClusterFacts, Command, SignError, Signer, Writer, token_hash};
use crate::der::Der;

const MESH: &str = "m";

struct Key(KeyPair);

impl Signer for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        self.0.sign(message).map_err(|error| SignError(error.to_string()))
    }
}

/// All members reach each other at once.
#[derive(Default)]
struct Links(Mutex<HashMap<ClusterId, MemberHandle>>);

struct Link {
    own: ClusterId,
    links: Weak<Links>,
}

impl Transport for Link {
    fn send(&self, to: ClusterId, frame: RaftFrame) {
        let Some(handle) = self.links.upgrade().and_then(|links| links.0.lock().get(&to).cloned()) else { return };
        let (reply, _) = oneshot::channel();
        if let Some(requests) = &handle.requests {
            let _ = requests.try_send(Request::Deliver(self.own, frame, reply));
        }
    }

    fn call(&self, to: ClusterId, call: Call) -> CallFuture {
        let handle = self.links.upgrade().and_then(|links| links.0.lock().get(&to).cloned());
        Box::pin(async move {
            match handle {
                Some(handle) => Ok(handle.answer(call).await),
                None => Err(TransportError { to, reason: "no link".into() }),
            }
        })
    }
}

struct Running {
    handle: MemberHandle,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

struct Mesh {
    links: Arc<Links>,
    dir: tempfile::TempDir,
    root: RootAuthority,
    domain: TrustDomain,
    keys: HashMap<String, Key>,
    chains: HashMap<String, Vec<Der>>,
    running: HashMap<u16, Running>,
    sequence: u64,
}

impl Drop for Mesh {
    /// A failed test must end: members' threads stop only when they are told.
    fn drop(&mut self) {
        self.running.values().for_each(|running| running.stop.cancel());
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

impl Mesh {
    fn new() -> Self {
        let domain: TrustDomain = "m.example".parse().unwrap();
        let root = RootAuthority::create(MESH, &domain, now_us() / 1_000_000).unwrap();
        Self {
            links: Arc::default(),
            dir: tempfile::tempdir().unwrap(),
            root,
            domain,
            keys: HashMap::new(),
            chains: HashMap::new(),
            running: HashMap::new(),
            sequence: 0,
        }
    }

    fn issue(&mut self, name: &str) -> Vec<Der> {
        let key = KeyPair::generate().unwrap();
        let now = now_us() / 1_000_000;
        let csr = key.request().unwrap();
        let der = self.root.issue_intermediate(&csr, &name.parse().unwrap(), &self.domain, now).unwrap();
        let chain = vec![Der(der.to_vec())];
        self.keys.insert(name.into(), Key(key));
        self.chains.insert(name.into(), chain.clone());
        chain
    }

    fn sign(&mut self, name: &str, command: Command) -> SignedEntry {
        self.sequence = now_us().max(self.sequence + 1);
        let writer = Writer::Cluster(name.parse().unwrap());
        SignedEntry::sign(&writer, MESH, self.sequence, command, &self.keys[name]).unwrap()
    }

    fn start(&mut self, id: u16, name: &str, init: Option<SignedEntry>) {
        let dir = self.dir.path().join(name);
        let mut config = MemberConfig::new(MESH, name.parse().unwrap(), ClusterId(id), dir);
        config.tick = Duration::from_millis(20);
        config.init = init;
        let link = Arc::new(Link { own: ClusterId(id), links: Arc::downgrade(&self.links) });
        let (member, handle) = Member::open(config, link).unwrap();
        self.links.0.lock().insert(ClusterId(id), handle.clone());
        let stop = CancellationToken::new();
        let tasks = vec![
            tokio::spawn(member.run(stop.clone())),
            tokio::spawn(follow(handle.clone(), self.links.clone(), stop.clone())),
        ];
        self.running.insert(id, Running { handle, stop, tasks });
    }

    async fn stop(&mut self, id: u16) {
        self.links.0.lock().remove(&ClusterId(id));
        let running = self.running.remove(&id).unwrap();
        running.stop.cancel();
        for task in running.tasks {
            task.await.unwrap();
        }
    }

    fn found(&mut self) {
        let chain = self.issue("c0");
        let roots = vec![Der(self.root.certificate().to_vec())];
        let init = Command::Init {
            mesh: MESH.into(),
            trust_domain: self.domain.clone(),
            roots,
            cluster: "c0".parse().unwrap(),
            chain,
            facts: ClusterFacts::default(),
        };
        let entry = self.sign("c0", init);
        self.start(1, "c0", Some(entry));
    }

    /// Token, request, grant, start: as `isthmus join` does it, all through the first cluster.
    async fn join(&mut self, name: &str) -> u16 {
        let cluster: ClusterName = name.parse().unwrap();
        let secret = format!("secret of {name}");
        let key = KeyPair::generate().unwrap();
        let csr = Der(key.request().unwrap());
        let token = Command::AddToken {
            id: format!("t-{name}"),
            hash: token_hash(&secret),
            cluster: cluster.clone(),
            namespaces: Patterns::all(),
            expires_unix_s: now_us() / 1_000_000 + 900,
        };
        self.write("c0", token).await.unwrap();
        let facts = ClusterFacts { addresses: vec!["127.0.0.1:15443".into()], ..ClusterFacts::default() };
        let request = Command::JoinRequest { secret, cluster: cluster.clone(), csr: csr.clone(), facts };
        self.write("c0", request).await.unwrap();
        let der = self.root.issue_intermediate(&csr.0, &cluster, &self.domain, now_us() / 1_000_000).unwrap();
        let chain = vec![Der(der.to_vec())];
        self.keys.insert(name.into(), Key(key));
        self.chains.insert(name.into(), chain.clone());
        self.write("c0", Command::Grant { cluster: cluster.clone(), chain }).await.unwrap();
        let id = self.handle(1).registry().borrow().clusters[&cluster].id.0;
        self.start(id, name, None);
        id
    }

    /// Writes as a cluster through its own member if it runs, else through the first.
    async fn write(&mut self, name: &str, command: Command) -> Result<u64, Refusal> {
        let entry = self.sign(name, command);
        let through = self.running.values().find(|running| running.handle.config.cluster.as_str() == name);
        let handle = through.unwrap_or_else(|| &self.running[&1]).handle.clone();
        let committed = handle.propose(entry).await.unwrap();
        committed.outcome.map(|()| committed.index)
    }

    fn handle(&self, id: u16) -> &MemberHandle {
        &self.running[&id].handle
    }

    async fn until(&self, id: u16, what: &str, holds: impl Fn(&Status, &Registry) -> bool) {
        let handle = self.handle(id);
        let met = async {
            while !holds(&handle.status(), &handle.registry().borrow()) {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let status = || handle.status();
        timeout(Duration::from_secs(20), met).await.unwrap_or_else(|_| panic!("{what}: {:?}", status()));
    }
}

/// What the gateway does with class FOLLOW.
async fn follow(own: MemberHandle, links: Arc<Links>, stop: CancellationToken) {
    let work = async {
        loop {
            sleep(Duration::from_millis(20)).await;
            if !own.status().wants_follow {
                continue;
            }
            let others: Vec<_> = links.0.lock().iter().map(|(id, handle)| (*id, handle.clone())).collect();
            for (id, other) in others.into_iter().filter(|(id, _)| *id != own.config.cluster_id) {
                let Ok(request) = own.follow_request().await else { return };
                for frame in other.serve_follow(request).await.unwrap_or_default() {
                    let _ = own.followed(id, frame).await;
                }
            }
        }
    };
    tokio::select! { () = work => {}, () = stop.cancelled() => {} }
}

fn export(name: &str) -> Command {
    let port = ServicePort { number: 80, name: "http".into(), protocol: Protocol::Http, target: 8080 };
    let namespace = "shop".parse().unwrap();
    let export = Export {
        namespace,
        name: name.parse().unwrap(),
        ports: vec![port],
        accounts: vec![],
        visible_to: Patterns::all(),
    };
    Command::PutExport { export }
}

#[tokio::test]
async fn a_single_cluster_writes_reads_and_finds_everything_after_a_restart() {
    let mut mesh = Mesh::new();
    mesh.found();
    let index = mesh.write("c0", export("cart")).await.unwrap();
    assert!(mesh.handle(1).read_index().await.unwrap() >= index);
    mesh.stop(1).await;
    mesh.start(1, "c0", None);
    mesh.until(1, "the export is back", |_, registry| registry.exporters("shop/cart").len() == 1).await;
    mesh.write("c0", export("pay")).await.unwrap();
    mesh.stop(1).await;
}

#[tokio::test]
async fn three_clusters_agree_forward_writes_and_survive_their_leader() {
    let mut mesh = Mesh::new();
    mesh.found();
    let (second, third) = (mesh.join("c1").await, mesh.join("c2").await);
    mesh.until(1, "three voters", |status, _| status.voters.len() == 3).await;
    mesh.until(third, "the third votes", |status, _| status.role == Role::Voter || status.role == Role::Leader).await;
    // Written at a member that does not lead, seen everywhere.
    mesh.write("c2", export("cart")).await.unwrap();
    for id in [1, second, third] {
        mesh.until(id, "sees the export", |_, registry| registry.exporters("shop/cart").len() == 1).await;
    }
    let leader = mesh.handle(second).status().leader.unwrap().0;
    mesh.stop(leader).await;
    let name = if leader == second { "c2" } else { "c1" };
    mesh.write(name, export("after")).await.unwrap();
    let rest: Vec<u16> = mesh.running.keys().copied().collect();
    for id in rest {
        mesh.stop(id).await;
    }
}

#[tokio::test]
async fn a_record_signed_by_another_cluster_is_refused_and_said_why() {
    let mut mesh = Mesh::new();
    mesh.found();
    mesh.join("c1").await;
    let writer = Writer::Cluster("c0".parse().unwrap());
    let entry = SignedEntry::sign(&writer, MESH, now_us(), export("cart"), &mesh.keys["c1"]).unwrap();
    let refusal = mesh.handle(1).propose(entry).await.unwrap().outcome.unwrap_err();
    assert_eq!(refusal.reason, "unproven", "{refusal}");
    let ids: Vec<u16> = mesh.running.keys().copied().collect();
    for id in ids {
        mesh.stop(id).await;
    }
}

#[tokio::test]
async fn a_workload_token_raced_by_many_serves_exactly_one() {
    let mut mesh = Mesh::new();
    mesh.found();
    let account = ServiceAccount { namespace: "shop".parse().unwrap(), name: "cart".parse().unwrap() };
    mesh.handle(1).mint_workload_token([7; 32], account, now_us() / 1_000_000 + 60).await.unwrap();
    let races: Vec<_> = (0..50)
        .map(|_| {
            let handle = mesh.handle(1).clone();
            tokio::spawn(async move { handle.use_workload_token([7; 32]).await.is_ok() })
        })
        .collect();
    let mut winners = 0;
    for race in races {
        winners += usize::from(race.await.unwrap());
    }
    assert_eq!(winners, 1);
    mesh.stop(1).await;
}
