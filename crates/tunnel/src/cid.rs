//! The 20-byte connection ID by which gateways route: its layout, its keys, its codec.
//!
//! Pure: nonces come in from outside. Never decides whether a packet may pass; that is [`crate::route`].
//!
//! ```text
//! byte 0      version (bits 7-6) | kind (5-4) | key generation (3-2) | zero (1-0)
//! byte 1-2    destination cluster, big-endian
//! byte 3      tickets and link probes: low byte of the source cluster's number; else zero
//! byte 4-19   one AES-128 block: handle 4 | incarnation 2 | nonce 6 | zero check 4
//!             (tickets: handle 4 | incarnation 2 | expiry 2 | nonce 4 | zero check 4)
//! ```
//! Bytes 0-2 never change meaning: a router passes versions it does not know on by them, and only the destination
//! cluster opens the block. Of random blocks one in 4 x 10^9 passes the check.

use std::fmt;

use aes::Aes128;
use aes::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};
use aws_lc_rs::hkdf;
use isthmus_model::ClusterId;
use zeroize::Zeroizing;

/// Length of every connection ID of this mesh, so that short headers parse without state (RFC 9000 §5.1 allows 20).
pub const CID_LEN: usize = 20;
/// The layout above.
pub const CID_VERSION: u8 = 0;
/// Generations that can be told apart; at most two live at once.
pub const GENERATIONS: usize = 4;

/// What a connection ID names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CidKind {
    /// One process of one endpoint, for as long as the tunnel lives.
    Endpoint = 0,
    /// The right to dial one endpoint, once.
    Ticket = 1,
    /// A liveness probe, answered by whoever it reaches.
    Probe = 2,
    /// The control connection of a gateway replica.
    Link = 3,
}

/// A connection ID as it stands in a packet. Its clear fields are readable by all, its block by its cluster alone.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cid([u8; CID_LEN]);

impl Cid {
    /// Takes exactly [`CID_LEN`] bytes; anything else is not one of ours.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The first ID of a control connection, by a gateway that has none of `cluster`'s yet: the block says nothing.
    pub fn first_link(cluster: ClusterId, block: [u8; 16]) -> Self {
        let mut bytes = [0; CID_LEN];
        bytes[0] = (CID_VERSION << 6) | ((CidKind::Link as u8) << 4);
        bytes[1..3].copy_from_slice(&cluster.0.to_be_bytes());
        bytes[4..].copy_from_slice(&block);
        Self(bytes)
    }

    /// The bytes on the wire.
    pub fn as_bytes(&self) -> &[u8; CID_LEN] {
        &self.0
    }

    /// Layout version, 0-3.
    pub fn version(&self) -> u8 {
        self.0[0] >> 6
    }

    /// What it names.
    pub fn kind(&self) -> CidKind {
        match (self.0[0] >> 4) & 3 {
            0 => CidKind::Endpoint,
            1 => CidKind::Ticket,
            2 => CidKind::Probe,
            _ => CidKind::Link,
        }
    }

    /// Key generation, 0-3.
    pub fn generation(&self) -> u8 {
        (self.0[0] >> 2) & 3
    }

    /// The cluster that can open it, and where it is routed.
    pub fn cluster(&self) -> ClusterId {
        ClusterId(u16::from_be_bytes([self.0[1], self.0[2]]))
    }

    /// Low byte of the source cluster's number (tickets and link probes).
    pub fn source_low(&self) -> u8 {
        self.0[3]
    }

    /// A value that spreads over replicas and flows and stays the same for the ID's life.
    pub fn spread(&self) -> u64 {
        // The block is a cipher's output: eight bytes of it are as good as a hash of all twenty.
        u64::from_le_bytes([self.0[4], self.0[5], self.0[6], self.0[7], self.0[8], self.0[9], self.0[10], self.0[11]])
    }

    pub(crate) fn sealed(
        kind: CidKind,
        generation: u8,
        cluster: ClusterId,
        source_low: u8,
        block: [u8; 16],
        cipher: &Aes128,
    ) -> Self {
        let mut bytes = [0; CID_LEN];
        bytes[0] = (CID_VERSION << 6) | ((kind as u8) << 4) | ((generation & 3) << 2);
        bytes[1..3].copy_from_slice(&cluster.0.to_be_bytes());
        bytes[3] = source_low;
        let mut block = block.into();
        cipher.encrypt_block(&mut block);
        bytes[4..].copy_from_slice(&block);
        Self(bytes)
    }

    /// The plain block, if it was sealed with `cipher`.
    pub(crate) fn open(&self, cipher: &Aes128) -> Option<[u8; 16]> {
        let mut block: [u8; 16] = self.0[4..].try_into().ok()?;
        cipher.decrypt_block((&mut block).into());
        (block[12..] == [0; 4]).then_some(block)
    }
}

