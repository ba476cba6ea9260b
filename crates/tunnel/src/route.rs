//! One datagram in, its next hop out.
//!
//! Pure: tables and a coarse clock come in, nothing is kept. Checks everything that the destination's gateway must
//! check of a ticket but one: that it was not used before is the receiving sidecar's business ([`crate::seen`]),
//! for only there do all replicas' packets meet. Never looks at payload.

use std::net::SocketAddr;
use std::sync::Arc;

use isthmus_model::ClusterId;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::cid::{Cid, CidKeys, CidKind, EndpointName};
use crate::link::choose;
use crate::packet::{Form, INITIAL_LEN_MIN, Packet};
use crate::probe::{PROBE_LEN, Probe, ProbeKey};
use crate::ticket::{TicketError, TicketKeys, TicketTime};

/// What a router knows of its own cluster. Replaced whole.
#[derive(Debug, Clone)]
pub struct LocalTable {
    /// This cluster.
    pub cluster: ClusterId,
    /// This replica.
    pub replica: u8,
    /// Keys of this cluster's connection IDs.
    pub keys: Arc<CidKeys>,
    /// Where each endpoint's datagrams go.
    pub endpoints: FxHashMap<EndpointName, SocketAddr>,
    /// Addresses that are registered: only they may send into the mesh.
    pub registered: FxHashSet<SocketAddr>,
    /// Who may dial a handle; a handle that is not here may be dialled by nobody.
    pub exports: FxHashMap<u32, Visibility>,
    /// Clusters that may dial, with the keys of their tickets and probes; an evicted one is not here.
    pub sources: Vec<Source>,
    /// The other replicas of this gateway.
    pub siblings: FxHashMap<u8, SocketAddr>,
    /// Going away: probes are answered so, forwarding goes on.
    pub draining: bool,
}

/// A cluster whose sidecars may dial ours.
#[derive(Debug, Clone)]
pub struct Source {
    /// Opens its tickets.
    pub tickets: TicketKeys,
    /// Opens its gateways' probes: one key per live generation.
    pub probes: Vec<ProbeKey>,
}

/// Which clusters an endpoint's exports are for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Visibility {
    /// Every cluster of the mesh.
    All,
    /// These.
    Only(FxHashSet<ClusterId>),
}

impl Visibility {
    /// Whether `cluster` may dial.
    pub fn holds_for(&self, cluster: ClusterId) -> bool {
        match self {
            Self::All => true,
            Self::Only(clusters) => clusters.contains(&cluster),
        }
    }
}

/// What a router knows of other clusters' gateways. Replaced whole.
#[derive(Debug, Clone, Default)]
pub struct LinkTable {
    /// Per cluster the flows that may be used now.
    pub peers: FxHashMap<ClusterId, Vec<Hop>>,
    /// From which cluster packets of an address come. Only probed addresses are here.
    pub addresses: FxHashMap<SocketAddr, ClusterId>,
    /// Keys of the probes that we send, to know the answers by.
    pub probes_out: FxHashMap<ClusterId, ProbeKey>,
}

/// One flow of a link: where to, and from which socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hop {
    /// The peer replica's address for this flow.
    pub address: SocketAddr,
    /// The socket its NAT mapping and probes belong to.
    pub socket: FlowSocket,
    /// Told apart from all other flows to the same cluster.
    pub id: u64,
}

/// A socket of this gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowSocket {
    /// The public port; every worker has one of its own on it.
    Public,
    /// The dial socket of one worker.
    Dial(u8),
}

/// Where a datagram goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// To a sidecar of this cluster, or another replica of this gateway, from the public port.
    Local(SocketAddr),
    /// Over a link.
    Link(Hop),
    /// To this gateway's own control connections.
    Control,
    /// Back to where it came from: the answer to a probe. `peer` is set if it proves a flow of another cluster.
    Reflect {
        /// The answer.
        answer: [u8; PROBE_LEN],
        /// Whose flow it was, for the link's state.
        peer: Option<PeerProbe>,
    },
    /// The answer to one of our own probes.
    Answered(PeerProbe),
    /// Nowhere.
    Drop(DropReason),
    /// Nowhere, and the cluster it came from is told, so that the dial ends at once.
    Refuse(DropReason, Refusal),
}

/// An authentic probe of another cluster's gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProbe {
    /// The cluster.
    pub cluster: ClusterId,
    /// The probe.
    pub probe: Probe,
}

