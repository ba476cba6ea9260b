//! The flows of all links: which are alive, what is learnt of them, and the router's table that follows.
//!
//! Pure: time comes in, probes to send and tables go out. A flow that we dialled is known by its address from the
//! start; one that was dialled to us is learnt from its authentic probes, also after a restart.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use isthmus_model::{ClusterId, ClusterName};
use isthmus_tunnel::link::{INTERVAL_BUSY, INTERVAL_LINK, PathHealth, PathState};
use isthmus_tunnel::probe::{Probe, ProbeKey};
use isthmus_tunnel::route::{FlowSocket, Hop, LinkTable, PeerProbe};
use rustc_hash::FxHashMap;

use super::LinkStatus;

/// Flows of one link that are taken from a peer; as many as a gateway has workers at most.
const FLOWS_MAX: u8 = 8;
/// A flow that was dialled to us and cannot be probed for want of the peer's key is alive for this long after its
/// last probe: three of the peer's intervals and some.
const HEARD_FOR: Duration = Duration::from_millis(700);

/// Which link a flow belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LinkKey {
    /// We dialled this address.
    Dialled(ClusterId, SocketAddr),
    /// This replica dialled us.
    Accepted(ClusterId, u8),
}

impl LinkKey {
    fn cluster(self) -> ClusterId {
        match self {
            Self::Dialled(cluster, _) | Self::Accepted(cluster, _) => cluster,
        }
    }
}

#[derive(Debug)]
struct Flow {
    number: u8,
    hop: Hop,
    health: PathHealth,
    /// Highest sequence of the peer's probes: a captured one moves nothing.
    seen_sequence: u64,
    heard: Option<Instant>,
}

#[derive(Debug, Default)]
struct Link {
    replica: Option<u8>,
    flows: Vec<Flow>,
}

/// One flow as it stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlowStatus {
    /// Its number.
    pub number: u8,
    /// The peer's address.
    pub address: SocketAddr,
    /// Whether it answers.
    pub state: PathState,
    /// Round trip.
    pub rtt: Option<Duration>,
    /// Share of probes lost.
    pub loss: f32,
}

/// A probe to be sent.
pub(super) struct DueProbe {
    pub cluster: ClusterId,
    pub key: ProbeKey,
    pub prober: u32,
    pub sequence: u64,
    pub address: SocketAddr,
    pub socket: FlowSocket,
}

/// The flows of all links.
pub(super) struct Flows {
    replica: u8,
    workers: usize,
    links: BTreeMap<LinkKey, Link>,
    keys: FxHashMap<ClusterId, ProbeKey>,
    published: Option<LinkTable>,
    generations: BTreeMap<ClusterId, u32>,
    clock: SequenceClock,
}

/// Sequence numbers must rise over restarts too: the wall clock does, at 1,000 a second against 5 probes.
#[derive(Debug, Clone, Copy)]
struct SequenceClock {
    started: Instant,
    started_unix_ms: u64,
}

impl SequenceClock {
    fn at(self, now: Instant) -> u64 {
        self.started_unix_ms + now.saturating_duration_since(self.started).as_millis() as u64
    }
}

impl Flows {
    pub(super) fn new(replica: u8, workers: usize, started: Instant, started_unix_ms: u64) -> Self {
        Self {
            replica,
            workers,
            clock: SequenceClock { started, started_unix_ms },
            links: BTreeMap::new(),
            keys: FxHashMap::default(),
            published: None,
            generations: BTreeMap::new(),
        }
    }

    /// A link that we dial: one flow per dial socket, used before anything is heard, for the address is known.
    pub(super) fn add_dialled(&mut self, now: Instant, cluster: ClusterId, address: SocketAddr) {
        let link = self.links.entry(LinkKey::Dialled(cluster, address)).or_default();
        if link.flows.is_empty() {
            let sequence = self.clock.at(now);
            let flow = |number: u8| Flow::new(now, sequence, number, address, FlowSocket::Dial(number));
            link.flows = (0..self.workers.min(usize::from(FLOWS_MAX)) as u8).map(flow).collect();
        }
    }

