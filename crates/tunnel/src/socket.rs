//! UDP in batches, and one virtual address for all gateways of a cluster.
//!
//! [`UdpPort`] is a bound socket with segmentation offload, large buffers and no fragmentation;
//! [`VirtualGatewaySocket`] is what a sidecar's QUIC endpoint sees. Knows nothing of tunnels.

mod gateways;
mod port;
mod recent;

pub use gateways::{GatewayStatus, VirtualGatewaySocket};
pub use port::{BUFFER_WANTED, UdpPort};
