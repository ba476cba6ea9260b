//! Dial tickets: the first connection ID of a tunnel, good for one dial of one endpoint, for a minute.
//!
//! Pure: clock and nonce come in from outside. A destination cluster derives one key per source cluster from its
//! ticket master and hands it to that source's gateways inside a link; they mint, the destination's gateways open.
//! Whether an export still holds is [`crate::route`]'s question; whether a ticket was used is [`crate::seen`]'s.

use std::fmt;
use std::time::Duration;

use aes::Aes128;
use aes::cipher::KeyInit;
use isthmus_model::ClusterId;
use zeroize::Zeroizing;

use crate::cid::{CID_VERSION, Cid, CidKind, EndpointName, GENERATIONS, derive_key};

/// How long a ticket is good for unless said otherwise.
pub const TICKET_VALIDITY: Duration = Duration::from_secs(60);
/// A ticket that claims to be good for longer than this was not minted by our rules. Larger than the validity by
/// what two clocks may differ after the link has corrected for their offset; far below the 36 h at which the
/// 16-bit expiry would be ambiguous.
const VALIDITY_UNITS_MAX: i16 = 20;
/// One unit of expiry.
const UNIT_MS: u64 = 4_000;

/// A moment of the destination cluster's wall clock in 4 s units, modulo 2^16 (three days).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TicketTime(pub u16);

impl TicketTime {
    /// The unit in which `unix_ms` lies.
    pub fn from_unix_ms(unix_ms: u64) -> Self {
        // Truncation is the modulus.
        Self((unix_ms / UNIT_MS) as u16)
    }

    /// This time and `validity`, rounded up.
    #[must_use]
    pub fn after(self, validity: Duration) -> Self {
        let units = validity.as_millis().div_ceil(u128::from(UNIT_MS));
        Self(self.0.wrapping_add(units.min(u128::from(u16::MAX)) as u16))
    }

    fn units_until(self, later: Self) -> i16 {
        later.0.wrapping_sub(self.0) as i16
    }
}

/// Why a ticket opened nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not sealed with a live key of that source.
    #[error("not a ticket of this source cluster")]
    Forged,
    /// Its minute is over, or lies in the future.
    #[error("the ticket has expired; check that the clocks of both clusters agree")]
    Expired,
}

/// One generation's key for one source cluster.
#[derive(Clone)]
pub struct TicketKey {
    raw: Zeroizing<[u8; 16]>,
    cipher: Aes128,
}

impl TicketKey {
    fn new(raw: [u8; 16]) -> Self {
        Self { cipher: Aes128::new(&raw.into()), raw: Zeroizing::new(raw) }
    }
}

/// The keys for tickets from `source` to `destination`: at most two generations live.
///
/// Held by the gateways of both clusters, never by sidecars. `Debug` shows no key.
#[derive(Clone)]
pub struct TicketKeys {
    source: ClusterId,
    destination: ClusterId,
    keys: [Option<TicketKey>; GENERATIONS],
    current: u8,
}

impl TicketKeys {
    /// Keys as they came over a link. `None` if `current` is not among them or a generation is impossible.
    pub fn from_parts(
        source: ClusterId,
        destination: ClusterId,
        current: u8,
        keys: impl IntoIterator<Item = (u8, [u8; 16])>,
    ) -> Option<Self> {
        let mut parsed = [const { None }; GENERATIONS];
        for (generation, key) in keys {
            *parsed.get_mut(usize::from(generation))? = Some(TicketKey::new(key));
        }
        parsed.get(usize::from(current))?.as_ref()?;
        Some(Self { source, destination, keys: parsed, current })
    }

