//! End-to-end QUIC between sidecars, routed by connection ID through gateways that cannot read it.
//!
//! Two halves. Pure: the connection-ID codec ([`cid`], [`ticket`], [`probe`]), the router ([`route`]), link and
//! replica liveness ([`link`]), what opens a stream ([`stream`]) and HTTP's frames ([`http::frame`]): no clock, no
//! socket, no random numbers; each decoder is a fuzz target. Drivers: UDP batches and the virtual gateway address
//! ([`socket`]), the QUIC endpoint of a sidecar ([`endpoint`]) and HTTP on its streams ([`http`]).
//! A gateway's own threads and links are in `isthmus-gateway` (`router`, `peers`). Start reading at [`cid`].

pub mod carrier;
pub mod cid;
pub mod endpoint;
pub mod frame;
pub mod http;
pub mod link;
pub mod packet;
pub mod probe;
pub mod route;
pub mod seen;
pub mod socket;
pub mod stream;
pub mod ticket;

pub use carrier::{Carrier, CarrierError};
pub use cid::{Cid, CidKeys, CidKind, EndpointName};
pub use endpoint::{DialError, Dialer, IncomingTunnel, Tunnel, TunnelConfig, TunnelEndpoint};
pub use stream::{ResetCode, StreamHeader, StreamKind};
