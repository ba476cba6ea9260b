//! What happens to the world: faults and clients at random times, then peace, then the reckoning.

use isthmus_model::service::{Export, Patterns, Protocol, ServicePort};
use isthmus_model::{ClusterName, ServiceAccount};

use raft::eraftpb::ConfState;

use super::keys;
use super::network::Weather;
use super::oracle::Violation;
use super::world::World;
use crate::command::{ClusterFacts, Command, SignedEntry, Writer};
use crate::store::memory::Fault;

/// How long faults go on, ms; and how long the mesh may take to agree afterwards.
const DISTURB_MS: u64 = 30_000;
const SETTLE_MS: u64 = 60_000;
/// Clusters of one run at most.
const CLUSTERS_MAX: usize = 8;

impl World {
    pub(super) fn disturb(&mut self) -> Result<(), Violation> {
        // A few clusters join in fair weather, so that most of the time there is a group to disturb.
        let first = 2 + self.rng.below(4);
        for _ in 0..first {
            self.invite();
            self.live(1_500)?;
        }
        let end = self.now_ms + DISTURB_MS;
        while self.now_ms < end {
            let pause = 50 + self.rng.below(700);
            self.live(pause)?;
            self.misfortune();
        }
        Ok(())
    }

    /// Lets time pass with clients at work.
    fn live(&mut self, ms: u64) -> Result<(), Violation> {
        let end = self.now_ms + ms;
        while self.now_ms < end {
            let next = (self.now_ms + 50 + self.rng.below(100)).min(end);
            self.advance(next)?;
            self.retry_pending();
            self.clients();
            self.signers();
            self.admit_granted();
        }
        Ok(())
    }

    fn someone(&mut self) -> Option<u16> {
        let up: Vec<u16> = self.clusters.values().filter(|c| c.driver.is_some() && !c.gone).map(|c| c.id).collect();
        (!up.is_empty()).then(|| up[self.rng.below(up.len() as u64) as usize])
    }

    fn clients(&mut self) {
        let Some(by) = self.someone() else { return };
        match self.rng.below(20) {
            0..=9 => {
                let command = self.put_or_delete();
                if let Some(entry) = self.sign_as(by, command) {
                    self.submit(by, entry);
                }
            }
            10..=12 => self.read(by),
            13 => self.forge(by),
            _ => {}
        }
    }

    fn put_or_delete(&mut self) -> Command {
        let namespace = ["shop", "pay"][self.rng.below(2) as usize].parse().expect("a label");
        let name = format!("svc-{}", self.rng.below(6)).parse().expect("a label");
        if self.rng.chance(250) {
            return Command::DeleteExport { namespace, name };
        }
        let number = 80 + self.rng.below(4) as u16;
        let port = ServicePort { number, name: "http".into(), protocol: Protocol::Http, target: 8080 };
        let account =
            ServiceAccount { namespace: "shop".parse().expect("a label"), name: "cart".parse().expect("a label") };
        let export =
            Export { namespace, name, ports: vec![port], accounts: vec![account], visible_to: Patterns::all() };
        Command::PutExport { export }
    }

    /// A cluster writes in another's name, with its own key: refused everywhere.
    fn forge(&mut self, by: u16) {
        let Some(victim) = self.someone().filter(|victim| *victim != by) else { return };
        let name = self.clusters[&victim].name.clone();
        let signer = keys::ToySigner(self.clusters[&by].certificate.clone());
        let stamp = self.unix_s(by) * 1_000_000 + self.rng.below(1_000_000);
        let command = self.put_or_delete();
        if let Ok(entry) = SignedEntry::sign(&Writer::Cluster(name), super::world::MESH, stamp, command, &signer) {
            self.oracle.forged(&entry.to_bytes());
            self.submit(by, entry);
        }
    }

