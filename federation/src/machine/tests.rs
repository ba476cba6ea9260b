//! Who may write what, told as the log sees it.

use std::sync::Arc;

use isthmus_model::ClusterId;
use isthmus_model::service::{Export, Patterns, Protocol, ServicePort};

use super::*;
use crate::command::{ClusterFacts, ConfigKey, token_hash};
use crate::der::Der;
use crate::registry::TokenState;
use crate::sim::keys::{self, ToySigner, ToyVerify};

const MESH: &str = "m";
const NOW: u64 = 1_800_000_000;

struct Log {
    machine: Machine,
    sequence: u64,
    now: u64,
}

impl Log {
    fn founded() -> Self {
        let mut log = Self { machine: Machine::new(Arc::new(ToyVerify)), sequence: 0, now: NOW };
        let init = Command::Init {
            mesh: MESH.into(),
            trust_domain: "m.example".parse().unwrap(),
            roots: vec![Der(b"root".to_vec())],
            cluster: "c0".parse().unwrap(),
            chain: vec![keys::cluster_certificate("c0", 0)],
            facts: ClusterFacts::default(),
        };
        log.by_cluster("c0", init).unwrap();
        log
    }

    fn signed(&mut self, writer: &Writer, certificate: Der, command: Command) -> SignedEntry {
        self.sequence = (self.now * 1_000_000).max(self.sequence + 1);
        SignedEntry::sign(writer, MESH, self.sequence, command, &ToySigner(certificate)).unwrap()
    }

    fn append(&mut self, entry: &SignedEntry) -> Outcome {
        let data = Stamped { unix_s: self.now, entry: entry.to_bytes() }.to_bytes();
        let index = self.machine.registry().index + 1;
        self.machine.apply(index, &data)
    }

    fn by_cluster(&mut self, name: &str, command: Command) -> Outcome {
        let entry = self.signed(&Writer::Cluster(name.parse().unwrap()), keys::cluster_certificate(name, 0), command);
        self.append(&entry)
    }

    fn by_operator(&mut self, command: Command) -> Outcome {
        let certificate = keys::operator_certificate("ann");
        let entry = self.signed(&Writer::Operator(vec![certificate.clone()]), certificate, command);
        self.append(&entry)
    }

    fn token(&mut self, id: &str, cluster: &str, namespaces: &[&str]) -> Outcome {
        self.by_operator(Command::AddToken {
            id: id.into(),
            hash: token_hash(id),
            cluster: cluster.parse().unwrap(),
            namespaces: Patterns(namespaces.iter().map(|one| (*one).to_owned()).collect()),
            expires_unix_s: self.now + 900,
        })
    }

    fn request(&mut self, id: &str, cluster: &str) -> Outcome {
        let (cluster, csr) = (cluster.parse().unwrap(), keys::request(cluster, 0));
        self.by_cluster("c0", Command::JoinRequest { secret: id.into(), cluster, csr, facts: ClusterFacts::default() })
    }

    fn grant(&mut self, cluster: &str) -> Outcome {
        let chain = vec![keys::cluster_certificate(cluster, 0)];
        self.by_cluster("c0", Command::Grant { cluster: cluster.parse().unwrap(), chain })
    }

    fn joined(&mut self, cluster: &str, namespaces: &[&str]) {
        let id = format!("t-{cluster}-{}", self.sequence);
        self.token(&id, cluster, namespaces).unwrap();
        self.request(&id, cluster).unwrap();
        self.grant(cluster).unwrap();
    }

    fn id(&self, cluster: &str) -> ClusterId {
        self.machine.registry().clusters[&cluster.parse().unwrap()].id
    }
}

fn export(namespace: &str, name: &str) -> Command {
    let port = ServicePort { number: 80, name: "http".into(), protocol: Protocol::Http, target: 8080 };
    let (namespace, name) = (namespace.parse().unwrap(), name.parse().unwrap());
    Command::PutExport {
        export: Export { namespace, name, ports: vec![port], accounts: vec![], visible_to: Patterns::all() },
    }
}

fn reason(outcome: Outcome) -> &'static str {
    outcome.expect_err("must be refused").reason()
}

#[test]
fn a_token_admits_one_cluster_under_its_own_name_in_time() {
    let mut log = Log::founded();
    log.token("t1", "c1", &["*"]).unwrap();
    assert_eq!(reason(log.request("guess", "c1")), "token_unknown");
    assert_eq!(reason(log.request("t1", "c2")), "name_mismatch");
    log.request("t1", "c1").unwrap();
    assert_eq!(reason(log.request("t1", "c1")), "token_used");
    log.grant("c1").unwrap();
    assert_eq!(log.id("c1"), ClusterId(2));

    log.token("t2", "c2", &["*"]).unwrap();
    log.by_operator(Command::RevokeToken { id: "t2".into() }).unwrap();
    assert_eq!(reason(log.request("t2", "c2")), "token_revoked");

    log.token("t3", "c3", &["*"]).unwrap();
    log.now += 901;
    assert_eq!(reason(log.request("t3", "c3")), "token_expired");

    log.token("t4", "c1", &["*"]).unwrap();
    assert_eq!(reason(log.request("t4", "c1")), "name_taken", "a second cluster of one name");
}

