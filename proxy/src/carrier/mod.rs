//! Ways to carry requests and byte streams: tunnels to other clusters, mTLS inside the own one, plain
//! connections to the workload and out of the mesh. All but the last stand behind
//! [`Carrier`](isthmus_tunnel::Carrier).

pub mod app;
pub mod body_bytes;
pub mod local;
pub mod spawn;
pub mod tunnels;