    pub(super) fn remove(&mut self, key: LinkKey) {
        self.links.remove(&key);
    }

    pub(super) fn retain(&mut self, wanted: impl Fn(ClusterId) -> bool) {
        self.links.retain(|key, _| wanted(key.cluster()));
        self.keys.retain(|cluster, _| wanted(*cluster));
        self.generations.retain(|cluster, _| wanted(*cluster));
    }

    /// The key of probes to `cluster`.
    pub(super) fn set_key(&mut self, cluster: ClusterId, key: ProbeKey) {
        self.keys.insert(cluster, key);
    }

    pub(super) fn name_replica(&mut self, key: LinkKey, replica: u8) {
        self.links.entry(key).or_default().replica = Some(replica);
    }

    /// A fresh handshake vouches for the peer: its sequence numbers may start anew, should its clock have gone back.
    pub(super) fn reset_sequences(&mut self, cluster: ClusterId, replica: u8) {
        if let Some(link) = self.links.get_mut(&LinkKey::Accepted(cluster, replica)) {
            link.flows.iter_mut().for_each(|flow| flow.seen_sequence = 0);
        }
    }

    /// An authentic probe of a peer's flow came. On the public port it says where that flow's packets go.
    pub(super) fn on_probe(&mut self, now: Instant, from: SocketAddr, socket: FlowSocket, probe: &PeerProbe) {
        let Some((replica, number)) = probe.probe.replica_and_flow() else { return };
        if socket != FlowSocket::Public || number >= FLOWS_MAX {
            return;
        }
        let sequence = self.clock.at(now);
        let link = self.links.entry(LinkKey::Accepted(probe.cluster, replica)).or_default();
        link.replica = Some(replica);
        let index = match link.flows.iter().position(|flow| flow.number == number) {
            Some(index) => index,
            None => {
                link.flows.push(Flow::new(now, sequence, number, from, socket));
                link.flows.len() - 1
            }
        };
        let flow = &mut link.flows[index];
        if probe.probe.sequence <= flow.seen_sequence {
            return;
        }
        if flow.hop.address != from {
            // A new NAT mapping or a restarted peer: what was known of the old path is void.
            tracing::info!(cluster = %probe.cluster, replica, flow = number, "a peer's flow has a new address");
            *flow = Flow::new(now, sequence, number, from, socket);
        }
        flow.seen_sequence = probe.probe.sequence;
        flow.heard = Some(now);
    }

    /// The answer to a probe of ours.
    pub(super) fn on_answer(&mut self, at: Instant, from: SocketAddr, probe: &PeerProbe) {
        let Some((_, number)) = probe.probe.replica_and_flow() else { return };
        let links = self.links.iter_mut().filter(|(key, _)| key.cluster() == probe.cluster);
        for flow in links.flat_map(|(_, link)| &mut link.flows) {
            if flow.number == number && flow.hop.address == from {
                flow.health.on_reply(at, probe.probe.sequence, probe.probe.draining);
            }
        }
    }

    /// The probes to be sent now.
    pub(super) fn poll(&mut self, now: Instant) -> Vec<DueProbe> {
        let mut due = Vec::new();
        for (key, link) in &mut self.links {
            let cluster = key.cluster();
            let Some(probe_key) = self.keys.get(&cluster) else { continue };
            for flow in &mut link.flows {
                if let Some(sequence) = flow.health.poll_probe(now) {
                    due.push(DueProbe {
                        cluster,
                        key: probe_key.clone(),
                        prober: Probe::flow_prober(self.replica, flow.number),
                        sequence,
                        address: flow.hop.address,
                        socket: flow.hop.socket,
                    });
                }
            }
        }
        due
    }

    /// Whether `cluster`'s link carries traffic: then a dead flow must be left before anybody notices.
    pub(super) fn set_busy(&mut self, now: Instant, cluster: ClusterId, busy: bool) {
        let interval = if busy { INTERVAL_BUSY } else { INTERVAL_LINK };
        let links = self.links.iter_mut().filter(|(key, _)| key.cluster() == cluster);
        links.flat_map(|(_, link)| &mut link.flows).for_each(|flow| flow.health.set_interval(now, interval));
    }