    fn misfortune(&mut self) {
        let Some(victim) = self.someone() else { return };
        let down = 100 + self.rng.below(4_000);
        match self.rng.below(22) {
            0..=3 => self.crash(victim, down),
            4 => self.clusters[&victim].platter.fail_next(Fault::Power),
            5 => self.clusters[&victim].platter.fail_next(Fault::Sync),
            6 => {
                let all: Vec<u16> = self.clusters.keys().copied().collect();
                all.into_iter().for_each(|id| self.crash(id, down));
            }
            7..=9 => {
                let mut sides: (Vec<u16>, Vec<u16>) = (Vec::new(), Vec::new());
                for id in self.clusters.keys() {
                    if self.rng.chance(500) { sides.0.push(*id) } else { sides.1.push(*id) }
                }
                self.network.split(&sides.0, &sides.1);
                self.report.faults += 1;
            }
            10 => {
                if let Some(other) = self.someone() {
                    self.network.cut(victim, other);
                    self.report.faults += 1;
                }
            }
            11..=13 => self.network.heal(),
            14 => self.weather = Weather { loss: self.rng.below(300), duplicate: self.rng.below(300), ..self.weather },
            15 => self.weather.delay_ms_max = self.weather.delay_ms_min + self.rng.below(400),
            16 => {
                if let Some(driver) = self.clusters.get_mut(&victim).and_then(|cluster| cluster.driver.as_mut()) {
                    driver.transfer_leader();
                }
            }
            17..=18 => self.invite(),
            19 => self.dismiss(victim),
            20 => self.lose_disk(victim, down),
            _ => {}
        }
    }

    /// One disk a run is lost for good and its store restored, where the rest of the group can do without,
    /// and nobody leaves: a group that shrinks to a voter whose disk is then lost is lost with it.
    fn lose_disk(&mut self, victim: u16, down: u64) {
        // The others must know that they can do without: a change of the group counts from where it is applied.
        let others = self.clusters.values().filter(|cluster| cluster.id != victim);
        let nodes = others.filter_map(|cluster| cluster.driver.as_ref()?.consensus());
        let knows = |state: &ConfState| state.voters.len() >= 3 && state.voters_outgoing.is_empty();
        let knowing = nodes.filter(|node| knows(node.conf_state())).count();
        let spared = knowing >= 2 && knowing * 2 > self.clusters.len();
        if self.voters_lost || !spared {
            return;
        }
        self.voters_lost = true;
        self.crash(victim, down);
        self.clusters[&victim].platter.restore();
    }

    /// The operator makes a token; two gateways try to use it at once, with different keys.
    fn invite(&mut self) {
        if self.clusters.values().filter(|c| !c.gone).count() + self.joining.len() >= CLUSTERS_MAX {
            return;
        }
        let Some(by) = self.someone() else { return };
        let serial = self.rng.below(1 << 40);
        let name: ClusterName = format!("c{serial}").parse().expect("a label");
        let id = format!("t{serial}");
        let (secret, hash) = self.token(&id);
        let expires_unix_s = self.unix_s(by) + 900;
        let token = Command::AddToken {
            id: id.clone(),
            hash,
            cluster: name.clone(),
            namespaces: Patterns::all(),
            expires_unix_s,
        };
        if let Some(entry) = self.sign_as_operator(token) {
            self.submit(by, entry);
        }
        for attempt in 0..2 {
            let Some(through) = self.someone() else { continue };
            let facts = ClusterFacts { provider: format!("cloud{}", serial % 3), ..ClusterFacts::default() };
            let csr = keys::request(name.as_str(), attempt);
            let request = Command::JoinRequest { secret: secret.clone(), cluster: name.clone(), csr, facts };
            if let Some(entry) = self.sign_as(through, request) {
                self.oracle.joins.tried(&entry.to_bytes(), &id);
                self.submit(through, entry);
            }
        }
        self.joining.insert(name);
    }

    /// A cluster leaves by itself or is thrown out.
    fn dismiss(&mut self, victim: u16) {
        if self.clusters.values().filter(|c| !c.gone).count() <= 2 {
            return;
        }
        let Some(by) = self.someone().filter(|_| !self.voters_lost || self.dismissing) else { return };
        (self.voters_lost, self.dismissing) = (true, true);
        let cluster = self.clusters[&victim].name.clone();
        let entry = match self.rng.chance(500) {
            true => self.sign_as(victim, Command::Leave {}),
            false => self.sign_as_operator(Command::Evict { cluster, reason: "sim".into() }),
        };
        if let Some(entry) = entry {
            self.submit(by, entry);
        }
    }

