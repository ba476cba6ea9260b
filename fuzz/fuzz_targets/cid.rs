//! Connection IDs: what opens is what was sealed, and nothing panics.
#![no_main]

use isthmus_model::ClusterId;
use isthmus_tunnel::cid::{Cid, CidKeys, EndpointName};
use isthmus_tunnel::packet::Packet;
use isthmus_tunnel::ticket::{TicketMasters, TicketTime};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<u8>, [u8; 16], u32, u16, [u8; 6], u16)| {
    let (bytes, key, handle, incarnation, nonce, now) = input;
    let keys = CidKeys::new(ClusterId(7), 1, key);
    let name = EndpointName { handle, incarnation };
    assert_eq!(keys.open_endpoint(&keys.mint_endpoint(name, nonce)), Some(name));
    let tickets = TicketMasters::new(ClusterId(7), [key[0]; 32]).keys_for(ClusterId(3));
    let ticket = tickets.mint(name, TicketTime(now), [0; 4]);
    assert_eq!(tickets.open(&ticket, TicketTime(now)), Ok(name));
    if let Some(packet) = Packet::parse(&bytes) {
        let _ = keys.open_endpoint(&packet.dcid);
        let _ = keys.open_link(&packet.dcid);
        let _ = tickets.open(&packet.dcid, TicketTime(now));
    }
    if let Some(cid) = Cid::from_slice(&bytes) {
        let _ = (cid.kind(), cid.version(), cid.cluster(), cid.spread(), format!("{cid:?}"));
    }
});
