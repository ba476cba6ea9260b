//! The WAN on loopback: relays between ranges of 127.0.0.0/8, without any privilege.
//!
//! Each gateway `127.N.x.y` has a relay address `127.(100+N).x.y`, which it advertises. A datagram
//! to a relay address from gateway A goes, shaped, to the gateway behind it, and comes *from A's
//! relay address with A's port*: replies find their way back through the WAN, and both sides see
//! one stable peer address. Mapped one to one, so no state can be lost. TCP connections are carried
//! likewise, delayed and rated but not damaged (their loss would be the kernel's to repair).
//!
//! Decisions are the [`crate::shaper`]'s. Datagrams: one thread, `udp`; TCP: one more, `tcp`.

mod tcp;
mod udp;

use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{LabError, Wan, wan::ClusterNumber};

/// The relays of a lab. Dropping it takes the WAN down.
#[derive(Debug)]
pub struct Relay {
    gateways: Gateways,
    udp: udp::UdpRelay,
    tcp: tcp::TcpRelay,
}

/// Who is behind which relay, shared with the threads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gateways(Arc<Mutex<Vec<(ClusterNumber, Ipv4Addr)>>>);

impl Gateways {
    fn add(&self, cluster: ClusterNumber, local: Ipv4Addr) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((cluster, local));
    }

    /// The cluster of a gateway, by the address it has at home.
    fn cluster_of(&self, local: Ipv4Addr) -> Option<ClusterNumber> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(_, address)| *address == local).map(|(cluster, _)| *cluster)
    }
}

impl Relay {
    /// Starts without gateways.
    ///
    /// # Errors
    /// [`LabError::Io`].
    pub fn start(wan: Wan) -> Result<Self, LabError> {
        let gateways = Gateways::default();
        let udp = udp::UdpRelay::start(wan.clone(), gateways.clone())?;
        let tcp = tcp::TcpRelay::start(wan, gateways.clone())?;
        Ok(Self { gateways, udp, tcp })
    }

    /// Puts a relay before a gateway, for UDP and TCP [`PORT`].
    ///
    /// # Errors
    /// [`LabError::Io`] if the relay's address is taken.
    pub fn add_gateway(&self, cluster: ClusterNumber, local: Ipv4Addr) -> Result<(), LabError> {
        self.gateways.add(cluster, local);
        self.udp.open(local, PORT)?;
        self.tcp.open(local, PORT)
    }
}

/// The relay address of a gateway.
pub fn relay_address(local: Ipv4Addr) -> Ipv4Addr {
    let [a, cluster, c, d] = local.octets();
    Ipv4Addr::new(a, cluster + RELAY_OFFSET, c, d)
}

/// The public port of gateways: the one that relays listen on from the start.
pub const PORT: u16 = 15443;
/// Clusters are 1..=99, their relays 101..=199.
const RELAY_OFFSET: u8 = 100;
