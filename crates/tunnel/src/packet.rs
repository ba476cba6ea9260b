//! The part of a QUIC packet that every version keeps (RFC 8999), read by hand.
//!
//! Pure; never looks behind the connection IDs. All that a router may believe of an unproven datagram starts here.

use crate::cid::{CID_LEN, Cid};

/// QUIC version 1 (RFC 9000).
const VERSION_1: u32 = 1;
/// A client pads its Initials to at least this (RFC 9000 §14.1).
pub const INITIAL_LEN_MIN: usize = 1200;

/// What a router reads of a datagram's first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Where it wants to go.
    pub dcid: Cid,
    /// Which kind of header it has.
    pub form: Form,
}

/// The kind of header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Data of an established connection.
    Short,
    /// A version 1 Initial, with the sender's own ID where it is one of ours.
    Initial {
        /// The sender's ID.
        scid: Option<Cid>,
    },
    /// Any other long header: Handshake, Retry, version negotiation, a version we do not know.
    Long,
}

impl Packet {
    /// Reads the header. `None` if it is too short, or its ID is not [`CID_LEN`] long.
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        let first = *datagram.first()?;
        if first & 0x80 == 0 {
            let dcid = Cid::from_slice(datagram.get(1..=CID_LEN)?)?;
            return Some(Self { dcid, form: Form::Short });
        }
        let version = u32::from_be_bytes(datagram.get(1..5)?.try_into().ok()?);
        if usize::from(*datagram.get(5)?) != CID_LEN {
            return None;
        }
        let dcid = Cid::from_slice(datagram.get(6..6 + CID_LEN)?)?;
        let form = if version == VERSION_1 && (first >> 4) & 3 == 0 {
            Form::Initial { scid: source_id(datagram) }
        } else {
            Form::Long
        };
        Some(Self { dcid, form })
    }
}

fn source_id(datagram: &[u8]) -> Option<Cid> {
    const AT: usize = 6 + CID_LEN;
    if usize::from(*datagram.get(AT)?) != CID_LEN {
        return None;
    }
    Cid::from_slice(datagram.get(AT + 1..AT + 1 + CID_LEN)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(first: u8, version: u32, dcid: &[u8], scid: &[u8]) -> Vec<u8> {
        let mut bytes = vec![first];
        bytes.extend(version.to_be_bytes());
        bytes.push(dcid.len() as u8);
        bytes.extend(dcid);
        bytes.push(scid.len() as u8);
        bytes.extend(scid);
        bytes
    }

    #[test]
    fn an_initial_shows_both_ids() {
        let packet = Packet::parse(&long(0xc3, 1, &[1; 20], &[2; 20])).expect("parses");
        assert_eq!(packet.dcid.as_bytes(), &[1; 20]);
        assert_eq!(packet.form, Form::Initial { scid: Cid::from_slice(&[2; 20]) });
    }

    #[test]
    fn other_versions_and_types_are_long_and_no_more() {
        for (first, version) in [(0xd3, 1), (0xe0, 1), (0xf0, 1), (0xc3, 0), (0xc3, 0x6b33_43cf)] {
            assert_eq!(Packet::parse(&long(first, version, &[1; 20], &[])).map(|p| p.form), Some(Form::Long));
        }
    }

    #[test]
    fn every_truncation_and_every_other_id_length_is_refused() {
        let whole = long(0xc3, 1, &[1; 20], &[2; 20]);
        for end in 0..26 {
            assert_eq!(Packet::parse(&whole[..end]), None, "{end} bytes");
        }
        for length in (0..=255).filter(|&length| length != 20) {
            assert_eq!(Packet::parse(&long(0xc3, 1, &vec![1; length], &[])), None, "{length}");
        }
        assert_eq!(Packet::parse(&[0x40; 20]), None, "a short header needs 21 bytes");
    }
}