    /// When [`Flows::poll`] has something to do next.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let keyed = self.links.iter().filter(|(key, _)| self.keys.contains_key(&key.cluster()));
        keyed.flat_map(|(_, link)| &link.flows).map(|flow| flow.health.next_timeout()).min()
    }

    /// The router's table, if it is not the one given last.
    pub(super) fn take_changed_table(&mut self, now: Instant) -> Option<LinkTable> {
        let table = self.table(now);
        if let Some(last) = &self.published {
            if last.peers == table.peers && last.addresses == table.addresses && last.probes_out == table.probes_out {
                return None;
            }
            for (cluster, hops) in &table.peers {
                if last.peers.get(cluster).is_some_and(|before| !before.is_empty() && before != hops) {
                    *self.generations.entry(*cluster).or_insert(1) += 1;
                }
            }
        }
        self.published = Some(table.clone());
        Some(table)
    }

    fn table(&self, now: Instant) -> LinkTable {
        let mut table = LinkTable { probes_out: self.keys.clone(), ..LinkTable::default() };
        let mut best: FxHashMap<ClusterId, Standing> = FxHashMap::default();
        for (key, link) in &self.links {
            let cluster = key.cluster();
            let keyed = self.keys.contains_key(&cluster);
            for flow in &link.flows {
                table.addresses.insert(flow.hop.address, cluster);
                let standing = flow.standing(now, keyed);
                let hops = table.peers.entry(cluster).or_default();
                // The best standing there is: with every flow silent, each is as good as another, and a peer that
                // comes back is reached with the first packet.
                match best.get(&cluster) {
                    Some(best) if *best > standing => continue,
                    Some(best) if *best == standing => {}
                    _ => {
                        hops.clear();
                        best.insert(cluster, standing);
                    }
                }
                hops.push(flow.hop);
            }
        }
        table
    }

    /// Per cluster, how often the set of flows in use has changed.
    pub(super) fn generations(&self) -> BTreeMap<ClusterId, u32> {
        self.generations.clone()
    }

    /// For the dashboard; what is known of control connections is added by the caller.
    pub(super) fn status(&self, names: &FxHashMap<ClusterId, ClusterName>) -> Vec<LinkStatus> {
        let link = |(key, link): (&LinkKey, &Link)| {
            let flows: Vec<FlowStatus> = link.flows.iter().map(Flow::status).collect();
            let mut rtts: Vec<Duration> = flows.iter().filter_map(|flow| flow.rtt).collect();
            rtts.sort_unstable();
            let lost: f32 = flows.iter().map(|flow| flow.loss).sum();
            Some(LinkStatus {
                cluster: names.get(&key.cluster())?.clone(),
                id: key.cluster(),
                replica: link.replica,
                control: false,
                dialled: matches!(key, LinkKey::Dialled(..)),
                address: flows.first().map(|flow| flow.address),
                rtt: rtts.get(rtts.len() / 2).copied(),
                loss: if flows.is_empty() { 0.0 } else { lost / flows.len() as f32 },
                flows,
                mtu: None,
            })
        };
        self.links.iter().filter_map(link).collect()
    }
}

/// How good a flow is, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    Dead,
    Draining,
    Untried,
    Live,
}

impl Flow {
    fn new(now: Instant, sequence: u64, number: u8, address: SocketAddr, socket: FlowSocket) -> Self {
        let salt = match socket {
            FlowSocket::Public => 0,
            FlowSocket::Dial(dial) => u64::from(dial) + 1,
        };
        let hop = Hop { address, socket, id: address_id(address).wrapping_add(salt << 56) };
        Self { number, hop, health: PathHealth::new(now, INTERVAL_LINK, sequence), seen_sequence: 0, heard: None }
    }

    fn standing(&self, now: Instant, keyed: bool) -> Standing {
        if !keyed && let Some(heard) = self.heard {
            let lately = now.saturating_duration_since(heard) < HEARD_FOR;
            return if lately { Standing::Live } else { Standing::Dead };
        }
        match self.health.state() {
            PathState::Live => Standing::Live,
            PathState::Untried => Standing::Untried,
            PathState::Draining => Standing::Draining,
            PathState::Dead => Standing::Dead,
        }
    }