#[test]
fn fifty_raced_requests_have_one_winner() {
    let mut log = Log::founded();
    log.token("t", "c1", &["*"]).unwrap();
    let winners = (0..50).filter(|_| log.request("t", "c1").is_ok()).count();
    assert_eq!(winners, 1);
    let registry = log.machine.registry();
    assert!(matches!(registry.tokens["t"].state, TokenState::Used(_)));
}

#[test]
fn a_grant_needs_a_signer_and_the_key_of_the_request() {
    let mut log = Log::founded();
    log.joined("c1", &["*"]);
    log.token("t2", "c2", &["*"]).unwrap();
    log.request("t2", "c2").unwrap();
    let (cluster, chain): (ClusterName, _) = ("c2".parse().unwrap(), vec![keys::cluster_certificate("c2", 0)]);
    let grant = Command::Grant { cluster: cluster.clone(), chain };
    assert_eq!(reason(log.by_cluster("c1", grant)), "not_a_signer");
    let other_key = Command::Grant { cluster: cluster.clone(), chain: vec![keys::cluster_certificate("c2", 9)] };
    assert_eq!(reason(log.by_cluster("c0", other_key)), "unproven");
    let other_name = Command::Grant { cluster, chain: vec![keys::cluster_certificate("c1", 0)] };
    assert_eq!(reason(log.by_cluster("c0", other_name)), "not_yours");
    log.grant("c2").unwrap();
}

#[test]
fn a_cluster_writes_its_own_exports_only_and_only_what_its_token_allowed() {
    let mut log = Log::founded();
    log.joined("c1", &["shop", "pay-*"]);
    log.by_cluster("c1", export("shop", "cart")).unwrap();
    log.by_cluster("c1", export("pay-eu", "card")).unwrap();
    assert_eq!(reason(log.by_cluster("c1", export("infra", "db"))), "namespace_not_granted");
    // In another's name, with its own key.
    let entry =
        log.signed(&Writer::Cluster("c0".parse().unwrap()), keys::cluster_certificate("c1", 0), export("shop", "x"));
    assert_eq!(reason(log.append(&entry)), "unproven");
    // Deleting finds only what is its own.
    let delete = Command::DeleteExport { namespace: "shop".parse().unwrap(), name: "cart".parse().unwrap() };
    assert_eq!(reason(log.by_cluster("c0", delete)), "absent");
}

#[test]
fn mesh_wide_writes_need_an_operator() {
    let mut log = Log::founded();
    log.joined("c1", &["*"]);
    let key = ConfigKey { kind: "VirtualService".into(), namespace: "shop".parse().unwrap(), name: "cart".into() };
    let put = Command::PutConfig { key: key.clone(), json: "{}".into() };
    assert_eq!(reason(log.by_cluster("c0", put.clone())), "operator_only");
    let evict = Command::Evict { cluster: "c1".parse().unwrap(), reason: String::new() };
    assert_eq!(reason(log.by_cluster("c0", evict)), "operator_only");
    assert_eq!(reason(log.by_operator(export("shop", "cart"))), "cluster_only");
    log.by_operator(put).unwrap();
    let bad = Command::PutConfig { key, json: "{".into() };
    assert_eq!(reason(log.by_operator(bad)), "invalid");
    assert!(log.machine.registry().audit.iter().any(|record| record.writer == "operator/ann"));
}

#[test]
fn the_oldest_export_wins_by_log_position_and_keeps_it_through_changes() {
    let mut log = Log::founded();
    log.joined("c1", &["*"]);
    log.by_cluster("c1", export("shop", "cart")).unwrap();
    log.by_cluster("c0", export("shop", "cart")).unwrap();
    log.by_cluster("c1", export("shop", "cart")).unwrap();
    let registry = log.machine.registry().clone();
    let order: Vec<_> = registry.exporters("shop/cart").into_iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(order, ["c1", "c0"]);
    let delete = Command::DeleteExport { namespace: "shop".parse().unwrap(), name: "cart".parse().unwrap() };
    log.by_cluster("c1", delete).unwrap();
    log.by_cluster("c1", export("shop", "cart")).unwrap();
    assert_eq!(log.machine.registry().exporters("shop/cart")[0].0.as_str(), "c0", "absent in between: now the younger");
}