    /// Generation and key of all that live, to be handed to the source's gateways.
    pub fn parts(&self) -> impl Iterator<Item = (u8, [u8; 16])> + '_ {
        (0u8..).zip(&self.keys).filter_map(|(generation, key)| key.as_ref().map(|key| (generation, *key.raw)))
    }

    /// The generation that mints.
    pub fn current(&self) -> u8 {
        self.current
    }

    /// The cluster whose sidecars dial with these tickets.
    pub fn source(&self) -> ClusterId {
        self.source
    }

    /// The cluster that is dialled.
    pub fn destination(&self) -> ClusterId {
        self.destination
    }

    /// Mints one ticket. `expiry` is by the destination's clock; `nonce` must not repeat within a minute.
    pub fn mint(&self, name: EndpointName, expiry: TicketTime, nonce: [u8; 4]) -> Cid {
        let mut block = [0; 16];
        name.write(&mut block);
        block[6..8].copy_from_slice(&expiry.0.to_be_bytes());
        block[8..12].copy_from_slice(&nonce);
        let key = self.keys[usize::from(self.current)].as_ref().expect("constructors put the current generation in");
        Cid::sealed(CidKind::Ticket, self.current, self.destination, self.source.0 as u8, block, &key.cipher)
    }

    /// Whom the ticket lets dial, if it is one of this source and its time has not run out.
    ///
    /// # Errors
    /// [`TicketError`]; an expired one is proved to come from the source, a forged one is not.
    pub fn open(&self, cid: &Cid, now: TicketTime) -> Result<EndpointName, TicketError> {
        if cid.kind() != CidKind::Ticket || cid.version() != CID_VERSION || cid.cluster() != self.destination {
            return Err(TicketError::Forged);
        }
        let key = self.keys[usize::from(cid.generation())].as_ref().ok_or(TicketError::Forged)?;
        let block = cid.open(&key.cipher).ok_or(TicketError::Forged)?;
        let left = now.units_until(TicketTime(u16::from_be_bytes([block[6], block[7]])));
        // Zero is the last unit: rounding up at minting pays for it.
        if (0..=VALIDITY_UNITS_MAX).contains(&left) {
            Ok(EndpointName::read(&block))
        } else {
            Err(TicketError::Expired)
        }
    }
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TicketKeys {{ {} -> {}, generation: {}, keys: .. }}", self.source, self.destination, self.current)
    }
}

/// The secrets of a destination cluster from which the keys for every source follow. On disk (0600), shared by all
/// replicas, rotated every 12 h; two generations live.
#[derive(Clone, PartialEq, Eq)]
pub struct TicketMasters {
    cluster: ClusterId,
    masters: [Option<Zeroizing<[u8; 32]>>; GENERATIONS],
    current: u8,
}

impl TicketMasters {
    /// The first master of `cluster`.
    pub fn new(cluster: ClusterId, master: [u8; 32]) -> Self {
        let mut masters = [const { None }; GENERATIONS];
        masters[0] = Some(Zeroizing::new(master));
        Self { cluster, masters, current: 0 }
    }

    /// Masters as they lie on disk. `None` if `current` is not among them or a generation is impossible.
    pub fn from_parts(
        cluster: ClusterId,
        current: u8,
        masters: impl IntoIterator<Item = (u8, [u8; 32])>,
    ) -> Option<Self> {
        let mut parsed = [const { None }; GENERATIONS];
        for (generation, master) in masters {
            *parsed.get_mut(usize::from(generation))? = Some(Zeroizing::new(master));
        }
        parsed.get(usize::from(current))?.as_ref()?;
        Some(Self { cluster, masters: parsed, current })
    }