    fn status(&self) -> FlowStatus {
        FlowStatus {
            number: self.number,
            address: self.hop.address,
            state: self.health.state(),
            rtt: self.health.rtt(),
            loss: self.health.loss(),
        }
    }
}

fn address_id(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        std::net::IpAddr::V4(ip) => u64::from(ip.to_bits()),
        std::net::IpAddr::V6(ip) => ip.to_bits() as u64 ^ (ip.to_bits() >> 64) as u64,
    };
    (ip << 16) ^ u64::from(address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: ClusterId = ClusterId(2);

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn flows(start: Instant) -> Flows {
        Flows::new(0, 2, start, 1_000_000)
    }

    fn probe(flow: u8, sequence: u64) -> PeerProbe {
        PeerProbe { cluster: PEER, probe: Probe::request(Probe::flow_prober(1, flow), sequence) }
    }

    fn addresses(table: &LinkTable) -> Vec<SocketAddr> {
        table.peers.get(&PEER).map_or(Vec::new(), |hops| hops.iter().map(|hop| hop.address).collect())
    }

    #[test]
    fn a_dialled_link_is_used_before_anything_was_heard() {
        let start = Instant::now();
        let mut flows = flows(start);
        flows.add_dialled(start, PEER, at(1));
        let table = flows.take_changed_table(start).expect("new");
        assert_eq!(addresses(&table), [at(1), at(1)]);
        assert_ne!(table.peers[&PEER][0].id, table.peers[&PEER][1].id, "two sockets, two flows");
        assert!(flows.take_changed_table(start).is_none(), "nothing changed");
    }

    #[test]
    fn a_restarted_gateway_learns_the_flows_dialled_to_it_from_their_probes_alone() {
        let start = Instant::now();
        let mut flows = flows(start);
        flows.on_probe(start, at(9), FlowSocket::Public, &probe(0, 5));
        let table = flows.take_changed_table(start).expect("learnt");
        assert_eq!(addresses(&table), [at(9)]);
        assert_eq!(table.addresses[&at(9)], PEER);
    }

    #[test]
    fn a_captured_probe_moves_no_flow_and_a_newer_one_does() {
        let start = Instant::now();
        let mut flows = flows(start);
        flows.on_probe(start, at(9), FlowSocket::Public, &probe(0, 5));
        flows.on_probe(start, at(66), FlowSocket::Public, &probe(0, 5));
        assert_eq!(addresses(&flows.take_changed_table(start).expect("new")), [at(9)]);
        flows.on_probe(start, at(10), FlowSocket::Public, &probe(0, 6));
        assert_eq!(addresses(&flows.take_changed_table(start).expect("moved")), [at(10)]);
        flows.on_probe(start, at(11), FlowSocket::Dial(0), &probe(0, 7));
        assert!(flows.take_changed_table(start).is_none(), "on a flow of ours the peer's probes teach nothing");
    }

    #[test]
    fn live_flows_carry_alone_and_with_none_left_all_are_tried() {
        let start = Instant::now();
        let mut flows = flows(start);
        flows.add_dialled(start, PEER, at(1));
        flows.add_dialled(start, PEER, at(2));
        flows.set_key(PEER, ProbeKey::new(0, [1; 16]));
        for due in flows.poll(start) {
            assert!(due.sequence > 1_000_000);
            if due.address == at(1) {
                let answer = Probe::request(due.prober, due.sequence).answered(false);
                flows.on_answer(start, at(1), &PeerProbe { cluster: PEER, probe: answer });
            }
        }
        assert_eq!(addresses(&flows.take_changed_table(start).expect("new")), [at(1), at(1)]);
        let mut now = start;
        for _ in 0..20 {
            now += INTERVAL_LINK;
            assert_eq!(flows.poll(now).len(), 4, "dead flows are probed on");
        }
        let table = flows.take_changed_table(now).expect("all silent");
        assert_eq!(addresses(&table), [at(1), at(1), at(2), at(2)]);
        assert_eq!(flows.generations()[&PEER], 2, "the path changed once");
    }
}
