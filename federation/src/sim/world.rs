//! The world: clusters, clients and the clock, one event at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use isthmus_model::{ClusterId, ClusterName};

use super::keys::{self, ToySigner, ToyVerify};
use super::network::{Network, Packet, Weather};
use super::oracle::{Oracle, Violation};
use crate::command::{ClusterFacts, Command, SignedEntry, Writer, token_hash};
use crate::der::Der;
use crate::raft::driver::{Driver, Output, Setup};
use crate::raft::group::FOUNDER;
use crate::rng::Rng;
use crate::store::memory::{MemoryStore, Platter};

/// The mesh's name in every run.
pub(super) const MESH: &str = "sim";
const TICK_MS: u64 = 100;
/// What a tick counts for where minutes matter: ten minutes of silence pass in six virtual seconds.
const TICK_COUNTS_MS: u64 = 10_000;
/// The wall clock's start.
const EPOCH_S: u64 = 1_800_000_000;
/// A write without an answer is proposed again after this long.
const RETRY_MS: u64 = 2_000;
/// Entries between snapshots: small, so that every run takes several.
const SNAPSHOT_ENTRIES: usize = 40;

/// A deliberate mistake, to prove that the oracle sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mutation {
    /// None: the code as it is.
    #[default]
    None,
    /// Disks acknowledge writes before they are synced: what sending before persisting amounts to.
    SendBeforePersist,
    /// Applying does not check who wrote an entry.
    NoSignatures,
}

/// What a run came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Events handled.
    pub events: u64,
    /// Highest position applied by all.
    pub applied: u64,
    /// Writes acknowledged.
    pub acknowledged: u64,
    /// Terms that had a leader.
    pub leaders: u64,
    /// Crashes, and cuts of the network.
    pub faults: u64,
    /// Changes of the group applied.
    pub group_changes: u64,
    /// Clusters that joined.
    pub joins: u64,
    /// The hash chain's last value: equal runs end in equal hashes.
    pub hash: String,
}

pub(super) struct Cluster {
    pub id: u16,
    pub name: ClusterName,
    pub certificate: Der,
    pub platter: Platter,
    pub driver: Option<Driver<MemoryStore>>,
    pub up_at: Option<u64>,
    pub next_tick: u64,
    pub skew_s: u64,
    pub sequence: u64,
    /// Out of the mesh: runs on, and nobody should listen.
    pub gone: bool,
    pub next_follow: u64,
}

/// A write that its client waits for.
pub(super) struct Pending {
    pub by: u16,
    pub entry: SignedEntry,
    pub retry_at: u64,
    pub tries: u32,
}

/// The world of one seed.
pub struct World {
    pub(super) seed: u64,
    pub(super) rng: Rng,
    pub(super) now_ms: u64,
    pub(super) clusters: BTreeMap<u16, Cluster>,
    pub(super) network: Network,
    pub(super) weather: Weather,
    pub(super) oracle: Oracle,
    pub(super) pending: BTreeMap<u64, Pending>,
    /// Reads under way: who asked, and what was acknowledged when they did.
    pub(super) reads: BTreeMap<u64, u64>,
    pub(super) next_request: u64,
    pub(super) operator_sequence: u64,
    pub(super) joining: BTreeSet<ClusterName>,
    pub(super) mutation: Mutation,
    pub(super) report: Report,
    /// Whether a cluster's disk was lost, or clusters leave: not both in one run.
    pub(super) voters_lost: bool,
    /// Whether clusters leave in this run.
    pub(super) dismissing: bool,
    /// Requests that a driver was asked for on behalf of another cluster: its own id to the asker's.
    proxied: BTreeMap<u64, (u16, u64)>,
}

impl World {
    /// A mesh of one cluster, founded.
    pub fn new(seed: u64, mutation: Mutation) -> Self {
        let weather = Weather { loss: 0, duplicate: 0, delay_ms_min: 5, delay_ms_max: 40 };
        let mut world = Self {
            seed,
            rng: Rng::new(seed ^ 0x1574_0005),
            now_ms: 0,
            clusters: BTreeMap::new(),
            network: Network::default(),
            weather,
            oracle: Oracle::default(),
            pending: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_request: 0,
            operator_sequence: 0,
            joining: BTreeSet::new(),
            mutation,
            report: Report { seed, ..Report::default() },
            voters_lost: false,
            dismissing: false,
            proxied: BTreeMap::new(),
        };
        world.add_cluster(FOUNDER as u16, "c0".parse().expect("a label"), keys::cluster_certificate("c0", 0));
        world
    }