    /// Generation and master of all that live, for the disk.
    pub fn parts(&self) -> impl Iterator<Item = (u8, [u8; 32])> + '_ {
        (0u8..).zip(&self.masters).filter_map(|(generation, master)| master.as_ref().map(|m| (generation, **m)))
    }

    /// The generation that mints.
    pub fn current(&self) -> u8 {
        self.current
    }

    /// One more generation, which mints from now on. The one before stays; older ones end.
    #[must_use]
    pub fn rotated(&self, master: [u8; 32]) -> Self {
        let next = (self.current + 1) & 3;
        let mut masters = [const { None }; GENERATIONS];
        masters[usize::from(self.current)] = self.masters[usize::from(self.current)].clone();
        masters[usize::from(next)] = Some(Zeroizing::new(master));
        Self { cluster: self.cluster, masters, current: next }
    }

    /// The keys for tickets from `source`: to open them here, and to hand to that source's gateways.
    pub fn keys_for(&self, source: ClusterId) -> TicketKeys {
        let derived = |(generation, master): (u8, &Option<Zeroizing<[u8; 32]>>)| {
            let info: [&[u8]; 3] = [b"isthmus ticket ", &[generation], &source.0.to_be_bytes()];
            master.as_ref().map(|master| TicketKey::new(*derive_key(&**master, &info)))
        };
        let mut keys = [const { None }; GENERATIONS];
        for (slot, master) in keys.iter_mut().zip((0u8..).zip(&self.masters)) {
            *slot = derived(master);
        }
        TicketKeys { source, destination: self.cluster, keys, current: self.current }
    }

    /// The key of probes that `source`'s gateways send here. Follows from the oldest master that lives, so a
    /// restarted gateway still knows the probes of peers that have not noticed.
    pub fn probe_key_for(&self, source: ClusterId, generation: u8) -> Option<[u8; 16]> {
        let master = self.masters.get(usize::from(generation))?.as_ref()?;
        Some(*derive_key(&**master, &[b"isthmus link probe ", &[generation], &source.0.to_be_bytes()]))
    }
}

impl fmt::Debug for TicketMasters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TicketMasters {{ cluster: {}, generation: {}, masters: .. }}", self.cluster, self.current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: EndpointName = EndpointName { handle: 4711, incarnation: 2 };
    const SOURCE: ClusterId = ClusterId(0x0305);
    const NOW: TicketTime = TicketTime(u16::MAX - 3);

    fn masters() -> TicketMasters {
        TicketMasters::new(ClusterId(9), [1; 32])
    }

    #[test]
    fn a_ticket_is_good_for_a_minute_even_where_the_clock_wraps() {
        let keys = masters().keys_for(SOURCE);
        let ticket = keys.mint(NAME, NOW.after(TICKET_VALIDITY), [1; 4]);
        assert_eq!((ticket.kind(), ticket.source_low()), (CidKind::Ticket, 5));
        assert_eq!(keys.open(&ticket, NOW), Ok(NAME));
        assert_eq!(keys.open(&ticket, TicketTime(NOW.0.wrapping_add(15))), Ok(NAME));
        assert_eq!(keys.open(&ticket, TicketTime(NOW.0.wrapping_add(16))), Err(TicketError::Expired));
        assert_eq!(keys.open(&ticket, TicketTime(NOW.0.wrapping_sub(100))), Err(TicketError::Expired), "too early");
    }

    #[test]
    fn keys_of_one_source_open_no_ticket_of_another() {
        let ticket = masters().keys_for(SOURCE).mint(NAME, NOW, [0; 4]);
        assert_eq!(masters().keys_for(ClusterId(0x0405)).open(&ticket, NOW), Err(TicketError::Forged));
    }

    #[test]
    fn a_source_that_got_its_keys_over_a_link_mints_what_the_destination_opens() {
        let ours = masters().rotated([2; 32]).keys_for(SOURCE);
        let theirs = TicketKeys::from_parts(SOURCE, ClusterId(9), ours.current(), ours.parts()).expect("complete");
        assert_eq!(ours.open(&theirs.mint(NAME, NOW, [0; 4]), NOW), Ok(NAME));
    }

    #[test]
    fn a_rotated_master_still_opens_the_last_generation_and_no_older_one() {
        let ticket = masters().keys_for(SOURCE).mint(NAME, NOW, [0; 4]);
        let second = masters().rotated([2; 32]);
        assert_eq!(second.keys_for(SOURCE).open(&ticket, NOW), Ok(NAME));
        assert_eq!(second.rotated([3; 32]).keys_for(SOURCE).open(&ticket, NOW), Err(TicketError::Forged));
    }
}