/// A dial that was refused although its ticket was real.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// Whose ticket it was.
    pub source: ClusterId,
    /// The ticket.
    pub ticket: Cid,
    /// The dialling sidecar's own ID.
    pub dialer: Option<Cid>,
}

/// Why a datagram goes nowhere. Each has a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// No QUIC header, or an ID that is not 20 bytes.
    Malformed,
    /// For another cluster, from an address that is not registered here.
    NotRegistered,
    /// For another cluster, from a peer: only direct links carry.
    NotDirect,
    /// A registered sidecar's packet for its own cluster.
    Hairpin,
    /// No live flow to that cluster.
    NoLink,
    /// The block does not open.
    BadBlock,
    /// No such endpoint process.
    UnknownEndpoint,
    /// A ticket outside an Initial.
    TicketMisplaced,
    /// An Initial that is too short.
    ShortInitial,
    /// A ticket from a cluster that may not dial, or over another cluster's link.
    UnknownSource,
    /// A ticket whose time is over.
    TicketExpired,
    /// The export is withdrawn.
    NotExported,
    /// A probe without a valid block.
    BadProbe,
    /// A version of connection ID for us that we do not know.
    UnknownVersion,
}

impl DropReason {
    /// All of them, in the order of their counters.
    pub const ALL: [Self; 14] = [
        Self::Malformed,
        Self::NotRegistered,
        Self::NotDirect,
        Self::Hairpin,
        Self::NoLink,
        Self::BadBlock,
        Self::UnknownEndpoint,
        Self::TicketMisplaced,
        Self::ShortInitial,
        Self::UnknownSource,
        Self::TicketExpired,
        Self::NotExported,
        Self::BadProbe,
        Self::UnknownVersion,
    ];

    /// A fixed word for metrics and notices.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NotRegistered => "not_registered",
            Self::NotDirect => "not_direct",
            Self::Hairpin => "hairpin",
            Self::NoLink => "no_link",
            Self::BadBlock => "bad_block",
            Self::UnknownEndpoint => "unknown_endpoint",
            Self::TicketMisplaced => "ticket_misplaced",
            Self::ShortInitial => "short_initial",
            Self::UnknownSource => "unknown_source",
            Self::TicketExpired => "ticket_expired",
            Self::NotExported => "not_exported",
            Self::BadProbe => "bad_probe",
            Self::UnknownVersion => "unknown_version",
        }
    }
}

/// Decides one datagram. `now` is the wall clock by which tickets expire.
pub fn route(local: &LocalTable, links: &LinkTable, from: SocketAddr, datagram: &[u8], now: TicketTime) -> Decision {
    let Some(packet) = Packet::parse(datagram) else { return Decision::Drop(DropReason::Malformed) };
    let dcid = packet.dcid;
    if dcid.cluster() != local.cluster {
        return outward(local, links, from, &dcid);
    }
    if dcid.version() != crate::cid::CID_VERSION {
        return Decision::Drop(DropReason::UnknownVersion);
    }
    match dcid.kind() {
        CidKind::Endpoint => match local.keys.open_endpoint(&dcid) {
            None => Decision::Drop(DropReason::BadBlock),
            // A sidecar reaches its own cluster's sidecars directly; through here it could only probe for them.
            Some(_) if local.registered.contains(&from) => Decision::Drop(DropReason::Hairpin),
            Some(name) => deliver(local, from, &dcid, name),
        },
        CidKind::Ticket => admit(local, links, from, &packet, datagram.len(), now),
        CidKind::Probe => reflect(local, links, from, &dcid, datagram.len()),
        CidKind::Link => control(local, &packet, datagram.len()),
    }
}

fn outward(local: &LocalTable, links: &LinkTable, from: SocketAddr, dcid: &Cid) -> Decision {
    if !local.registered.contains(&from) {
        let peer = links.addresses.contains_key(&from);
        return Decision::Drop(if peer { DropReason::NotDirect } else { DropReason::NotRegistered });
    }
    let hops = links.peers.get(&dcid.cluster()).map_or(&[][..], Vec::as_slice);
    match choose(dcid.spread(), hops.iter().map(|hop| hop.id)) {
        Some(index) => Decision::Link(hops[index]),
        None => Decision::Drop(DropReason::NoLink),
    }
}

fn deliver(local: &LocalTable, from: SocketAddr, dcid: &Cid, name: EndpointName) -> Decision {
    match local.endpoints.get(&name) {
        Some(&address) => Decision::Local(address),
        None => ask_sibling(local, from, dcid).unwrap_or(Decision::Drop(DropReason::UnknownEndpoint)),
    }
}