    pub(super) fn add_cluster(&mut self, id: u16, name: ClusterName, certificate: Der) {
        let platter = Platter::default();
        if self.mutation == Mutation::SendBeforePersist {
            platter.lie();
        }
        let cluster = Cluster {
            id,
            name,
            certificate,
            platter,
            driver: None,
            up_at: Some(self.now_ms),
            next_tick: self.now_ms,
            skew_s: self.rng.below(40),
            sequence: 0,
            gone: false,
            next_follow: 0,
        };
        self.clusters.insert(id, cluster);
    }

    fn setup(&mut self, id: u16) -> Setup {
        let init = (u64::from(id) == FOUNDER).then(|| {
            let certificate = keys::cluster_certificate("c0", 0);
            let command = Command::Init {
                mesh: MESH.into(),
                trust_domain: "sim.example".parse().expect("a trust domain"),
                roots: vec![Der(b"root".to_vec())],
                cluster: "c0".parse().expect("a label"),
                chain: vec![certificate.clone()],
                facts: ClusterFacts::default(),
            };
            let writer = Writer::Cluster("c0".parse().expect("a label"));
            SignedEntry::sign(&writer, MESH, EPOCH_S * 1_000_000, command, &ToySigner(certificate)).expect("signs")
        });
        Setup {
            mesh: MESH.into(),
            id: ClusterId(id),
            init,
            seed: self.rng.draw(),
            tick_ms: TICK_COUNTS_MS,
            snapshot_entries: SNAPSHOT_ENTRIES,
            verify: match self.mutation {
                Mutation::NoSignatures => Arc::new(super::oracle::single_writer::Credulous),
                _ => Arc::new(ToyVerify),
            },
        }
    }

    /// Runs the schedule, heals everything, and expects the mesh to agree.
    ///
    /// # Errors
    /// The first invariant that did not hold.
    pub fn run(mut self) -> Result<Report, Violation> {
        self.disturb()?;
        self.settle()?;
        self.report.acknowledged = self.oracle.acknowledged.count();
        self.report.leaders = self.oracle.election.terms();
        Ok(self.report)
    }

    pub(super) fn violation(&self, text: String) -> Violation {
        Violation { seed: self.seed, at_ms: self.now_ms, text }
    }

    /// Moves the clock to the next event and handles what is due, until `until_ms`.
    pub(super) fn advance(&mut self, until_ms: u64) -> Result<(), Violation> {
        loop {
            let ticks = self.clusters.values().filter(|c| c.driver.is_some()).map(|c| c.next_tick);
            let starts = self.clusters.values().filter_map(|c| c.up_at);
            let next = ticks.chain(starts).chain(self.network.next_arrival()).min().unwrap_or(until_ms);
            if next > until_ms {
                self.now_ms = until_ms;
                return Ok(());
            }
            self.now_ms = next.max(self.now_ms);
            self.report.events += 1;
            self.step()?;
        }
    }

    fn step(&mut self) -> Result<(), Violation> {
        let now = self.now_ms;
        let due: Vec<u16> =
            self.clusters.values().filter(|c| c.up_at.is_some_and(|at| at <= now)).map(|c| c.id).collect();
        for id in due {
            self.start(id)?;
        }
        let mut touched = BTreeSet::new();
        while let Some((from, to, packet)) = self.network.arrived(now) {
            self.arrive(from, to, packet);
            touched.insert(to);
        }
        let ticking: Vec<u16> =
            self.clusters.values().filter(|c| c.driver.is_some() && c.next_tick <= now).map(|c| c.id).collect();
        for id in ticking {
            let drift = self.rng.below(3);
            let unix_s = self.unix_s(id);
            let Some(cluster) = self.clusters.get_mut(&id) else { continue };
            // Clocks run at slightly different rates.
            cluster.next_tick = now + TICK_MS - 1 + drift;
            if let Some(driver) = &mut cluster.driver {
                driver.tick(unix_s);
            }
            self.follow(id);
            touched.insert(id);
        }
        for id in touched {
            self.turn(id)?;
        }
        Ok(())
    }

    pub(super) fn unix_s(&self, id: u16) -> u64 {
        EPOCH_S + self.now_ms / 1000 + self.clusters.get(&id).map_or(0, |cluster| cluster.skew_s)
    }