impl fmt::Debug for Cid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}@{}/", self.kind(), self.cluster())?;
        self.0[4..].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A process of an endpoint: the handle its cluster gave it and which of its lives it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointName {
    /// The cluster's number for the endpoint, never 0.
    pub handle: u32,
    /// A restart is another incarnation.
    pub incarnation: u16,
}

impl EndpointName {
    pub(crate) fn write(self, block: &mut [u8; 16]) {
        block[..4].copy_from_slice(&self.handle.to_be_bytes());
        block[4..6].copy_from_slice(&self.incarnation.to_be_bytes());
    }

    pub(crate) fn read(block: &[u8; 16]) -> Self {
        Self {
            handle: u32::from_be_bytes([block[0], block[1], block[2], block[3]]),
            incarnation: u16::from_be_bytes([block[4], block[5]]),
        }
    }
}

/// One generation of a cluster's endpoint key, expanded. A kind opens only what was sealed as that kind, although
/// the kind stands in clear: each has a key of its own, derived from the one that is distributed.
#[derive(Clone)]
struct CidKey {
    raw: Zeroizing<[u8; 16]>,
    endpoint: Aes128,
    probe: Aes128,
    link: Aes128,
}

impl CidKey {
    fn new(raw: [u8; 16]) -> Self {
        let derived = |kind: &str| Aes128::new(&(*derive_key(&raw, &[b"isthmus cid ", kind.as_bytes()])).into());
        Self { endpoint: derived("endpoint"), probe: derived("probe"), link: derived("link"), raw: Zeroizing::new(raw) }
    }
}

/// HKDF-SHA256 with the parts of `info` joined. `secret` is uniformly random already.
pub(crate) fn derive_key(secret: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; 16]> {
    struct Sixteen;
    impl hkdf::KeyType for Sixteen {
        fn len(&self) -> usize {
            16
        }
    }
    let mut key = Zeroizing::new([0; 16]);
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, b"isthmus/1").extract(secret);
    prk.expand(info, Sixteen).and_then(|okm| okm.fill(&mut *key)).expect("16 bytes is within HKDF's bound");
    key
}

/// The endpoint keys of one cluster that live now: at most two generations. Gateways and sidecars hold them.
///
/// Knowing them lets one route to a sidecar, never open a tunnel. `Debug` shows generations only.
#[derive(Clone)]
pub struct CidKeys {
    cluster: ClusterId,
    keys: [Option<CidKey>; GENERATIONS],
    current: u8,
}

impl CidKeys {
    /// The keys of `cluster` with one generation, which mints.
    pub fn new(cluster: ClusterId, generation: u8, key: [u8; 16]) -> Self {
        let mut keys = [const { None }; GENERATIONS];
        keys[usize::from(generation & 3)] = Some(CidKey::new(key));
        Self { cluster, keys, current: generation & 3 }
    }

    /// All generations at once, as they were distributed; `current` mints. `None` if `current` is not among them.
    pub fn from_parts(cluster: ClusterId, current: u8, keys: impl IntoIterator<Item = (u8, [u8; 16])>) -> Option<Self> {
        let mut parsed = [const { None }; GENERATIONS];
        for (generation, key) in keys {
            *parsed.get_mut(usize::from(generation))? = Some(CidKey::new(key));
        }
        parsed.get(usize::from(current))?.as_ref()?;
        Some(Self { cluster, keys: parsed, current })
    }

