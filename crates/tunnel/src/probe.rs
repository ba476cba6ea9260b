//! Liveness probes: 32-byte datagrams that whoever holds the path's key reflects.
//!
//! Pure. They look like a QUIC short header, so one parser serves all; the connection ID's kind tells them apart.
//! The block under the path's key is {prober 4 | flags 2 | sequence 6 | check 4}. A reply repeats prober and
//! sequence with [`REPLY`] set: only who holds the key can write it, and it is as long as the request, so nothing
//! is amplified. Between a sidecar and its gateways the key follows from the endpoint key; between gateways from
//! the receiving cluster's master, per source cluster.

use std::fmt;

use aes::Aes128;
use aes::cipher::KeyInit;
use isthmus_model::ClusterId;
use zeroize::Zeroizing;

use crate::cid::{CID_LEN, Cid, CidKeys, CidKind};

/// Length of every probe.
pub const PROBE_LEN: usize = 32;
const REPLY: u16 = 1 << 15;
const DRAINING: u16 = 1;
/// First byte of a short header: the fixed bit (RFC 9000 §17.3).
const SHORT_HEADER: u8 = 0x40;

/// What a probe says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Who asked: a sidecar's handle, or [`Probe::prober`] of a gateway's flow.
    pub prober: u32,
    /// Rises with every probe of a prober (48 bits), so that a captured one is good once.
    pub sequence: u64,
    /// Whether this is the answer.
    pub reply: bool,
    /// In answers: the gateway is going away, use another.
    pub draining: bool,
}

impl Probe {
    /// A question.
    pub fn request(prober: u32, sequence: u64) -> Self {
        Self { prober, sequence, reply: false, draining: false }
    }

    /// The answer to this question.
    #[must_use]
    pub fn answered(self, draining: bool) -> Self {
        Self { reply: true, draining, ..self }
    }

    /// The prober number of flow `flow` of gateway replica `replica`.
    pub fn flow_prober(replica: u8, flow: u8) -> u32 {
        u32::from(replica) << 8 | u32::from(flow)
    }

    /// Replica and flow of a gateway's prober number.
    pub fn replica_and_flow(&self) -> Option<(u8, u8)> {
        Some((u8::try_from(self.prober >> 8).ok()?, self.prober as u8))
    }

    fn block(self) -> [u8; 16] {
        let mut block = [0; 16];
        let flags = if self.reply { REPLY } else { 0 } | if self.draining { DRAINING } else { 0 };
        block[..4].copy_from_slice(&self.prober.to_be_bytes());
        block[4..6].copy_from_slice(&flags.to_be_bytes());
        block[6..12].copy_from_slice(&self.sequence.to_be_bytes()[2..]);
        block
    }

    fn from_block(block: &[u8; 16]) -> Option<Self> {
        let flags = u16::from_be_bytes([block[4], block[5]]);
        if flags & !(REPLY | DRAINING) != 0 {
            return None;
        }
        let mut sequence = [0; 8];
        sequence[2..].copy_from_slice(&block[6..12]);
        Some(Self {
            prober: u32::from_be_bytes([block[0], block[1], block[2], block[3]]),
            sequence: u64::from_be_bytes(sequence),
            reply: flags & REPLY != 0,
            draining: flags & DRAINING != 0,
        })
    }

    /// As a datagram between a sidecar and a gateway of its cluster.
    pub fn to_local(self, keys: &CidKeys) -> [u8; PROBE_LEN] {
        datagram(&keys.seal_probe(self.block()))
    }

    /// Opens a probe between a sidecar and a gateway of its cluster.
    pub fn from_local(cid: &Cid, keys: &CidKeys) -> Option<Self> {
        Self::from_block(&keys.open_probe(cid)?)
    }

    /// As a datagram between gateways, towards `to`, from `from`.
    pub fn to_link(self, key: &ProbeKey, from: ClusterId, to: ClusterId) -> [u8; PROBE_LEN] {
        datagram(&Cid::sealed(CidKind::Probe, key.generation, to, from.0 as u8, self.block(), &key.cipher))
    }

    /// Opens a probe between gateways.
    pub fn from_link(cid: &Cid, key: &ProbeKey) -> Option<Self> {
        if cid.kind() != CidKind::Probe || cid.generation() != key.generation {
            return None;
        }
        Self::from_block(&cid.open(&key.cipher)?)
    }
}

fn datagram(cid: &Cid) -> [u8; PROBE_LEN] {
    let mut bytes = [0; PROBE_LEN];
    bytes[0] = SHORT_HEADER;
    bytes[1..=CID_LEN].copy_from_slice(cid.as_bytes());
    bytes
}

/// The key of the probes that one cluster's gateways send to another's, chosen by the receiving cluster.
#[derive(Clone)]
pub struct ProbeKey {
    generation: u8,
    raw: Zeroizing<[u8; 16]>,
    cipher: Aes128,
}

impl ProbeKey {
    /// `generation` is that of the master it was derived from, 0-3.
    pub fn new(generation: u8, key: [u8; 16]) -> Self {
        Self { generation: generation & 3, cipher: Aes128::new(&key.into()), raw: Zeroizing::new(key) }
    }

    /// Generation and key, for the link.
    pub fn parts(&self) -> (u8, [u8; 16]) {
        (self.generation, *self.raw)
    }
}

impl PartialEq for ProbeKey {
    fn eq(&self, other: &Self) -> bool {
        self.generation == other.generation && self.raw == other.raw
    }
}

impl fmt::Debug for ProbeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProbeKey {{ generation: {}, key: .. }}", self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::Packet;

    #[test]
    fn a_probe_parses_as_a_packet_and_its_answer_repeats_it() {
        let keys = CidKeys::new(ClusterId(3), 0, [5; 16]);
        let probe = Probe::request(77, 0xffff_1234_5678);
        let datagram = probe.to_local(&keys);
        let cid = Packet::parse(&datagram).expect("parses").dcid;
        let seen = Probe::from_local(&cid, &keys).expect("opens");
        assert_eq!(seen, probe);
        let answer = Packet::parse(&seen.answered(true).to_local(&keys)).expect("parses").dcid;
        let answer = Probe::from_local(&answer, &keys).expect("opens");
        assert_eq!((answer.sequence, answer.reply, answer.draining), (probe.sequence, true, true));
    }

    #[test]
    fn a_link_probe_opens_only_under_the_key_of_its_path() {
        let key = ProbeKey::new(1, [7; 16]);
        let datagram = Probe::request(Probe::flow_prober(2, 3), 9).to_link(&key, ClusterId(1), ClusterId(2));
        let cid = Packet::parse(&datagram).expect("parses").dcid;
        assert_eq!(Probe::from_link(&cid, &key).and_then(|p| p.replica_and_flow()), Some((2, 3)));
        assert_eq!(Probe::from_link(&cid, &ProbeKey::new(1, [8; 16])), None);
    }
}