/// Another replica for a packet whose endpoint is not known here: after a restart peers find a replica sooner than
/// its sidecars do. What a sibling has sent goes no further, so there are no loops.
fn ask_sibling(local: &LocalTable, from: SocketAddr, dcid: &Cid) -> Option<Decision> {
    if local.siblings.values().any(|sibling| *sibling == from) {
        return None;
    }
    let siblings: Vec<_> = local.siblings.iter().collect();
    let index = choose(dcid.spread(), siblings.iter().map(|(number, _)| u64::from(**number)))?;
    Some(Decision::Local(*siblings[index].1))
}

fn admit(
    local: &LocalTable,
    links: &LinkTable,
    from: SocketAddr,
    packet: &Packet,
    length: usize,
    now: TicketTime,
) -> Decision {
    let Form::Initial { scid } = packet.form else { return Decision::Drop(DropReason::TicketMisplaced) };
    if length < INITIAL_LEN_MIN {
        return Decision::Drop(DropReason::ShortInitial);
    }
    let ticket = packet.dcid;
    let link = links.addresses.get(&from).copied();
    let mut reason = DropReason::UnknownSource;
    for source in &local.sources {
        let cluster = source.tickets.source();
        if cluster.0 as u8 != ticket.source_low() || link.is_some_and(|link| link != cluster) {
            continue;
        }
        let refuse = |reason| Decision::Refuse(reason, Refusal { source: cluster, ticket, dialer: scid });
        match source.tickets.open(&ticket, now) {
            Err(TicketError::Forged) => reason = DropReason::BadBlock,
            Err(TicketError::Expired) => return refuse(DropReason::TicketExpired),
            Ok(name) => {
                return match local.exports.get(&name.handle) {
                    Some(visibility) if visibility.holds_for(cluster) => match deliver(local, from, &ticket, name) {
                        Decision::Drop(reason) => refuse(reason),
                        decision => decision,
                    },
                    Some(_) => refuse(DropReason::NotExported),
                    None => ask_sibling(local, from, &ticket).unwrap_or(refuse(DropReason::NotExported)),
                };
            }
        }
    }
    Decision::Drop(reason)
}

fn reflect(local: &LocalTable, links: &LinkTable, from: SocketAddr, dcid: &Cid, length: usize) -> Decision {
    if length != PROBE_LEN {
        return Decision::Drop(DropReason::BadProbe);
    }
    if local.registered.contains(&from) {
        return match Probe::from_local(dcid, &local.keys) {
            Some(probe) if !probe.reply => {
                Decision::Reflect { answer: probe.answered(local.draining).to_local(&local.keys), peer: None }
            }
            _ => Decision::Drop(DropReason::BadProbe),
        };
    }
    for source in local.sources.iter().filter(|source| source.tickets.source().0 as u8 == dcid.source_low()) {
        let cluster = source.tickets.source();
        for key in &source.probes {
            if let Some(probe) = Probe::from_link(dcid, key).filter(|probe| !probe.reply) {
                let answer = probe.answered(local.draining).to_link(key, local.cluster, cluster);
                return Decision::Reflect { answer, peer: Some(PeerProbe { cluster, probe }) };
            }
        }
    }
    for (&cluster, key) in links.probes_out.iter().filter(|(cluster, _)| cluster.0 as u8 == dcid.source_low()) {
        if let Some(probe) = Probe::from_link(dcid, key).filter(|probe| probe.reply) {
            return Decision::Answered(PeerProbe { cluster, probe });
        }
    }
    Decision::Drop(DropReason::BadProbe)
}