    /// Generation and key of all that live, for distribution over an authenticated session.
    pub fn parts(&self) -> impl Iterator<Item = (u8, [u8; 16])> + '_ {
        (0u8..).zip(&self.keys).filter_map(|(generation, key)| key.as_ref().map(|key| (generation, *key.raw)))
    }

    /// The generation that mints.
    pub fn current(&self) -> u8 {
        self.current
    }

    /// The cluster whose keys these are.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// These keys with one more generation, which mints from now on. The one before stays; older ones end.
    #[must_use]
    pub fn rotated(&self, key: [u8; 16]) -> Self {
        let next = (self.current + 1) & 3;
        let mut keys = [const { None }; GENERATIONS];
        keys[usize::from(self.current)] = self.keys[usize::from(self.current)].clone();
        keys[usize::from(next)] = Some(CidKey::new(key));
        Self { cluster: self.cluster, keys, current: next }
    }

    /// An ID for an established tunnel of `name`.
    pub fn mint_endpoint(&self, name: EndpointName, nonce: [u8; 6]) -> Cid {
        self.seal(CidKind::Endpoint, |key| &key.endpoint, name, nonce)
    }

    /// The endpoint of an established tunnel's ID; `None` if it was not sealed with a live key.
    pub fn open_endpoint(&self, cid: &Cid) -> Option<EndpointName> {
        self.unseal(cid, CidKind::Endpoint, |key| &key.endpoint).map(|block| EndpointName::read(&block))
    }

    /// An ID for a control connection of replica `replica`.
    pub fn mint_link(&self, replica: u8, nonce: [u8; 6]) -> Cid {
        let name = EndpointName { handle: u32::from(replica), incarnation: 0 };
        self.seal(CidKind::Link, |key| &key.link, name, nonce)
    }

    /// The replica of a control connection's ID.
    pub fn open_link(&self, cid: &Cid) -> Option<u8> {
        let block = self.unseal(cid, CidKind::Link, |key| &key.link)?;
        u8::try_from(EndpointName::read(&block).handle).ok()
    }

    /// Seals a probe's block between a sidecar and its gateways.
    pub(crate) fn seal_probe(&self, block: [u8; 16]) -> Cid {
        Cid::sealed(CidKind::Probe, self.current, self.cluster, 0, block, &self.minting().probe)
    }

    pub(crate) fn open_probe(&self, cid: &Cid) -> Option<[u8; 16]> {
        self.unseal(cid, CidKind::Probe, |key| &key.probe)
    }

    fn seal(&self, kind: CidKind, key: impl Fn(&CidKey) -> &Aes128, name: EndpointName, nonce: [u8; 6]) -> Cid {
        let mut block = [0; 16];
        name.write(&mut block);
        block[6..12].copy_from_slice(&nonce);
        Cid::sealed(kind, self.current, self.cluster, 0, block, key(self.minting()))
    }

    fn unseal(&self, cid: &Cid, kind: CidKind, key: impl Fn(&CidKey) -> &Aes128) -> Option<[u8; 16]> {
        if cid.kind() != kind || cid.version() != CID_VERSION || cid.cluster() != self.cluster {
            return None;
        }
        cid.open(key(self.keys[usize::from(cid.generation())].as_ref()?))
    }

    fn minting(&self) -> &CidKey {
        self.keys[usize::from(self.current)].as_ref().expect("constructors put the current generation in")
    }
}

impl fmt::Debug for CidKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CidKeys {{ cluster: {}, generation: {}, keys: .. }}", self.cluster, self.current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: EndpointName = EndpointName { handle: 0xdead_beef, incarnation: 7 };

    fn keys() -> CidKeys {
        CidKeys::new(ClusterId(0x0102), 1, [9; 16])
    }

    #[test]
    fn an_endpoint_id_is_read_back_and_its_clear_fields_stand_where_the_layout_says() {
        let cid = keys().mint_endpoint(NAME, [1, 2, 3, 4, 5, 6]);
        assert_eq!(cid.as_bytes()[..4], [0b0000_0100, 1, 2, 0]);
        assert_eq!((cid.kind(), cid.generation(), cid.cluster()), (CidKind::Endpoint, 1, ClusterId(0x0102)));
        assert_eq!(keys().open_endpoint(&cid), Some(NAME));
    }

    #[test]
    fn two_generations_live_and_the_third_ends_the_first() {
        let first = keys();
        let old = first.mint_endpoint(NAME, [0; 6]);
        let second = first.rotated([8; 16]);
        assert_eq!(second.open_endpoint(&old), Some(NAME));
        let third = second.rotated([7; 16]);
        assert_eq!(third.open_endpoint(&old), None);
        assert_eq!(third.open_endpoint(&second.mint_endpoint(NAME, [0; 6])), Some(NAME));
    }

    #[test]
    fn a_kind_written_over_in_clear_does_not_open() {
        let mut bytes = *keys().mint_endpoint(NAME, [0; 6]).as_bytes();
        bytes[0] |= (CidKind::Link as u8) << 4;
        assert_eq!(keys().open_link(&Cid(bytes)), None);
    }

    #[test]
    fn any_flipped_bit_of_the_block_is_noticed() {
        let cid = keys().mint_endpoint(NAME, [0; 6]);
        for bit in 0..128 {
            let mut bytes = *cid.as_bytes();
            bytes[4 + bit / 8] ^= 1 << (bit % 8);
            assert_eq!(keys().open_endpoint(&Cid(bytes)), None, "bit {bit}");
        }
    }

    #[test]
    fn keys_travel_in_parts_and_are_never_printed() {
        let keys = keys().rotated([8; 16]);
        let copy = CidKeys::from_parts(keys.cluster(), keys.current(), keys.parts()).expect("current is there");
        assert_eq!(copy.open_endpoint(&keys.mint_endpoint(NAME, [3; 6])), Some(NAME));
        assert!(CidKeys::from_parts(ClusterId(1), 2, [(1, [0; 16])]).is_none(), "no current key");
        assert!(CidKeys::from_parts(ClusterId(1), 1, [(9, [0; 16])]).is_none(), "no such generation");
        assert_eq!(format!("{keys:?}"), "CidKeys { cluster: 258, generation: 2, keys: .. }");
    }
}