    fn start(&mut self, id: u16) -> Result<(), Violation> {
        let setup = self.setup(id);
        let Some(cluster) = self.clusters.get_mut(&id) else { return Ok(()) };
        cluster.up_at = None;
        cluster.next_tick = self.now_ms;
        let opened = Driver::open(setup, cluster.platter.open());
        match opened {
            Ok(driver) => cluster.driver = Some(driver),
            Err(error) => return Err(self.violation(format!("cluster {id} does not start: {error}"))),
        }
        self.oracle.restarted(id);
        self.turn(id)
    }

    /// Stops a cluster as a power cut does.
    pub(super) fn crash(&mut self, id: u16, down_ms: u64) {
        let mut rng = self.rng.fork();
        if let Some(cluster) = self.clusters.get_mut(&id) {
            cluster.driver = None;
            cluster.platter.crash(&mut rng);
            cluster.up_at = Some(self.now_ms + down_ms);
            self.report.faults += 1;
        }
    }

    /// Lets a cluster write, send and apply, and shows the oracle what it did.
    pub(super) fn turn(&mut self, id: u16) -> Result<(), Violation> {
        let Some(driver) = self.clusters.get_mut(&id).and_then(|cluster| cluster.driver.as_mut()) else {
            return Ok(());
        };
        driver.turn();
        let mut outputs = Vec::new();
        while let Some(output) = driver.poll_output() {
            outputs.push(output);
        }
        let seen = self.oracle.look(id, driver);
        driver.tidy();
        let failed = driver.status().failed.is_some();
        seen.map_err(|text| self.violation(text))?;
        for output in outputs {
            self.handle(id, output)?;
        }
        if failed {
            // The disk reported an error: the process exits, and comes back after a while.
            self.crash(id, 500);
        }
        Ok(())
    }

    fn handle(&mut self, id: u16, output: Output) -> Result<(), Violation> {
        match output {
            Output::Send(to, frame) => {
                self.network.send(self.now_ms, (id, to.0), Packet::Raft(frame), self.weather, &mut self.rng);
            }
            Output::Proposed(request, result) => {
                let answer = result.ok().map(|done| (done.index, done.outcome.map_err(|refused| refused.reason)));
                match self.proxied.remove(&request) {
                    Some((asker, theirs)) if asker != id => {
                        let packet = Packet::Answer(theirs, answer);
                        self.network.send(self.now_ms, (id, asker), packet, self.weather, &mut self.rng);
                    }
                    Some((_, own)) => self.answered(own, answer)?,
                    None => {}
                }
            }
            Output::Read(request, Ok(index)) => {
                if let Some(acknowledged) = self.reads.remove(&request)
                    && index < acknowledged
                {
                    let text = format!("linearizable read at {index}, but {acknowledged} was acknowledged before it");
                    return Err(self.violation(text));
                }
            }
            Output::Read(request, Err(_)) => drop(self.reads.remove(&request)),
        }
        Ok(())
    }

    fn arrive(&mut self, from: u16, to: u16, packet: Packet) {
        let (now, weather) = (self.now_ms, self.weather);
        let Some(driver) = self.clusters.get_mut(&to).and_then(|cluster| cluster.driver.as_mut()) else { return };
        match packet {
            Packet::Raft(frame) => drop(driver.deliver(ClusterId(from), &frame)),
            Packet::Propose(theirs, entry) => {
                self.next_request += 1;
                self.proxied.insert(self.next_request, (from, theirs));
                driver.propose(self.next_request, &entry);
            }
            Packet::Answer(request, answer) => {
                // Violations are found when the oracle next looks; see `Oracle::acknowledge`.
                if let Err(violation) = self.answered(request, answer) {
                    self.oracle.defer(violation.text);
                }
            }
            Packet::Ask(request) => {
                if let Some(frame) = driver.serve_follow(&request) {
                    self.network.send(now, (to, from), Packet::Follow(frame), weather, &mut self.rng);
                }
            }
            Packet::Follow(frame) => drop(driver.followed(ClusterId(from), frame)),
        }
    }

    /// A follower asks somebody for the log, now and then.
    fn follow(&mut self, id: u16) {
        let now = self.now_ms;
        let others: Vec<u16> = self.clusters.values().filter(|c| c.id != id && !c.gone).map(|c| c.id).collect();
        let Some(cluster) = self.clusters.get_mut(&id) else { return };
        let Some(driver) = &cluster.driver else { return };
        if cluster.next_follow > now || others.is_empty() || cluster.gone || !driver.status().wants_follow {
            return;
        }
        cluster.next_follow = now + 300;
        let request = driver.follow_request();
        let to = others[self.rng.below(others.len() as u64) as usize];
        self.network.send(now, (id, to), Packet::Ask(request), self.weather, &mut self.rng);
    }