fn control(local: &LocalTable, packet: &Packet, length: usize) -> Decision {
    match (local.keys.open_link(&packet.dcid), packet.form) {
        (Some(replica), _) if replica == local.replica => Decision::Control,
        (Some(replica), _) => match local.siblings.get(&replica) {
            Some(&address) => Decision::Local(address),
            None => Decision::Drop(DropReason::UnknownEndpoint),
        },
        // The first packet of a peer that has none of our IDs yet: the handshake will prove it.
        (None, Form::Initial { .. }) if length >= INITIAL_LEN_MIN => Decision::Control,
        (None, Form::Initial { .. }) => Decision::Drop(DropReason::ShortInitial),
        (None, _) => Decision::Drop(DropReason::BadBlock),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ticket::{TICKET_VALIDITY, TicketMasters};

    const OURS: ClusterId = ClusterId(1);
    const THEIRS: ClusterId = ClusterId(2);
    const THIRD: ClusterId = ClusterId(0x0102);
    const NAME: EndpointName = EndpointName { handle: 7, incarnation: 1 };
    const NOW: TicketTime = TicketTime(1000);

    fn at(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }
    const SIDECAR: u16 = 1;
    const PEER: u16 = 2;
    const STRANGER: u16 = 3;

    fn masters() -> TicketMasters {
        TicketMasters::new(OURS, [3; 32])
    }

    fn source(cluster: ClusterId) -> Source {
        let key = masters().probe_key_for(cluster, 0).expect("generation 0 lives");
        Source { tickets: masters().keys_for(cluster), probes: vec![ProbeKey::new(0, key)] }
    }

    fn local() -> LocalTable {
        LocalTable {
            cluster: OURS,
            replica: 0,
            keys: Arc::new(CidKeys::new(OURS, 0, [1; 16])),
            endpoints: [(NAME, at(SIDECAR))].into_iter().collect(),
            registered: [at(SIDECAR)].into_iter().collect(),
            exports: [(NAME.handle, Visibility::Only([THEIRS].into_iter().collect()))].into_iter().collect(),
            sources: vec![source(THIRD), source(THEIRS)],
            siblings: [(1, at(99))].into_iter().collect(),
            draining: false,
        }
    }

    fn hop() -> Hop {
        Hop { address: at(PEER), socket: FlowSocket::Public, id: 1 }
    }

    fn links() -> LinkTable {
        LinkTable {
            peers: [(THEIRS, vec![hop()])].into_iter().collect(),
            addresses: [(at(PEER), THEIRS)].into_iter().collect(),
            probes_out: FxHashMap::default(),
        }
    }

    fn decide(from: u16, datagram: &[u8]) -> Decision {
        route(&local(), &links(), at(from), datagram, NOW)
    }

    fn initial(dcid: &Cid) -> Vec<u8> {
        let mut bytes = vec![0xc3, 0, 0, 0, 1, 20];
        bytes.extend(dcid.as_bytes());
        bytes.push(20);
        bytes.extend([7; 20]);
        bytes.resize(1200, 0);
        bytes
    }

    fn short(dcid: &Cid) -> Vec<u8> {
        [&[0x40], dcid.as_bytes().as_slice(), &[0; 30]].concat()
    }

    fn ticket(source: ClusterId) -> Cid {
        masters().keys_for(source).mint(NAME, NOW.after(TICKET_VALIDITY), [0; 4])
    }

    #[test]
    fn an_established_tunnel_is_delivered_wherever_it_comes_from() {
        let packet = short(&local().keys.mint_endpoint(NAME, [0; 6]));
        assert_eq!(decide(PEER, &packet), Decision::Local(at(SIDECAR)));
        assert_eq!(decide(STRANGER, &packet), Decision::Local(at(SIDECAR)), "the block is the proof");
        assert_eq!(decide(SIDECAR, &packet), Decision::Drop(DropReason::Hairpin));
        let gone = EndpointName { incarnation: 2, ..NAME };
        let packet = short(&local().keys.mint_endpoint(gone, [0; 6]));
        assert_eq!(decide(PEER, &packet), Decision::Local(at(99)), "another replica may know it");
        assert_eq!(decide(99, &packet), Decision::Drop(DropReason::UnknownEndpoint), "but that one asks no further");
    }

    #[test]
    fn only_registered_sidecars_send_outward_and_a_peer_never_through_us() {
        let packet = short(&CidKeys::new(THEIRS, 0, [9; 16]).mint_endpoint(NAME, [0; 6]));
        assert_eq!(decide(SIDECAR, &packet), Decision::Link(hop()));
        assert_eq!(decide(STRANGER, &packet), Decision::Drop(DropReason::NotRegistered));
        assert_eq!(decide(PEER, &packet), Decision::Drop(DropReason::NotDirect));
        let third = short(&CidKeys::new(THIRD, 0, [9; 16]).mint_endpoint(NAME, [0; 6]));
        assert_eq!(decide(SIDECAR, &third), Decision::Drop(DropReason::NoLink));
    }

    #[test]
    fn an_unknown_version_is_forwarded_by_its_clear_fields_alone() {
        let mut packet = short(&CidKeys::new(THEIRS, 0, [9; 16]).mint_endpoint(NAME, [0; 6]));
        packet[1] |= 0xc0;
        assert_eq!(decide(SIDECAR, &packet), Decision::Link(hop()));
        let mut packet = short(&local().keys.mint_endpoint(NAME, [0; 6]));
        packet[1] |= 0xc0;
        assert_eq!(decide(PEER, &packet), Decision::Drop(DropReason::UnknownVersion));
    }

    #[test]
    fn a_ticket_opens_only_in_an_initial_of_its_own_source() {
        assert_eq!(decide(PEER, &initial(&ticket(THEIRS))), Decision::Local(at(SIDECAR)));
        assert_eq!(decide(PEER, &short(&ticket(THEIRS))), Decision::Drop(DropReason::TicketMisplaced));
        assert_eq!(decide(PEER, &initial(&ticket(THEIRS))[..1199]), Decision::Drop(DropReason::ShortInitial));
        let stolen = initial(&ticket(THIRD));
        assert_eq!(decide(PEER, &stolen), Decision::Drop(DropReason::BadBlock), "another cluster's, over this link");
        let evicted = initial(&masters().keys_for(ClusterId(0x0077)).mint(NAME, NOW, [0; 4]));
        assert_eq!(decide(STRANGER, &evicted), Decision::Drop(DropReason::UnknownSource));
    }

    #[test]
    fn a_real_ticket_that_opens_nothing_is_told_to_its_source() {
        let refused = |decision: Decision| match decision {
            Decision::Refuse(reason, refusal) => (reason, refusal.source, refusal.dialer),
            other => panic!("{other:?}"),
        };
        let dialer = Cid::from_slice(&[7; 20]);
        let third = refused(decide(STRANGER, &initial(&ticket(THIRD))));
        assert_eq!(third, (DropReason::NotExported, THIRD, dialer), "the export is for another cluster");
        let late = initial(&ticket(THEIRS));
        let late = route(&local(), &links(), at(PEER), &late, TicketTime(NOW.0 + 16));
        assert_eq!(refused(late), (DropReason::TicketExpired, THEIRS, dialer));
        let gone = EndpointName { incarnation: 9, ..NAME };
        let gone = masters().keys_for(THEIRS).mint(gone, NOW, [0; 4]);
        assert_eq!(decide(PEER, &initial(&gone)), Decision::Local(at(99)), "another replica may know it");
        assert_eq!(refused(decide(99, &initial(&gone))), (DropReason::UnknownEndpoint, THEIRS, dialer));
    }

    #[test]
    fn probes_are_answered_to_whoever_holds_the_key_and_are_not_amplified() {
        let keys = local().keys;
        let probe = Probe::request(5, 1);
        let answer = probe.answered(false);
        let expected = Decision::Reflect { answer: answer.to_local(&keys), peer: None };
        assert_eq!(decide(SIDECAR, &probe.to_local(&keys)), expected);
        assert_eq!(decide(STRANGER, &probe.to_local(&keys)), Decision::Drop(DropReason::BadProbe));
        assert_eq!(decide(SIDECAR, &answer.to_local(&keys)), Decision::Drop(DropReason::BadProbe), "no ping-pong");
        let key = &source(THEIRS).probes[0];
        let datagram = probe.to_link(key, THEIRS, OURS);
        let expected = Decision::Reflect {
            answer: answer.to_link(key, OURS, THEIRS),
            peer: Some(PeerProbe { cluster: THEIRS, probe }),
        };
        assert_eq!(decide(STRANGER, &datagram), expected);
        let mut links = links();
        links.probes_out.insert(THEIRS, ProbeKey::new(0, [6; 16]));
        let answered = answer.to_link(&ProbeKey::new(0, [6; 16]), THEIRS, OURS);
        let decision = route(&local(), &links, at(PEER), &answered, NOW);
        assert_eq!(decision, Decision::Answered(PeerProbe { cluster: THEIRS, probe: answer }));
    }

    #[test]
    fn control_packets_find_their_replica() {
        let keys = local().keys;
        assert_eq!(decide(PEER, &short(&keys.mint_link(0, [0; 6]))), Decision::Control);
        assert_eq!(decide(PEER, &short(&keys.mint_link(1, [0; 6]))), Decision::Local(at(99)));
        assert_eq!(decide(PEER, &short(&keys.mint_link(2, [0; 6]))), Decision::Drop(DropReason::UnknownEndpoint));
        let forged = CidKeys::new(OURS, 0, [2; 16]).mint_link(0, [0; 6]);
        assert_eq!(decide(STRANGER, &short(&forged)), Decision::Drop(DropReason::BadBlock));
        assert_eq!(decide(STRANGER, &initial(&forged)), Decision::Control, "a first packet proves itself later");
    }
}
