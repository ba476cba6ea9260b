//! Asks a name server for an address, from wherever the calling thread is.
//!
//! The system's resolver would do, but it reads `/etc/resolv.conf`, which a namespace shares with
//! the machine. One A question, one answer, over UDP.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

/// The first IPv4 address of `name` by `server`.
///
/// # Errors
/// No answer within [`PATIENCE`], or an answer without an address (`NotFound`).
pub fn lookup(server: SocketAddr, name: &str) -> io::Result<Ipv4Addr> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    // Ids guard against forgery on a hostile network; this one is our own.
    socket.send_to(&question(ID, name), server)?;
    let mut buffer = [0; 1500];
    let (len, _) = socket.recv_from(&mut buffer)?;
    first_address(&buffer[..len])
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{server} knows no address of {name}")))
}

fn question(id: u16, name: &str) -> Vec<u8> {
    const RECURSION_DESIRED: u16 = 0x0100;
    const A: u16 = 1;
    const IN: u16 = 1;
    let mut packet = Vec::with_capacity(name.len() + 18);
    for field in [id, RECURSION_DESIRED, 1, 0, 0, 0] {
        packet.extend(field.to_be_bytes());
    }
    for label in name.trim_end_matches('.').split('.') {
        packet.push(label.len() as u8);
        packet.extend(label.bytes());
    }
    packet.push(0);
    packet.extend(A.to_be_bytes());
    packet.extend(IN.to_be_bytes());
    packet
}

/// The first A record of an answer (RFC 1035 §4.1), wherever it stands among others.
fn first_address(packet: &[u8]) -> Option<Ipv4Addr> {
    let word = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    let answers = word(6)?;
    let mut at = skip_name(packet, 12)? + 4;
    for _ in 0..answers {
        at = skip_name(packet, at)?;
        let (kind, len) = (word(at)?, usize::from(word(at + 8)?));
        at += 10;
        if (kind, len) == (1, 4) {
            let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
            return Some(octets.into());
        }
        at += len;
    }
    None
}

fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            pointer if pointer >= 0xc0 => return Some(at + 2),
            len => at += usize::from(len) + 1,
        }
    }
}

/// Longer than a sidecar takes for a name of its own, shorter than its upstream's patience.
pub const PATIENCE: Duration = Duration::from_secs(2);
const ID: u16 = 0x4953;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_behind_an_alias_is_found() {
        let mut answer = question(ID, "cart.shop");
        answer[7] = 2;
        // A CNAME to the name itself, then its address, both names compressed.
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 12]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 240, 240, 0, 7]);
        assert_eq!(first_address(&answer), Some(Ipv4Addr::new(240, 240, 0, 7)));
        for len in 0..answer.len() {
            assert_eq!(first_address(&answer[..len]), None, "cut at {len}");
        }
    }

    #[test]
    fn an_answer_without_records_is_no_address() {
        assert_eq!(first_address(&question(ID, "nobody")), None);
    }
}
