//! What the sidecar knows of the mesh, and how it asks for more.
//!
//! [`Mesh`] is what everything else reads. [`session`] decides what a gateway's message means and [`delta`]
//! what it changes, both pure; [`client`] owns the connections.

pub mod client;
pub mod delta;
mod mesh;
pub mod session;
mod tickets;

pub use delta::Known;
pub use mesh::{ASK_TIMEOUT, Answer, Mesh, SUBSCRIPTIONS_MAX, ViewGuard, find};
pub use tickets::{TicketError, Tickets};