#[test]
fn an_entry_repeated_has_its_first_outcome_and_a_replayed_one_none() {
    let mut log = Log::founded();
    let writer = Writer::Cluster("c0".parse().unwrap());
    let put = log.signed(&writer, keys::cluster_certificate("c0", 0), export("shop", "cart"));
    log.append(&put).unwrap();
    let delete = Command::DeleteExport { namespace: "shop".parse().unwrap(), name: "cart".parse().unwrap() };
    log.by_cluster("c0", delete).unwrap();
    assert_eq!(log.append(&put), Ok(()), "the same entry again: its first outcome");
    assert!(log.machine.registry().exporters("shop/cart").is_empty(), "and no second effect");
    for number in 0..=WINDOW {
        log.by_cluster("c0", export("shop", &format!("s{number}"))).unwrap();
    }
    assert_eq!(reason(log.append(&put)), "stale", "long after, a replay is refused");
}

#[test]
fn a_number_rests_seven_days_and_the_former_member_writes_nothing() {
    let mut log = Log::founded();
    log.joined("c1", &["*"]);
    let number = log.id("c1");
    log.by_cluster("c1", export("shop", "cart")).unwrap();
    log.by_operator(Command::Evict { cluster: "c1".parse().unwrap(), reason: "stolen".into() }).unwrap();
    assert!(log.machine.registry().exporters("shop/cart").is_empty());
    assert_eq!(reason(log.by_cluster("c1", export("shop", "cart"))), "not_a_member");
    log.joined("c2", &["*"]);
    assert_ne!(log.id("c2"), number, "still resting");
    log.now += NUMBER_REST_S + 1;
    log.joined("c3", &["*"]);
    assert_eq!(log.id("c3"), number);
}

#[test]
fn the_last_signer_stays() {
    let mut log = Log::founded();
    log.joined("c1", &["*"]);
    assert_eq!(reason(log.by_cluster("c0", Command::Leave {})), "last_signer");
    log.by_operator(Command::SetSigner { cluster: "c1".parse().unwrap(), signer: true }).unwrap();
    log.by_cluster("c0", Command::Leave {}).unwrap();
}

#[test]
fn neither_leader_nor_writer_alone_moves_the_time() {
    let mut log = Log::founded();
    let entry =
        log.signed(&Writer::Cluster("c0".parse().unwrap()), keys::cluster_certificate("c0", 0), export("shop", "cart"));
    // A leader whose clock is a year ahead.
    log.now += 365 * 86_400;
    log.append(&entry).unwrap();
    assert!(log.machine.registry().unix_s <= NOW + CLOCK_SPREAD_MAX_S);
}

#[test]
fn an_entry_of_another_mesh_a_second_init_and_garbage_are_refused() {
    let mut log = Log::founded();
    let writer = Writer::Cluster("c0".parse().unwrap());
    let signer = ToySigner(keys::cluster_certificate("c0", 0));
    let foreign = SignedEntry::sign(&writer, "other", NOW * 1_000_000 + 9, export("a", "b"), &signer).unwrap();
    assert_eq!(reason(log.append(&foreign)), "other_mesh");
    let index = log.machine.registry().index;
    assert_eq!(reason(log.machine.apply(index + 1, b"\xff\xff\xff")), "malformed");
    assert_eq!(
        reason(log.machine.apply(index + 2, &Stamped { unix_s: NOW, entry: vec![8, 99] }.to_bytes())),
        "malformed"
    );
}

#[test]
fn a_service_entry_cannot_claim_names_of_the_mesh() {
    let mut log = Log::founded();
    for host in ["cart.shop.svc.clusterset.local", "*.clusterset.local", "*.local", "a.b.svc.cluster.local"] {
        let json = serde_json::json!({
            "namespace": "shop", "name": "x", "hosts": [host], "addresses": [],
            "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "target": 80}],
            "location": "MESH_EXTERNAL", "resolution": "NONE", "endpoints": [],
            "workload_selector": {}, "export_to": [], "subject_alt_names": []
        });
        let entry = serde_json::from_value(json).unwrap();
        assert_eq!(reason(log.by_cluster("c0", Command::PutServiceEntry { entry })), "invalid", "{host}");
    }
}

#[test]
fn a_registry_survives_its_snapshot() {
    let mut log = Log::founded();
    log.joined("c1", &["*"]);
    log.by_cluster("c1", export("shop", "cart")).unwrap();
    assert_eq!(reason(log.by_cluster("c1", Command::RevokeToken { id: "t".into() })), "not_a_signer");
    let packed = crate::raft::snapshot::pack(log.machine.registry()).unwrap();
    assert_eq!(&crate::raft::snapshot::unpack(&packed).unwrap(), log.machine.registry());
    for len in 0..packed.len() {
        assert!(crate::raft::snapshot::unpack(&packed[..len]).is_err(), "cut at {len}");
    }
}