    /// A signer that sees a request in its registry answers it.
    fn signers(&mut self) {
        let mut grants = Vec::new();
        for cluster in self.clusters.values().filter(|c| !c.gone) {
            let Some(driver) = &cluster.driver else { continue };
            let registry = driver.registry();
            if !registry.clusters.get(&cluster.name).is_some_and(|record| record.signer) {
                continue;
            }
            for (name, request) in registry.requests.iter() {
                let text = String::from_utf8_lossy(&request.csr.0).replacen("request:", "cluster:", 1);
                grants.push((cluster.id, name.clone(), crate::der::Der(text.into_bytes())));
            }
        }
        for (by, cluster, certificate) in grants {
            // Once per look is too often while the first is under way; the log refuses the repeats.
            if self.rng.chance(200)
                && let Some(entry) = self.sign_as(by, Command::Grant { cluster, chain: vec![certificate] })
            {
                self.submit(by, entry);
            }
        }
    }

    /// Joiners that were granted start; clusters that the log dismissed are marked.
    fn admit_granted(&mut self) {
        let Some(furthest) =
            self.clusters.values().filter_map(|c| c.driver.as_ref()).max_by_key(|driver| driver.registry().index)
        else {
            return;
        };
        let registry = furthest.registry().clone();
        for (name, record) in registry.clusters.iter() {
            if self.joining.remove(name) {
                self.report.joins += 1;
                self.add_cluster(record.id.0, name.clone(), record.chain[0].clone());
            }
        }
        for cluster in self.clusters.values_mut() {
            cluster.gone |= registry.gone.contains_key(&isthmus_model::ClusterId(cluster.id));
        }
    }

    /// Peace: everything is up, whole and fair. The mesh must elect, commit and agree.
    pub(super) fn settle(&mut self) -> Result<(), Violation> {
        self.network.heal();
        self.weather = Weather { loss: 0, duplicate: 0, delay_ms_min: 5, delay_ms_max: 40 };
        self.clusters.values_mut().filter(|c| c.driver.is_none()).for_each(|c| c.up_at = Some(self.now_ms));
        let end = self.now_ms + SETTLE_MS;
        let mut quiet = 0;
        while self.now_ms < end {
            self.advance(self.now_ms + 200)?;
            self.retry_pending();
            self.signers();
            self.admit_granted();
            quiet = if self.agreed() { quiet + 1 } else { 0 };
            if quiet == 5 {
                return self.reckon();
            }
        }
        let table: Vec<String> = self.clusters.values().map(|c| self.describe(c)).collect();
        Err(self.violation(format!("no agreement {SETTLE_MS} ms after all faults ended:\n  {}", table.join("\n  "))))
    }

    fn describe(&self, cluster: &super::world::Cluster) -> String {
        let gone = if cluster.gone { " (gone)" } else { "" };
        match &cluster.driver {
            None => format!("{}{gone}: down", cluster.id),
            Some(driver) => {
                let s = driver.status();
                format!(
                    "{}{gone}: {} term {} leader {:?} commit {} applied {} voters {:?} learners {:?}",
                    cluster.id,
                    s.role.as_str(),
                    s.term,
                    s.leader,
                    s.commit,
                    s.applied,
                    s.voters,
                    s.learners
                )
            }
        }
    }

    /// Whether all members have applied the same log, to the end, with one leader and an odd group.
    fn agreed(&self) -> bool {
        let mut hashes = self.clusters.values().filter(|c| !c.gone).map(|c| {
            let driver = c.driver.as_ref()?;
            let log = driver.consensus().map(|node| node.last_index());
            let registry = driver.registry();
            (log.is_none_or(|last| last == registry.index)).then_some((registry.index, registry.hash))
        });
        let Some(Some(first)) = hashes.next() else { return false };
        let leaders = self.clusters.values().filter(|c| !c.gone && c.driver.as_ref().is_some_and(|d| d.leads()));
        let odd = leaders.clone().all(|c| c.driver.as_ref().is_some_and(|d| d.status().voters.len() % 2 == 1));
        hashes.all(|hash| hash == Some(first)) && leaders.count() == 1 && odd && self.pending.is_empty()
    }

    fn reckon(&mut self) -> Result<(), Violation> {
        let Some(registry) =
            self.clusters.values().find(|c| !c.gone).and_then(|c| c.driver.as_ref()).map(|d| d.registry().clone())
        else {
            return Err(self.violation("nobody is left".into()));
        };
        self.report.applied = registry.index;
        self.report.hash = registry.hash.to_string();
        self.report.group_changes = self.oracle.group_changes();
        self.oracle.final_look(&registry).map_err(|text| self.violation(text))
    }
}