    /// Signs a command as a cluster.
    pub(super) fn sign_as(&mut self, id: u16, command: Command) -> Option<SignedEntry> {
        let micros = self.unix_s(id) * 1_000_000;
        let cluster = self.clusters.get_mut(&id)?;
        cluster.sequence = micros.max(cluster.sequence + 1);
        let writer = Writer::Cluster(cluster.name.clone());
        let signer = ToySigner(cluster.certificate.clone());
        SignedEntry::sign(&writer, MESH, cluster.sequence, command, &signer).ok()
    }

    /// Signs a command as the operator.
    pub(super) fn sign_as_operator(&mut self, command: Command) -> Option<SignedEntry> {
        self.operator_sequence = ((EPOCH_S + self.now_ms / 1000) * 1_000_000).max(self.operator_sequence + 1);
        let certificate = keys::operator_certificate("ops");
        let writer = Writer::Operator(vec![certificate.clone()]);
        SignedEntry::sign(&writer, MESH, self.operator_sequence, command, &ToySigner(certificate)).ok()
    }

    /// A client at cluster `by` wants `entry` in the log.
    pub(super) fn submit(&mut self, by: u16, entry: SignedEntry) {
        self.next_request += 1;
        let request = self.next_request;
        self.pending.insert(request, Pending { by, entry, retry_at: self.now_ms, tries: 0 });
        self.attempt(request);
    }

    /// Sends pending writes (again) to whoever seems to lead.
    pub(super) fn retry_pending(&mut self) {
        let now = self.now_ms;
        let due: Vec<u64> = self.pending.iter().filter(|(_, p)| p.retry_at <= now).map(|(id, _)| *id).collect();
        for request in due {
            self.attempt(request);
        }
    }

    fn attempt(&mut self, request: u64) {
        let now = self.now_ms;
        let Some(pending) = self.pending.get_mut(&request) else { return };
        pending.tries += 1;
        pending.retry_at = now + RETRY_MS;
        let (by, entry, tries) = (pending.by, pending.entry.clone(), pending.tries);
        if tries > 12 {
            self.pending.remove(&request);
            return;
        }
        let Some(driver) = self.clusters.get_mut(&by).and_then(|cluster| cluster.driver.as_mut()) else { return };
        let status = driver.status();
        if driver.leads() {
            self.next_request += 1;
            self.proxied.insert(self.next_request, (by, request));
            return driver.propose(self.next_request, &entry);
        }
        let voters: Vec<u16> = status.voters.iter().map(|id| id.0).filter(|id| *id != by).collect();
        let to = match status.leader {
            Some(leader) if leader.0 != by && !tries.is_multiple_of(3) => leader.0,
            _ if voters.is_empty() => return,
            _ => voters[self.rng.below(voters.len() as u64) as usize],
        };
        self.network.send(now, (by, to), Packet::Propose(request, entry), self.weather, &mut self.rng);
    }

    fn answered(&mut self, request: u64, answer: Option<(u64, Result<(), String>)>) -> Result<(), Violation> {
        let Some((index, outcome)) = answer else {
            // No leader there: soon again, elsewhere.
            if let Some(pending) = self.pending.get_mut(&request) {
                pending.retry_at = self.now_ms + 300;
            }
            return Ok(());
        };
        let Some(pending) = self.pending.remove(&request) else { return Ok(()) };
        let bytes = pending.entry.to_bytes();
        self.oracle.acknowledge(index, &bytes, &outcome).map_err(|text| self.violation(text))
    }

    /// Asks a cluster that leads for a linearizable position.
    pub(super) fn read(&mut self, id: u16) {
        let acknowledged = self.oracle.acknowledged.highest();
        if let Some(driver) = self.clusters.get_mut(&id).and_then(|cluster| cluster.driver.as_mut()) {
            self.next_request += 1;
            self.reads.insert(self.next_request, acknowledged);
            driver.read_index(self.next_request);
        }
    }

    /// The secret and hash of a join token.
    pub(super) fn token(&self, id: &str) -> (String, crate::der::Fingerprint) {
        let secret = format!("secret of {id}");
        let hash = token_hash(&secret);
        (secret, hash)
    }
}
