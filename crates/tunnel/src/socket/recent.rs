//! The last packets of every tunnel, to be sent once more when the path they took turns out to be dead.
//!
//! QUIC itself would notice by its probe timeout, which has doubled a few times by then: an outage of 150 ms
//! costs 300 to 700. A copy over the new path is acknowledged after one round trip, and what was lost before it
//! is sent again at once (RFC 9002 §6.1). A packet that did arrive is a duplicate, which QUIC drops.
//! Sans-IO: packets and time come in, copies go out.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

use crate::cid::{Cid, CidKind};
use crate::packet::{Form, Packet};

/// Packets kept of a tunnel: the last alone may be a bare acknowledgement, which nobody acknowledges.
const PER_TUNNEL: usize = 3;
/// Tunnels remembered; beyond it the others recover by themselves.
const TUNNELS_MAX: usize = 1_024;
/// What was sent longer ago has arrived, or QUIC has sent it again.
const KEPT_FOR: Duration = Duration::from_secs(1);

/// What was sent lately. A tunnel costs up to 4.5 KB while it is in use.
#[derive(Debug, Default)]
pub(super) struct Recent {
    by_id: FxHashMap<Cid, Sent>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Sent {
    last: Instant,
    packets: VecDeque<Vec<u8>>,
}

impl Recent {
    /// A datagram, or a batch of them `segment` bytes each, is sent to `dcid`.
    pub(super) fn sent(&mut self, now: Instant, packet: &Packet, contents: &[u8], segment: Option<usize>) {
        if packet.form != Form::Short || packet.dcid.kind() != CidKind::Endpoint {
            return;
        }
        self.sweep(now);
        if !self.by_id.contains_key(&packet.dcid) && self.by_id.len() >= TUNNELS_MAX {
            return;
        }
        // Of a batch the last one: its acknowledgement tells of all before it.
        let last = segment.map_or(contents, |size| contents.chunks(size.max(1)).next_back().unwrap_or(contents));
        let sent = self
            .by_id
            .entry(packet.dcid)
            .or_insert_with(|| Sent { last: now, packets: VecDeque::with_capacity(PER_TUNNEL) });
        sent.last = now;
        // The oldest one's buffer is used again: nothing is allocated per packet.
        let mut buffer =
            if sent.packets.len() == PER_TUNNEL { sent.packets.pop_front() } else { None }.unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(last);
        sent.packets.push_back(buffer);
    }

    /// Copies of what was lately sent to the tunnels that `affected` picks, oldest first.
    pub(super) fn copies(&self, now: Instant, affected: impl Fn(&Cid) -> bool) -> Vec<(Cid, Vec<u8>)> {
        let lately = |sent: &Sent| now.saturating_duration_since(sent.last) < KEPT_FOR;
        let of = self.by_id.iter().filter(|(id, sent)| affected(id) && lately(sent));
        of.flat_map(|(id, sent)| sent.packets.iter().map(|packet| (*id, packet.clone()))).collect()
    }

    fn sweep(&mut self, now: Instant) {
        let due = self.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= KEPT_FOR);
        if due {
            self.swept = Some(now);
            self.by_id.retain(|_, sent| now.saturating_duration_since(sent.last) < KEPT_FOR);
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_model::ClusterId;

    use super::*;
    use crate::cid::{CidKeys, EndpointName};

    fn packet(handle: u32) -> Packet {
        let keys = CidKeys::new(ClusterId(2), 0, [7; 16]);
        let dcid = keys.mint_endpoint(EndpointName { handle, incarnation: 1 }, [1; 6]);
        Packet { dcid, form: Form::Short }
    }

    #[test]
    fn the_last_packets_of_a_tunnel_are_kept_for_a_second() {
        let (start, mut recent) = (Instant::now(), Recent::default());
        let (one, other) = (packet(1), packet(2));
        for number in 0..10u8 {
            recent.sent(start, &one, &[number; 4], None);
        }
        recent.sent(start, &other, &[1, 1, 2, 2, 3], Some(2));
        let of_one: Vec<u8> = recent.copies(start, |id| *id == one.dcid).iter().map(|(_, bytes)| bytes[0]).collect();
        assert_eq!(of_one, [7, 8, 9]);
        assert_eq!(recent.copies(start, |id| *id == other.dcid)[0].1, [3], "the last of a batch");
        assert!(recent.copies(start + KEPT_FOR, |_| true).is_empty());
        recent.sent(start + KEPT_FOR, &other, &[4], None);
        assert_eq!(recent.by_id.len(), 1, "an idle tunnel costs nothing");
    }

    #[test]
    fn a_dial_is_never_sent_twice_and_the_memory_is_bounded() {
        let (start, mut recent) = (Instant::now(), Recent::default());
        let initial = Packet { form: Form::Initial { scid: None }, ..packet(1) };
        recent.sent(start, &initial, &[0; 1200], None);
        assert!(recent.copies(start, |_| true).is_empty());
        for handle in 0..2 * TUNNELS_MAX as u32 {
            recent.sent(start, &packet(handle + 1), &[0], None);
        }
        assert_eq!(recent.by_id.len(), TUNNELS_MAX);
    }
}
